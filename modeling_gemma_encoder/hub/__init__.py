"""Publish a trained encoder on the Hub with its code, card and licenses, and verify what was
published."""
