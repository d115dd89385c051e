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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from grass_ray.config import ConfigError, GeneratedSource, RunConfig, SourceConfig
from grass_ray.experiment.space import LogUniform as LogUniform
from grass_ray.experiment.space import Picks, RandomPicker, Space, choose, labelled, values
from grass_ray.experiment.trial_spec import TrialSpec as TrialSpec
from grass_ray.experiment.tuning import MUTABLE, Group, Scheduler, Search, Tuning
from grass_ray.methods import METHODS, get_method
from grass_ray.overrides import Changes, has, parse
from grass_ray.paths import find_model, with_absolute_paths

BASE_METHOD = "base"
_OWN_FLAGS = {"model.name": "--models", "seed": "--seeds"}


@dataclass(frozen=True, kw_only=True)
class PlanChoices:
    """Everything a plan is expanded from.

    ``settings`` are ``dotted.key=value`` assignments for every method that has the key, ``method_settings`` those of
    one method, and ``overrides`` what the user said last. ``grid`` maps dotted keys to values, all combined;
    ``one_at_a_time`` maps keys to values that are changed alone, everything else staying as it is. With
    ``num_samples`` that many points a method are drawn from its own space, ``grid`` and ``space`` instead; every model
    and seed gets the same points. ``search`` is what was asked for by name, None where nothing was.
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
    one_at_a_time: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    num_samples: int | None = None
    base_row: bool = True
    space: Space = field(default_factory=dict)
    search: Search | None = None
    scheduler: Scheduler = "none"


def make_tuning(choices: PlanChoices) -> Tuning | None:
    """The search in two stages that the choices ask for; None where every trial is to be trained and tested.

    ``--search optuna`` and every ``--scheduler`` are such searches; a grid or random search is one where training rows
    are held out to judge it by.

    Raises:
        ConfigError: the choices do not go together.
    """
    _check_space(choices.space)
    search: Search = choices.search or ("grid" if choices.num_samples is None else "random")
    if choices.scheduler == "pbt" and choices.search is None:
        search = "random"
    needed = search == "optuna" or choices.scheduler != "none"
    if choices.search is None and not needed:
        return None
    methods = [name for name in dict.fromkeys(choices.methods) if get_method(name).trains]
    templates = {name: _template(choices, name) for name in methods}
    _check_settings_reach_a_method(choices, templates | {BASE_METHOD: _template(choices, BASE_METHOD)})
    if not needed and any(config.data.validation_rows is None for config in templates.values()):
        return None
    groups = tuple(
        _group(choices, search, template, model) for model in _models(choices) for template in templates.values()
    )
    tuning = Tuning(
        search=search,
        scheduler=choices.scheduler,
        num_samples=choices.num_samples,
        seeds=tuple(dict.fromkeys(choices.seeds)),
        groups=groups,
    )
    tuning.check()
    return tuning


def _check_space(space: Space) -> None:
    """A key that no method at all has is a mistake of the sweep's file; one that others have is left out."""
    rows = [RunConfig.parse({"method": row.config.model_dump(mode="json")}) for row in METHODS.values()]
    for key in space:
        if not any(_has_key(config, key) for config in rows):
            raise ConfigError(f"no method has the key {key!r} of the sweep's search space")


def _group(choices: PlanChoices, search: Search, template: RunConfig, model: str) -> Group:
    """One method's search; a population's space keeps what may change in mid-training."""
    config = template.override({"model.name": model, "seed": choices.seeds[0], "evaluation.test": False})
    space = _space(choices, config) if search != "grid" else {}
    if choices.scheduler == "pbt":
        space = {key: dimension for key, dimension in space.items() if key in MUTABLE}
        config = config.override({"training.checkpoint_every_steps": None})  # at the end of each generation instead
    if search == "grid":
        grid = {key: own for key, own in choices.grid.items() if _has_key(config, key)}
        return Group(config=config, space=grid, points=tuple(_grid_points(grid)))
    drawn = () if search == "optuna" else _drawn(space, config.method.name, choices.num_samples or 0)
    return Group(config=config, space=space, points=tuple(drawn))


def untrained(choices: PlanChoices) -> list[TrialSpec]:
    """The trials beside a search: the untrained models, where they are asked for."""
    if not choices.base_row and BASE_METHOD not in choices.methods:
        return []
    template = _template(choices, BASE_METHOD)
    models = _models(choices)
    return [TrialSpec(config=template.override({"model.name": model, "seed": 0})) for model in models]


def expand(choices: PlanChoices) -> list[TrialSpec]:
    """All trials of a plan, each once, in the order models, methods, hyperparameters, seeds; untrained rows first."""
    methods = tuple(dict.fromkeys(choices.methods))
    if choices.base_row and BASE_METHOD not in methods:
        methods = (BASE_METHOD, *methods)
    templates = {method: _template(choices, method) for method in methods}
    _check_settings_reach_a_method(choices, templates)
    specs: dict[str, TrialSpec] = {}
    for model, method in itertools.product(_models(choices), methods):
        trains = get_method(method).trains
        points = _points(choices, templates[method]) if trains else [{}]
        for point, seed in itertools.product(points, choices.seeds if trains else (0,)):
            spec = TrialSpec(config=templates[method].override({**point, "model.name": model, "seed": seed}))
            specs.setdefault(spec.key, spec)
    return list(specs.values())


def _models(choices: PlanChoices) -> list[str]:
    """The models as configurations name them, each once: workers, and a later ``--resume``, run elsewhere."""
    return list(dict.fromkeys(find_model(model) for model in choices.models))


