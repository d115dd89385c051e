"""Run a sweep: trials under Ray Tune, those with several workers as Ray Train runs.

Imports ray and torch only when trials are about to run, so that ``--help`` and wrong flags answer at once.
"""

from __future__ import annotations

import os
import random
import secrets
import shlex
import sys
from collections.abc import Hashable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError, CustomSource, RunConfig
from grass_ray.errors import MASK, redact
from grass_ray.experiment.flags import SweepOptions, TrialFlags, parse_options
from grass_ray.experiment.plan import PLAN_FILE, SweepPlan, differences, plan_trials
from grass_ray.experiment.space import at_random, sample
from grass_ray.experiment.sweep import Sweep
from grass_ray.method_files import methods_with
from grass_ray.process import leave, prepare_output
from grass_ray.progress import quiet_libraries
from grass_ray.results.connection import default_tracking_uri

# Read when ray is imported or a sweep starts. Tune's own loggers would write every report three times, and its SIGINT
# handler would swallow Ctrl-C; the raylet warns of the processes that every trial needs.
DRIVER_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # schedulers look at a few reports, not at all
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "PYTHON worker processes have been started",
}


def main(sweep: Sweep, argv: Sequence[str] | None = None) -> NoReturn:
    """Run the sweep from the command line and exit: 0, 1 if a trial failed, 2 on bad input."""
    prepare_output()
    options = parse_options(script_name(), sweep.question, argv)
    leave(lambda: run(sweep, options))


def run(sweep: Sweep, options: SweepOptions) -> int:
    """Run, resume or only print the sweep, and return the exit code. Raises :class:`ConfigError` on bad input."""
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet_libraries()
    console = Console()
    root = Storage.at(options.storage_path)
    if options.resume:
        plan, options = _resumed_plan(sweep, root, options)
    else:
        plan = _new_plan(sweep, root, options)
    storage = root.join(sweep.name, plan.sweep_id)
    left = _left(plan, storage) if options.resume else _to_check(plan)
    _check(left, options)
    if options.dry_run:
        _print_trials(console, plan)
    elif not options.quiet:
        _print_head(console, plan, storage)
    if options.dry_run and not options.quiet:
        from grass_ray.commands.data_view import show_data

        show_data((config for config in plan.configs if config.training.steps), console)
    for line in _find_lost_rows(left):
        _say(console, line)
    if options.dry_run:
        return 0
    from grass_ray.cluster.runner import SweepRunner

    runner = SweepRunner(plan, root, Storage(storage.uri), options, console)
    runner.open()
    if not options.resume:
        try:
            storage.write_text(plan.to_yaml(), PLAN_FILE)
        except OSError as error:
            raise ConfigError(f"cannot write to the storage path {root.shown}: {error}") from None
    return runner.run(resume_command())


def _new_plan(sweep: Sweep, root: Storage, options: SweepOptions) -> SweepPlan:
    trials, search = plan_trials(sweep, options)
    return SweepPlan(
        name=sweep.name,
        sweep_id=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",  # --resume takes the last by name
        question=sweep.question,
        tracking_uri=options.tracking or _embedded_store(root),
        trials=trials,
        search=search,
        flags=TrialFlags(**options.trial_flags),
    )


def _resumed_plan(sweep: Sweep, root: Storage, options: SweepOptions) -> tuple[SweepPlan, SweepOptions]:
    """The newest saved plan, and the flags with which it goes on.

    Flags that would make other trials are refused, not ignored.
    """
    folder = root.join(sweep.name)
    saved = [sweep_id for sweep_id in folder.folders() if folder.exists(sweep_id, PLAN_FILE)]
    if not saved:
        raise ConfigError(
            f"nothing to resume: no {sweep.name!r} sweep under {root.shown}; leave --resume out to start one, "
            "or give the --storage-path it was started with"
        )
    methods_with(options.method_file)
    where = folder.join(saved[-1])
    plan = SweepPlan.from_yaml(where.read_text(PLAN_FILE), f"{where.shown}/{PLAN_FILE}")
    for part in (part for config in plan.configs for part in config.method.imported_parts):
        part.check_code()
    options = options.resuming(plan.flags)
    chosen = options.chosen()
    if chosen and not plan.has_the_trials_of(*plan_trials(sweep, options)):
        raise ConfigError(
            f"{' '.join(chosen)} would make other trials than the sweep {plan.sweep_id} that --resume continues "
            "with its saved plan; leave these flags out, or leave --resume out to start a new sweep"
        )
    uri = options.tracking if MASK in plan.tracking_uri else options.tracking_uri
    if uri is None and MASK in plan.tracking_uri:
        raise ConfigError(
            f"the sweep's store is {plan.tracking_uri}, and its password was not written down; give the whole address "
            "with --tracking-uri or MLFLOW_TRACKING_URI"
        )
    return plan.model_copy(update={"tracking_uri": uri}) if uri else plan, options


