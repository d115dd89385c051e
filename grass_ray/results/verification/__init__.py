"""Recompute recorded results from their run records."""
