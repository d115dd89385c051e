"""The plan of a sweep: method x model x seed x hyperparameters, expanded into different trials before anything runs.

A trial is a :class:`grass_ray.config.RunConfig`. Its key is the configuration's fingerprint, so the same plan gives the
same keys in any process, and a resumed sweep recognises what it has finished::

    trials, search = plan_trials(sweep, SweepOptions(seeds=(0, 1)))
    for config in trials:
        print(config.fingerprint, config.name)

Imports neither ray nor torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import yaml
from pydantic import AliasChoices, Field, ValidationError

from grass_ray.config import ConfigError, ConfigPart, DataConfig, RunConfig
from grass_ray.config.base import explain
from grass_ray.errors import redact
from grass_ray.experiment.algorithms import ALGORITHMS, Search, known_points
from grass_ray.experiment.flags import SweepOptions, TrialFlags, choose_data
from grass_ray.experiment.search import MUTABLE, SearchPlan, SearchSpec
from grass_ray.experiment.space import LogUniform, Space, values
from grass_ray.experiment.sweep import Sweep
from grass_ray.method_files import methods_with
from grass_ray.methods import Method, get_method
from grass_ray.overrides import Changes, flatten, has, merge, parse
from grass_ray.paths import find_model, with_absolute_paths
from grass_ray.reading import parse_yaml
from grass_ray.results.searches import read_settings
from grass_ray.tasks.readback import choose_evaluation

PLAN_FILE = "sweep.yaml"  # in the sweep's folder
BASE_METHOD = "base"
_OWN_FLAGS = {"model.name": "--models", "seed": "--seeds"}


class SweepPlan(ConfigPart):
    """A sweep's identity and trials; written as ``sweep.yaml`` first thing, read again by ``--resume``."""

    name: str
    sweep_id: Annotated[str, Field(pattern=r"^[^/\\\x00.][^/\\\x00]*$")]  # a folder is named after it
    question: str
    tracking_uri: str
    trials: tuple[RunConfig, ...]
    search: SearchPlan | None = Field(default=None, validation_alias=AliasChoices("search", "tuning"))  # older plans
    flags: TrialFlags = TrialFlags()

    @property
    def known_trials(self) -> list[RunConfig]:
        """All trials that are known before any has run: neither those of an adaptive search nor winners."""
        return [*self.trials, *(self.search.trials if self.search else ())]

    @property
    def num_trials(self) -> int:
        """The number of trials, with those of a search and its winners."""
        return len(self.trials) + (self.search.num_trials if self.search else 0)

    @property
    def configs(self) -> list[RunConfig]:
        """The known trials, and what the trials of each search share."""
        return [*self.known_trials, *(spec.config for spec in (self.search.methods if self.search else ()))]

    def has_the_trials_of(self, trials: Sequence[RunConfig], search: SearchPlan | None) -> bool:
        """Return whether these are the plan's trials, in any order, and its search."""
        if {config.fingerprint for config in trials} != {config.fingerprint for config in self.trials}:
            return False
        # as they are written: a plan that was read has lists where a sweep's file has tuples
        saved, given = (own and own.model_dump(mode="json") for own in (self.search, search))
        return saved == given

    def to_yaml(self) -> str:
        """Return the plan as YAML, without the password of its store."""
        values = self.model_dump(mode="json") | {"tracking_uri": redact(self.tracking_uri)}
        return yaml.safe_dump(values, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, where: str) -> SweepPlan:
        """Read a plan. Raises :class:`ConfigError` that names ``where`` if the text is no plan."""
        try:
            return cls.model_validate(parse_yaml(text, "it"))
        except ConfigError as error:
            raise ConfigError(f"{where} is not a sweep's plan: {error}") from None
        except ValidationError as error:
            raise ConfigError(f"{where} is not a sweep's plan: {explain(error)}") from None


