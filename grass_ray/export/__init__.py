"""Trained weights as others load them: models, adapters, deltas and their cards."""
