"""The plan of a sweep: method x model x seed x hyperparameters, expanded into deduplicated trials before anything runs.

A trial's key is the fingerprint of its configuration, so the same plan gives the same keys in any process, and a
resumed sweep recognises what it has finished::

    choices = PlanChoices(methods=("full", "grass"), models=("tiny",), suite="generated", tasks=("generated",))
    for spec in expand(choices):
        print(spec.key, spec.config.name)

Imports neither ray nor torch.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from grass_ray.config import ConfigError, GeneratedSource, RunConfig, SourceConfig, assignment
from grass_ray.methods import get_method

BASE_METHOD = "base"


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """A positive hyperparameter drawn evenly on a logarithmic scale, rounded to three digits."""

    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        """One value."""
        return float(f"{self.low * (self.high / self.low) ** rng.random():.3g}")


Space = Mapping[str, LogUniform | Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial: its configuration, and the key that equal configurations share."""

    config: RunConfig

    @property
    def key(self) -> str:
        """The configuration's fingerprint."""
        return self.config.fingerprint

    @property
    def folder(self) -> str:
        """The trial's folder name inside the sweep's folder."""
        return f"{self.config.name}-{self.key}"


@dataclass(frozen=True, kw_only=True)
class PlanChoices:
    """Everything a plan is expanded from.

    ``settings`` are ``dotted.key=value`` assignments for every method that has the key, ``method_settings`` those of
    one method, and ``overrides`` what the user said last. ``grid`` maps dotted keys to values, all combined. With
    ``num_samples`` that many points a method are drawn from ``grid`` and the method's own space instead; every model
    and seed gets the same points.
    """

    methods: tuple[str, ...]
    models: tuple[str, ...]
    suite: str
    tasks: tuple[str, ...]
    source: SourceConfig = field(default_factory=GeneratedSource)
    seeds: tuple[int, ...] = (0,)
    settings: tuple[str, ...] = ()
    method_settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    num_samples: int | None = None
    base_row: bool = True


def expand(choices: PlanChoices) -> list[TrialSpec]:
    """All trials of a plan, each once, in the order models, methods, hyperparameters, seeds; untrained rows first."""
    methods = tuple(dict.fromkeys(choices.methods))
    if choices.base_row and BASE_METHOD not in methods:
        methods = (BASE_METHOD, *methods)
    templates = {method: _template(choices, method) for method in methods}
    _check_settings_reach_a_method(choices, templates)
    specs: dict[str, TrialSpec] = {}
    for model, method in itertools.product(choices.models, methods):
        trains = get_method(method).trains
        points = _points(choices, templates[method]) if trains else [()]
        for point, seed in itertools.product(points, choices.seeds if trains else (0,)):
            assignments = (*point, assignment("model.name", model), f"seed={seed}")
            spec = TrialSpec(config=templates[method].override(assignments))
            specs.setdefault(spec.key, spec)
    return list(specs.values())


def _template(choices: PlanChoices, method: str) -> RunConfig:
    """The configuration of a method before model, seed and hyperparameters are filled in."""
    row = get_method(method)
    data = {"suite": choices.suite, "tasks": list(choices.tasks), "source": choices.source.model_dump(mode="json")}
    config = RunConfig.parse({"method": row.config.model_dump(mode="json"), "data": data})
    config = config.override(text for text in choices.settings if _has_key(config, _key(text)))
    config = config.override(choices.method_settings.get(method, ()))
    config = config.override(text for text in choices.overrides if _has_key(config, _key(text)))
    return config if row.trains else config.override(["training.steps=0"])


def _check_settings_reach_a_method(choices: PlanChoices, templates: Mapping[str, RunConfig]) -> None:
    """A setting or grid key that no method of the plan has would silently do nothing."""
    for key in [*(_key(text) for text in (*choices.settings, *choices.overrides)), *choices.grid]:
        if not any(_has_key(config, key) for config in templates.values()):
            known = sorted({known for config in templates.values() for known in config.flatten()})
            raise ConfigError(f"no method of this sweep has the key {key!r}; available: {', '.join(known)}")


def _points(choices: PlanChoices, config: RunConfig) -> list[tuple[str, ...]]:
    """The hyperparameter points of one method, as assignments."""
    grid = {key: values for key, values in choices.grid.items() if _has_key(config, key)}
    if choices.num_samples is None:
        axes = [[assignment(key, value) for value in values] for key, values in grid.items()]
        return [tuple(point) for point in itertools.product(*axes)]
    space = {**default_space(config), **grid}
    rng = random.Random(f"{config.method.name}:{sorted(space)}")
    return [
        tuple(
            assignment(key, values.draw(rng) if isinstance(values, LogUniform) else rng.choice(values))
            for key, values in space.items()
        )
        for _ in range(choices.num_samples)
    ]


def default_space(config: RunConfig) -> Space:
    """A small search space around a method's own defaults; the learning rate's is equally wide for every method."""
    lr = config.method.optimizer.lr
    space: dict[str, LogUniform | Sequence[Any]] = {"method.optimizer.lr": LogUniform(low=lr / 5, high=lr * 5)}
    if _has_key(config, "method.adapter.rank"):
        space["method.adapter.rank"] = (8, 16, 32)
    if _has_key(config, "method.sampler.num_active_layers"):
        space["method.sampler.num_active_layers"] = (1, 2, 4)
    if _has_key(config, "method.sampler.temperature"):
        space["method.sampler.temperature"] = LogUniform(low=0.1, high=2.0)
    return space


def differences(specs: Sequence[TrialSpec]) -> list[str]:
    """For each trial, the settings in which trials of its method differ, as one line of text."""
    flat = [spec.config.flatten() for spec in specs]
    lines = []
    for spec, values in zip(specs, flat, strict=True):
        peers = [other for other in flat if other["method.name"] == spec.config.method.name]
        varied = [key for key in values if len({peer.get(key) for peer in peers}) > 1]
        lines.append(" ".join(f"{key.removeprefix('method.')}={values[key]}" for key in varied))
    return lines


# ------------------------------------------------------------------------------------------------- the plan as a file


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep's identity and trials; written as ``sweep.yaml`` first thing, read again by ``--resume``."""

    name: str
    sweep_id: str
    question: str
    specs: tuple[TrialSpec, ...]
    tracking_uri: str

    def to_yaml(self) -> str:
        """The plan as YAML."""
        values = {
            "name": self.name,
            "sweep_id": self.sweep_id,
            "question": self.question,
            "tracking_uri": self.tracking_uri,
            "trials": [spec.config.to_dict() for spec in self.specs],
        }
        return yaml.safe_dump(values, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, where: str) -> SweepPlan:
        """Read a plan. Raises :class:`ConfigError` that names ``where`` when the text is no plan."""
        try:
            values = yaml.safe_load(text)
            specs = tuple(TrialSpec(config=RunConfig.parse(trial)) for trial in values["trials"])
            names = {key: str(values[key]) for key in ("name", "sweep_id", "question", "tracking_uri")}
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigError(f"{where} is not a sweep's plan: {error}") from None
        return cls(specs=specs, **names)


def _key(assignment: str) -> str:
    key, separator, _ = assignment.partition("=")
    if not separator or not key:
        raise ConfigError(f"cannot read the setting {assignment!r}; write it as dotted.key=value")
    return key


def _has_key(config: RunConfig, key: str) -> bool:
    return _reaches(config.to_dict(), key.split("."))


def _reaches(values: object, keys: Iterable[str]) -> bool:
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True
