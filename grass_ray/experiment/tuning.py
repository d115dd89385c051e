"""A search in two stages: settings are judged by held-out training rows, then the winners alone meet the test.

Every method is a group of its own with the same number of trials and steps; trials of different methods are never
compared while they run, so that a method which starts slowly is not stopped for it::

    tuning = Tuning(search="optuna", scheduler="asha", num_samples=12, seeds=(0, 1, 2), groups=(...))
    tuning.check()                                    # ConfigError where the choices do not go together
    spec = group.trial(picks)                         # searches: held-out rows, no test
    specs = group.finals(picks, tuning.seeds)         # the winner: every seed, with the test

Imports neither ray nor torch nor optuna.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from grass_ray.config import ConfigError, RunConfig
from grass_ray.experiment.space import Picks, Space, from_plain, to_plain, values
from grass_ray.experiment.trial_spec import TrialSpec

Search = Literal["grid", "random", "optuna"]
Scheduler = Literal["none", "asha", "pbt"]

REDUCTION = 3  # ASHA (arXiv 1810.05934): of the trials that reach a rung, the best third goes on
GENERATIONS = 4  # a population changes its settings after each quarter of the training but the last
# What may change while a run trains: its weights, moments and memory stay as they are.
MUTABLE = (
    "method.optimizer.lr",
    "method.sampler.period",
    "method.sampler.refresh_period",
    "method.sampler.temperature",
    "method.sampler.effective_layers",
    "method.sampler.ema",
    "method.sampler.exploration",
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One method's search.

    ``config`` is what all its trials share, with the search's seed and without the test; ``points`` are the picks that
    are known beforehand: all of a grid, of a random search and of a population, none of Optuna's.
    """

    config: RunConfig
    space: Space
    points: tuple[Picks, ...] = ()

    @property
    def method(self) -> str:
        """The method's name."""
        return self.config.method.name

    @property
    def steps(self) -> int:
        """Updates of a trial."""
        return self.config.training.steps

    def trial(self, picks: Picks) -> TrialSpec:
        """A trial of the search. Raises :class:`ConfigError` when the picks break a rule."""
        return TrialSpec(config=self.config.override(values(self.space, picks)))

    def finals(self, picks: Picks, seeds: tuple[int, ...]) -> list[TrialSpec]:
        """The winner's trials, one a seed, with the test."""
        chosen = {**values(self.space, picks), "evaluation.test": True}
        return [TrialSpec(config=self.config.override({**chosen, "seed": seed})) for seed in seeds]

    def to_plain(self) -> dict[str, Any]:
        """Plain values for a file."""
        points = [dict(point) for point in self.points]
        return {"config": self.config.to_dict(), "space": to_plain(self.space), "points": points}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Group:
        """The group again."""
        config = RunConfig.parse(plain["config"])
        return cls(config=config, space=from_plain(plain["space"]), points=tuple(plain["points"]))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a sweep searches, and for what."""

    search: Search
    scheduler: Scheduler
    num_samples: int | None
    seeds: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def how(self) -> str:
        """The search in words: ``optuna with ASHA``."""
        return {"none": self.search, "asha": f"{self.search} with ASHA", "pbt": "PBT"}[self.scheduler]

    @property
    def trials(self) -> list[TrialSpec]:
        """The trials that are known beforehand, each once."""
        known = (group.trial(point) for group in self.groups for point in group.points)
        return list({spec.key: spec for spec in known}.values())

    @property
    def num_trials(self) -> int:
        """Trials of the search and of the winners."""
        finals = 1 if self.scheduler == "pbt" else len(self.seeds)
        searched = len(self.groups) * (self.num_samples or 0) if self.search == "optuna" else len(self.trials)
        return searched + finals * len(self.groups)

    def check(self) -> None:
        """Raise :class:`ConfigError` where the choices do not go together."""
        mistakes: list[str] = []
        flag = f"--scheduler {self.scheduler}" if self.scheduler != "none" else f"--search {self.search}"
        if not self.groups:
            mistakes.append(f"{flag}: there is no method to search for; --methods names the untrained model alone")
        if len({group.config.model.name for group in self.groups}) > 1:
            mistakes.append(f"{flag} searches for one model at a time; give one to --models")
        if any(group.config.data.validation_rows is None for group in self.groups):
            mistakes.append(
                f"{flag} judges trials by held-out training rows, never by test questions; say how many are held out: "
                "--set data.validation_rows=64"
            )
        if self.search == "optuna" and self.num_samples is None:
            mistakes.append("--search optuna needs --num-samples N, the trials of each method")
        mistakes += self._check_scheduler()
        for group in self.groups:
            if not group.space:
                what = "PBT may change while a run trains: " + ", ".join(MUTABLE)
                what = what if self.scheduler == "pbt" else f"{flag} could search"
                mistakes.append(f"the method {group.method!r} has nothing that {what}; leave it out of --methods")
        if mistakes:
            raise ConfigError("; ".join(dict.fromkeys(mistakes)))

    def _check_scheduler(self) -> list[str]:
        mistakes = []
        fewest = min((group.steps for group in self.groups), default=REDUCTION**2)
        if self.scheduler == "asha" and fewest < REDUCTION**2:
            mistakes.append(
                f"--scheduler asha looks after a ninth and a third of the steps; {fewest} are too few, give "
                f"{REDUCTION**2} or more"
            )
        if self.scheduler == "pbt":
            if self.search != "random":
                mistakes.append(
                    f"--scheduler pbt draws its population at random and changes it in mid-training; it does not go "
                    f"with --search {self.search}; leave --search out"
                )
            if (self.num_samples or 0) < 2:
                mistakes.append("--scheduler pbt needs --num-samples N, the population of each method, 2 or more")
            if fewest < GENERATIONS:
                mistakes.append(f"--scheduler pbt changes settings {GENERATIONS - 1} times; {fewest} steps are too few")
        return mistakes

    def to_plain(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {
            "search": self.search,
            "scheduler": self.scheduler,
            "num_samples": self.num_samples,
            "seeds": list(self.seeds),
            "groups": [group.to_plain() for group in self.groups],
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Tuning:
        """The search again."""
        groups = tuple(Group.from_plain(group) for group in values["groups"])
        seeds = tuple(values["seeds"])
        return cls(
            search=values["search"],
            scheduler=values["scheduler"],
            num_samples=values["num_samples"],
            seeds=seeds,
            groups=groups,
        )


def rungs(steps: int) -> tuple[int, ...]:
    """After how many updates ASHA looks at a trial: a ninth and a third of all, the end left out."""
    first = max(1, steps // REDUCTION**2)
    return tuple(rung for rung in (first, first * REDUCTION) if rung < steps)


def generation_ends(steps: int) -> tuple[int, ...]:
    """After how many updates each generation of a population ends; the last one with the training."""
    length = -(-steps // GENERATIONS)
    return (*range(length, steps, length), steps)
