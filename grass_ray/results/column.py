"""What a column of a leaderboard is: how a fact is computed from a row, and how every output shows it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grass_ray.results.formats import NONE, limits
from grass_ray.results.rows import LeaderboardRow

Cell = Callable[[LeaderboardRow], str]
Interval = Callable[[LeaderboardRow], tuple[float, float] | None]

# Where a column stands in tables for people: those of the ranking, then those of its details, of
# lm-eval's own tasks, and the status.
RANKING, COMPARED, LOSS, SCOPE, COST, DETAILS, LM_EVAL, END = 0, 20, 24, 28, 30, 100, 190, 200


def _as_text(value: Any) -> str:
    return NONE if value is None else str(value)


@dataclass(frozen=True)
class Column:
    """One fact about a row, and how every output shows it.

    Args:
        key: its name in JSON, in CSV, and for ``--sort``.
        name: its heading in tables for people; without one it is for programs alone.
        get: the value: a number, text, bool, list or None; by default the row's attribute ``key``.
        form: the value as text for people.
        meaning: one line for readers who do not know the heading.
        text: the cell for people where it says more than the value.
        interval: the value's 95 % limits, which the page shows beside it.
        place: where it stands in tables for people, from the left; those of equal place in the order of ``COLUMNS``.
        small_first: whether small values are good, so that ``--sort`` begins with them.
        sortable: whether ``--sort`` takes it.
        data: whether JSON and CSV have it.
        share: whether the value is a share from 0 to 1 and MLflow's table shows percent.
        mlflow: its name in MLflow's table, by default ``name``; empty: it is not there.
        plain: the cell of MLflow's table where it is not the value.
        always: shown even where no row has a value.
        words: whether it is text, aligned left.
    """

    key: str
    name: str = ""
    get: Callable[[LeaderboardRow], Any] | None = None
    form: Callable[[Any], str] = _as_text
    meaning: str = ""
    text: Cell | None = None
    interval: Interval | None = None
    place: int = DETAILS + 50
    small_first: bool = False
    sortable: bool = True
    data: bool = True
    share: bool = False
    mlflow: str | None = None
    plain: Cell | None = None
    always: bool = False
    words: bool = False

    def raw(self, row: LeaderboardRow) -> Any:
        """The value as plain JSON; a number that is not finite becomes None."""
        return _plain(getattr(row, self.key) if self.get is None else self.get(row))

    def value(self, row: LeaderboardRow) -> float | str | None:
        """What the row is sorted by: the value, of a list its length."""
        value = self.raw(row)
        return len(value) if isinstance(value, list) else value

    def cell(self, row: LeaderboardRow) -> str:
        """The value as text for people."""
        return self.form(self.value(row)) if self.text is None else self.text(row)

    def cell_with_interval(self, row: LeaderboardRow) -> str:
        """The same with 95 % limits where the column has them."""
        found = None if self.interval is None else self.interval(row)
        return self.cell(row) + ("" if found is None else f" ({limits(*found, self.form)})")

    def overview(self, row: LeaderboardRow) -> Any:
        """The value for MLflow's table."""
        if self.plain is not None:
            return self.plain(row)
        value = self.value(row)
        return round(100 * value, 2) if self.share and isinstance(value, float) else value


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value
