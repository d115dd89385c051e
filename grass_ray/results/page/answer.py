"""What a leaderboard table says, in a few sentences: which row is best, and which rows can be told from it.

::

    print(findings(table))     # grass has the highest accuracy, 58.8 % ... grass is better than lora; it cannot ...

Computed from the paired comparisons in the table's rows, whose p-values are adjusted for the number of comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence

from grass_ray.results.formats import limits, nats, percent
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
from grass_ray.results.paired import Comparison

_FEW = 4


def findings(table: LeaderboardTable) -> str:
    """The table in a few sentences."""
    ranked = [row for row in table.rows if row.rank is not None]
    if not ranked:
        return "No row is ranked."
    best = [row for row in ranked if row.rank == 1]
    sentences = []
    if table.metric == "accuracy":
        sentences += [_highest(best)] if best else []
        sentences += _against_best(best, [(row, row.to_best) for row in ranked])
        sentences += _against_full([(row, row.to_full) for row in ranked])
    if table.metric == "lm_eval" and best:
        have = "have" if len(best) > 1 else "has"
        sentences.append(f"{_names(best)} {have} the highest average of lm-eval's tasks, {percent(best[0].lm_eval)} %.")
        sentences += _against_best(best, [(row, row.lm_eval_to_best) for row in ranked])
    sentences += _by_loss([row for row in ranked if row.loss is not None])
    by_lm_eval = [row.lm_eval_to_best for row in ranked if table.metric == "lm_eval"]
    pairs = [found for row in ranked for found in (row.to_full, row.to_best, row.loss_to_best)]
    compared = [found for found in (*pairs, *by_lm_eval) if found is not None]
    covered = {found.covers_training for found in compared}
    if False in covered:
        where = "Where a side has one seed" if True in covered else "With one seed on a side"
        sentences.append(f"{where}, this holds for these runs alone, not for other seeds.")
    return " ".join(sentences)


def _highest(best: Sequence[LeaderboardRow]) -> str:
    row = best[0]
    interval = "" if row.accuracy_low is None else f" (95 % interval {limits(row.accuracy_low, row.accuracy_high)})"
    have = "have" if len(best) > 1 else "has"
    return f"{_names(best)} {have} the highest accuracy, {percent(row.accuracy)} %{interval}."


def _by_loss(measured: Sequence[LeaderboardRow]) -> list[str]:
    """Which row has the lowest loss, and which can be told from it; nothing if there is nothing to compare."""
    lowest = [row for row in measured if row.loss_to_best is None]
    pairs = [(row, row.loss_to_best) for row in measured]
    first = [f"{_names(lowest)} has the lowest loss, {nats(lowest[0].loss)} nats."] if len(lowest) == 1 else []
    against_full = _against_full([(row, row.loss_to_full) for row in measured], by_loss=True)
    return first + _against_best(lowest, pairs, by_loss=True) + against_full


_Pairs = Sequence[tuple[LeaderboardRow, Comparison | None]]


def _against_best(best: Sequence[LeaderboardRow], pairs: _Pairs, *, by_loss: bool = False) -> list[str]:
    """Which rows can be told from the best, which is compared with nothing; nothing if no row was compared."""
    compared = [(row, found) for row, found in pairs if found is not None]
    if not compared:
        return []
    alone = [row for row, found in pairs if found is None]
    # the row that the others were compared with; a filter may have left it out of the table
    name = next((row.label for row in best if row in alone), "the best row")
    told = [row for row, found in compared if found.told_apart]
    alike = [row for row, found in compared if not found.told_apart]
    if not told:
        words = f"{name} cannot be told from any other row"
    elif not alike:
        words = f"{name} is better than every other row"
    else:
        words = f"{name} is better than {_names(told)}; it cannot be told from {_names(alike)}"
    by = "by loss, " if by_loss else ""
    return [f"At the 5 % level, corrected for the number of comparisons, {by}{words}."]


def _against_full(pairs: _Pairs, *, by_loss: bool = False) -> list[str]:
    """Who is better or worse than full fine-tuning; nothing if full is the best row, of the sentence before."""
    compared = [(row, found) for row, found in pairs if found is not None]
    best = [row for row, _ in pairs if (row.loss_to_best if by_loss else row.to_best) is None]
    if not compared or any(row.method == "full" for row in best):
        return []
    told = [(row, (found.value < 0) == by_loss) for row, found in compared if found.told_apart]
    better, worse = ([row for row, is_better in told if is_better is wanted] for wanted in (True, False))
    alike = [row for row, found in compared if not found.told_apart]
    parts = [f"{_names(rows)} {_are(rows)} {word}" for rows, word in ((better, "better"), (worse, "worse")) if rows]
    parts += [f"{_names(alike)} cannot be told from it"] if alike else []
    return [f"Compared with full fine-tuning{' by loss' if by_loss else ''}, {'; '.join(parts)}."]


def _are(rows: Sequence[LeaderboardRow]) -> str:
    return "is" if len(rows) == 1 else "are"


def _names(rows: Sequence[LeaderboardRow]) -> str:
    """``grass, lisa and lora``; the number of those that are too many."""
    shown = rows if len(rows) <= _FEW + 1 else rows[:_FEW]
    labels = [row.label for row in shown]
    if len(rows) > len(shown):
        labels.append(f"{len(rows) - len(shown)} more")
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
