"""What a program can see of the entry rules (``benchmarks/RECORDS.md``): remarks, since no number is wrong.

::

    for remark in entry_remarks(Recomputed(folder=folder, ...)): print(remark)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from grass_ray.results.leaderboard import LeaderboardTable
from grass_ray.results.rate_search import RateSearch, search_of
from grass_ray.results.record import RunRecord
from grass_ray.results.settings import settings_key, training_rows
from grass_ray.results.verification.tables import PLAN, Recomputed

LEAST_SEEDS = 3
_MOST_NAMES = 8


def entry_remarks(result: Recomputed) -> list[str]:
    """One sentence for each rule that the records, or the folder, are seen to break."""
    rates = _rates(result.records, result.searches)
    return [*_runs(result.records), *_rows(result.tables), *rates, *_plan(result.folder)]


def _runs(records: Sequence[RunRecord]) -> Iterable[str]:
    trained = [record for record in records if record.config["training"]["steps"]]
    finished = [record for record in records if record.status == "finished"]
    untested = {(r.run_id, task) for r in records for task, s in r.tasks.items() if not s.protocol.get("test_sha256")}
    for rule, runs in {
        "not finished": [record.run_id for record in records if record.status != "finished"],
        "with uncommitted changes in the tree": [record.run_id for record in records if record.git_dirty],
        "without the commit": [record.run_id for record in records if not record.git_commit],
        "without the hash of the base model": [record.run_id for record in records if not record.model_sha256],
        "without the hash of the training rows": [record.run_id for record in trained if not training_rows(record)],
        "without the hash of the test rows": sorted({run for run, _ in untested}),
        "without the hash of the trained weights": [r.run_id for r in finished if not r.weights_sha256],
        "without the number of threads": [r.run_id for r in records if r.threads is None],
        "without the hardware": [record.run_id for record in records if not record.hardware.strip()],
        "without a fingerprint in the run id, so a configuration changed later is not seen": [
            record.run_id for record in records if not re.search(r"-[0-9a-f]{12}$", record.run_id)
        ],
        "of a configuration and seed that a later run has, too; the later one counts": _repeated(records),
    }.items():
        if runs:
            yield f"{len(runs)} of {len(records)} runs {rule}: {_some(runs)}"


def _repeated(records: Sequence[RunRecord]) -> list[str]:
    """Runs that a later one stands for; the winner of a search is run again to be tested, which is none of these."""
    last: dict[tuple[str, int, str | None], RunRecord] = {}
    earlier = []
    tested = [record for record in records if record.config["evaluation"].get("test", True)]
    for record in sorted(tested, key=lambda record: record.finished_at):
        key = (settings_key(record), record.config["seed"], training_rows(record))
        if key in last:
            earlier.append(last[key].run_id)
        last[key] = record
    return earlier


def _rows(tables: Sequence[LeaderboardTable]) -> Iterable[str]:
    for table in tables:
        at = f"{table.title}: " if len(tables) > 1 else ""
        trained = [row for row in table.rows if row.trained and row.seeds]
        if few := [row.label for row in trained if len(row.seeds) < LEAST_SEEDS]:
            yield f"{at}{len(few)} rows with fewer than {LEAST_SEEDS} seeds: {_some(few)}"
        by_seeds: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
        for row in trained:
            by_seeds[tuple(row.seeds)].append(row.label)
        if len(by_seeds) > 1:
            groups = (f"{' '.join(map(str, seeds))} ({_some(labels)})" for seeds, labels in by_seeds.items())
            yield f"{at}rows with different seeds: {'; '.join(groups)}"
        if len(commits := {commit for row in table.rows for commit in (row.commit or "").split(", ")}) > 1:
            yield f"{at}runs of different commits: {_some(sorted(commits))}"
    tests: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for table in tables:
        tests[table.model, table.suite].add(table.test.name)
    for (model, suite), names in tests.items():
        if len(names) > 1:
            yield f"runs of {model} on {suite} were tested on {len(names)} different tests"


def _rates(records: Sequence[RunRecord], searches: Sequence[RateSearch]) -> Iterable[str]:
    trained = [record for record in records if record.config["training"]["steps"]]
    chosen = {record.run_id: search_of(record, searches) for record in trained}
    unsearched = {r.config["method"]["name"] for r in trained if chosen[r.run_id] is None}
    if unsearched:
        yield f"no search of the learning rate is here for {_some(sorted(unsearched))}"
    used = {search.label: search for search in chosen.values() if search is not None}
    if edges := sorted(label for label, search in used.items() if search.at_edge):
        yield f"the best learning rate is the smallest or largest that was tried: {_some(edges)}"
    numbers = {len(search.losses) for search in used.values()}
    if len(numbers) > 1:
        yield f"methods tried different numbers of learning rates: from {min(numbers)} to {max(numbers)}"


def _plan(folder: Path) -> Iterable[str]:
    page = folder / "README.md"
    linked = page.is_file() and re.search(rf"\]\([^)]*{PLAN}\)", page.read_text(encoding="utf-8"))
    if not linked and not (folder / PLAN).is_file():
        yield f"no plan from before the runs: neither {PLAN} nor a link to one in README.md"


def _some(names: Collection[str]) -> str:
    named = list(names)[:_MOST_NAMES]
    more = len(names) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
