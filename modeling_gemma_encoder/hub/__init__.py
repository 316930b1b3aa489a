"""The Hub: publishing a trained encoder with its code, card and licenses, and verifying what was published."""
