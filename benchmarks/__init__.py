"""Measurements; ``python -m benchmarks list`` names them."""
