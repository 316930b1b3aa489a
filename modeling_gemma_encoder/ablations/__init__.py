"""Ablations: variants of a training on the same rows and seeds, beside baselines, and what their
differences mean."""
