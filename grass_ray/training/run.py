"""One run from a configuration to its outcome: prepare, fit, evaluate. Knows neither Ray nor MLflow.

::

    check_run(config)                       # every mistake that shows without loading weights
    run = Run.prepare(config)
    for report in run.fit(): print(report.step, report.loss)
    run.evaluate()
    outcome = run.outcome()
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from grass_ray.config import (
    ConfigError,
    HubSource,
    MethodConfig,
    ModelConfig,
    Parallel,
    RunConfig,
)
from grass_ray.layerwise.sampler import Sampler
from grass_ray.optim.data_parallel import Workers
from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.optim.options import LayerwiseOptions
from grass_ray.optim.sharded import reshard
from grass_ray.tasks.evaluation import check_evaluation, evaluate
from grass_ray.tasks.readback import check_answers
from grass_ray.tasks.rows import Row, hash_rows
from grass_ray.tasks.scores import EvaluationResult, accuracy_metrics, contaminated_tasks, workload_metrics
from grass_ray.tasks.shards import merge_shards
from grass_ray.tasks.sources import check_data, load_train_rows
from grass_ray.training.adapters import add_adapter
from grass_ray.training.batches import Batches
from grass_ray.training.built_in import cache_folder
from grass_ray.training.checkpoint import load_checkpoint, save_checkpoint
from grass_ray.training.loop import TrainState, fit
from grass_ray.training.lost_rows import check_some_row_fits, describe_lost_rows
from grass_ray.training.metrics import MemoryMeter, default_device
from grass_ray.training.models import (
    build_skeleton,
    check_lengths,
    check_model,
    load_model,
    load_tokenizer,
)
from grass_ray.training.packing import check_packed_adapter, check_packing
from grass_ray.training.report import MOST_UNITS_AS_SERIES, VALIDATION, RunOutcome, StepReport
from grass_ray.training.sharding import check_shardable, shard_model
from grass_ray.training.trace import EngagementLog
from grass_ray.training.validation import answer_loss, hold_out
from grass_ray.training.weights import parameters_sha256
from grass_ray.training.without_effect import settings_without_effect

Progress = Callable[[str, int, int], None]


def check_run(
    config: RunConfig,
    workers: int = 1,
    parallel: Parallel = "replicate",
    min_workers: int | None = None,
    checked: set[Hashable] | None = None,
) -> None:
    """Find every mistake that shows before weights are loaded: model, gamma, data, evaluation, workers.

    Args:
        config: the run.
        workers: how many share the micro-batches of every step.
        parallel: what each of them holds of the model.
        min_workers: the run may go on with any number of workers from this one up; None never changes it.
        checked: data and models whose rows were found good, which are not read again; new ones are added.

    Raises:
        ConfigError: with all mistakes, separated by semicolons.
    """
    mistakes: list[str] = []

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except ConfigError as error:
            if str(error) not in mistakes:  # a model or file that cannot be read stops several checks
                mistakes.append(str(error))

    fewest = workers if min_workers is None else min_workers
    attempt(lambda: _check_workers(config, fewest, workers))
    if parallel == "shard":
        attempt(lambda: check_shardable(config, fewest))
    attempt(lambda: _check_model(config))
    attempt(lambda: check_lengths(config))
    if config.data.batching == "packed":
        attempt(lambda: check_packed_adapter(config.method.adapter))
    rows = (config.model, config.data, config.evaluation)
    if checked is None or rows not in checked:
        attempt(lambda: check_data(config.data))
        attempt(lambda: check_evaluation(config.data, config.evaluation))
        attempt(lambda: check_answers(config.data, config.evaluation, tokenizer_to_check(config.model)))
        attempt(lambda: check_some_row_fits(config, tokenizer_to_check(config.model)))
    if mistakes:
        raise ConfigError("; ".join(dict.fromkeys(mistakes)))
    if checked is not None:
        checked.add(rows)


class Run:
    """One run in this process. Make it with :meth:`prepare`."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        tokenizer: Any,
        data: dict[str, Any],
        revision: str | None,
        held_out: Batches | None = None,
    ):
        self.config = config
        self.state = state
        self.tokenizer = tokenizer
        self._data = data
        self._revision = revision
        self._held_out = held_out
        self._validation_loss: float | None = None
        self._results: dict[str, EvaluationResult] = {}

    @classmethod
    def prepare(cls, config: RunConfig, device: torch.device | None = None, *, parallel: Parallel = "replicate") -> Run:
        """Load the model and the data, and build the optimizer.

        Seeds torch's global generator with the run's seed: adapters' first weights and dropout draw from it.

        Args:
            config: the run.
            device: where it trains; None takes this worker's.
            parallel: whether each worker holds the whole model, or shards of it.

        Raises:
            ConfigError: as :func:`check_run`.
        """
        check_run(config, Workers().count, parallel)
        torch.manual_seed(config.seed)
        device = device or default_device()
        loaded = load_model(config.model)
        if isinstance(config.data.source, HubSource) and config.evaluation.test:
            check_answers(config.data, config.evaluation, loaded.tokenizer, online=True)
        rows = load_train_rows(config.data)
        training = config.training
        train_rows: Sequence[Row] = rows.rows
        held_out: Batches | None = None
        if config.data.validation_rows is not None:
            train_rows, chosen = hold_out(rows.rows, config.data.validation_rows)
            held_out = Batches(chosen, loaded.tokenizer, config.data, batch_size=1, accumulation_steps=1, seed=0)
        batches = Batches(
            train_rows,
            loaded.tokenizer,
            config.data,
            batch_size=training.batch_size,
            accumulation_steps=training.accumulation_steps,
            seed=config.seed,
        )
        model = add_adapter(loaded.model, config.method.adapter)
        model = model.to(device) if parallel == "replicate" else model
        if training.gradient_checkpointing:
            # non-reentrant, and inputs need no gradient: backward stops at the lowest active layer
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()
        if config.data.batching == "packed" and training.steps:
            check_packing(model)
        if parallel == "shard":
            shard_model(model, device)
        sampler = config.method.sampler.build(seed=config.seed, train_steps=training.steps)
        optimizer = build_optimizer(model, sampler, config.method)
        state = TrainState(
            config=training,
            model=model,
            device=device,
            batches=batches,
            optimizer=optimizer,
            schedule=_build_schedule(optimizer, config),
            engagement=EngagementLog(optimizer, model),
            memory=MemoryMeter(device),
        )
        data = {"train": rows.provenance, **batches.summary()}
        if held_out is not None:
            data["validation"] = {"rows": held_out.summary()["train_rows_used"], "sha256": hash_rows(chosen)}
        return cls(config, state, loaded.tokenizer, data, loaded.revision, held_out)

    def fit(self, until: int | None = None) -> Iterator[StepReport]:
        """Train to the last step, or to the training step ``until`` (see :func:`grass_ray.training.loop.fit`)."""
        return fit(self.state, until)

    def save(self, folder: Path | None) -> None:
        """Write a checkpoint; with None, help another worker to write it (:func:`save_checkpoint`)."""
        save_checkpoint(self.state, None if folder is None else Path(folder))

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint, as if the run had never stopped."""
        load_checkpoint(self.state, Path(folder))

    def validate(self) -> float:
        """Measure the loss on held-out rows on the way, as a point of the run's series; training goes on unchanged.

        Of a sharded model every worker must call it.

        Returns:
            The mean loss in nats on the answers of the held-out rows.

        Raises:
            ConfigError: no rows are held out (``data.validation_rows``).
        """
        loss = self._held_out_loss()
        self.state.record(VALIDATION, loss)
        return loss

    def _held_out_loss(self) -> float:
        if self._held_out is None:
            raise ConfigError("no training rows are held out; set data.validation_rows to a number of rows")
        self.state.optimizer.synchronize()
        loss = answer_loss(self.state.model, self._held_out, self.state.device)
        reshard(self.state.model)
        return loss

    def apply_learning_rate(self) -> None:
        """Train at this run's own learning rate, where the checkpoint that was restored was of another."""
        schedule: Any = self.state.schedule
        lr = self.config.method.optimizer.lr
        schedule.base_lrs = [lr for _ in schedule.base_lrs]
        rates = [lr * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, rate in zip(self.state.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = lr, rate
        schedule._last_lr = rates

    def evaluate(self, on_progress: Progress | None = None) -> None:
        """Measure the loss on held-out rows, and accuracy on every task; training goes on unchanged afterwards.

        Several workers share the questions, and each has the whole result: all of them must call this. On a sharded
        model every forward takes all workers, so that each answers every question. A trial of
        a search (``evaluation.test`` is false) meets no question.
        """
        workers = self.state.optimizer.workers
        shares = workers.count > 1 and not self.state.optimizer.sharded
        self.state.optimizer.synchronize()
        if self._held_out is not None:
            self._validation_loss = self._held_out_loss()
        if not self.config.evaluation.test:
            return
        results = evaluate(
            self.state.model,
            self.tokenizer,
            self.config.data,
            self.config.evaluation,
            on_progress=on_progress,
            cache=cache_folder() / "tokens",
            shard=(workers.rank, workers.count) if shares else None,
        )
        reshard(self.state.model)
        self._results = merge_shards(workers.gather(results)) if shares else results

    def lost_rows(self) -> list[str]:
        """A line for each way in which training rows were lost."""
        return describe_lost_rows(self._data, self.config.data.max_length_tokens)

    def weights_sha256(self) -> str:
        """The hash of all weights as they are now, trained or not (a second for two gigabytes).

        Of a sharded model every worker must ask for it.
        """
        self.state.optimizer.synchronize()
        reshard(self.state.model)
        return parameters_sha256(self.state.model)

    def outcome(self) -> RunOutcome:
        """What the run came to so far."""
        state = self.state
        steps = self.config.training.steps
        contaminated = contaminated_tasks(self.config.data.suite, self._data["train"], training_steps=steps)
        metrics = accuracy_metrics(self._results, contaminated=contaminated) | workload_metrics(self._results)
        if self._validation_loss is not None:
            metrics[VALIDATION] = self._validation_loss
        engagement = replace(state.engagement.engagement, without_effect=settings_without_effect(self.config))
        if state.trained:
            resident, host = state.optimizer.state_bytes()
            metrics |= {name: points[-1][1] for name, points in state.series.items() if name.startswith("train/")}
            metrics |= {
                "memory/peak_allocated_gib": state.memory.peak_allocated_gib,
                "memory/peak_reserved_gib": state.memory.peak_reserved_gib,
                "memory/host_pinned_gib": host / 1024**3,
                "memory/resident_state_gib": resident / 1024**3,
                "throughput/tokens_per_second": state.tokens_per_second,
                "time/train_s": state.train_s,
                "time/measure_s": state.measure_s,
            }
            if shares := state.series.get("data/padding_share"):
                metrics["data/padding_share"] = fmean(share for _, share in shares)
            visits = state.engagement.engagement.visits
            if len(visits) <= MOST_UNITS_AS_SERIES:
                metrics |= {f"layers/visits_{layer:02d}": number for layer, number in enumerate(visits)}
        return RunOutcome(
            metrics=metrics,
            series=state.series,
            tasks=self._results,
            engagement=engagement if state.trained else None,
            data=self._data,
            model_revision=self._revision,
        )


def build_optimizer(model: Any, sampler: Sampler, method: MethodConfig) -> LayerwiseAdamW:
    """The optimizer a method's row describes."""
    settings = method.optimizer
    return LayerwiseAdamW(
        model,
        sampler,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        precision=settings.precision,
        offload=method.offload,
        options=LayerwiseOptions(
            projection=None if settings.projection is None else settings.projection.build(),
            inactive_states=method.inactive_states,
            train_embeddings=method.train_embeddings,
            train_head=method.train_head,
            train_norm=method.train_norm,
            granularity=method.granularity,
            # the loop divides by the labels of all workers
            gradient_reduction="sum",
        ),
    )


def _build_schedule(optimizer: LayerwiseAdamW, config: RunConfig) -> torch.optim.lr_scheduler.LRScheduler:
    from transformers import get_scheduler

    training = config.training
    names = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        names[training.lr_schedule],
        optimizer,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=max(training.steps, 1),
    )
    if optimizer.sampler.lr_cycle_steps > 1:
        _hold_within_cycles(schedule, optimizer.sampler.lr_cycle_steps, training.warmup_steps)
    return schedule


def _hold_within_cycles(schedule: Any, cycle_steps: int, warmup_steps: int) -> None:
    """After the warm-up, give every step the learning rate of its cycle's first step."""

    def held(of_step: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: of_step(step if step < warmup_steps else max(step - step % cycle_steps, warmup_steps))

    schedule.lr_lambdas = [held(of_step) for of_step in schedule.lr_lambdas]


def _check_workers(config: RunConfig, fewest: int, most: int) -> None:
    """Workers take whole micro-batches, so that importance is measured on the same gradients whatever their number."""
    training = config.training
    shares = math.lcm(*range(fewest, most + 1))
    if training.steps and training.accumulation_steps % shares:
        number = f"{most}" if fewest == most else f"{fewest} to {most}"
        raise ConfigError(
            f"{number} workers share the micro-batches of every step, so training.accumulation_steps must be a "
            f"multiple of {shares}, not {training.accumulation_steps}; set training.accumulation_steps={shares} "
            f"(training.batch_size stays the rows of a step over all workers)"
        )
    if training.steps and fewest < most and training.checkpoint_every_steps is None:
        raise ConfigError(
            f"a run of {fewest} to {most} workers goes on from its last checkpoint whenever their number changes; set "
            "training.checkpoint_every_steps=50, or another number of steps whose loss you can bear"
        )


@functools.lru_cache(maxsize=4)
def tokenizer_to_check(model: ModelConfig) -> Any:
    """A model's tokenizer to look at: every trial of a sweep is checked with it."""
    return load_tokenizer(model)


def _check_model(config: RunConfig) -> None:
    """Build everything but the weights: what cannot work with this model shows here."""
    check_model(config.model)
    adapter = config.method.adapter
    if config.training.gradient_checkpointing and adapter is not None and not adapter.allows_checkpointing:
        raise ConfigError(
            f"{adapter.kind} tuning cannot train with gradient checkpointing: its keys and values live in the cache "
            "that checkpointing drops; set training.gradient_checkpointing=false"
        )
    model = add_adapter(build_skeleton(config.model), adapter)
    # nothing is streamed here, so no host memory is taken for it
    method = config.method.model_copy(update={"offload": "none"})
    try:
        build_optimizer(model, method.sampler.build(seed=config.seed, train_steps=config.training.steps), method)
    except ValueError as error:
        raise ConfigError(f"{config.model.name}: {error}") from None
