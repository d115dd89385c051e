"""The planner: how much memory a run will need."""
