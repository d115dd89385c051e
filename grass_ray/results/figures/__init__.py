"""Figures of runs, sweeps and searches."""