def _template(choices: PlanChoices, method: str) -> RunConfig:
    """The configuration of a method before model, seed and hyperparameters are filled in."""
    row = get_method(method)
    data = {"suite": choices.suite, "tasks": list(choices.tasks), "source": choices.source.model_dump(mode="json")}
    config = RunConfig.parse({"method": row.config.model_dump(mode="json"), "data": data})
    config = config.override({key: value for key, value in parse(choices.settings).items() if _has_key(config, key)})
    config = config.override(parse(choices.method_settings.get(method, ())))
    config = config.override({key: value for key, value in parse(choices.overrides).items() if _has_key(config, key)})
    config = with_absolute_paths(config)
    return config if row.trains else config.override({"training.steps": 0})


def _check_settings_reach_a_method(choices: PlanChoices, templates: Mapping[str, RunConfig]) -> None:
    """A setting or grid key that no method of the plan has would silently do nothing."""
    for key in [
        *parse((*choices.settings, *choices.overrides)),
        *choices.grid,
        *choices.one_at_a_time,
    ]:
        if key in _OWN_FLAGS:
            raise ConfigError(f"a sweep sets {key} itself, trial by trial; give {_OWN_FLAGS[key]}")
        if not any(_has_key(config, key) for config in templates.values()):
            known = sorted({known for config in templates.values() for known in config.flatten()})
            raise ConfigError(f"no method of this sweep has the key {key!r}; available: {', '.join(known)}")


def _points(choices: PlanChoices, config: RunConfig) -> list[Changes]:
    """The hyperparameter points of one method."""
    if choices.num_samples is None:
        grid = {key: own for key, own in choices.grid.items() if _has_key(config, key)}
        changed = {key: own for key, own in choices.one_at_a_time.items() if _has_key(config, key)}
        alone = [{key: value} for key, own in changed.items() for value in own]
        return [*(values(grid, picks) for picks in _grid_points(grid)), *alone]
    space = _space(choices, config)
    return [values(space, picks) for picks in _drawn(space, config.method.name, choices.num_samples)]


def _grid_points(grid: Mapping[str, Sequence[Any]]) -> list[Picks]:
    """Every combination of a grid's values."""
    axes = [list(labelled(own)) for own in grid.values()]
    return [dict(zip(grid, point, strict=True)) for point in itertools.product(*axes)]


def _space(choices: PlanChoices, config: RunConfig) -> Space:
    """What is searched for a method: its own space, the sweep's grid and the sweep's space, the last word counting."""
    found: dict[str, Any] = {**default_space(config), **choices.grid, **choices.space}
    return {key: dimension for key, dimension in found.items() if _has_key(config, key)}


def _drawn(space: Space, method: str, number: int) -> list[Picks]:
    """Points drawn at random, each once, the same in any process; fewer where the space has no more."""
    rng = random.Random(f"{method}:{sorted(space)}")
    points: list[Picks] = []
    for _ in range(50 * number):
        point = choose(space, RandomPicker(rng))
        if len(points) < number and point not in points:
            points.append(point)
    return points


def default_space(config: RunConfig) -> Space:
    """A small search space around a method's own defaults; the learning rate's is equally wide for every method."""
    lr = config.method.optimizer.lr
    space: dict[str, Any] = {"method.optimizer.lr": LogUniform(low=lr / 5, high=lr * 5)}
    if _has_key(config, "method.adapter.rank"):
        space["method.adapter.rank"] = (8, 16, 32)
    if _has_key(config, "method.sampler.num_active_layers"):
        space["method.sampler.num_active_layers"] = (1, 2, 4)
    if getattr(config.method.sampler, "temperature", None) is not None:
        space["method.sampler.temperature"] = LogUniform(low=0.1, high=2.0)
    return space


def differences(specs: Sequence[TrialSpec]) -> list[str]:
    """For each trial, the settings in which trials of its method differ, as one line of text."""
    flat = [spec.config.flatten() for spec in specs]
    lines = []
    for spec, own in zip(specs, flat, strict=True):
        peers = [other for other in flat if other["method.name"] == spec.config.method.name]
        varied = [key for key in own if len({peer.get(key) for peer in peers}) > 1]
        lines.append(" ".join(f"{key.removeprefix('method.')}={own[key]}" for key in varied))
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
    tuning: Tuning | None = None

    @property
    def known_trials(self) -> list[TrialSpec]:
        """All trials that are known before any has run: those of a search by Optuna, and its winners, are not."""
        return [*self.specs, *(self.tuning.trials if self.tuning else ())]

    @property
    def num_trials(self) -> int:
        """How many trials there will be, those of a search and its winners included."""
        return len(self.specs) + (self.tuning.num_trials if self.tuning else 0)

    def to_yaml(self) -> str:
        """The plan as YAML."""
        plain: dict[str, Any] = {
            "name": self.name,
            "sweep_id": self.sweep_id,
            "question": self.question,
            "tracking_uri": self.tracking_uri,
            "trials": [spec.config.to_dict() for spec in self.specs],
        }
        if self.tuning is not None:
            plain["tuning"] = self.tuning.to_plain()
        return yaml.safe_dump(plain, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, where: str) -> SweepPlan:
        """Read a plan. Raises :class:`ConfigError` that names ``where`` when the text is no plan."""
        try:
            plain = yaml.safe_load(text)
            specs = tuple(TrialSpec(config=RunConfig.parse(trial)) for trial in plain["trials"])
            tuning = Tuning.from_plain(plain["tuning"]) if "tuning" in plain else None
            names = {key: str(plain[key]) for key in ("name", "sweep_id", "question", "tracking_uri")}
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigError(f"{where} is not a sweep's plan: {error}") from None
        return cls(specs=specs, tuning=tuning, **names)


def _has_key(config: RunConfig, key: str) -> bool:
    return has(config.to_dict(), key)
