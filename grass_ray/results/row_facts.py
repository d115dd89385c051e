"""Facts of a leaderboard row from the records of its seeds: losses, held-out text, forgetting, lm-eval's own tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from grass_ray.results.paired import Comparison
from grass_ray.results.record import RunRecord
from grass_ray.tasks.lm_eval_scores import average, is_averaged
from grass_ray.tasks.scores import MOST_NATS
from grass_ray.training.report import FORGETTING


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A row's result on one of lm-eval's own tasks.

    Attributes:
        metric: name of the metric.
        value: mean over seeds.
        stderr: lm-eval's standard error over the examples, the mean over seeds; None if it gives none.
        is_share: whether its values are from 0 to 1 for each example, so that it is shown in percent.
        to_base: comparison with the untrained model, example by example; None if nothing can be compared.
    """

    metric: str
    value: float
    stderr: float | None
    is_share: bool
    to_base: Comparison | None = None


def losses(finished: Sequence[RunRecord]) -> dict[str, Any]:
    """The row's losses; nothing unless every seed has finite ones on every task."""
    found = {}
    for task in finished[0].tasks if finished else ():
        scores = [record.tasks[task] for record in finished if task in record.tasks]
        seeds = [losses for score in scores if (losses := score.losses)]
        found[task] = [fmean(losses) for losses in seeds if all(map(math.isfinite, losses))]
    if not found or any(len(seeds) < len(finished) for seeds in found.values()):
        return {}
    averages = [fmean(own) for own in zip(*found.values(), strict=True)]
    return {
        "loss": fmean(averages),
        "loss_std": stdev(averages) if len(averages) > 1 else None,
        "task_losses": {task: fmean(seeds) for task, seeds in found.items()},
    }


def of_texts(finished: Sequence[RunRecord]) -> dict[str, Any]:
    """Loss on held-out text, and what was forgotten; nothing unless every seed has it."""
    found: dict[str, Any] = {}
    forgotten = values(finished, FORGETTING)
    if forgotten and len(forgotten) == len(finished):
        found["forgetting"] = fmean(forgotten)
        found["forgetting_std"] = stdev(forgotten) if len(forgotten) > 1 else None
        texts = [record.data.get(FORGETTING, {}) for record in finished]
        found["forgetting_texts"] = tuple(sorted({f"{t.get('name')} {str(t.get('sha256'))[:8]}" for t in texts}))
    losses = [score.text_loss for record in finished for score in record.tasks.values()]
    known = [loss for loss in losses if loss is not None]
    if known and len(known) == len(losses):
        found["bits_per_byte"] = fmean(loss.bits_per_byte for loss in known)
        found["perplexity"] = math.exp(min(fmean(loss.nats_per_token for loss in known), MOST_NATS))
    return found


def of_lm_eval(finished: Sequence[RunRecord]) -> dict[str, Any]:
    """The results of lm-eval's own tasks that every seed has."""
    found = {}
    for task in finished[0].lm_eval if finished else ():
        scores = [record.lm_eval[task] for record in finished if task in record.lm_eval]
        errors = [score.stderr for score in scores if score.stderr is not None]
        if len(scores) == len(finished):
            found[task] = Benchmark(
                metric=scores[0].metric,
                value=fmean(score.value for score in scores),
                stderr=fmean(errors) if len(errors) == len(scores) else None,
                is_share=all(map(is_averaged, scores)),
            )
    averages = [mean for record in finished if (mean := average(record.lm_eval)) is not None]
    if not found or len(averages) < len(finished):
        return {"lm_eval_tasks": found}
    std = stdev(averages) if len(averages) > 1 else None
    return {"lm_eval_tasks": found, "lm_eval": fmean(averages), "lm_eval_std": std}


def memory_and_size(group: Sequence[RunRecord], finished: Sequence[RunRecord]) -> dict[str, Any]:
    """The most of all seeds, or a mean, of what was measured."""
    found: dict[str, Any] = {
        name: max(values(group, f"memory/{name}"), default=None)
        for name in ("peak_allocated_gib", "peak_reserved_gib", "host_pinned_gib", "p99_reserved_gib")
    }
    means = values(finished, "memory/mean_reserved_gib")
    found["mean_reserved_gib"] = fmean(means) if means else None
    found["checkpoint_mib"] = max(values(group, "checkpoint/mib"), default=None)
    return found


def values(group: Iterable[RunRecord], metric: str) -> list[float]:
    """The finite values of a metric, of the records that have it."""
    return [value for record in group if math.isfinite(value := record.metrics.get(metric, math.nan))]
