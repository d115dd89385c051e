"""The names of all pictures, apart from the code that draws them, so that the command line need not load matplotlib."""

from typing import Literal

Kind = Literal[
    "pareto",
    "loss",
    "tasks",
    "step-time",
    "sensitivity",
    "search",
    "rungs",
    "population",
    "sampling",
    "importance",
    "ages",
]
