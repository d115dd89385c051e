"""The flags that every sweep script takes.

::

    options = parse_options("sweeps/quickstart.py", "Which method learns most in a minute?", argv)
    suite, tasks, source = choose_data(("boolq", "piqa"), options.data_dir)

Imports neither ray nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from grass_ray.config import ConfigError, ConfigPart, FolderSource, GeneratedSource, HubSource, Parallel
from grass_ray.config.base import PositiveFloat, PositiveInt
from grass_ray.config.data import AnySourceConfig
from grass_ray.experiment.algorithms import ALGORITHMS, Search
from grass_ray.experiment.search import Scheduler
from grass_ray.methods import METHODS
from grass_ray.paths import at_home
from grass_ray.tasks.custom import read_task_file
from grass_ray.tasks.dataset_files import is_data_file
from grass_ray.tasks.dataset_rows import find_dataset
from grass_ray.tasks.suites import resolve_tasks
from grass_ray.training.report import GIB, RESERVE_BYTES

_Count = Annotated[int | None, tyro.conf.arg(metavar="N")]
_Names = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME ...")]
_SEARCH_HELP = "; ".join(f"{name}: {algorithm.help}" for name, algorithm in ALGORITHMS.items())
_SCHEDULER_HELP = (
    "none: every trial runs to its end; asha: the worse two thirds of a search stop early; pbt: a population takes "
    "over weights from its best and changes settings in mid-training"
)
_ELASTIC_HELP = (
    "elastic: a trial begins, and after a machine's death goes on, with as few workers as this, and grows back when "
    "machines return; default: always all of them"
)
_AT_LEAST = {
    **dict.fromkeys(("num_samples", "workers_per_trial", "min_workers_per_trial", "cpus_per_trial"), 1),
    **dict.fromkeys(("max_concurrent_trials", "machines"), 1),
    **dict.fromkeys(("gpus_per_trial", "max_failures"), 0),
}
_CHOOSE_TRIALS = (
    *("smoke", "models", "methods", "tasks", "eval_tasks", "num_fewshot", "seeds", "steps", "set", "settings"),
    *("search", "num_samples"),
)


class TrialFlags(ConfigPart):
    """Flags that say how each trial is carried out. A sweep's plan keeps those that were given, for ``--resume``."""

    workers_per_trial: PositiveInt | None = None
    min_workers_per_trial: PositiveInt | None = None
    parallel: Parallel | None = None
    gpu_memory: PositiveFloat | None = None
    memory_check: bool = True
    keep_checkpoints: bool = False


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The command line of a sweep; None takes what the sweep's file says."""

    smoke: bool = False
    """a small version of the sweep that ends in minutes"""
    models: _Names = None
    """built-in names, hub ids or folders"""
    methods: Annotated[_Names, tyro.conf.arg(help=f"some of: {' '.join(METHODS)}", metavar="NAME ...")] = None
    method_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file with methods of your own; its code is run, here and by the workers"""
    tasks: _Names = None
    """a suite, some of its tasks, or the YAML file of a task of your own"""
    eval_tasks: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME ...")] = None
    """tasks of lm-eval to evaluate, too: its names (mmlu,ifeval), folders (mine/) or YAML files"""
    num_fewshot: _Count = None
    """examples before each question of --eval-tasks; default: what each task says"""
    seeds: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="N ...")] = None
    """one trial a seed"""
    steps: _Count = None
    """optimizer updates a trial; same as --set training.steps=N"""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """dotted.key=value, for every method that has the key"""
    settings: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """each method's settings from a search: its summary/best.yaml"""
    search: Annotated[Search | None, tyro.conf.arg(help=_SEARCH_HELP)] = None
    num_samples: _Count = None
    """points a method; with --scheduler pbt its population"""
    scheduler: Annotated[Scheduler, tyro.conf.arg(help=_SCHEDULER_HELP)] = "none"
    base: bool = True
    """add the untrained model as a row"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """a data set of your own in place of tasks: a file, a save_to_disk folder or a hub id"""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder with dataset/<Name>/{train,test}.json"""
    storage_path: Annotated[str, tyro.conf.arg(metavar="URI")] = "grass_ray_results"
    """folder or URI (s3://...) for everything the sweep writes"""
    tracking_uri: Annotated[str | None, tyro.conf.arg(metavar="URI")] = None
    """MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db under the storage path"""
    workers_per_trial: _Count = None
    """data-parallel workers that share each step's micro-batches, 1 by default; the numbers stay the same"""
    min_workers_per_trial: Annotated[int | None, tyro.conf.arg(metavar="N", help=_ELASTIC_HELP)] = None
    parallel: Parallel | None = None
    """each worker holds the whole model, as by default, or shards of it (FSDP2) where it outgrows one GPU"""
    cpus_per_trial: _Count = None
    """of each worker; default: all of a machine, so trials run alone"""
    gpus_per_trial: _Count = None
    """of each worker; default: 1 where the cluster has GPUs, else 0"""
    max_concurrent_trials: _Count = None
    """default: as many as fit"""
    machines: _Count = None
    """wait until the cluster has so many machines; default: take those that are there"""
    max_failures: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """how often a trial's process may die; each time it goes on from its checkpoint"""
    keep_checkpoints: bool = False
    """keep what each trial trained, for `grass-ray export`; otherwise only its numbers"""
    gpu_memory: Annotated[float | None, tyro.conf.arg(metavar="GIB")] = None
    """memory in GiB that each worker may take; default: that of its device"""
    memory_check: bool = True
    """refuse trials that cannot fit into their device's memory, before they start"""
    reuse: bool = False
    """take over trials that have run in this store before, where neither configuration, data, model nor code changed"""
    resume: bool = False
    """finish this sweep's newest interrupted run, its trials carried out as they were unless flags say otherwise"""
    dry_run: bool = False
    """print the trials and stop"""
    quiet: bool = False
    """only the final leaderboard, failures and errors"""

    @property
    def changes(self) -> dict[str, Any]:
        """The settings of every method that flags of their own change, by dotted key."""
        given = {"training.steps": self.steps, **lm_eval_settings(self.eval_tasks, self.num_fewshot)}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def workers(self) -> int:
        """The number of workers of a trial, at most."""
        return 1 if self.workers_per_trial is None else self.workers_per_trial

    @property
    def min_workers(self) -> int:
        """The number of workers that a trial begins and continues with at least."""
        return self.workers if self.min_workers_per_trial is None else self.min_workers_per_trial

    @property
    def parallelism(self) -> Parallel:
        """What each worker holds."""
        return self.parallel or "replicate"

    @property
    def trial_flags(self) -> dict[str, Any]:
        """Those of :class:`TrialFlags` that were given."""
        flags = {name: (getattr(self, name), field.default) for name, field in TrialFlags.model_fields.items()}
        return {name: value for name, (value, default) in flags.items() if value != default}

    def resuming(self, saved: TrialFlags) -> SweepOptions:
        """Return these options with ``saved`` flags where none was given. Raises :class:`ConfigError`."""
        options = replace(self, **dict(saved) | self.trial_flags)
        options.check()
        return options

    @property
    def tracking(self) -> str | None:
        """The tracking URI that was asked for, by flag or environment."""
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")

    def chosen(self) -> list[str]:
        """Return the flags given that decide what the trials are."""
        given = [flag for flag in (*_CHOOSE_TRIALS, "data", "data_dir") if getattr(self, flag)]
        given += [] if self.scheduler == "none" else ["scheduler"]
        return [_flag(name) for name in given] + ([] if self.base else ["--no-base"])

    def check(self) -> None:
        """Raise :class:`ConfigError` that lists all flags that break a rule."""
        mistakes = [
            f"{_flag(name)} {value}: give {least} or more"
            for name, least in _AT_LEAST.items()
            if (value := getattr(self, name)) is not None and value < least
        ]
        fewest = self.min_workers
        if fewest > self.workers:
            mistakes.append(
                f"--min-workers-per-trial {fewest}: give at most --workers-per-trial, which is {self.workers}"
            )
        if self.parallel == "shard" and self.workers < 2:
            mistakes.append("--parallel shard needs --workers-per-trial 2 or more")
        elif self.parallel == "shard" and fewest < 2:
            mistakes.append("--parallel shard needs --min-workers-per-trial 2 or more")
        drawn = self.search not in (None, "grid") and not ALGORITHMS[self.search].adaptive
        if drawn and self.num_samples is None:
            mistakes.append(f"--search {self.search} needs --num-samples N, the points drawn for each method")
        if self.search == "grid" and self.num_samples is not None:
            mistakes.append(
                "--search grid takes every point of the grid; leave --num-samples out, or use --search random"
            )
        if self.reuse and self.scheduler != "none":
            mistakes.append(
                f"--reuse takes over whole trials, and those of --scheduler {self.scheduler} depend on each other; "
                "leave one of them out"
            )
        if self.data is not None and self.tasks:
            mistakes.append(f"--tasks {' '.join(self.tasks)} has no effect: --data {self.data} is a task of its own")
        if self.gpu_memory is not None and self.gpu_memory * GIB <= RESERVE_BYTES:
            mistakes.append(
                f"--gpu-memory {self.gpu_memory:g}: give more than the {RESERVE_BYTES / GIB:g} GiB of a process"
            )
        for name in ("models", "methods", "tasks", "seeds"):
            if getattr(self, name) == ():
                mistakes.append(f"{_flag(name)}: give at least one value")
        if mistakes:
            raise ConfigError("; ".join(mistakes))


