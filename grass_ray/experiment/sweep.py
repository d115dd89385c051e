"""A sweep: one question, asked of method x model x seed.

A sweep's file is thin::

    from grass_ray.commands.sweep import main
    from grass_ray.experiment import Sweep, TrainingConfig

    SWEEP = Sweep(
        name="quickstart",
        question="Which method learns most from thirty steps?",
        models=("tiny",),
        methods=("full", "lora", "grass"),
        tasks=("generated",),
        training=TrainingConfig(steps=30),
        method_settings={"grass": {"method.sampler.period": 5}},
    )

    if __name__ == "__main__":
        main(SWEEP)

Imports neither ray nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from grass_ray.config import DataConfig, EvaluationConfig, TrainingConfig
from grass_ray.experiment.algorithms import Search
from grass_ray.experiment.space import Space
from grass_ray.overrides import Changes, flatten, merge


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a sweep compares. Each field may be left out; all keys are dotted keys of the configuration.

    Args:
        models: built-in names, hub ids or folders.
        methods: names of :data:`grass_ray.methods.METHODS`; the untrained model is added.
        tasks: a suite, some of its tasks, the YAML file of one task, or a data file.
        seeds: one trial each.
        data, training, evaluation: the fields that are given change each method's configuration.
        settings: further changes, for every method that has the key.
        method_settings: changes of one method, by its name.
        grid: values by key, all combined.
        one_at_a_time: values by key, each changed alone.
        space: what ``--search`` and ``--scheduler`` choose from beyond each method's own space, by key
            (:mod:`grass_ray.experiment.space`).
        search: makes the sweep a search without the flag.
    """

    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    data: DataConfig | None = None
    training: TrainingConfig | None = None
    evaluation: EvaluationConfig | None = None
    settings: Changes = field(default_factory=dict)
    method_settings: Mapping[str, Changes] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    one_at_a_time: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    space: Space = field(default_factory=dict)
    search: Search | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """The fields given of ``data``, ``training`` and ``evaluation``, and ``settings``, by dotted key."""
        parts = {"data": self.data, "training": self.training, "evaluation": self.evaluation}
        given = {
            name: part.model_dump(mode="json", exclude_unset=True) for name, part in parts.items() if part is not None
        }
        return merge(flatten(given), self.settings)


@dataclass(frozen=True, kw_only=True)
class Sweep(Preset):
    """A question, and what is compared to answer it.

    Args:
        name: also the name of the MLflow experiment and of the folder in the storage path.
        question: one sentence.
        smoke: what ``--smoke`` replaces, so that the sweep ends within minutes; settings are replaced key by key.
    """

    name: str
    question: str
    smoke: Preset = field(default_factory=Preset)

    def small(self) -> Sweep:
        """Return the sweep with ``smoke`` on top."""
        chosen = {own.name: getattr(self.smoke, own.name) for own in fields(Preset)}
        methods = dict.fromkeys((*self.method_settings, *self.smoke.method_settings))
        chosen |= {
            "settings": merge(self.changes, self.smoke.changes),
            "method_settings": {
                name: merge(self.method_settings.get(name, {}), self.smoke.method_settings.get(name, {}))
                for name in methods
            },
        }
        empty: dict[str, Any] = {"data": None, "training": None, "evaluation": None}  # they are in the settings
        return replace(self, **{name: value for name, value in chosen.items() if value} | empty)
