"""From the verdict's records to its answers, as PLAN.md says. Pure functions of the records.

runs = group(records)                            # {data set: {row: records}}
findings = compare(runs, "uniform")              # every row against uniform, data set by data set
answer(runs)                                     # "yes", "uniform is better", "no difference that matters", ...
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Literal

import numpy as np
from experiment import DATA, ROWS
from scipy.stats import false_discovery_control, spearmanr

from grass_ray.results.paired import Answers, Comparison, Metric, collect_answers, compare_answers
from grass_ray.results.power import SeedSpread, with_detectable
from grass_ray.results.record import RunRecord

MARGIN = 0.1  # of what uniform gained: differences within it do not matter
QUESTIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "Q1": (("grass", "uniform"),),
    "Q2": (("inverse", "uniform"), ("top", "uniform"), ("grass", "inverse"), ("grass", "top")),
    "Q3": (("grass", "grass-static"),),
    "Q4": tuple(("grass", rival) for rival in ("full", "lora", "lisa", "badam", "dora")),
}

Runs = Mapping[str, Mapping[str, Sequence[RunRecord]]]
Verdict = Literal["yes", "uniform is better", "no difference that matters", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A difference in loss between two rows on one data set, in nats: first minus second."""

    question: str
    data: str
    first: str
    second: str
    comparison: Comparison


def group(records: Iterable[RunRecord]) -> Runs:
    """Records by data set and row, in the plan's order, each row's by seed."""
    found: defaultdict[tuple[str, str], list[RunRecord]] = defaultdict(list)
    for record in records:
        found[record.sweep_id.removeprefix("verdict-"), record.config["method"]["name"]].append(record)
    return {
        data: {
            row: sorted(found[data, row], key=lambda record: int(record.config["seed"]))
            for row in ROWS
            if (data, row) in found
        }
        for data in DATA
        if any(name == data for name, _ in found)
    }


def answers(runs: Runs, data: str, row: str, metric: Metric = "loss") -> Answers:
    """What every seed of a row made of every question."""
    return collect_answers(runs[data].get(row, ()), metric)


def losses(runs: Runs, data: str, row: str) -> list[float]:
    """The loss of each finished seed: the mean over tasks of the mean over questions, in nats."""
    finished = [record for record in runs[data].get(row, ()) if record.status == "finished"]
    return [fmean(fmean(score.losses or [math.nan]) for score in record.tasks.values()) for record in finished]


def compare(runs: Runs, second: str, metric: Metric = "loss") -> dict[str, dict[str, Comparison]]:
    """For each data set every other trained row against ``second``."""
    found: dict[str, dict[str, Comparison]] = {}
    for data, rows in runs.items():
        other = answers(runs, data, second, metric)
        pairs = {row: compare_answers(answers(runs, data, row, metric), other) for row in rows if row != second}
        found[data] = {row: one for row, one in pairs.items() if one is not None}
    return found


def ask(runs: Runs, question: str) -> list[Finding]:
    """The comparisons of one question, p-values adjusted as planned; those whose runs are missing are left out."""
    found = []
    spread = {data: seed_spread(runs, data) for data in runs}
    for first, second in QUESTIONS[question]:
        for data in runs:
            one = compare_answers(answers(runs, data, first), answers(runs, data, second))
            if one is not None:
                one = with_detectable({0: one}, spread[data])[0]
                found.append(Finding(question=question, data=data, first=first, second=second, comparison=one))
    p_values = [finding.comparison.p_value for finding in found]
    adjusted = holm(p_values) if question == "Q1" else list(false_discovery_control(p_values)) if found else []
    return [
        replace(finding, comparison=replace(finding.comparison, p_adjusted=float(p)))
        for finding, p in zip(found, adjusted, strict=True)
    ]


def seed_spread(runs: Runs, data: str) -> SeedSpread:
    """The spread of losses over seeds, pooled over all rows of a data set."""
    spread = SeedSpread()
    for row in runs[data]:
        spread.add(answers(runs, data, row))
    return spread


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method, in the given order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def answer(runs: Runs) -> Verdict:
    """The answer to Q1."""
    found = ask(runs, "Q1")
    lower = [f for f in found if f.comparison.told_apart and f.comparison.value < 0]
    higher = [f for f in found if f.comparison.told_apart and f.comparison.value > 0]
    if len(lower) >= 2 and not higher:
        return "yes"
    if len(higher) >= 2 and not lower:
        return "uniform is better"
    margins = {data: MARGIN * gain(runs, data) for data in runs}
    inside = [max(map(abs, f.comparison.limits)) <= margins[f.data] for f in found]
    return "no difference that matters" if len(inside) == len(DATA) and all(inside) else "undecided"


def gain(runs: Runs, data: str) -> float:
    """What ``uniform`` gained over the untrained model, in nats."""
    return fmean(losses(runs, data, "base")) - fmean(losses(runs, data, "uniform"))


# -------------------------------------------------------------------------------------------------- sampling behaviour


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What the draws of a row did, means over its seeds.

    Attributes:
        effective: exponential of the entropy of the probabilities: over how many layers the draws were spread.
        distinct: layers that trained at all.
        kept: share of a draw's layers that the draw before had, too.
        age: steps since a layer's importance was last measured, the mean over layers at refreshes.
        moved: 1 - Spearman's correlation of the importance before training and at the last refresh.
        favourites: the layers that trained most, over all seeds.
    """

    effective: float
    distinct: float
    kept: float
    age: float
    moved: float
    favourites: tuple[int, ...]


def sampling(records: Sequence[RunRecord]) -> Sampling | None:
    """How the layers of a row were drawn; None if it draws none or has no importance."""
    traces = [record.layers for record in records if record.layers is not None and record.layers.refreshes]
    if not traces:
        return None
    spread, kept, ages, moved = [], [], [], []
    visits = np.zeros(len(traces[0].visits))
    for trace in traces:
        visits += trace.visits
        for _, _, probabilities in trace.refreshes:
            p = np.array(probabilities)
            spread.append(math.exp(-float((p[p > 0] * np.log(p[p > 0])).sum())))
        kept += [len(set(now) & set(before)) / len(now) for (_, before), (_, now) in pairwise(trace.intervals)]
        ages += [float(np.nanmean(age)) for step, age in trace.ages if step > trace.refreshes[0][0]]
        first, last = (np.array(trace.refreshes[place][1]) for place in (0, -1))
        if len(trace.refreshes) > 1:
            moved.append(1 - float(spearmanr(first, last).statistic))
    return Sampling(
        effective=fmean(spread),
        distinct=fmean(sum(number > 0 for number in trace.visits) for trace in traces),
        kept=fmean(kept) if kept else math.nan,
        age=fmean(ages) if ages else math.nan,
        moved=fmean(moved) if moved else math.nan,
        favourites=tuple(int(layer) for layer in np.argsort(-visits, kind="stable")[:5]),
    )