def lm_eval_settings(tasks: Sequence[str] | None, num_fewshot: int | None) -> dict[str, Any]:
    """The settings that ``--eval-tasks`` and ``--num-fewshot`` mean; names may be separated by commas."""
    few = {"evaluation.lm_eval.num_fewshot": num_fewshot}
    if tasks is None:
        return {} if num_fewshot is None else few
    names = [name for word in tasks for name in word.split(",") if name]
    if not names:
        raise ConfigError("--eval-tasks: give at least one task of lm-eval")
    return {"evaluation.lm_eval.tasks": names, **few}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
    )
    return at_home(options)


def choose_data(
    names: Sequence[str], data_dir: Path | None, dataset: str | None = None
) -> tuple[str, tuple[str, ...], AnySourceConfig]:
    """Suite, tasks and source that ``--task``, ``--data-dir`` and ``--data`` mean. Raises :class:`ConfigError`.

    A name that ends in ``.yaml`` or ``.yml`` is a task file of the user's own (:mod:`grass_ray.tasks.custom`), and one
    that ends like a data file is a data set, as ``dataset`` is (:mod:`grass_ray.tasks.dataset_rows`).
    """
    files = [name for name in names if name.lower().endswith((".yaml", ".yml")) or is_data_file(name)]
    given = dataset or (files[0] if len(names) == 1 and files and is_data_file(files[0]) else None)
    if given is not None:
        if data_dir is not None:
            raise ConfigError(f"--data-dir {data_dir} has no effect on the data set {given}; leave it out")
        own = find_dataset(given)
        return own.name, (own.name,), own
    if not files:
        suite, tasks = resolve_tasks(list(names))
        return suite, tasks, data_source(suite, data_dir)
    if len(names) > 1:
        raise ConfigError(f"the file {files[0]} stands alone; a run takes one file of data, got: {' '.join(names)}")
    if data_dir is not None:
        raise ConfigError(f"--data-dir {data_dir} has no effect: {files[0]} says where its rows are; leave it out")
    source = read_task_file(Path(files[0]).expanduser())
    return source.name, (source.name,), source


def data_source(suite: str, data_dir: Path | None) -> AnySourceConfig:
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
