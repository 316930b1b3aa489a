"""What the command lines share; not an interface of the package."""
