"""Whether a rerun agrees with its record, number by number.

::

    checks = compare_records(recorded, rerun)
    reproduced = all(check.agrees is not False for check in checks)

Losses, learning rates, gradient norms, what the sampler did, accuracies and every example's answer must be equal in
every bit. Seconds, tokens per second and memory depend on the machine's other work: they are shown only.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grass_ray.results.record import LmEvalScore, RunRecord, TaskScore
from grass_ray.training.report import PHASE, STALL_S, TOKENS, TRAIN_STEP, LayerTrace

Point = tuple[int, float]
ExtractedAnswers = Mapping[tuple[str, str], Sequence[str | None]]  # of (task, example id), in the order of the file

# the rest is of the machine: time, throughput, memory, offload
_DECIDING = ("train/", "eval/", "lm_eval/", "validation/", "forgetting", "layers/", TOKENS, PHASE, TRAIN_STEP)
_SINCE_SCHEMA_2 = {TOKENS, PHASE, TRAIN_STEP, STALL_S}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing compared. ``agrees`` is None for what is only shown."""

    what: str
    agrees: bool | None
    detail: str


def compare_records(
    recorded: RunRecord,
    rerun: RunRecord,
    answers: ExtractedAnswers | None = None,
    new_answers: ExtractedAnswers | None = None,
) -> list[Check]:
    """Compare everything that both runs measured.

    Args:
        recorded: the original. Of one that was stopped, the steps it came to count.
        rerun: the same configuration, run again.
        answers: what the original extracted from every example's output, where that is still known.
        new_answers: the same of the rerun.
    """
    checks = [_end(recorded, rerun)]
    partial = recorded.status == "stopped"
    stems: defaultdict[str, list[str]] = defaultdict(list)
    new = _SINCE_SCHEMA_2 - recorded.series.keys()  # an earlier version did not record these
    for name in sorted((recorded.series.keys() | rerun.series.keys()) - new):
        stems[re.sub(r"_\d+$", "", name)].append(name)
    for stem, names in stems.items():
        alone = [
            _series(name, recorded.series.get(name, []), rerun.series.get(name, []), cut=partial) for name in names
        ]
        checks += _as_one(f"{stem} of every layer, every step", alone) if len(alone) > 1 else alone
    if partial:
        return checks
    if recorded.layers is not None or rerun.layers is not None:
        checks += _layers(recorded.layers, rerun.layers)
    for name in sorted(recorded.metrics.keys() | rerun.metrics.keys()):
        if name.startswith("layers/"):  # the visits, which are compared above
            continue
        checks.append(_metric(name, recorded.metrics.get(name), rerun.metrics.get(name)))
    for task in sorted(recorded.tasks.keys() | rerun.tasks.keys()):
        checks += _task(task, recorded.tasks.get(task), rerun.tasks.get(task))
    for task in sorted(recorded.lm_eval.keys() | rerun.lm_eval.keys()):
        checks.append(_benchmark(task, recorded.lm_eval.get(task), rerun.lm_eval.get(task)))
    if answers is not None and new_answers is not None:
        checks.append(_answers(answers, new_answers))
    return checks


def _end(recorded: RunRecord, rerun: RunRecord) -> Check:
    if recorded.status == "stopped":
        steps = max((points[-1][0] for points in recorded.series.values() if points), default=0)
        return Check(what="status", agrees=None, detail=f"the original was stopped; its {steps} steps are compared")
    same = (recorded.status, recorded.failure) == (rerun.status, rerun.failure)
    old, new = (f"{r.status}{f': {r.failure}' if r.failure else ''}" for r in (recorded, rerun))
    return Check(what="status", agrees=same, detail=old if same else f"{old}; now {new}")


def _series(name: str, old: Sequence[Point], new: Sequence[Point], *, cut: bool) -> Check:
    what = f"{name}, every step"
    if cut and old:
        new = [point for point in new if point[0] <= old[-1][0]]
    if not name.startswith(_DECIDING):
        return Check(what=what, agrees=None, detail=_ratio(_mean(old), _mean(new), "on average "))
    if [step for step, _ in old] != [step for step, _ in new]:
        return Check(what=what, agrees=False, detail=f"{len(old)} steps recorded, {len(new)} now")
    differing = [(step, a, b) for (step, a), (_, b) in zip(old, new, strict=True) if not _same(a, b)]
    if not differing:
        return Check(what=what, agrees=True, detail=f"{len(old)} values, the same in every bit")
    step, a, b = differing[0]
    largest = max((abs(x - y) for _, x, y in differing), default=0.0)
    return Check(
        what=what,
        agrees=False,
        detail=f"{len(differing)} of {len(old)} values differ, by {largest:.3g} at most; "
        f"the first at step {step}: {a!r}, now {b!r}",
    )


def _as_one(what: str, checks: list[Check]) -> list[Check]:
    """One line for the series of all layers if they agree, else those that differ."""
    differing = [check for check in checks if check.agrees is False]
    if differing:
        return differing
    return [Check(what=what, agrees=True, detail=f"{len(checks)} series, the same in every bit")]


def _metric(name: str, old: float | None, new: float | None) -> Check:
    if not name.startswith(_DECIDING):
        return Check(what=name, agrees=None, detail=_ratio(old, new))
    if old is None or new is None:
        return Check(what=name, agrees=False, detail="not recorded, there now" if old is None else "recorded, gone now")
    if _same(old, new):
        return Check(what=name, agrees=True, detail=f"{old:.10g}")
    return Check(what=name, agrees=False, detail=f"{old!r}, now {new!r} ({new - old:+.3g})")