def plan_trials(sweep: Sweep, options: SweepOptions) -> tuple[tuple[RunConfig, ...], SearchPlan | None]:
    """Return the trials that a sweep and its flags ask for, and the search, if they are one.

    The trials are in the order models, methods, hyperparameters, seeds, each once, the untrained model first. Beside a
    search they are the untrained models alone.

    Raises:
        ConfigError: an unknown name, or choices that do not go together.
    """
    options.check()
    sweep = _with_flags(sweep, options)
    methods = methods_with(options.method_file)
    templates = _templates(sweep, options, methods)
    if not sweep.seeds and any(methods[name].trains for name in templates):
        raise ConfigError(f"the sweep {sweep.name} has no seeds; name one or more in its file or with --seeds")
    _check_space(sweep.space, methods)
    search = _plan_search(sweep, options, {name: own for name, own in templates.items() if methods[name].trains})
    _check_keys(sweep, options, templates.values())
    if search is not None:
        search.check()
    wanted = [name for name in templates if name != BASE_METHOD or options.base or BASE_METHOD in sweep.methods]
    trials: dict[str, RunConfig] = {}
    for model, name in itertools.product(sweep.models, wanted):
        trains = methods[name].trains
        if trains and search is not None:
            continue
        points: list[Changes] = _points(sweep, templates[name], options.num_samples) if trains else [{}]
        for point, seed in itertools.product(points, sweep.seeds if trains else (0,)):
            config = templates[name].override({**point, "model.name": model, "seed": seed})
            trials.setdefault(config.fingerprint, config)
    return tuple(trials.values()), search


def _with_flags(sweep: Sweep, options: SweepOptions) -> Sweep:
    """The sweep with what the flags say in place of its own."""
    chosen = sweep.small() if options.smoke else sweep
    models = options.models or chosen.models
    return replace(
        chosen,
        # as configurations name them: workers, and a later --resume, may run in another directory
        models=tuple(dict.fromkeys(find_model(model) for model in models)),
        methods=tuple(dict.fromkeys(options.methods or chosen.methods)),
        tasks=options.tasks or chosen.tasks,
        seeds=tuple(dict.fromkeys(options.seeds or chosen.seeds)),
        settings=merge(chosen.settings, options.changes),
    )


def _templates(sweep: Sweep, options: SweepOptions, methods: Mapping[str, Method]) -> dict[str, RunConfig]:
    """The configuration of each method, the untrained model first, without model, seed and hyperparameters."""
    suite, tasks, source = choose_data(sweep.tasks, options.data_dir, options.data)
    data = DataConfig(suite=suite, tasks=tasks, source=source)
    settings = merge(parse(choose_evaluation(source)), sweep.changes)
    found = read_settings(options.settings, methods) if options.settings is not None else {}
    overrides = parse(options.set)
    templates = {}
    for name in sweep.methods if BASE_METHOD in sweep.methods else (BASE_METHOD, *sweep.methods):
        row = get_method(name, methods)
        config = RunConfig(method=row.config, data=data)
        config = config.override(_reaching(config, settings))
        config = config.override(merge(sweep.method_settings.get(name, {}), parse(found.get(name, ()))))
        config = with_absolute_paths(config.override(_reaching(config, overrides)))
        templates[name] = config if row.trains else config.override({"training.steps": 0})
    return templates


def _check_keys(sweep: Sweep, options: SweepOptions, templates: Iterable[RunConfig]) -> None:
    """A setting or grid key that no method of the plan has would silently do nothing."""
    plain = [config.to_dict() for config in templates]
    for key in (*sweep.changes, *parse(options.set), *sweep.grid, *sweep.one_at_a_time):
        if key in _OWN_FLAGS:
            raise ConfigError(f"a sweep sets {key} itself, trial by trial; give {_OWN_FLAGS[key]}")
        if not any(has(config, key) for config in plain):
            known = sorted({known for config in plain for known in flatten(config)})
            raise ConfigError(f"no method of this sweep has the key {key!r}; available: {', '.join(known)}")


