"""Results of an evaluation: one :class:`EvaluationResult` per task, with every example. Plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, NamedTuple, Protocol

from grass_ray.tasks.suites import SUITES, TASKS

MOST_NATS = 700  # the exponential of more is no float


@dataclass(frozen=True, kw_only=True)
class Example:
    """One evaluated example.

    Log-likelihoods differ in their last bits with the batches they were computed in, so they do not count when examples
    are compared.

    Attributes:
        id: hash of the prompt.
        prompt: the question as asked.
        target: the right answer.
        output: what the model generated, or the log-likelihood of each option.
        extracted: the answer in it; None if none was found.
        correct: whether that is the right one; False with scoring ``loss``.
        answer_nats: negative log-likelihood of the reference response, in nats, the sum over its tokens.
        answer_tokens: tokens of the reference response.
        answer_bytes: bytes of the text of a held-out row that is learned, in UTF-8; None for a question.
        option_nats: negative logarithm of the right option's share of the likelihood of all options, in nats; None for
            a question without options.
    """

    id: str
    prompt: str
    target: str
    output: str
    extracted: str | None
    correct: bool
    answer_nats: float | None = field(default=None, compare=False)
    answer_tokens: int | None = field(default=None, compare=False)
    answer_bytes: int | None = field(default=None, compare=False)
    option_nats: float | None = field(default=None, compare=False)

    @property
    def loss(self) -> float | None:
        """The loss of the right answer in nats: among the options, else per token of the reference response."""
        if self.option_nats is not None:
            return self.option_nats
        return None if self.answer_nats is None or not self.answer_tokens else self.answer_nats / self.answer_tokens


class TextLoss(NamedTuple):
    """Loss over all learned tokens of a text together.

    Attributes:
        nats_per_token: mean over tokens.
        bits_per_byte: the sum in bits over the bytes of the text, which does not depend on the tokenizer.
        perplexity: the exponential of ``nats_per_token``.
    """

    nats_per_token: float
    bits_per_byte: float
    perplexity: float


def text_loss(rows: Sequence[tuple[float | None, int | None, int | None]]) -> TextLoss | None:
    """Return the loss over rows of (nats, tokens, bytes); None if one of them is unknown."""
    known = [(nats, tokens, size) for nats, tokens, size in rows if nats is not None and tokens and size is not None]
    if not known or len(known) < len(rows):
        return None
    nats, tokens, size = (sum(column) for column in zip(*known, strict=True))
    mean = nats / tokens
    bits = nats / math.log(2) / size if size else math.nan
    return TextLoss(mean, bits, math.exp(mean) if mean < MOST_NATS else math.inf)


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
        scoring: ``generation``, ``loglikelihood`` or ``loss``.
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
        """Share of correct examples, 0 to 1; NaN with scoring ``loss``."""
        if self.scoring == "loss":
            return math.nan
        return sum(example.correct for example in self.examples) / len(self.examples)

    @property
    def loss(self) -> float | None:
        """Mean loss of the right answers, in nats; None if there are no examples or it was not measured."""
        losses = [example.loss for example in self.examples if example.loss is not None]
        return fmean(losses) if losses and len(losses) == len(self.examples) else None

    @property
    def text_loss(self) -> TextLoss | None:
        """Loss of held-out text over all of its tokens; None for questions."""
        return text_loss([(e.answer_nats, e.answer_tokens, e.answer_bytes) for e in self.examples])


class Scored(Protocol):
    """What averages need of a task's result, or of its score in a record: as of :class:`EvaluationResult`."""

    @property
    def scoring(self) -> str:
        """``generation``, ``loglikelihood`` or ``loss``."""

    @property
    def accuracy(self) -> float:
        """Share of correct examples, 0 to 1."""

    @property
    def loss(self) -> float | None:
        """Mean loss of the right answers, in nats; None if it was not measured."""

    @property
    def text_loss(self) -> TextLoss | None:
        """Loss of held-out text over all of its tokens; None for questions."""

    @property
    def protocol(self) -> dict[str, Any]:
        """What makes results comparable; its ``chance`` is the expected accuracy of guessing."""


def score_metrics(results: Mapping[str, Scored], *, contaminated: Collection[str] = ()) -> dict[str, float]:
    """Return the accuracy and the loss of each task and their averages, by MLflow key; empty without results.

    Args:
        results: by task.
        contaminated: tasks whose test questions are part of the training data (:func:`contaminated_tasks`).

    Returns:
        ``eval/<task>/accuracy``, and unweighted means over tasks: ``eval/average``; ``eval/average_clean`` over tasks
        that are not contaminated, if there are any; ``eval/average_normalised`` of accuracies above chance
        (:func:`above_chance`), if the chance of every task is known. ``eval/<task>/loss`` and ``eval/loss``, the mean
        loss of the right answers in nats (:attr:`Example.loss`), if it was measured; of held-out text also
        ``eval/<task>/nats_per_token``, ``bits_per_byte`` and ``perplexity`` (:class:`TextLoss`).
    """
    return _accuracies({task: r for task, r in results.items() if r.scoring != "loss"}, contaminated) | _losses(results)


def _accuracies(results: Mapping[str, Scored], contaminated: Collection[str]) -> dict[str, float]:
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


def _losses(results: Mapping[str, Scored]) -> dict[str, float]:
    metrics = {f"eval/{task}/loss": loss for task, r in results.items() if (loss := r.loss) is not None}
    mean = {"eval/loss": fmean(metrics.values())} if metrics and len(metrics) == len(results) else {}
    return metrics | mean | _of_texts(results)


def _of_texts(results: Mapping[str, Scored]) -> dict[str, float]:
    """What is usual for text: every token counts alike, so long rows count more than in the loss."""
    metrics: dict[str, float] = {}
    for task, result in results.items():
        if (total := result.text_loss) is not None:
            metrics |= {f"eval/{task}/{name}": value for name, value in total._asdict().items()}
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
