"""Results of an evaluation: one :class:`EvaluationResult` per task, with every example. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Protocol

from grass_ray.tasks.suites import SUITES, TASKS


@dataclass(frozen=True, kw_only=True)
class Example:
    """One evaluated example. ``id`` is a hash of the prompt; ``extracted`` is None if no answer was found."""

    id: str
    prompt: str
    target: str
    output: str
    extracted: str | None
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Work that an evaluation took. It may differ between evaluations with equal results.

    Attributes:
        tokens: tokens of prompts, options and generated answers that the model processed.
        padding_tokens: other positions that it processed.
        passes: forward passes.
        halvings: how often a batch did not fit into memory.
        prompts_cut: prompts that were truncated on the left, because the context of the model is too short.
        seconds: duration.
    """

    tokens: int = 0
    padding_tokens: int = 0
    passes: int = 0
    halvings: int = 0
    prompts_cut: int = 0
    seconds: float = 0.0

    def __add__(self, other: Workload) -> Workload:
        """Sum of both. Seconds of work done at the same time by several workers are added, too."""
        return Workload(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    @property
    def padding_share(self) -> float:
        """Padding as a share of all processed positions, 0 to 1."""
        return self.padding_tokens / max(self.tokens + self.padding_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Result of one task. Results are equal whatever work they took.

    Attributes:
        task: key of the task.
        scoring: ``generation`` or ``loglikelihood``.
        extraction: rule that extracted the answers.
        examples: every example, in the order of the test file.
        protocol: template, decoding, limit, test file and all else that makes results comparable, as plain JSON values.
            Its ``chance`` is the expected accuracy of guessing: the mean of 1/options, 0 for numbers.
        workload: work that it took.
    """

    task: str
    scoring: str
    extraction: str
    examples: tuple[Example, ...]
    protocol: dict[str, Any]
    workload: Workload = field(default=Workload(), compare=False)

    @property
    def accuracy(self) -> float:
        """Share of correct examples, 0 to 1."""
        return sum(example.correct for example in self.examples) / len(self.examples)


class Scored(Protocol):
    """What averages need of a task's result, or of its score in a record."""

    @property
    def accuracy(self) -> float:
        """Share of correct examples, 0 to 1."""

    @property
    def protocol(self) -> dict[str, Any]:
        """How the task was asked and scored, as of :class:`EvaluationResult`."""


def accuracy_metrics(results: Mapping[str, Scored], *, contaminated: Collection[str] = ()) -> dict[str, float]:
    """Return the accuracy of each task and their averages, by MLflow key; empty without results.

    Args:
        results: by task.
        contaminated: tasks whose test questions are part of the training data (:func:`contaminated_tasks`).

    Returns:
        ``eval/<task>/accuracy``, and unweighted means over tasks: ``eval/average``; ``eval/average_clean`` over tasks
        that are not contaminated, if there are any; ``eval/average_normalised`` of accuracies above chance
        (:func:`above_chance`), if the chance of every task is known.
    """
    metrics = {f"eval/{task}/accuracy": result.accuracy for task, result in results.items()}
    if not metrics:
        return metrics
    metrics["eval/average"] = sum(metrics.values()) / len(metrics)
    clean = [result.accuracy for task, result in results.items() if task not in contaminated]
    if clean:
        metrics["eval/average_clean"] = fmean(clean)
    normalised = average_above_chance([(r.accuracy, r.protocol.get("chance")) for r in results.values()])
    if normalised is not None:
        metrics["eval/average_normalised"] = normalised
    return metrics


def workload_metrics(results: Mapping[str, EvaluationResult]) -> dict[str, float]:
    """Return the work that an evaluation took, by MLflow key; empty without results.

    ``evaluation/tokens``, ``evaluation/padding_share``, ``evaluation/halvings``, ``evaluation/seconds`` and
    ``evaluation/examples_per_second`` (per worker); ``evaluation/prompts_cut`` if there are any.
    """
    works = [result.workload for result in results.values()]
    return describe_work(works, sum(len(result.examples) for result in results.values()))


def describe_work(works: Collection[Workload], examples: int) -> dict[str, float]:
    """As :func:`workload_metrics`, from the work that each task took and the number of examples of all tasks."""
    if not works:
        return {}
    total = sum(works, Workload())
    cut = {"evaluation/prompts_cut": float(total.prompts_cut)} if total.prompts_cut else {}
    return cut | {
        "evaluation/tokens": float(total.tokens),
        "evaluation/padding_share": total.padding_share,
        "evaluation/halvings": float(total.halvings),
        "evaluation/seconds": total.seconds,
        "evaluation/examples_per_second": examples / total.seconds if total.seconds else 0.0,
    }


def above_chance(accuracy: float, chance: float) -> float:
    """Return ``(accuracy - chance) / (1 - chance)``: 0 is guessing, 1 is perfect.

    Raises:
        ValueError: ``chance`` is not in [0, 1).
    """
    if not 0 <= chance < 1:
        raise ValueError(f"chance must be at least 0 and below 1, got {chance}")
    return (accuracy - chance) / (1 - chance)


def average_above_chance(scores: Sequence[tuple[float, float | None]]) -> float | None:
    """Return the mean of :func:`above_chance` over (accuracy, chance); None if a chance is unknown or 1."""
    values = [above_chance(accuracy, chance) for accuracy, chance in scores if chance is not None and chance < 1]
    return fmean(values) if values and len(values) == len(scores) else None


def contaminated_tasks(suite: str, train: Mapping[str, Any], *, training_steps: int) -> tuple[str, ...]:
    """Return the tasks whose test questions are part of the training data; known only for published mixtures.

    ``math_10k`` contains MAWPS, and thereby AddSub, MultiArith and SingleEq. A mixture built from training sets does
    not.

    Args:
        suite: suite of the run.
        train: provenance of its training rows.
        training_steps: number of steps; 0 for a model that was not trained.
    """
    known = SUITES.get(suite)
    files = {str(file.get("name", "")) for file in train.get("files", ())}
    names = {name.rsplit("/", 1)[-1].removesuffix(".json") for name in files}
    if known is None or not names & set(known.mixtures) or not training_steps:
        return ()
    return tuple(task for task in known.tasks if TASKS[task].contaminated)
