"""A sweep: one question, asked of method x model x seed.

A sweep's file is thin::

    from grass_ray.commands.sweep import main
    from grass_ray.experiment.flags import SweepDefaults
    from grass_ray.experiment.sweep import Sweep

    SWEEP = Sweep("quickstart", "Which method learns most in a minute?", SweepDefaults(models=("tiny",), ...))

    if __name__ == "__main__":
        main(SWEEP)

Imports neither ray nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from grass_ray.experiment.flags import SweepDefaults, SweepOptions, choose
from grass_ray.experiment.plan import TrialSpec, expand, make_tuning, untrained
from grass_ray.experiment.tuning import Tuning


@dataclass(frozen=True)
class Sweep:
    """A question and the trials that answer it. ``name`` is also the MLflow experiment."""

    name: str
    question: str
    defaults: SweepDefaults
    smoke: SweepDefaults = field(default_factory=SweepDefaults)

    def plan(self, options: SweepOptions) -> tuple[list[TrialSpec], Tuning | None]:
        """The trials that the flags choose, and the search beside them. Raises :class:`ConfigError`."""
        defaults = self.defaults.with_preset(self.smoke) if options.smoke else self.defaults
        choices = choose(defaults, options)
        tuning = make_tuning(choices)
        return (expand(choices), None) if tuning is None else (untrained(choices), tuning)
