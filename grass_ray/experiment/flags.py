"""The flags every sweep script takes, and the plan they choose.

::

    options = parse_options("sweeps/quickstart.py", "Which method learns most in a minute?", argv)
    choices = choose(defaults, options)

Imports neither ray nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from grass_ray.config import ConfigError, FolderSource, GeneratedSource, HubSource, Parallel, SourceConfig
from grass_ray.experiment.plan import PlanChoices
from grass_ray.experiment.space import Space
from grass_ray.experiment.tuning import Scheduler, Search
from grass_ray.methods import METHODS, get_method
from grass_ray.paths import at_home
from grass_ray.results.searches import read_settings
from grass_ray.tasks.custom import read_task_file
from grass_ray.tasks.readback import choose_extraction
from grass_ray.tasks.suites import resolve_tasks


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The command line of a sweep; None takes what the sweep's file says."""

    smoke: Annotated[bool, tyro.conf.arg(help="a small version of the sweep that ends in minutes")] = False
    models: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(help="built-in names, hub ids or folders", metavar="NAME ...")
    ] = None
    methods: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(help=f"some of: {' '.join(METHODS)}", metavar="NAME ...")
    ] = None
    tasks: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(help="a suite, some of its tasks, or the YAML file of a task of your own", metavar="NAME ..."),
    ] = None
    seeds: Annotated[tuple[int, ...] | None, tyro.conf.arg(help="one trial a seed", metavar="N ...")] = None
    steps: Annotated[
        int | None, tyro.conf.arg(help="optimizer updates a trial; same as --set training.steps=N", metavar="N")
    ] = None
    set: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help="dotted.key=value, for every method that has the key", metavar="KEY=VALUE ..."),
    ] = ()
    settings: Annotated[
        Path | None,
        tyro.conf.arg(help="each method's settings from a search: its summary/best.yaml", metavar="FILE"),
    ] = None
    search: Annotated[
        Search | None,
        tyro.conf.arg(
            help="grid: the sweep's own grid; random: --num-samples points a method; optuna: --num-samples trials a "
            "method, each chosen by the losses before it"
        ),
    ] = None
    num_samples: Annotated[
        int | None,
        tyro.conf.arg(help="points a method; with --scheduler pbt its population", metavar="N"),
    ] = None
    scheduler: Annotated[
        Scheduler,
        tyro.conf.arg(
            help="none: every trial runs to its end; asha: the worse two thirds of a search stop early; pbt: a "
            "population takes over weights from its best and changes settings in mid-training"
        ),
    ] = "none"
    base: Annotated[bool, tyro.conf.arg(help="add the untrained model as a row")] = True
    data_dir: Annotated[
        Path | None, tyro.conf.arg(help="folder with dataset/<Name>/{train,test}.json", metavar="DIR")
    ] = None
    storage_path: Annotated[
        str, tyro.conf.arg(help="folder or URI (s3://...) for everything the sweep writes", metavar="URI")
    ] = "grass_ray_results"
    tracking_uri: Annotated[
        str | None,
        tyro.conf.arg(
            help="MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db under the storage path", metavar="URI"
        ),
    ] = None
    workers_per_trial: Annotated[
        int,
        tyro.conf.arg(
            help="data-parallel workers that share each step's micro-batches; the numbers stay the same", metavar="N"
        ),
    ] = 1
    min_workers_per_trial: Annotated[
        int | None,
        tyro.conf.arg(
            help="elastic: a trial begins, and after a machine's death goes on, with as few workers as this, and grows "
            "back when machines return; default: always all of them",
            metavar="N",
        ),
    ] = None
    parallel: Annotated[
        Parallel,
        tyro.conf.arg(help="each worker holds the whole model, or shards of it (FSDP2) where it outgrows one GPU"),
    ] = "replicate"
    cpus_per_trial: Annotated[
        int | None,
        tyro.conf.arg(help="of each worker; default: all of a machine, so trials run alone", metavar="N"),
    ] = None
    gpus_per_trial: Annotated[
        int | None, tyro.conf.arg(help="of each worker; default: 1 where the cluster has GPUs, else 0", metavar="N")
    ] = None
    max_concurrent_trials: Annotated[int | None, tyro.conf.arg(help="default: as many as fit", metavar="N")] = None
    machines: Annotated[
        int | None,
        tyro.conf.arg(
            help="wait until the cluster has so many machines; default: take those that are there", metavar="N"
        ),
    ] = None
    max_failures: Annotated[
        int,
        tyro.conf.arg(
            help="how often a trial's process may die; each time it goes on from its checkpoint", metavar="N"
        ),
    ] = 2
    keep_checkpoints: Annotated[
        bool, tyro.conf.arg(help="keep what each trial trained, for `grass-ray export`; otherwise only its numbers")
    ] = False
    memory_check: Annotated[
        bool, tyro.conf.arg(help="refuse trials that cannot fit into their device's memory, before they start")
    ] = True
    resume: Annotated[bool, tyro.conf.arg(help="finish this sweep's newest interrupted run")] = False
    dry_run: Annotated[bool, tyro.conf.arg(help="print the trials and stop")] = False
    quiet: Annotated[bool, tyro.conf.arg(help="only the final leaderboard, failures and errors")] = False

    @property
    def min_workers(self) -> int:
        """The number of workers that a trial begins and goes on with at least."""
        return self.workers_per_trial if self.min_workers_per_trial is None else self.min_workers_per_trial

    def chosen(self) -> list[str]:
        """The flags given that decide what the trials are."""
        plan_flags = (
            "smoke",
            "models",
            "methods",
            "tasks",
            "seeds",
            "steps",
            "set",
            "settings",
            "search",
            "num_samples",
            "data_dir",
        )
        given = [flag for flag in plan_flags if getattr(self, flag)]
        given += [] if self.scheduler == "none" else ["scheduler"]
        return [f"--{flag.replace('_', '-')}" for flag in given] + ([] if self.base else ["--no-base"])


