"""Optimizers that accumulate micro-batches themselves, so that the norm and infs are known before any update."""
