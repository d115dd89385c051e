"""Where a table's numbers come from: hardware, versions, data and models of its runs, and how to run them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from grass_ray.results.page.commands import reproduce_command
from grass_ray.results.record import RunRecord

_FEW = 8

_FACTS: dict[str, Callable[[RunRecord], object]] = {
    "hardware": lambda record: record.hardware,
    "workers": lambda record: record.world_size,
    "threads": lambda record: record.threads or "not recorded",
    "model": lambda record: _model(record),
    "training data": lambda record: _data(record),
    "commit": lambda record: _commit(record),
    "sweeps": lambda record: f"{record.sweep} {record.sweep_id}",
}


def environment(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Name and value of every fact; where runs differ, each value with its number of runs."""
    packages = dict.fromkeys(package for record in records for package in record.versions)
    return [
        *((name, _values([str(fact(record)) for record in records])) for name, fact in _FACTS.items()),
        *((name, _values([record.versions.get(name, "absent") for record in records])) for name in packages),
    ]


def _values(texts: Sequence[str]) -> str:
    found = Counter(texts)
    if len(found) == 1:
        return texts[0]
    shown = [f"{text} ({number} run{'' if number == 1 else 's'})" for text, number in list(found.items())[:_FEW]]
    return "; ".join(shown) + (f"; and {len(found) - _FEW} others" if len(found) > _FEW else "")


def _model(record: RunRecord) -> str:
    config = record.config["model"]
    revision = f", revision {record.model_revision}" if record.model_revision else ""
    hashed = f", sha256 {record.model_sha256[:16]}" if record.model_sha256 else ""
    return f"{config['name']}, {config.get('dtype', '-')}{revision}{hashed}"


def _data(record: RunRecord) -> str:
    if not record.config["training"]["steps"]:
        return "none"
    found = record.data.get("train")
    if not isinstance(found, dict):
        return "not recorded"
    sha256 = str(found.get("rows_sha256"))[:16]
    return f"{found.get('description', '-')}; {found.get('rows', '-')} rows, sha256 {sha256}"


def _commit(record: RunRecord) -> str:
    if record.git_commit is None:
        return "not recorded"
    return record.git_commit + (" with uncommitted changes" if record.git_dirty else "")


def run_again(seeds: Sequence[RunRecord]) -> str:
    """The lines that run a row's seeds again at the commits they ran at."""
    commits = sorted({record.git_commit for record in seeds if record.git_commit is not None})
    lines = [
        reproduce_command(record.config) or f"# {record.name}: this version of grass_ray cannot read its configuration"
        for record in seeds
    ]
    return "\n".join([*(f"git checkout {commit}" for commit in commits), *lines])
