"""What a leaderboard table says, in a few sentences: which row is first, and which rows can be told from it.

::

    print(findings(table))     # grass ranks first with 58.8 % ... It differs from lora at the 5 % level ...

Computed from the paired comparisons in the table's rows, whose p-values are adjusted for the number of comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence

from grass_ray.results.formats import limits, percent
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable

LEVEL = 0.05  # of a test: how often a difference is reported where there is none
_FEW = 4


def findings(table: LeaderboardTable) -> str:
    """The table in a few sentences."""
    ranked = [row for row in table.rows if row.rank is not None]
    if not ranked:
        return "No row is ranked."
    best = [row for row in ranked if row.rank == 1]
    sentences = [_first(best)] if best else []
    compared = [row for row in ranked if row.to_best is not None]
    if compared:
        sentences.append(_against_best(best, compared))
    sentences += _against_full(ranked)
    covered = {found.covers_training for row in ranked for found in (row.to_full, row.to_best) if found is not None}
    if False in covered:
        where = "Where a side has one seed" if True in covered else "With one seed on a side"
        sentences.append(f"{where}, this holds for these runs alone, not for other seeds.")
    return " ".join(sentences)


def _first(best: Sequence[LeaderboardRow]) -> str:
    row = best[0]
    interval = "" if row.accuracy_low is None else f" (95 % interval {limits(row.accuracy_low, row.accuracy_high)})"
    return f"{_names(best)} {'rank' if len(best) > 1 else 'ranks'} first with {percent(row.accuracy)} %{interval}."


def _against_best(best: Sequence[LeaderboardRow], compared: Sequence[LeaderboardRow]) -> str:
    # the row that the others were compared with; a filter may have left it out of the table
    name = next((row.label for row in best if row not in compared), "the best row")
    told = [row for row in compared if row.to_best is not None and (row.to_best.p_adjusted or 0.0) < LEVEL]
    alike = [row for row in compared if row not in told]
    if not told:
        words = f"{name} cannot be told from any other row"
    elif not alike:
        words = f"{name} is better than every other row"
    else:
        words = f"{name} is better than {_names(told)}; it cannot be told from {_names(alike)}"
    return f"At the 5 % level, corrected for the number of comparisons, {words}."


def _against_full(ranked: Sequence[LeaderboardRow]) -> list[str]:
    """Who is better or worse than full fine-tuning; nothing if full is the row of the sentence before."""
    compared = [row for row in ranked if row.to_full is not None]
    if not compared or any(row.method == "full" and row.to_best is None for row in ranked):
        return []
    told = [row for row in compared if row.to_full is not None and (row.to_full.p_adjusted or 0.0) < LEVEL]
    better = [row for row in told if row.to_full is not None and row.to_full.value > 0]
    worse = [row for row in told if row not in better]
    alike = [row for row in compared if row not in told]
    parts = [f"{_names(rows)} {_are(rows)} {word}" for rows, word in ((better, "better"), (worse, "worse")) if rows]
    parts += [f"{_names(alike)} cannot be told from it"] if alike else []
    return [f"Compared with full fine-tuning, {'; '.join(parts)}."]


def _are(rows: Sequence[LeaderboardRow]) -> str:
    return "is" if len(rows) == 1 else "are"


def _names(rows: Sequence[LeaderboardRow]) -> str:
    """``grass, lisa and lora``; the number of those that are too many."""
    shown = rows if len(rows) <= _FEW + 1 else rows[:_FEW]
    labels = [row.label for row in shown]
    if len(rows) > len(shown):
        labels.append(f"{len(rows) - len(shown)} more")
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