def _ratio(old: float | None, new: float | None, prefix: str = "") -> str:
    if old is None or new is None or not (math.isfinite(old) and math.isfinite(new)):
        return f"{prefix}{'-' if old is None else f'{old:.4g}'}, now {'-' if new is None else f'{new:.4g}'}"
    change = f" ({new / old:.2f} times)" if old else ""
    return f"{prefix}{old:.4g}, now {new:.4g}{change}"


def _mean(points: Sequence[Point]) -> float | None:
    return sum(value for _, value in points) / len(points) if points else None


def _layers(old: LayerTrace | None, new: LayerTrace | None) -> list[Check]:
    if old is None or new is None:
        return [Check(what="layers", agrees=False, detail="recorded for only one of the two")]
    checks = []
    for name in ("intervals", "refreshes", "visits", "trainable_parameters", "only_active_layers_changed"):
        a, b = getattr(old, name), getattr(new, name)
        size = f"{len(a)} entries" if isinstance(a, list) else str(a)
        same = _same(a, b)
        detail = f"{size}, the same" if same else f"{size}, others now{_first_difference(a, b)}"
        checks.append(Check(what=f"layers: {name.replace('_', ' ')}", agrees=same, detail=detail))
    return checks


def _first_difference(old: Any, new: Any) -> str:
    if not isinstance(old, list):
        return f": {new}"
    for a, b in zip(old, new, strict=False):
        if not _same(a, b):
            return f": first {a}, now {b}"
    return f": {len(new)} of them"


def _task(task: str, old: TaskScore | None, new: TaskScore | None) -> list[Check]:
    if old is None or new is None:
        return [Check(what=f"{task}: questions", agrees=False, detail="evaluated in only one of the two")]
    if old.example_ids != new.example_ids:
        return [
            Check(
                what=f"{task}: questions",
                agrees=False,
                detail=f"other questions: {len(old.example_ids)} recorded, {len(new.example_ids)} now, "
                f"{len(set(old.example_ids) & set(new.example_ids))} in both",
            )
        ]
    losses = _losses(task, old, new)
    if old.scoring == "loss":
        return losses
    flipped = [a for a, b in zip(old.correct, new.correct, strict=True) if a != b]
    checks = [
        Check(
            what=f"{task}: right or wrong, every question",
            agrees=not flipped,
            detail=f"{old.num_examples} questions, the same"
            if not flipped
            else f"{len(flipped)} of {old.num_examples} differ: {sum(flipped)} were right, "
            f"{len(flipped) - sum(flipped)} are right now",
        )
    ]
    share = sum(old.correct) / len(old.correct) if old.correct else math.nan
    if not _same(share, old.accuracy):
        detail = f"{old.accuracy:.10g} is not the share of right answers, {share:.10g}"
        checks.append(Check(what=f"{task}: accuracy of the record itself", agrees=False, detail=detail))
    return checks + losses


def _losses(task: str, old: TaskScore, new: TaskScore) -> list[Check]:
    """The loss of every right answer; no check if one of the records has none."""
    if old.losses is None or new.losses is None:
        return []
    differing = [pair for pair in zip(old.losses, new.losses, strict=True) if not _same(*pair)]
    detail = f"{old.num_examples} questions, the same"
    if differing:
        most = max(abs(a - b) for a, b in differing)
        detail = f"{len(differing)} of {old.num_examples} differ, by {most:.3g} nats at most"
    return [Check(what=f"{task}: loss of the right answer, every question", agrees=not differing, detail=detail)]


def _benchmark(task: str, old: LmEvalScore | None, new: LmEvalScore | None) -> Check:
    """One of lm-eval's own tasks: the metric of every example."""
    what = f"{task} of lm-eval: every example"
    if old is None or new is None:
        return Check(what=what, agrees=False, detail="evaluated in only one of the two")
    if old.example_ids != new.example_ids:
        detail = f"other examples: {len(old.example_ids)} recorded, {len(new.example_ids)} now"
        return Check(what=what, agrees=False, detail=detail)
    differing = [pair for pair in zip(old.values or (), new.values or (), strict=True) if not _same(*pair)]
    number = f"{len(differing)} of {len(old.example_ids)} differ" if differing else f"{len(old.example_ids)}, the same"
    return Check(what=what, agrees=not differing, detail=number)


def _answers(old: ExtractedAnswers, new: ExtractedAnswers) -> Check:
    differing = [key for key in sorted(old.keys() | new.keys()) if list(old.get(key, ())) != list(new.get(key, ()))]
    detail = f"{sum(map(len, old.values()))} answers, the same"
    if differing:
        task, example = differing[0]
        was, now = old.get((task, example), ()), new.get((task, example), ())
        detail = f"{len(differing)} of {len(old)} differ; the first, {task} {example}: {_text(was)}, now {_text(now)}"
    return Check(what="extracted answers, every question", agrees=not differing, detail=detail)


def _text(answers: Sequence[str | None]) -> str:
    return " / ".join("none" if answer is None else repr(answer) for answer in answers) or "not asked"


def _same(old: Any, new: Any) -> bool:
    """Equal in every bit; a number that is none equals itself."""
    if isinstance(old, float) and isinstance(new, float):
        return (math.isnan(old) and math.isnan(new)) or (old == new and math.copysign(1, old) == math.copysign(1, new))
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(_same(a, b) for a, b in zip(old, new, strict=True))
    return bool(old == new)
