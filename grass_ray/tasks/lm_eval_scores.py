"""Results of lm-eval's own tasks, with the value of every example. Plain data, no torch.

::

    results = evaluate_lm_eval(model, tokenizer, config.evaluation)
    results["mmlu"].metric, results["mmlu"].value, results["mmlu"].stderr
    results["mmlu"].values                        # of each example, so that runs can be compared example by example
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

LM_EVAL = "lm_eval"  # the first part of metrics' names


@dataclass(frozen=True, kw_only=True)
class LmEvalResult:
    """Result of one task, or of a group of tasks that lm-eval averages.

    Attributes:
        task: name of the task or group.
        metric: its first metric, by which rows are compared, such as ``acc``.
        value: of that metric, as lm-eval aggregates it; ``stderr`` is its standard error, None if it gives none.
        higher_is_better: whether large values of the metric are good.
        metrics: everything that lm-eval computed, by ``metric`` or, with a filter, ``metric/filter``.
        subtasks: the metric of each task of a group.
        example_ids: a hash of each example's prompt.
        values: the metric of each example; None if it is no mean over examples.
        protocol: few-shot examples, version, limit and all else that makes results comparable, as plain JSON values.
        examples: prompt, target and answers of each example.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    metrics: dict[str, float]
    subtasks: dict[str, float]
    example_ids: list[str]
    values: list[float] | None
    protocol: dict[str, Any]
    examples: list[dict[str, Any]] = field(default_factory=list, compare=False)


class LmEvalScored(Protocol):
    """What metrics and averages need of a result, or of its score in a record: as of :class:`LmEvalResult`."""

    @property
    def metric(self) -> str:
        """Name of the metric."""

    @property
    def value(self) -> float:
        """Its value."""

    @property
    def higher_is_better(self) -> bool:
        """Whether large values are good."""

    @property
    def metrics(self) -> dict[str, float]:
        """Everything that lm-eval computed."""

    @property
    def values(self) -> list[float] | None:
        """The metric of each example."""


def is_averaged(score: LmEvalScored) -> bool:
    """Whether a task counts in the average: its metric is a mean of values from 0 to 1, and high ones are good."""
    values = score.values
    return bool(values) and score.higher_is_better and all(0 <= value <= 1 for value in values or ())


def average(results: Mapping[str, LmEvalScored]) -> float | None:
    """The unweighted mean over the tasks that :func:`is_averaged`; None if there are none."""
    found = [score.value for score in results.values() if is_averaged(score)]
    return fmean(found) if found else None


def lm_eval_metrics(results: Mapping[str, LmEvalScored]) -> dict[str, float]:
    """Return all metrics by MLflow key: ``lm_eval/<task>/<metric>``, and ``lm_eval/average``."""
    metrics = {f"{LM_EVAL}/{task}/{key}": value for task, r in results.items() for key, value in r.metrics.items()}
    mean = average(results)
    return metrics if mean is None else metrics | {f"{LM_EVAL}/average": mean}


# ---------------------------------------------------------------------------------------------------------- of lm-eval


def read_results(
    outcome: Mapping[str, Any], parts: Mapping[str, Sequence[str]], protocol: Mapping[str, Any]
) -> dict[str, LmEvalResult]:
    """Read what ``lm_eval.simple_evaluate`` returned.

    Args:
        outcome: with samples.
        parts: the tasks that each result is made of.
        protocol: what all tasks share.
    """
    return {name: _read(outcome, name, tasks, protocol) for name, tasks in parts.items()}


def _read(outcome: Mapping[str, Any], name: str, tasks: Sequence[str], protocol: Mapping[str, Any]) -> LmEvalResult:
    computed = outcome["results"][name]
    metrics = {_name(key): float(value) for key, value in computed.items() if "," in key and _is_number(value)}
    first = _first_metric(outcome, computed, tasks)
    metric, _, chosen = first.partition(",")
    ids: list[str] = []
    values: list[Any] = []
    examples = []
    for task in tasks:
        own = [sample for sample in outcome["samples"][task] if sample["filter"] == chosen]
        for sample in sorted(own, key=lambda sample: sample["doc_id"]):
            ids.append(hashlib.sha256(f"{task}\n{sample['prompt_hash']}".encode()).hexdigest()[:16])
            values.append(sample.get(metric))
            examples.append(_example(name, task, ids[-1], sample, metric))
    stderr = computed.get(f"{metric}_stderr,{chosen}")
    whole = len(tasks) > 1 or tasks[0] != name
    higher = outcome["higher_is_better"].get(name, {}).get(metric)
    return LmEvalResult(
        task=name,
        metric=_name(first),
        value=float(computed[first]),
        stderr=float(stderr) if _is_number(stderr) else None,
        higher_is_better=higher is not False,
        metrics=metrics,
        subtasks={task: float(outcome["results"][task][first]) for task in tasks} if whole else {},
        example_ids=ids,
        values=[float(value) for value in values] if all(map(_is_number, values)) else None,
        protocol={
            **protocol,
            "num_fewshot": sorted({int(outcome["n-shot"][task]) for task in tasks}),
            "version": str(outcome["versions"].get(name)),
            "config_sha256": _hash([outcome["configs"][task] for task in tasks]),
        },
        examples=examples,
    )


def _first_metric(outcome: Mapping[str, Any], computed: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """The key of the metric that is listed first, with its first filter."""
    keys = [key for key in computed if "," in key and "_stderr," not in key]
    listed = outcome["configs"][tasks[0]].get("metric_list") or [{}]
    return next((key for key in keys if key.partition(",")[0] == listed[0].get("metric")), keys[0])


def _name(key: str) -> str:
    metric, _, chosen = key.partition(",")
    return metric if chosen == "none" else f"{metric}/{chosen}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _example(name: str, task: str, id: str, sample: Mapping[str, Any], metric: str) -> dict[str, Any]:
    arguments = sample["arguments"]
    return {
        "task": name,
        "subtask": task,
        "id": id,
        "prompt": str(arguments[0][0]),
        "options": [str(own[1]) for own in arguments] if len(arguments) > 1 else None,
        "target": str(sample["target"]),
        "output": json.loads(json.dumps(sample["filtered_resps"], default=str)),
        "metric": metric,
        "value": float(sample[metric]) if _is_number(sample.get(metric)) else None,
    }


def _hash(configs: Sequence[Mapping[str, Any]]) -> str:
    """Of what is asked and how it is judged; where files are is no matter, and the examples' ids say what they hold."""
    places = ("metadata", "dataset_kwargs", "dataset_path")
    kept = [{key: value for key, value in config.items() if key not in places} for config in configs]
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()  # where a function is in memory
