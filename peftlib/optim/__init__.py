"""Optimizers that accumulate a step's micro-batches themselves, so that norm and infs are known before any change."""
