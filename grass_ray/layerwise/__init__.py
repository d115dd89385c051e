"""WHICH layers train: the decoder stack, importance measurements, samplers. Needs torch only."""