def _check(configs: Sequence[RunConfig], options: SweepOptions) -> None:
    """Check every trial's model, data and schedule before anything is started; all mistakes at once."""
    if not configs:
        return  # loads no torch
    from grass_ray.training.checks import check_run

    mistakes: dict[str, None] = {}
    checked: set[Hashable] = set()
    for config in configs:
        try:
            check_run(config, options.workers, options.parallelism, options.min_workers, checked)
        except ConfigError as mistake:
            mistakes[str(mistake)] = None
    if mistakes:
        raise ConfigError("\n  ".join(mistakes))


def _find_lost_rows(configs: Sequence[RunConfig]) -> list[str]:
    """A line for each way in which the trials lose training rows."""
    distinct = {(config.model, config.data): config for config in configs if config.training.steps}
    if not distinct:
        return []
    from grass_ray.training.checks import tokenizer_to_check
    from grass_ray.training.lost_rows import find_lost_rows

    lines = [find_lost_rows(config, tokenizer_to_check(config.model)) for config in distinct.values()]
    return list(dict.fromkeys(line for some in lines for line in some))


def _to_check(plan: SweepPlan) -> list[RunConfig]:
    """The known trials, and for an adaptive search a few from all over its space."""
    if plan.search is None or not plan.search.adaptive:
        return plan.known_trials
    choose = at_random(random.Random(0))
    drawn = [spec.trial(sample(spec.space, choose)) for spec in plan.search.methods for _ in range(8)]
    return [*plan.known_trials, *drawn]


def _left(plan: SweepPlan, storage: Storage) -> list[RunConfig]:
    """Those to check of the trials that have not ended. Whether a search's winners have is not known yet."""
    from grass_ray.cluster.job import has_ended

    return [config for config in _to_check(plan) if plan.search is not None or not has_ended(storage, config)]


def _embedded_store(root: Storage) -> str:
    """MLflow's own database beside the results; a bucket cannot hold one, so then it is in the current folder."""
    return default_tracking_uri(root.local_folder or Path.cwd())


def resume_command() -> str:
    """Return the command that continues this process's sweep: the same line with ``--resume``."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    return redact(shlex.join(["python", script_name(), *words, "--resume"]))


def script_name() -> str:
    """Return the path of the running script as one types it."""
    path = Path(sys.argv[0])
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def _say(console: Console, line: str) -> None:
    """Print one line whole; a terminal wraps it."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _print_head(console: Console, plan: SweepPlan, storage: Storage) -> None:
    """First lines: the question, how many trials of what, and where everything goes."""

    def distinct(values: Iterable[str]) -> str:
        return " ".join(dict.fromkeys(values))

    configs = plan.configs
    rows = {
        "sweep": f"{plan.name} {plan.sweep_id}: {plan.question}",
        "models": distinct(config.model.name for config in configs),
        "methods": distinct(config.method.name for config in configs),
        "suite": distinct(config.data.suite for config in configs),
        "tasks": distinct(task for config in configs for task in config.data.tasks),
        "trials": f"{plan.num_trials}, plan in {storage.shown}/{PLAN_FILE}",
        "tracking": f"{redact(plan.tracking_uri)}, experiment {plan.name}",
    }
    own = [config for config in configs if isinstance(config.data.source, CustomSource)]
    if any(config.evaluation.extraction == "strict" for config in own):
        rows["answers"] = "read by strict extraction (evaluation.extraction)"
    for name, text in rows.items():
        _say(console, f"{name:9} {text}")
    if plan.search is not None:
        for line in plan.search.describe():
            _say(console, f"search    {line}")
    for line in _without_effect(plan):
        _say(console, f"no effect {line}")


def _without_effect(plan: SweepPlan) -> list[str]:
    """A line for each setting that changes nothing in some trials, with the methods of these."""
    from grass_ray.training.without_effect import settings_without_effect

    found: dict[str, dict[str, None]] = {}
    for config in plan.configs:
        for line in settings_without_effect(config):
            found.setdefault(line, {})[config.method.name] = None
    return [f"{', '.join(methods)}: {line}" for line, methods in found.items()]


def _print_trials(console: Console, plan: SweepPlan) -> None:
    """The trials as a table; every row whole, also where nothing is a terminal."""
    table = Table(box=None, header_style="bold")
    for column in ("name", "key", "method", "lr", "steps", "differs in"):
        table.add_column(column, justify="right" if column in ("lr", "steps") else "left", no_wrap=True)
    for config, text in zip(plan.known_trials, differences(plan.known_trials), strict=True):
        lr = f"{config.method.optimizer.lr:g}" if config.training.steps else "-"
        table.add_row(config.name, config.fingerprint, config.method.name, lr, str(config.training.steps), text)
    console.print(f"{plan.name}: {plan.num_trials} trials; none is run", highlight=False)
    if plan.search is not None:
        for line in plan.search.describe():
            _say(console, f"search: {line}")
    wide = Console(width=None if console.is_terminal else 240)
    wide.print(table)
    for line in _without_effect(plan):
        _say(console, f"without effect: {line}")
