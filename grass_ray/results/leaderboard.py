"""The leaderboard: records in, ranked tables out. Pure; nothing here asks MLflow or a model.

::

    tables = build_leaderboard(load_records(uri, "commonsense"))
    print(render(tables, "markdown"))                     # grass_ray.results.rendering

One table for each model, suite, hardware and worker count - and for each set of tasks and way of evaluating, since
other numbers cannot be ranked together. One row for each method as configured, over its seeds. Only rows whose every
seed finished are ranked; failed, stopped and partly failed ones stay below with their reason.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from statistics import fmean, stdev
from typing import Any

from grass_ray.results.record import RunRecord
from grass_ray.results.statistics import average_interval, benjamini_hochberg, mcnemar

# What decides whether two accuracies may be ranked together; rows that differ here go to different tables.
_EVALUATION = ("limit", "scoring", "extraction", "num_beams")
# Settings that change no number, so that runs which differ in them alone are one row.
_NO_EFFECT = ("seed", "training.checkpoint_every_steps", "evaluation.batch_size")
# MAWPS, which is in the arithmetic training mixture, contains these three test sets.
_CONTAMINATED = ("addsub", "multiarith", "singleeq")


@dataclass(frozen=True, kw_only=True)
class LeaderboardRow:
    """One method as configured, over its seeds.

    Accuracies are shares from 0 to 1; ``accuracy`` is the unweighted mean over tasks of the means over seeds, its
    interval that of :func:`grass_ray.results.statistics.average_interval` over the questions (not questions x seeds:
    the same ones are asked again), ``accuracy_std`` the spread over seeds. Memory is the maximum over seeds, speed and
    time the mean. ``variant`` says what tells this row from others of its method; ``seeds`` lists the finished seeds.
    ``p_value`` is the exact McNemar test against ``full`` on the same questions, ``p_adjusted`` the same after
    Benjamini-Hochberg over the table. ``status`` is the seeds' common one, or ``partial`` when they differ.
    """

    rank: int | None = None
    method: str
    model: str
    suite: str
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    tasks: dict[str, float]
    peak_allocated_gib: float | None
    peak_reserved_gib: float | None
    host_pinned_gib: float | None
    tokens_per_second: float | None
    train_s: float | None
    trainable_share: float | None
    seeds: list[int]
    status: str
    failure: str | None
    variant: str
    hardware: str
    accuracy_std: float | None
    accuracy_clean: float | None
    difference_to_full: float | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    pareto: bool = False
    commit: str | None
    date: str
    run_ids: list[str]

    @property
    def label(self) -> str:
        """The method, with what sets this row apart."""
        return f"{self.method} ({self.variant})" if self.variant else self.method

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values in a fixed order; a number that is not one becomes None."""
        return {key: _plain(value) for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class LeaderboardTable:
    """Rows that may be compared, best first; ``notes`` say what a reader must know."""

    model: str
    suite: str
    hardware: str
    world_size: int
    tasks: tuple[str, ...]
    evaluation: Mapping[str, Any]
    rows: tuple[LeaderboardRow, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Model, suite, hardware and how it was evaluated."""
        machine = self.hardware if self.world_size == 1 else f"{self.world_size} x {self.hardware}"
        parts = [str(self.evaluation["scoring"]), f"{self.evaluation['extraction']} extraction"]
        if self.evaluation["num_beams"] not in (None, 1):
            parts.append(f"{self.evaluation['num_beams']} beams")
        if self.evaluation["limit"] is not None:
            parts.append(f"a sample of {self.evaluation['limit']} examples a task")
        return f"{self.model} on {self.suite}, {machine} ({', '.join(parts)})"


def build_leaderboard(records: Iterable[RunRecord]) -> list[LeaderboardTable]:
    """Group, aggregate, compare and rank. Of two runs of one configuration and seed the later one counts."""
    tables: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        tables[json.dumps(_table_key(record))].append(record)
    return [_table(tables[key]) for key in sorted(tables)]


def _table_key(record: RunRecord) -> list[Any]:
    config = record.config
    protocol = [config["evaluation"].get(key) for key in _EVALUATION]
    tasks = sorted(config["data"]["tasks"])
    return [config["model"]["name"], config["data"]["suite"], record.hardware, record.world_size, tasks, protocol]


def _table(records: Sequence[RunRecord]) -> LeaderboardTable:
    model, suite, hardware, world_size, _, protocol = _table_key(records[0])
    groups: defaultdict[str, dict[int, RunRecord]] = defaultdict(dict)
    for record in sorted(records, key=lambda record: datetime.fromisoformat(record.finished_at)):
        groups[json.dumps(_settings(record), sort_keys=True)][record.config["seed"]] = record
    seeds = [[group[seed] for seed in sorted(group)] for group in groups.values()]
    rows = [_row(group, variant) for group, variant in zip(seeds, _variants(seeds), strict=True)]
    evaluated = {task for row in rows if row.status == "finished" for task in row.tasks}
    rows = [_incomplete(row, evaluated) for row in rows]
    rows = _compare(rows, seeds)
    return LeaderboardTable(
        model=model,
        suite=suite,
        hardware=hardware,
        world_size=world_size,
        tasks=tuple(records[0].config["data"]["tasks"]),
        evaluation=dict(zip(_EVALUATION, protocol, strict=True)),
        rows=tuple(_ranked(_pareto(rows))),
        notes=tuple(_notes(rows, suite)),
    )


# ------------------------------------------------------------------------------------------------- rows from records


def _settings(record: RunRecord) -> dict[str, str]:
    """What a row is: the configuration by dotted key, without what changes no number."""
    flat = dict(_flat("", record.config))
    return {key: value for key, value in flat.items() if key not in _NO_EFFECT}


def _flat(prefix: str, value: object) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, json.dumps(value).strip('"')


def _variants(groups: Sequence[Sequence[RunRecord]]) -> list[str]:
    """For each group what tells it from the other groups of its method, in as few words as are unambiguous."""
    settings = [_settings(group[0]) for group in groups]
    labels = []
    for own in settings:
        peers = [other for other in settings if other["method.name"] == own["method.name"]]
        keys = sorted({key for peer in peers for key in peer})
        differing = [key for key in keys if len({peer.get(key) for peer in peers}) > 1 and key in own]
        last = [key.rsplit(".", 1)[-1] for key in differing]
        words = [name if last.count(name) == 1 else key for name, key in zip(last, differing, strict=True)]
        labels.append(", ".join(f"{word}={own[key]}" for word, key in zip(words, differing, strict=True)))
    return labels


def _row(group: Sequence[RunRecord], variant: str) -> LeaderboardRow:
    finished = [record for record in group if record.status == "finished" and record.tasks]
    scores = {
        task: fmean(record.tasks[task].accuracy for record in finished)
        for task in (finished[0].tasks if finished else {})
        if all(task in record.tasks and record.tasks[task].num_examples for record in finished)
    }
    low = high = None
    if scores:
        low, high = average_interval(
            list(scores.values()), [min(record.tasks[task].num_examples for record in finished) for task in scores]
        )
    last, config = group[-1], group[-1].config
    averages = [fmean(score.accuracy for score in record.tasks.values()) for record in finished]
    clean = [value for task, value in scores.items() if task not in _CONTAMINATED]
    mixed = config["data"]["suite"] == "arithmetic" and config["method"]["name"] != "base"
    shares = [record.layers.trainable_share for record in group if record.layers is not None]
    status, failure = _status(group)
    return LeaderboardRow(
        method=config["method"]["name"],
        variant=variant,
        model=config["model"]["name"],
        suite=config["data"]["suite"],
        accuracy=fmean(scores.values()) if scores else None,
        accuracy_low=low,
        accuracy_high=high,
        accuracy_std=stdev(averages) if len(averages) > 1 else None,
        accuracy_clean=fmean(clean) if mixed and clean and len(clean) < len(scores) else None,
        tasks=scores,
        peak_allocated_gib=max(_values(group, "memory/peak_allocated_gib"), default=None),
        peak_reserved_gib=max(_values(group, "memory/peak_reserved_gib"), default=None),
        host_pinned_gib=max(_values(group, "memory/host_pinned_gib"), default=None),
        tokens_per_second=_mean(_values(finished, "throughput/tokens_per_second")),
        train_s=_mean(_values(finished, "time/train_s")),
        trainable_share=max(shares, default=None),
        seeds=[record.config["seed"] for record in finished],
        status=status,
        failure=failure,
        hardware=last.hardware,
        commit=_commit(group),
        date=max(record.finished_at for record in group)[:10],
        run_ids=[record.run_id for record in group],
    )


def _status(group: Sequence[RunRecord]) -> tuple[str, str | None]:
    statuses = {record.status for record in group}
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for record in group:
        if record.status != "finished":
            reasons[record.failure or record.status].append(str(record.config["seed"]))
        elif not record.tasks:
            reasons["finished without an evaluation"].append(str(record.config["seed"]))
    failure = "; ".join(f"seed {', '.join(seeds)}: {reason}" for reason, seeds in reasons.items())
    return (statuses.pop() if len(statuses) == 1 else "partial"), failure or None


def _values(group: Iterable[RunRecord], metric: str) -> list[float]:
    return [value for record in group if math.isfinite(value := record.metrics.get(metric, math.nan))]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _commit(group: Sequence[RunRecord]) -> str | None:
    commits = {f"{record.git_commit[:9]}{'+' if record.git_dirty else ''}" for record in group if record.git_commit}
    return ", ".join(sorted(commits)) or None


def _incomplete(row: LeaderboardRow, evaluated: set[str]) -> LeaderboardRow:
    """An average over fewer tasks than the other rows' is no rival of theirs."""
    missing = sorted(evaluated - row.tasks.keys())
    if row.status != "finished" or not missing or not row.tasks:
        return row
    return replace(row, status="partial", failure=f"not evaluated on {', '.join(missing)}")


# ------------------------------------------------------------------------------------------- comparing and ranking


def _is_ranked(row: LeaderboardRow) -> bool:
    return row.status == "finished" and row.accuracy is not None and math.isfinite(row.accuracy)


def _compare(rows: Sequence[LeaderboardRow], groups: Sequence[Sequence[RunRecord]]) -> list[LeaderboardRow]:
    """Difference to the best ``full`` row, with McNemar over the questions of the seeds both have."""
    full = [index for index, row in enumerate(rows) if row.method == "full" and _is_ranked(row)]
    if not full:
        return list(rows)
    best = max(full, key=lambda index: rows[index].accuracy or 0.0)
    reference = rows[best].accuracy or 0.0
    p_values: dict[int, float] = {}
    for index, row in enumerate(rows):
        if index != best and _is_ranked(row):
            own, other = _paired(groups[index], groups[best])
            if own:
                p_values[index] = mcnemar(own, other)
    adjusted = dict(zip(p_values, benjamini_hochberg(list(p_values.values())), strict=True))
    return [
        replace(
            row,
            difference_to_full=row.accuracy - reference
            if index != best and _is_ranked(row) and row.accuracy is not None
            else None,
            p_value=p_values.get(index),
            p_adjusted=adjusted.get(index),
        )
        for index, row in enumerate(rows)
    ]


def _paired(first: Sequence[RunRecord], second: Sequence[RunRecord]) -> tuple[list[bool], list[bool]]:
    """Correctness of both on the same task, question and seed."""
    others = {record.config["seed"]: _correctness(record) for record in second}
    own: list[bool] = []
    other: list[bool] = []
    for record in first:
        answers, rival = _correctness(record), others.get(record.config["seed"], {})
        same = sorted(answers.keys() & rival.keys())
        own += [answers[key] for key in same]
        other += [rival[key] for key in same]
    return own, other


def _correctness(record: RunRecord) -> dict[tuple[str, str, int], bool]:
    """Correctness by task, example id and how often that id came before (equal prompts share an id)."""
    answers: dict[tuple[str, str, int], bool] = {}
    for task, score in record.tasks.items():
        seen: defaultdict[str, int] = defaultdict(int)
        for example, correct in zip(score.example_ids, score.correct, strict=True):
            answers[task, example, seen[example]] = correct
            seen[example] += 1
    return answers


def _pareto(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Mark ranked rows that no other beats in accuracy without more peak memory, or in memory without less accuracy."""
    points = {
        index: (row.accuracy, -row.peak_allocated_gib)
        for index, row in enumerate(rows)
        if _is_ranked(row) and row.accuracy is not None and row.peak_allocated_gib is not None
    }

    def beaten(point: tuple[float, float]) -> bool:
        return any(rival[0] >= point[0] and rival[1] >= point[1] and rival != point for rival in points.values())

    return [replace(row, pareto=index in points and not beaten(points[index])) for index, row in enumerate(rows)]


def _ranked(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Best first, equal accuracies sharing a rank, then what is not ranked: partly finished before failed."""
    ranked = sorted((row for row in rows if _is_ranked(row)), key=lambda row: (-(row.accuracy or 0.0), row.label))
    accuracies = [row.accuracy for row in ranked]
    below = sorted((row for row in rows if not _is_ranked(row)), key=lambda row: (-len(row.seeds), row.label))
    return [replace(row, rank=accuracies.index(row.accuracy) + 1) for row in ranked] + below


def _notes(rows: Sequence[LeaderboardRow], suite: str) -> list[str]:
    notes = []
    if any(row.p_value is not None for row in rows):
        pooled = max(len(row.seeds) for row in rows if row.p_value is not None) > 1
        notes.append(
            "p: exact McNemar against full on the same questions, Benjamini-Hochberg over this table"
            + ("; answers of all common seeds pooled, so p is too small where seeds agree" if pooled else "")
        )
    if any(row.accuracy_clean is not None for row in rows):
        clean = ", ".join(
            f"{row.label} {100 * row.accuracy_clean:.1f}" for row in rows if row.accuracy_clean is not None
        )
        notes.append(f"{suite}: training data contains AddSub, MultiArith and SingleEq; average without them: {clean}")
    if sum(_is_ranked(row) for row in rows) > 1 and all(len(row.seeds) <= 1 for row in rows):
        notes.append("one seed a row: differences between trainings are not covered by the intervals")
    return notes


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value
