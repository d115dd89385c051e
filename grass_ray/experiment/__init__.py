"""What to run: sweeps, their flags and plans, search spaces and search algorithms. Needs no ray."""