@dataclass(frozen=True, kw_only=True)
class SweepDefaults:
    """What a sweep's file decides; the same fields as a preset that ``--smoke`` puts on top.

    ``grid`` combines all its values, ``one_at_a_time`` changes one setting and leaves the others as they are.
    ``space`` are ranges beyond a method's own (:mod:`grass_ray.experiment.space`) for a random or Optuna search;
    ``search`` makes the sweep a search without the flag.
    """

    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    settings: tuple[str, ...] = ()
    method_settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    one_at_a_time: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    space: Space = field(default_factory=dict)
    search: Search | None = None

    def with_preset(self, preset: SweepDefaults) -> SweepDefaults:
        """This with a preset's choices in the place of its own, and the preset's settings after its own."""
        methods = {*self.method_settings, *preset.method_settings}
        return SweepDefaults(
            models=preset.models or self.models,
            methods=preset.methods or self.methods,
            tasks=preset.tasks or self.tasks,
            seeds=preset.seeds or self.seeds,
            settings=(*self.settings, *preset.settings),
            method_settings={
                name: (*self.method_settings.get(name, ()), *preset.method_settings.get(name, ())) for name in methods
            },
            grid=preset.grid or self.grid,
            one_at_a_time=preset.one_at_a_time or self.one_at_a_time,
            space=preset.space or self.space,
            search=preset.search or self.search,
        )


