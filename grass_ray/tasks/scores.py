"""What an evaluation says: one :class:`EvaluationResult` a task, with every example in it. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from grass_ray.tasks.suites import SUITES, TASKS


@dataclass(frozen=True, kw_only=True)
class Example:
    """One evaluated example. ``id`` is a hash of the prompt; ``extracted`` is None where no answer was found."""

    id: str
    prompt: str
    target: str
    output: str
    extracted: str | None
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What an evaluation took: the same answers may take more or less.

    ``tokens`` are those of prompts, options and generated answers that went through the model, ``padding_tokens`` the
    positions that were computed besides; ``halvings`` counts batches that did not fit into memory, ``prompts_cut``
    prompts that lost their beginning because the model takes no more tokens.
    """

    tokens: int = 0
    padding_tokens: int = 0
    passes: int = 0
    halvings: int = 0
    prompts_cut: int = 0
    seconds: float = 0.0

    def __add__(self, other: Workload) -> Workload:
        """Both together; the seconds of work that went on side by side count each."""
        return Workload(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    @property
    def padding_share(self) -> float:
        """Padding over all computed positions, 0 to 1."""
        return self.padding_tokens / max(self.tokens + self.padding_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One task's result. ``protocol`` names template, decoding, limit and file, so that numbers can be compared.

    Its ``chance`` is the accuracy of guessing: the mean of 1/options over the questions asked, 0 for numbers. Results
    are equal whatever work they took.
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


def accuracy_metrics(
    results: Mapping[str, EvaluationResult], *, contaminated: Collection[str] = ()
) -> dict[str, float]:
    """Each task's accuracy and their averages under MLflow's names; empty without results.

    Args:
        results: by task.
        contaminated: tasks whose test questions were trained on (:func:`contaminated_tasks`).

    Returns:
        ``eval/<task>/accuracy``, and unweighted means over tasks: ``eval/average``; ``eval/average_clean`` over the
        tasks that are not contaminated, where there are any; ``eval/average_normalised`` of accuracies above chance
        (:func:`above_chance`), where every task's chance is known.
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
    """What evaluating took, under MLflow's names; empty without results.

    ``evaluation/tokens``, ``evaluation/padding_share``, ``evaluation/halvings``, ``evaluation/seconds`` and
    ``evaluation/examples_per_second`` (of one worker); ``evaluation/prompts_cut`` where there are any.
    """
    if not results:
        return {}
    total = sum((result.workload for result in results.values()), Workload())
    examples = sum(len(result.examples) for result in results.values())
    cut = {"evaluation/prompts_cut": float(total.prompts_cut)} if total.prompts_cut else {}
    return cut | {
        "evaluation/tokens": float(total.tokens),
        "evaluation/padding_share": total.padding_share,
        "evaluation/halvings": float(total.halvings),
        "evaluation/seconds": total.seconds,
        "evaluation/examples_per_second": examples / total.seconds if total.seconds else 0.0,
    }


def above_chance(accuracy: float, chance: float) -> float:
    """``(accuracy - chance) / (1 - chance)``: 0 is guessing, 1 is perfect, below 0 is worse than guessing.

    Raises :class:`ValueError` unless ``0 <= chance < 1``.
    """
    if not 0 <= chance < 1:
        raise ValueError(f"chance must be at least 0 and below 1, got {chance}")
    return (accuracy - chance) / (1 - chance)


def average_above_chance(scores: Sequence[tuple[float, float | None]]) -> float | None:
    """The mean over (accuracy, chance) of :func:`above_chance`; None where a chance is unknown or leaves nothing."""
    values = [above_chance(accuracy, chance) for accuracy, chance in scores if chance is not None and chance < 1]
    return fmean(values) if values and len(values) == len(scores) else None


def contaminated_tasks(suite: str, train: Mapping[str, Any], *, training_steps: int) -> tuple[str, ...]:
    """Tasks whose test questions are in what a run trained on: known for the published mixtures alone.

    ``math_10k`` contains MAWPS, and with it AddSub, MultiArith and SingleEq; a mixture that was built from train sets
    in its place does not.

    Args:
        suite: the run's suite.
        train: the provenance of its training rows.
        training_steps: 0 is a model that was not trained.
    """
    known = SUITES.get(suite)
    files = {str(file.get("name", "")) for file in train.get("files", ())}
    names = {name.rsplit("/", 1)[-1].removesuffix(".json") for name in files}
    if known is None or not names & set(known.mixtures) or not training_steps:
        return ()
    return tuple(task for task in known.tasks if TASKS[task].contaminated)
