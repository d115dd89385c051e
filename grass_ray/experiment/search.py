"""A search in two stages: settings are judged by held-out training rows, then the winners alone meet the test.

Every method is searched with the same number of trials and steps. Trials of different methods are never compared while
they run, so that a method that starts slowly is not stopped for it::

    plan = SearchPlan(search="optuna", scheduler="asha", num_samples=12, seeds=(0, 1, 2), methods=(...))
    plan.check()                                      # ConfigError if the choices do not go together
    config = plan.methods[0].trial(params)            # of the search: held-out rows, no test
    configs = plan.methods[0].finals(params, seeds)   # of the winner: every seed, with the test

Imports neither ray nor torch nor optuna.
"""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, Field

from grass_ray.config import ConfigError, ConfigPart, RunConfig
from grass_ray.experiment.algorithms import ALGORITHMS, Search
from grass_ray.experiment.space import Params, Space, values

Scheduler = Literal["none", "asha", "pbt"]

REDUCTION = 3  # ASHA (arXiv 1810.05934): the best third of the trials that reach a rung goes on
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


class SearchSpec(ConfigPart):
    """The search of one method.

    Args:
        config: what all its trials share: the search's seed, and no test.
        space: where to search.
        points: all trials, if they are known beforehand; empty for an adaptive algorithm.
    """

    config: RunConfig
    space: Space
    points: tuple[Params, ...] = ()

    @property
    def method(self) -> str:
        """The method's name."""
        return self.config.method.name

    @property
    def steps(self) -> int:
        """Training steps of a trial."""
        return self.config.training.steps

    def trial(self, params: Params) -> RunConfig:
        """Return a trial of the search. Raises :class:`ConfigError` if the parameters break a rule."""
        return self.config.override(values(self.space, params))

    def finals(self, params: Params, seeds: tuple[int, ...]) -> list[RunConfig]:
        """Return the winner's trials, one per seed, with the test."""
        chosen = {**values(self.space, params), "evaluation.test": True}
        return [self.config.override({**chosen, "seed": seed}) for seed in seeds]


class SearchPlan(ConfigPart):
    """How a sweep searches, and for what. ``seeds`` are those of the winners; the search takes the first."""

    search: Search
    scheduler: Scheduler
    num_samples: int | None
    seeds: tuple[int, ...]
    methods: tuple[SearchSpec, ...] = Field(validation_alias=AliasChoices("methods", "groups"))  # groups: older plans

    @property
    def how(self) -> str:
        """The search in words: ``optuna with ASHA``."""
        return {"none": self.search, "asha": f"{self.search} with ASHA", "pbt": "PBT"}[self.scheduler]

    @property
    def adaptive(self) -> bool:
        """Whether points are chosen while the search runs."""
        return ALGORITHMS[self.search].adaptive

    @property
    def trials(self) -> list[RunConfig]:
        """The trials that are known beforehand, each once."""
        known = (spec.trial(point) for spec in self.methods for point in spec.points)
        return list({config.fingerprint: config for config in known}.values())

    @property
    def num_trials(self) -> int:
        """Trials of the search and of the winners."""
        finals = 1 if self.scheduler == "pbt" else len(self.seeds)
        searched = len(self.methods) * (self.num_samples or 0) if self.adaptive else len(self.trials)
        return searched + finals * len(self.methods)

    def describe(self) -> list[str]:
        """Say what is searched for each method, and what becomes of the winners, in a line each."""
        lines = []
        for spec in self.methods:
            number = self.num_samples if self.adaptive else len(spec.points)
            keys = ", ".join(key.removeprefix("method.") for key in spec.space)
            lines.append(
                f"{spec.method}: {number} trials of {spec.steps} steps by {self.how} over {keys}; judged by "
                f"{spec.config.data.validation_rows} held-out rows"
            )
        seeds = " ".join(map(str, self.seeds[:1] if self.scheduler == "pbt" else self.seeds))
        return [*lines, f"the winner of each method is then tested once with each seed: {seeds}"]

    def check(self) -> None:
        """Raise :class:`ConfigError` if the choices do not go together."""
        mistakes: list[str] = []
        flag = f"--scheduler {self.scheduler}" if self.scheduler != "none" else f"--search {self.search}"
        if not self.methods:
            mistakes.append(f"{flag}: there is no method to search for; --methods names the untrained model alone")
        if len({spec.config.model.name for spec in self.methods}) > 1:
            mistakes.append(f"{flag} searches for one model at a time; give one to --models")
        if any(spec.config.data.validation_rows is None for spec in self.methods):
            mistakes.append(
                f"{flag} judges trials by held-out training rows, never by test questions; say how many are held out: "
                "--set data.validation_rows=64"
            )
        if self.adaptive and self.num_samples is None:
            mistakes.append(f"--search {self.search} needs --num-samples N, the trials of each method")
        mistakes += self._check_scheduler()
        for spec in self.methods:
            if not spec.space:
                what = "PBT may change while a run trains: " + ", ".join(MUTABLE)
                what = what if self.scheduler == "pbt" else f"{flag} could search"
                mistakes.append(f"the method {spec.method!r} has nothing that {what}; leave it out of --methods")
        if mistakes:
            raise ConfigError("; ".join(dict.fromkeys(mistakes)))

    def _check_scheduler(self) -> list[str]:
        mistakes = []
        fewest = min((spec.steps for spec in self.methods), default=REDUCTION**2)
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


def rungs(steps: int) -> tuple[int, ...]:
    """Return the training steps after which ASHA judges a trial: a ninth and a third of all, without the end."""
    first = max(1, steps // REDUCTION**2)
    return tuple(rung for rung in (first, first * REDUCTION) if rung < steps)


def generation_ends(steps: int) -> tuple[int, ...]:
    """Return the training steps after which the generations of a population end; the last one ends the training."""
    length = -(-steps // GENERATIONS)
    return (*range(length, steps, length), steps)