def _reaching(config: RunConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes whose keys the configuration has."""
    plain = config.to_dict()
    return {key: value for key, value in changes.items() if has(plain, key)}


# ------------------------------------------------------------------------------------------------------------- points


def _points(sweep: Sweep, config: RunConfig, num_samples: int | None) -> list[Changes]:
    """The hyperparameter points of one method, where every trial is trained and tested."""
    if num_samples is not None:
        space = _space(sweep, config)
        return [values(space, params) for params in known_points("random", space, config, num_samples)]
    grid = _reaching(config, sweep.grid)
    alone = [{key: value} for key, own in _reaching(config, sweep.one_at_a_time).items() for value in own]
    return [*(values(grid, params) for params in known_points("grid", grid, config, None)), *alone]


def _space(sweep: Sweep, config: RunConfig) -> Space:
    """What is searched for a method: its own space, the sweep's grid and the sweep's space, later ones winning."""
    return _reaching(config, {**default_space(config), **sweep.grid, **sweep.space})


def default_space(config: RunConfig) -> Space:
    """Return a small search space around a method's defaults; every learning rate's is equally wide."""
    lr = config.method.optimizer.lr
    space: dict[str, Any] = {
        "method.optimizer.lr": LogUniform(low=lr / 5, high=lr * 5),
        "method.adapter.rank": (8, 16, 32),
        "method.sampler.num_active_layers": (1, 2, 4),
    }
    if getattr(config.method.sampler, "temperature", None) is not None:
        space["method.sampler.temperature"] = LogUniform(low=0.1, high=2.0)
    return _reaching(config, space)


def differences(trials: Sequence[RunConfig]) -> list[str]:
    """Return for each trial the settings in which trials of its method differ, as one line of text."""
    flat = [config.flatten() for config in trials]
    lines = []
    for own in flat:
        peers = [other for other in flat if other["method.name"] == own["method.name"]]
        varied = [key for key in own if len({peer.get(key) for peer in peers}) > 1]
        lines.append(" ".join(f"{key.removeprefix('method.')}={own[key]}" for key in varied))
    return lines


# ------------------------------------------------------------------------------------------------------------- search


def _plan_search(sweep: Sweep, options: SweepOptions, trained: Mapping[str, RunConfig]) -> SearchPlan | None:
    """The search in two stages; None if every trial is to be trained and tested.

    An adaptive search and every scheduler need two stages. Another search has them if training rows are held out to
    judge it by.
    """
    pbt, sampled = options.scheduler == "pbt", options.num_samples is not None
    asked = options.search
    if asked is None and not pbt and sweep.search is not None:
        asked = "random" if sampled else sweep.search
    if asked is None and options.scheduler == "none":
        return None
    search: Search = asked or ("random" if sampled or pbt else "grid")
    configs = trained.values()
    judged = all(config.data.validation_rows is not None for config in configs)
    if not judged and not ALGORITHMS[search].adaptive and options.scheduler == "none":
        return None
    specs = [
        _search_spec(sweep, options, search, config, model) for model in sweep.models for config in trained.values()
    ]
    return SearchPlan(
        search=search,
        scheduler=options.scheduler,
        num_samples=options.num_samples,
        seeds=sweep.seeds,
        methods=tuple(specs),
    )


def _search_spec(sweep: Sweep, options: SweepOptions, search: Search, template: RunConfig, model: str) -> SearchSpec:
    """One method's search; a population's space keeps what may change in mid-training."""
    config = template.override({"model.name": model, "seed": sweep.seeds[0], "evaluation.test": False})
    space = _reaching(config, sweep.grid) if search == "grid" else _space(sweep, config)
    if options.scheduler == "pbt":
        space = {key: dimension for key, dimension in space.items() if key in MUTABLE}
        config = config.override({"training.checkpoint_every_steps": None})  # at the end of each generation instead
    return SearchSpec(config=config, space=space, points=known_points(search, space, config, options.num_samples))


def _check_space(space: Space, methods: Mapping[str, Method]) -> None:
    """A key that no method at all has is a mistake of the sweep's file; one that others have is left out."""
    rows = [RunConfig(method=row.config).to_dict() for row in methods.values()]
    for key in space:
        if not any(has(row, key) for row in rows):
            raise ConfigError(f"no method has the key {key!r} of the sweep's search space")
