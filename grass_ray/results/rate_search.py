"""What a search of learning rates found: files ``search/METHOD.json`` beside a result's records.

::

    searches = load_rate_searches(folder)
    searches["grass"].best, searches["grass"].at_edge
    lines = rate_table(records, searches)

A file maps each rate that was tried to the loss in nats on held-out rows, infinite where training failed.
``settings.yaml`` beside it, which every sweep's ``--settings`` takes, holds the best rate of each method.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import yaml

from grass_ray.config import ConfigError
from grass_ray.results.record import RunRecord

SEARCH, SETTINGS = "search", "settings.yaml"
ANSWER_LOSS = "test/answer_loss"
_HEADER = (
    "| method | test answer loss, mean of seeds | spread | learning rate | at the edge | held-out loss by rate |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True, kw_only=True)
class RateSearch:
    """The rates that a method tried, as they were written, from the smallest, with their losses."""

    losses: Mapping[str, float]

    @property
    def best(self) -> str:
        """The rate with the lowest loss."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def at_edge(self) -> bool:
        """Whether the best is the smallest or the largest of those tried, so that a better one may lie beyond."""
        return float(self.best) in (min(map(float, self.losses)), max(map(float, self.losses)))


def load_rate_searches(folder: Path) -> dict[str, RateSearch]:
    """The searches of a result's folder by method, without methods that have no rate to search.

    Raises:
        ConfigError: a file cannot be read.
    """
    found = {}
    for path in sorted((folder / SEARCH).glob("*.json")):
        try:
            losses = {str(float(rate)): float(loss) for rate, loss in json.loads(path.read_text("utf-8")).items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path} is no search of learning rates: {error}; it maps rates to losses") from None
        if losses:
            found[path.stem] = RateSearch(losses=losses)
    return found


def render_settings(searches: Mapping[str, RateSearch]) -> str:
    """``settings.yaml`` of these searches."""
    settings = {method: [f"method.optimizer.lr={search.best}"] for method, search in searches.items()}
    return yaml.safe_dump({"methods": settings})


def rate_table(records: Sequence[RunRecord], searches: Mapping[str, RateSearch]) -> list[str]:
    """Lines of a Markdown table: each method's loss on test answers and what its rate was chosen from, best first."""
    by_method: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        by_method[record.config["method"]["name"]].append(record.metrics.get(ANSWER_LOSS, math.nan))
    rows = []
    for method, losses in by_method.items():
        mean = fmean(losses)
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "-"
        rate = edge = tried = "-"
        if (search := searches.get(method)) is not None:
            rate, edge = search.best, "yes" if search.at_edge else "no"
            tried = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in search.losses.items())
        rows.append((math.isnan(mean), mean, f"| {method} | {mean:.4f} | {spread} | {rate} | {edge} | {tried} |"))
    return [*_HEADER, *(text for _, _, text in sorted(rows))]
