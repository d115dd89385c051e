"""What a search of learning rates found, from the files ``search/*.json`` beside a result's records.

::

    searches = load_rate_searches(folder)
    searches[0].method, searches[0].best, searches[0].at_edge
    lines = rate_table(records, searches)

A file is either the record of one run, judged by its loss on held-out training rows, or has the name of a method and
maps each rate that was tried to that loss in nats, infinite where training failed. Files may be compressed
(``*.json.gz``). ``settings.yaml``, which every sweep's ``--settings`` takes, holds the best rate of each method.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from grass_ray.config import ConfigError, read_text
from grass_ray.reading import parse_json, reason
from grass_ray.results.record import RunRecord
from grass_ray.training.report import VALIDATION

SEARCH, SETTINGS = "search", "settings.yaml"
ANSWER_LOSS = "test/answer_loss"
_HEADER = (
    "| method | test answer loss, mean of seeds | spread | learning rate | at the edge | held-out loss by rate |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True, kw_only=True)
class RateSearch:
    """The rates that a method tried.

    Attributes:
        method: whose rate was searched.
        suite: on which suite; None if there is only one.
        losses: loss of each rate, from the smallest rate, which are texts as Python writes numbers.
    """

    method: str
    suite: str | None
    losses: Mapping[str, float]

    @property
    def label(self) -> str:
        """The method, and the suite if there may be several."""
        return self.method if self.suite is None else f"{self.method} on {self.suite}"

    @property
    def best(self) -> str:
        """The rate with the lowest loss."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def at_edge(self) -> bool:
        """Whether the best is the smallest or the largest of those tried, so that a better one may lie beyond."""
        rates = list(self.losses)
        return self.best in (rates[0], rates[-1])


def search_files(folder: Path) -> list[Path]:
    """The files of a result's searches, sorted."""
    return [path for path in sorted((folder / SEARCH).glob("*")) if path.name.endswith((".json", ".json.gz"))]


def is_record(path: Path) -> bool:
    """Whether a file of a search is the record of one run; else it maps rates to losses."""
    values = _values(path)
    return isinstance(values, dict) and "run_id" in values


def _values(path: Path) -> Any:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {reason(error)}") from None
    return parse_json(text, str(path))


def load_rate_searches(folder: Path) -> list[RateSearch]:
    """The searches of a result's folder, without methods that have no rate to search.

    Raises:
        ConfigError: a file cannot be read.
    """
    found = []
    records = []
    for path in search_files(folder):
        if is_record(path):
            records.append(RunRecord.load(path))
            continue
        try:
            losses = {float(rate): float(loss) for rate, loss in _values(path).items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path} is no search of learning rates: {error}; it maps rates to losses") from None
        if losses:
            found.append(RateSearch(method=path.name.split(".json")[0], suite=None, losses=_sorted(losses)))
    return found + _of_records(records)


def _of_records(records: Iterable[RunRecord]) -> list[RateSearch]:
    tried: defaultdict[tuple[str, str], defaultdict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        method, loss = record.config["method"], record.metrics.get(VALIDATION, math.inf)
        rates = tried[method["name"], record.config["data"]["suite"]]
        rates[method["optimizer"]["lr"]].append(loss if math.isfinite(loss) else math.inf)
    return [
        RateSearch(method=method, suite=suite, losses=_sorted({rate: fmean(own) for rate, own in rates.items()}))
        for (method, suite), rates in tried.items()
    ]


def _sorted(losses: Mapping[float, float]) -> dict[str, float]:
    return {repr(rate): losses[rate] for rate in sorted(losses)}


def search_of(record: RunRecord, searches: Iterable[RateSearch]) -> RateSearch | None:
    """The search that a run's learning rate was chosen by; None if there is none."""
    method, suite = record.config["method"]["name"], record.config["data"]["suite"]
    return next((own for own in searches if own.method == method and own.suite in (None, suite)), None)


def render_settings(searches: Iterable[RateSearch]) -> str:
    """``settings.yaml`` of these searches."""
    settings = {search.method: [f"method.optimizer.lr={search.best}"] for search in searches}
    return yaml.safe_dump({"methods": settings})


def rate_table(records: Sequence[RunRecord], searches: Sequence[RateSearch]) -> list[str]:
    """Lines of a Markdown table: each method's loss on test answers and what its rate was chosen from, best first."""
    by_method: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        by_method[record.config["method"]["name"]].append(record)
    rows = []
    for method, own in by_method.items():
        losses = [record.metrics.get(ANSWER_LOSS, math.nan) for record in own]
        mean = fmean(losses)
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "-"
        rate = edge = tried = "-"
        if (search := search_of(own[0], searches)) is not None:
            rate, edge = search.best, "yes" if search.at_edge else "no"
            tried = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in search.losses.items())
        rows.append((math.isnan(mean), mean, f"| {method} | {mean:.4f} | {spread} | {rate} | {edge} | {tried} |"))
    return [*_HEADER, *(text for _, _, text in sorted(rows))]
