"""Where numbers come from: versions, hardware and git commit, and how a run record is built. Needs no mlflow or ray.

::

    record = build_record(run_id=key, sweep="quickstart", sweep_id=sweep_id, config=config, status="finished",
                          failure=None, outcome=outcome, started_at=now())
    record.save(folder / "record.json")
    write_examples(folder / "examples.jsonl", outcome.tasks)
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from grass_ray.config import RunConfig, to_json, whole_file, write_whole
from grass_ray.errors import redact
from grass_ray.method_files import code_of
from grass_ray.results.record import LmEvalScore, RunRecord, SearchPart, Status, TaskScore
from grass_ray.tasks.lm_eval_scores import LmEvalResult
from grass_ray.tasks.scores import EvaluationResult
from grass_ray.training.report import GIB, LayerTrace, RunOutcome

Value = TypeVar("Value")
PACKAGES = ("torch", "transformers", "peft", "ray", "mlflow", "lm_eval", "grass_ray")


class GitState(NamedTuple):
    """The commit of the grass_ray checkout and whether files differ from it; both None outside a checkout."""

    commit: str | None
    dirty: bool | None


def now() -> str:
    """The current time in UTC, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: str | None = None) -> str:
    """The device's description: the GPU's name, or the CPU's model, cores and memory.

    Args:
        device: ``"cpu"`` or ``"cuda"``, whichever the run used; None means the GPU if torch sees one.
    """
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return str(torch.cuda.get_device_name())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model()}, {cores} cores{_memory()}"


def _memory() -> str:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return ""
    return f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB"


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine()


def git_state(folder: Path | None = None) -> GitState:
    """The commit of the checkout that the package runs from, and whether files differ from it.

    An installed package has no checkout. The environment variable ``GRASS_RAY_GIT_COMMIT`` names the commit of a copy
    without history.

    Args:
        folder: the package's folder, by default grass_ray's own.
    """
    package = folder or Path(__file__).resolve().parents[1]
    # An installed copy inside somebody else's repository is not tracked there, and that commit would say nothing.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return GitState(os.environ.get("GRASS_RAY_GIT_COMMIT") or None, None)
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain")
    return GitState(commit, None if commit is None or changes is None else bool(changes))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def build_record(
    *,
    run_id: str,
    sweep: str,
    sweep_id: str,
    config: RunConfig,
    status: Status,
    failure: str | None,
    outcome: RunOutcome | None,
    started_at: str,
    finished_at: str | None = None,
    hardware_name: str | None = None,
    world_size: int = 1,
    model_sha256: str | None = None,
    threads: int | None = None,
    weights_sha256: str | None = None,
    search: SearchPart | None = None,
) -> RunRecord:
    """Build the record of one trial, finished or not.

    Args:
        run_id: the trial's identifier, the same after a restart.
        sweep: the sweep's name, such as ``quickstart``.
        sweep_id: identifies one execution of the sweep.
        config: the run's configuration.
        status: how it ended.
        failure: why it did not finish; access tokens in it are masked.
        outcome: what was measured; None if nothing was.
        started_at: ISO time (see :func:`now`).
        finished_at: ISO time, by default now; ``started_at`` if the clock was set back in between.
        hardware_name: what the workers ran on; None means this process's :func:`hardware`.
        world_size: number of workers.
        model_sha256: the base model's hash (:func:`grass_ray.training.weights.base_model_sha256`).
        threads: CPU threads that torch used; another number may change the last bits of a sum.
        weights_sha256: hash of the trained weights (:func:`grass_ray.training.weights.parameters_sha256`).
        search: the search it belongs to, if any.
    """
    git = git_state()
    return RunRecord(
        run_id=run_id,
        name=config.name,
        sweep=sweep,
        sweep_id=sweep_id,
        status=status,
        failure=None if failure is None else redact(failure),
        config=config.to_dict(),
        hardware=hardware_name or hardware(),
        world_size=world_size,
        versions=versions(),
        git_commit=git.commit,
        git_dirty=git.dirty,
        started_at=started_at,
        finished_at=finished_at or max(now(), started_at),
        model_sha256=model_sha256,
        threads=threads,
        weights_sha256=weights_sha256,
        search=search,
        code=code_of(config.method),
        **({} if outcome is None else _measured(outcome)),
    )


def _measured(outcome: RunOutcome) -> dict[str, Any]:
    return {
        "metrics": {key: float(value) for key, value in outcome.metrics.items()},
        "series": {key: list(points) for key, points in outcome.series.items()},
        "tasks": {name: _score(result) for name, result in outcome.tasks.items()},
        "lm_eval": {name: _lm_eval_score(result) for name, result in outcome.lm_eval.items()},
        "layers": outcome.layers,
        "data": dict(outcome.data),
        "model_revision": outcome.model_revision,
    }


def _score(result: EvaluationResult) -> TaskScore:
    return TaskScore(
        accuracy=result.accuracy if result.examples else math.nan,
        num_examples=len(result.examples),
        correct=[example.correct for example in result.examples],
        example_ids=[example.id for example in result.examples],
        scoring=result.scoring,
        extraction=result.extraction,
        protocol=dict(result.protocol),
        workload=asdict(result.workload),
        answer_nats=_of_each(example.answer_nats for example in result.examples),
        answer_tokens=_of_each(example.answer_tokens for example in result.examples),
        answer_bytes=_of_each(example.answer_bytes for example in result.examples),
        option_nats=_of_each(example.option_nats for example in result.examples),
    )


def _lm_eval_score(result: LmEvalResult) -> LmEvalScore:
    own = {name: getattr(result, name) for name in LmEvalScore.model_fields}
    return LmEvalScore(**own)


def _of_each(values: Iterable[Value | None]) -> list[Value] | None:
    """The values; None unless every example has one."""
    found = list(values)
    known = [value for value in found if value is not None]
    return known if known and len(known) == len(found) else None


def write_layer_trace(folder: str | Path, trace: LayerTrace | None) -> None:
    """Write which layers trained when, as ``engagement.json`` and ``engagement.txt``; nothing if it is None."""
    if trace is not None:
        values = to_json(trace.model_dump(), indent=1)
        write_whole(Path(folder) / "engagement.json", values + "\n")
        write_whole(Path(folder) / "engagement.txt", trace.describe() + "\n")


def write_examples(path: str | Path, tasks: Mapping[str, EvaluationResult]) -> None:
    """Write every evaluated example as one JSON line, with the keys of :class:`~grass_ray.tasks.scores.Example`."""
    with whole_file(path) as file:
        for task, result in tasks.items():
            for example in result.examples:
                row = {
                    "task": task,
                    "id": example.id,
                    "prompt": example.prompt,
                    "target": example.target,
                    "output": example.output,
                    "extracted": example.extracted,
                    "correct": example.correct,
                    "answer_nats": example.answer_nats,
                    "answer_tokens": example.answer_tokens,
                    "answer_bytes": example.answer_bytes,
                    "option_nats": example.option_nats,
                }
                file.write(to_json(row) + "\n")


def write_lm_eval_examples(path: str | Path, results: Mapping[str, LmEvalResult]) -> None:
    """Write every example of lm-eval's own tasks as one JSON line; no file if there are none."""
    if results:
        with whole_file(path) as file:
            for result in results.values():
                file.writelines(to_json(example) + "\n" for example in result.examples)
