"""What an evaluation says: one :class:`EvaluationResult` a task, with every example in it. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
class EvaluationResult:
    """One task's result. ``protocol`` names template, decoding, limit and file, so that numbers can be compared."""

    task: str
    scoring: str
    extraction: str
    examples: tuple[Example, ...]
    protocol: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Share of correct examples, 0 to 1."""
        return sum(example.correct for example in self.examples) / len(self.examples)


def accuracy_metrics(results: Mapping[str, EvaluationResult]) -> dict[str, float]:
    """Each task's accuracy and their average under MLflow's names; empty without results."""
    metrics = {f"eval/{task}/accuracy": result.accuracy for task, result in results.items()}
    if metrics:
        metrics["eval/average"] = sum(metrics.values()) / len(metrics)
    return metrics
