"""The columns of the differences to full fine-tuning and to the best row, by accuracy and by loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from grass_ray.results.column import COMPARED, LM_EVAL, LOSS, SCOPE, Column
from grass_ray.results.formats import NONE, p_text, points, scope
from grass_ray.results.paired import Comparison, Metric, fact
from grass_ray.results.rows import LeaderboardRow

_BEST: dict[Metric, str] = {
    "accuracy": "the first row",
    "loss": "the row of the lowest loss",
    "lm_eval": "the row of the highest average of lm-eval's tasks",
}


def differences(
    name: Literal["full", "best", "base"],
    form: Callable[[Any], str],
    of: Callable[[LeaderboardRow], Comparison | None],
    *,
    metric: Metric = "accuracy",
) -> list[Column]:
    """The columns of the comparison with one reference row: the difference, its limits, and the p-values."""
    by_loss, best = metric == "loss", name == "best"
    before, words = ("", "") if metric == "accuracy" else (f"{metric}_", f"{metric.replace('_', '-')} ")
    suffix = "" if name == "full" else f"_to_{name}"
    whom = {"full": "full fine-tuning", "base": "the untrained model", "best": _BEST[metric]}[name]
    what, unit = ("difference of loss", "nats") if by_loss else ("difference", "percentage points")
    place = {"accuracy": COMPARED, "loss": LOSS, "lm_eval": LM_EVAL}[metric] + best
    place += metric == "lm_eval" and name != "base"
    return [
        Column(
            f"{before}difference_to_{name}",
            f"{words}vs {name}",
            lambda row: fact(of(row), "value"),
            form,
            f"{what} to {whom} on the same questions, in {unit}",
            interval=lambda row: fact(of(row), "limits"),
            place=place,
            share=form is points,
            small_first=by_loss,
        ),
        Column(f"{before}difference_to_{name}_low", get=lambda row: fact(of(row), "low"), small_first=by_loss),
        Column(f"{before}difference_to_{name}_high", get=lambda row: fact(of(row), "high"), small_first=by_loss),
        Column(f"{before}p_value{suffix}", get=lambda row: fact(of(row), "p_value"), small_first=True),
        Column(
            f"{before}p_adjusted{suffix}",
            f"p {words}{'' if name == 'full' else name}".strip(),
            lambda row: fact(of(row), "p_adjusted"),
            p_text,
            "of that difference, adjusted for the table",
            place=place,
            small_first=True,
        ),
    ]


def detectable(
    name: Literal["full", "best"], of: Callable[[LeaderboardRow], Comparison | None], *, metric: Metric = "accuracy"
) -> Column:
    """The smallest difference that the comparison with one reference row could have seen, for programs."""
    before = "" if metric == "accuracy" else f"{metric}_"
    return Column(f"{before}detectable_to_{name}", get=lambda row: fact(of(row), "detectable"), small_first=True)


def _scopes(row: LeaderboardRow) -> str:
    compared = {"full": row.to_full, "best": row.to_best, "loss full": row.loss_to_full, "loss best": row.loss_to_best}
    said = {name: scope(found.covers_training) for name, found in compared.items() if found is not None}
    if len(set(said.values())) < 2:
        return next(iter(said.values()), NONE)
    return ", ".join(f"{name}: {words}" for name, words in said.items())


P_FOR = Column(
    "p_for",
    "p for",
    _scopes,
    meaning="what the differences and p-values speak of: any seeds and questions, or questions and these runs alone",
    place=SCOPE,
    sortable=False,
    data=False,
    words=True,
)
