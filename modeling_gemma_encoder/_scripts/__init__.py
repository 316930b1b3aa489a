"""What the scripts share. Not a public interface of the package."""
