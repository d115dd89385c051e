"""One row of a leaderboard: a method with its settings, over its seeds, computed from run records.

::

    rows = build_rows(groups)                 # a group: the records of one configuration, one per seed
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from grass_ray.results.paired import Comparison, Metric
from grass_ray.results.record import RunRecord
from grass_ray.results.row_facts import Benchmark, losses, memory_and_size, of_lm_eval, of_texts, values
from grass_ray.results.settings import train_data, training_rows, variants
from grass_ray.results.statistics import average_interval, mean_of_shares
from grass_ray.tasks.scores import average_above_chance, contaminated_tasks
from grass_ray.training.report import VALIDATION


@dataclass(frozen=True, kw_only=True)
class LeaderboardRow:
    """One method with its settings, over its seeds.

    Accuracies are shares from 0 to 1. Memory is the maximum over seeds; speed, time and tokens are means.

    Attributes:
        rank: place by accuracy, or by loss where no accuracy is measured; None for rows that are not ranked.
        accuracy: unweighted mean over tasks of the means over seeds. ``accuracy_low`` and ``accuracy_high`` are its
            95 % interval over the questions, which every seed is asked again
            (:func:`grass_ray.results.statistics.average_interval`); ``accuracy_std`` is the spread over seeds.
        accuracy_clean: the same without tasks that are contaminated in some row of the table.
        accuracy_normalised: mean of (accuracy - chance) / (1 - chance); None for tasks without options.
        tasks: accuracy by task; ``task_intervals`` are Wilson's.
        seeds: the seeds that finished.
        status: the seeds' common status, or ``"partial"`` if they differ.
        variant: what tells this row from others of its method.
        contaminated: tasks whose test questions are in the data that this row trained on.
        loss: loss of the right answer in nats, the mean over tasks of the means over seeds; lower is better. None where
            a finished seed has none on a task, or one that is not finite. ``loss_std`` is the spread over seeds.
        task_losses: loss by task.
        to_full: comparison with the best ``full`` row, question by question (:mod:`grass_ray.results.paired`); None
            for that row itself, and if nothing can be compared.
        to_best: the same with the best row.
        loss_to_full, loss_to_best: the same by loss, with the ``full`` row and the row of the lowest loss.
        bits_per_byte, perplexity: of held-out text, over all of its tokens; means over tasks and seeds, of the
            perplexity in nats.
        forgetting: rise of the loss on a text that has nothing to do with the task, in nats per token, a mean over
            seeds; ``forgetting_std`` is its spread, and ``forgetting_texts`` names the text (several if seeds differ).
        lm_eval: mean over lm-eval's own tasks of their metrics (:func:`grass_ray.tasks.lm_eval_scores.average`) and
            over seeds; ``lm_eval_std`` is the spread over seeds, and ``lm_eval_tasks`` says them one by one.
        lm_eval_to_full, lm_eval_to_best, lm_eval_to_base: comparisons by these tasks, with the row of the highest
            average, and with the untrained model: what training changed.
        mean_reserved_gib, p99_reserved_gib: of the memory reserved after each step, the mean and the 99th percentile.
        checkpoint_mib: size of what an export holds: the adapter, or all weights.
        ranked_by: ``"loss"`` if no accuracy was measured (scoring ``loss``), ``"lm_eval"`` if lm-eval's tasks alone
            were.
        pareto: whether no other row has both more accuracy and less peak memory.
        learning_rates_tried: how many this method's runs in the table tried, whatever became of them.
        reused_from: runs whose results were taken over (``--reuse``).
        train_rows: rows that were trained on; ``train_rows_dropped`` were too long.
        test: names what the row was tested on; rows with another name answered other questions, or were judged by
            other rules.
    """

    rank: int | None = None
    method: str
    model: str
    suite: str
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    tasks: dict[str, float]
    peak_allocated_gib: float | None = None
    peak_reserved_gib: float | None = None
    host_pinned_gib: float | None = None
    mean_reserved_gib: float | None = None
    p99_reserved_gib: float | None = None
    checkpoint_mib: float | None = None
    tokens_per_second: float | None
    train_s: float | None
    trainable_share: float | None
    seeds: list[int]
    status: str
    failure: str | None
    variant: str
    hardware: str
    accuracy_std: float | None
    accuracy_clean: float | None
    accuracy_normalised: float | None = None
    contaminated: list[str]
    to_full: Comparison | None = None
    to_best: Comparison | None = None
    pareto: bool = False
    task_intervals: dict[str, tuple[float, float]]
    training_steps: int
    batch_size: int
    train_tokens: float | None
    learning_rate: float | None
    learning_rates_tried: int
    data_sha256: list[str]
    commit: str | None
    date: str
    run_ids: list[str]
    reused_from: list[str] = field(default_factory=list)
    train_rows: int | None = None
    train_rows_dropped: int | None = None
    test: str | None = None
    loss: float | None = None
    loss_std: float | None = None
    task_losses: dict[str, float] = field(default_factory=dict)
    loss_to_full: Comparison | None = None
    loss_to_best: Comparison | None = None
    ranked_by: Metric = "accuracy"
    bits_per_byte: float | None = None
    perplexity: float | None = None
    forgetting: float | None = None
    forgetting_std: float | None = None
    forgetting_texts: tuple[str, ...] = ()
    lm_eval: float | None = None
    lm_eval_std: float | None = None
    lm_eval_tasks: dict[str, Benchmark] = field(default_factory=dict)
    lm_eval_to_full: Comparison | None = None
    lm_eval_to_best: Comparison | None = None
    lm_eval_to_base: Comparison | None = None

    @property
    def label(self) -> str:
        """The method, and what tells this row from its other rows."""
        return f"{self.method} ({self.variant})" if self.variant else self.method

    @property
    def is_ranked(self) -> bool:
        """Whether every seed finished with an accuracy, or with a loss where no accuracy is measured."""
        return self.status == "finished" and math.isfinite(self.badness(self.ranked_by))

    @property
    def scored(self) -> frozenset[str]:
        """The tasks that it was scored on."""
        scores: dict[Metric, Collection[str]] = {"loss": self.task_losses, "lm_eval": self.lm_eval_tasks}
        return frozenset(scores.get(self.ranked_by, self.tasks))

    def badness(self, metric: Metric) -> float:
        """The loss, or the negative of what is good when it is high. Infinite where it has none."""
        if metric == "loss":
            return math.inf if self.loss is None else self.loss
        value = self.accuracy if metric == "accuracy" else self.lm_eval
        return math.inf if value is None else -value

    def compared(self, metric: Metric) -> tuple[Comparison | None, Comparison | None]:
        """The comparisons with the ``full`` row and with the best row by a metric."""
        return {
            "accuracy": (self.to_full, self.to_best),
            "loss": (self.loss_to_full, self.loss_to_best),
            "lm_eval": (self.lm_eval_to_full, self.lm_eval_to_best),
        }[metric]

    @property
    def trained(self) -> bool:
        """Whether anything was to be trained; False for the untrained base model."""
        return self.training_steps > 0

    @property
    def told_apart(self) -> bool | None:
        """Whether it differs from the first row, adjusted, by what it is ranked by.

        None for the first row, and where nothing is compared.
        """
        _, found = self.compared(self.ranked_by)
        return None if found is None else found.told_apart


def build_rows(groups: Sequence[Sequence[RunRecord]]) -> list[LeaderboardRow]:
    """One row per group. Groups of one method are told apart by their settings."""
    rates: defaultdict[str, set[float]] = defaultdict(set)
    for record in (record for group in groups for record in group):
        if (rate := _learning_rate(record)) is not None:
            rates[record.config["method"]["name"]].add(rate)
    return [
        _row(group, variant, len(rates[group[0].config["method"]["name"]]))
        for group, variant in zip(groups, variants(groups), strict=True)
    ]


# ------------------------------------------------------------------------------------------------ what is in a row


def _row(group: Sequence[RunRecord], variant: str, learning_rates: int) -> LeaderboardRow:
    finished = [record for record in group if record.status == "finished" and record.is_tested]
    scores = {
        task: mean_of_shares(record.tasks[task].accuracy for record in finished)
        for task in (finished[0].tasks if finished else {})
        if all(task in record.tasks and math.isfinite(record.tasks[task].accuracy) for record in finished)
    }
    low = high = None
    if scores:
        low, high = average_interval(
            list(scores.values()), [min(record.tasks[task].num_examples for record in finished) for task in scores]
        )
    last, config = group[-1], group[-1].config
    averages = [mean_of_shares(score.accuracy for score in record.tasks.values()) for record in finished]
    contaminated = sorted({task for record in group for task in _contaminated(record)})
    clean = [value for task, value in scores.items() if task not in contaminated]
    shares = [record.layers.trainable_share for record in group if record.layers is not None]
    status, failure = _status(group)
    return LeaderboardRow(
        method=config["method"]["name"],
        variant=variant,
        model=config["model"]["name"],
        suite=config["data"]["suite"],
        accuracy=mean_of_shares(scores.values()) if scores else None,
        accuracy_low=low,
        accuracy_high=high,
        accuracy_std=stdev(averages) if scores and len(averages) > 1 else None,
        accuracy_clean=mean_of_shares(clean) if clean and len(clean) < len(scores) else None,
        accuracy_normalised=_above_chance(scores, finished),
        contaminated=[task for task in contaminated if task in scores],
        tasks=scores,
        tokens_per_second=_mean(values(finished, "throughput/tokens_per_second")),
        train_s=_mean(values(finished, "time/train_s")),
        trainable_share=max(shares, default=None),
        seeds=[record.config["seed"] for record in finished],
        status=status,
        failure=failure,
        hardware=last.hardware,
        task_intervals={
            task: average_interval([value], [min(record.tasks[task].num_examples for record in finished)])
            for task, value in scores.items()
        },
        training_steps=config["training"]["steps"],
        batch_size=config["training"]["batch_size"],
        train_tokens=_mean([tokens for record in finished if (tokens := _train_tokens(record)) is not None]),
        learning_rate=_learning_rate(last),
        learning_rates_tried=learning_rates,
        data_sha256=sorted({hashed for record in group if (hashed := training_rows(record))}),
        commit=_commit(group),
        date=max(record.finished_at for record in group)[:10],
        run_ids=[record.run_id for record in group],
        reused_from=[record.reused_from for record in group if record.reused_from is not None],
        train_rows=min(_counts(group, "train_rows_used"), default=None),
        train_rows_dropped=max(_counts(group, "train_rows_dropped"), default=None),
        ranked_by=ranked_by(config["evaluation"].get("scoring")),
        **losses(finished),
        **memory_and_size(group, finished),
        **of_texts(finished),
        **of_lm_eval(finished),
    )


def ranked_by(scoring: str | None) -> Metric:
    """What rows are ranked by, given the scoring of their configurations."""
    return "loss" if scoring == "loss" else "lm_eval" if scoring == "lm_eval" else "accuracy"


def _contaminated(record: RunRecord) -> tuple[str, ...]:
    steps = record.config["training"]["steps"]
    return contaminated_tasks(record.config["data"]["suite"], train_data(record), training_steps=steps)


def _above_chance(scores: Mapping[str, float], records: Sequence[RunRecord]) -> float | None:
    """The average above chance; None if no task has options, or a record does not say how many."""
    chances = {task: [record.tasks[task].protocol.get("chance", math.nan) for record in records] for task in scores}
    known = {task: fmean(values) for task, values in chances.items() if values and not any(map(math.isnan, values))}
    if known.keys() != scores.keys() or not any(known.values()):
        return None
    return average_above_chance([(value, known[task]) for task, value in scores.items()])


def _counts(group: Iterable[RunRecord], key: str) -> list[int]:
    """The count ``key`` of each run that trained and recorded it."""
    found = [record.data.get(key) for record in group if record.config["training"]["steps"]]
    return [count for count in found if isinstance(count, int)]


def _train_tokens(record: RunRecord) -> float | None:
    """Non-padding tokens of all steps, probing included; None if they are unknown."""
    tokens = record.step_tokens()
    total = sum(tokens.values())
    return total if tokens and math.isfinite(total) else None


def _learning_rate(record: RunRecord) -> float | None:
    if not record.config["training"]["steps"]:
        return None
    rate = record.config["method"].get("optimizer", {}).get("lr")
    return float(rate) if isinstance(rate, int | float) else None


def _status(group: Sequence[RunRecord]) -> tuple[str, str | None]:
    statuses = {record.status for record in group}
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for record in group:
        if record.status != "finished":
            reasons[record.failure or record.status].append(str(record.config["seed"]))
        elif not record.is_tested:
            reasons[_why_untested(record)].append(str(record.config["seed"]))
    failure = "; ".join(f"seed {', '.join(seeds)}: {reason}" for reason, seeds in reasons.items())
    return (statuses.pop() if len(statuses) == 1 else "partial"), failure or None


def _why_untested(record: RunRecord) -> str:
    if record.config["evaluation"].get("test", True):
        return "finished without an evaluation"
    loss = record.metrics.get(VALIDATION, math.nan)
    return f"searched, not tested; validation loss {loss:.4f}"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _commit(group: Sequence[RunRecord]) -> str | None:
    commits = {f"{record.git_commit[:9]}{'+' if record.git_dirty else ''}" for record in group if record.git_commit}
    return ", ".join(sorted(commits)) or None