def parse_options(script: str, question: str, argv: Sequence[str] | None) -> SweepOptions:
    """Read the flags. A wrong one ends the process with exit code 2 and a message."""
    examples = (
        f"{question}\n\n"
        "examples:\n"
        f"  python {script} --dry-run                         # the trials, without running any\n"
        f"  python {script} --methods full grass --seeds 0 1  # two methods, two seeds\n"
        f"  python {script} --resume                          # finish the newest interrupted sweep"
    )
    options = tyro.cli(
        SweepOptions,
        prog=script,
        description=examples,
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    return at_home(options)


def choose(defaults: SweepDefaults, options: SweepOptions) -> PlanChoices:
    """The plan's choices from a sweep's defaults and the flags. Raises :class:`ConfigError`."""
    _check_numbers(options)
    suite, tasks, source = choose_data(options.tasks or defaults.tasks, options.data_dir)
    methods = options.methods or defaults.methods
    for name in methods:
        get_method(name)
    steps = [] if options.steps is None else [f"training.steps={options.steps}"]
    settings = (*choose_extraction(source), *defaults.settings, *steps)
    found = read_settings(options.settings) if options.settings is not None else {}
    own = {name: (*defaults.method_settings.get(name, ()), *found.get(name, ())) for name in methods}
    return PlanChoices(
        methods=methods,
        models=options.models or defaults.models,
        suite=suite,
        tasks=tasks,
        source=source,
        seeds=options.seeds or defaults.seeds,
        settings=settings,
        method_settings=own,
        overrides=options.set,
        grid=defaults.grid,
        one_at_a_time=defaults.one_at_a_time,
        num_samples=options.num_samples,
        base_row=options.base,
        space=defaults.space,
        search=options.search or _implied_search(defaults, options),
        scheduler=options.scheduler,
    )


def _implied_search(defaults: SweepDefaults, options: SweepOptions) -> Search | None:
    """The search that was not named: the sweep's own; with ``--num-samples`` at random."""
    if options.scheduler == "pbt" or defaults.search is None:
        return None
    return defaults.search if options.num_samples is None else "random"


def default_tracking(options: SweepOptions) -> str | None:
    """The tracking URI that was asked for, by flag or environment."""
    return options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")


def _check_numbers(options: SweepOptions) -> None:
    mistakes = []
    for flag in (
        "num_samples",
        "workers_per_trial",
        "min_workers_per_trial",
        "cpus_per_trial",
        "max_concurrent_trials",
        "machines",
    ):
        value = getattr(options, flag)
        if value is not None and value < 1:
            mistakes.append(f"--{flag.replace('_', '-')} {value}: give 1 or more")
    for flag in ("gpus_per_trial", "max_failures"):
        value = getattr(options, flag)
        if value is not None and value < 0:
            mistakes.append(f"--{flag.replace('_', '-')} {value}: give 0 or more")
    fewest = options.min_workers
    if fewest > options.workers_per_trial:
        mistakes.append(
            f"--min-workers-per-trial {fewest}: give at most --workers-per-trial, which is {options.workers_per_trial}"
        )
    if options.parallel == "shard" and options.workers_per_trial < 2:
        mistakes.append("--parallel shard needs --workers-per-trial 2 or more")
    elif options.parallel == "shard" and fewest < 2:
        mistakes.append("--parallel shard needs --min-workers-per-trial 2 or more")
    if options.search == "random" and options.num_samples is None:
        mistakes.append("--search random needs --num-samples N, the points drawn for each method")
    if options.search == "grid" and options.num_samples is not None:
        mistakes.append("--search grid takes every point of the grid; leave --num-samples out, or use --search random")
    for flag in ("models", "methods", "tasks", "seeds"):
        if getattr(options, flag) == ():
            mistakes.append(f"--{flag}: give at least one value")
    if mistakes:
        raise ConfigError("; ".join(mistakes))


def choose_data(names: Sequence[str], data_dir: Path | None) -> tuple[str, tuple[str, ...], SourceConfig]:
    """Suite, tasks and source that ``--task`` and ``--data-dir`` mean. Raises :class:`ConfigError`.

    A name that ends in ``.yaml`` or ``.yml`` is a task file of the user's own (:mod:`grass_ray.tasks.custom`).
    """
    files = [name for name in names if name.lower().endswith((".yaml", ".yml"))]
    if not files:
        suite, tasks = resolve_tasks(list(names))
        return suite, tasks, data_source(suite, data_dir)
    if len(names) > 1:
        raise ConfigError(f"the task file {files[0]} stands alone; a run takes one task file, got: {' '.join(names)}")
    if data_dir is not None:
        raise ConfigError(f"--data-dir {data_dir} has no effect: {files[0]} says where its rows are; leave it out")
    source = read_task_file(Path(files[0]).expanduser())
    return source.name, (source.name,), source


def data_source(suite: str, data_dir: Path | None) -> SourceConfig:
    """Where a suite's rows come from: made, a folder, or the hub. Raises :class:`ConfigError`."""
    if suite == "generated":
        if data_dir is not None:
            raise ConfigError(
                f"--data-dir {data_dir} has no effect: the suite 'generated' is made by the project; leave it out"
            )
        return GeneratedSource()
    if data_dir is None:
        return HubSource()
    if not data_dir.is_dir():
        raise ConfigError(
            f"--data-dir {data_dir} is not a folder; give one that holds dataset/<Name>/{{train,test}}.json"
        )
    return FolderSource(path=str(data_dir.resolve()))
