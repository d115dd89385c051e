"""WHAT to learn: suites and tasks, sources of rows, templates, evaluation through lm-eval."""
