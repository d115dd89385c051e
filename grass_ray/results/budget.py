"""Whether the rows of a leaderboard had the same budget: steps, rows a step, tokens, learning rates tried, data.

::

    print(budget_line(table.rows))            # "same budget: ..." or "budgets differ: ..."
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from grass_ray.results.record import RunRecord
from grass_ray.results.rows import LeaderboardRow
from grass_ray.results.searches import searched

_SAME_TOKENS = 0.01  # batches of other lengths are another shuffle, not another budget


def budget_line(rows: Sequence[LeaderboardRow], records: Sequence[RunRecord] = ()) -> str | None:
    """One sentence on the trained rows' budgets, None where none was trained.

    Learning rates are those that the table's own runs tried, and searches those among its ``records``; a search outside
    them is not recorded.
    """
    trained = [row for row in rows if row.trained]
    if not trained:
        return None
    parts: list[tuple[bool, str]] = [
        _values(trained, lambda row: f"{row.training_steps:,} steps"),
        _values(trained, lambda row: f"{row.batch_size} rows a step"),
        *_tokens(trained),
        _values(trained, lambda row: _tried(row.learning_rates_tried)),
    ]
    searches = {method: _searched(own) for method, own in searched(records).items()}
    if searches:
        parts.append(_values(trained, lambda row: searches.get(row.method, "no search")))
    if known := [row for row in trained if row.data_sha256]:  # a run that failed early has read none
        same, text = _values(known, lambda row: " and ".join(hashed[:8] for hashed in row.data_sha256))
        parts.append((True, "the same training rows") if same else (False, f"training rows by hash: {text}"))
    if known := [row for row in trained if row.train_rows is not None]:
        same, text = _values(known, lambda row: f"{row.train_rows:,} rows trained on")
        parts += [] if same else [(False, text)]
    equal = [text for same, text in parts if same]
    other = [text for same, text in parts if not same]
    if not other:
        return f"same budget: {', '.join(equal)}"
    return f"budgets differ: {'; '.join(other)}" + (f"; the same: {', '.join(equal)}" if equal else "")


def _searched(records: Sequence[RunRecord]) -> str:
    """How many trials a method's search had and how long they might become; the steps taken are fewer with ASHA."""
    steps = max(record.config["training"]["steps"] for record in records)
    return f"a search of {len(records)} trials of at most {steps:,} steps"


def _tried(number: int) -> str:
    return f"{number} learning rate{'' if number == 1 else 's'} tried in these runs"


def _values(rows: Sequence[LeaderboardRow], text: Callable[[LeaderboardRow], str]) -> tuple[bool, str]:
    """Whether a property is the same in all rows, and the property or who has which."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.method not in found[text(row)]:
            found[text(row)].append(row.method)
    if len(found) == 1:
        return True, next(iter(found))
    most = max(found, key=lambda value: len(found[value]))
    named = [f"{value} ({_some(methods)})" for value, methods in found.items() if value != most]
    return False, f"{most} (most rows), " + ", ".join(named)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


def _tokens(rows: Sequence[LeaderboardRow]) -> list[tuple[bool, str]]:
    known = [(row.train_tokens, row.label) for row in rows if row.train_tokens is not None]
    if not known:
        return []
    least, most = min(known), max(known)
    if most[0] - least[0] <= _SAME_TOKENS * most[0]:
        return [(True, f"{_count(most[0])} tokens")]
    extremes = f"{_count(least[0])} ({least[1]}) to {_count(most[0])} ({most[1]})"
    return [(False, f"tokens read, those for measuring included: {extremes}")]


def _count(tokens: float) -> str:
    return f"{tokens / 1e6:.2f} M" if tokens >= 1e6 else f"{tokens / 1e3:.1f} k" if tokens >= 1e3 else f"{tokens:.0f}"
