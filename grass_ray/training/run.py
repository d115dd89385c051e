"""One run from a configuration to its outcome: prepare, fit, evaluate. Knows neither Ray nor MLflow.

::

    run = Run.prepare(config)
    for report in run.fit(): print(report.step, report.loss)
    run.evaluate()
    outcome = run.outcome()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from grass_ray.config import ConfigError, Parallel, RunConfig, recomputed_layers
from grass_ray.optim.data_parallel import Workers
from grass_ray.optim.host_weights import move_outside_of_layers
from grass_ray.optim.recompute import Recompute
from grass_ray.optim.sharded import reshard
from grass_ray.tasks.evaluation import evaluate
from grass_ray.tasks.lm_eval_run import evaluate_lm_eval
from grass_ray.tasks.lm_eval_scores import LmEvalResult, lm_eval_metrics
from grass_ray.tasks.readback import check_answers
from grass_ray.tasks.rows import AnyRow, hash_rows
from grass_ray.tasks.scores import EvaluationResult, contaminated_tasks, score_metrics, workload_metrics
from grass_ray.tasks.shards import merge_shards
from grass_ray.tasks.sources import load_train_rows
from grass_ray.training.adapters import add_adapter
from grass_ray.training.batches import Batches
from grass_ray.training.built_in import cache_folder
from grass_ray.training.checkpoint import load_checkpoint, save_checkpoint
from grass_ray.training.checks import check_run
from grass_ray.training.forgetting import Forgetting
from grass_ray.training.inputs import hash_inputs
from grass_ray.training.loop import TrainState, fit
from grass_ray.training.lost_rows import describe_lost_rows
from grass_ray.training.metrics import MemoryMeter, default_device
from grass_ray.training.models import load_model
from grass_ray.training.optimizer import build_optimizer, build_schedule
from grass_ray.training.packing import check_packing
from grass_ray.training.report import MOST_UNITS_AS_SERIES, VALIDATION, RunOutcome, StepReport, TrainingFailure
from grass_ray.training.sharding import shard_model
from grass_ray.training.trace import LayerTracer
from grass_ray.training.validation import answer_loss, hold_out
from grass_ray.training.weights import checkpoint_bytes, parameters_sha256
from grass_ray.training.without_effect import settings_without_effect

Progress = Callable[[str, int, int], None]


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
        forgetting: Forgetting | None = None,
    ):
        self.config = config
        self.state = state
        self.tokenizer = tokenizer
        self._data = data
        self._revision = revision
        self._held_out = held_out
        self._forgetting = forgetting
        self._forgotten: dict[str, float] = {}
        self._validation_loss: float | None = None
        self._results: dict[str, EvaluationResult] = {}
        self._lm_eval: dict[str, LmEvalResult] = {}
        self._checkpoint_mib = 0.0

    @classmethod
    def prepare(cls, config: RunConfig, device: torch.device | None = None, *, parallel: Parallel = "replicate") -> Run:
        """Load the model and the data, and build the optimizer.

        Seeds torch's global generator with the run's seed: adapters' first weights and dropout draw from it.
        ``training.deterministic`` is for :func:`grass_ray.execute.execute` to see to.

        Args:
            config: the run.
            device: to train on; None takes this worker's.
            parallel: whether each worker holds the whole model, or shards of it.

        Raises:
            ConfigError: as :func:`check_run`.
        """
        check_run(config, Workers().count, parallel)
        torch.manual_seed(config.seed)
        device = device or default_device()
        training = config.training
        loaded = load_model(config.model)
        inputs = hash_inputs(config)  # lm-eval's data may have to be downloaded: now, not after hours
        if config.data.source.downloads and config.evaluation.test:
            check_answers(config.data, config.evaluation, loaded.tokenizer, online=True)
        batches, held_out, data = _load_data(config, loaded.tokenizer)
        data["inputs"] = inputs
        model = add_adapter(loaded.model, config.method.adapter)
        size = checkpoint_bytes(model)
        if parallel == "replicate" and config.method.weights == "streamed":
            move_outside_of_layers(model, device)
        elif parallel == "replicate":
            model = model.to(device)
        if config.data.batching == "packed" and training.steps:
            check_packing(model)
        if parallel == "shard":
            shard_model(model, device)
        forgetting = None
        if config.evaluation.forgetting is not None and config.evaluation.test:
            forgetting = Forgetting(config, model, loaded.tokenizer)
            data["forgetting"] = forgetting.provenance
        sampler = config.method.sampler.build(seed=config.seed, train_steps=training.steps)
        optimizer = build_optimizer(model, sampler, config.method)
        state = TrainState(
            config=training,
            model=model,
            device=device,
            batches=batches,
            optimizer=optimizer,
            schedule=build_schedule(optimizer, config),
            tracer=LayerTracer(optimizer, model),
            memory=MemoryMeter(device),
        )
        run = cls(config, state, loaded.tokenizer, data, loaded.revision, held_out, forgetting)
        run._checkpoint_mib = size / 1024**2
        Recompute(optimizer.stack.modules[: run.recomputed_layers]).switch(True)
        return run

    @property
    def recomputed_layers(self) -> int:
        """Number of decoder layers, from the first, that are recomputed in backward."""
        setting = self.config.training.gradient_checkpointing
        if setting == "auto" and self.state.device.type == "cpu":
            return 0  # on a GPU all, since nobody has predicted its memory
        return recomputed_layers(setting, self.state.optimizer.stack.num_layers)

    def fit(self, until: int | None = None) -> Iterator[StepReport]:
        """Train to the last step, or to the training step ``until`` (see :func:`grass_ray.training.loop.fit`)."""
        return fit(self.state, until)

    def save(self, folder: Path | None) -> None:
        """Write a checkpoint to ``folder``.

        Collective: call on every rank if the model is sharded, with None on all but the first.
        """
        save_checkpoint(self.state, None if folder is None else Path(folder))

    def restore(self, folder: Path) -> None:
        """Continue from the checkpoint in ``folder``, bit for bit as if the run had never stopped."""
        load_checkpoint(self.state, Path(folder))

    def validate(self) -> float:
        """Measure the loss on held-out rows and add it to the run's series; training is not affected.

        Collective: call on every rank if the model is sharded.

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
        """Set this run's own learning rate after restoring a checkpoint of a run with another."""
        schedule: Any = self.state.schedule
        lr = self.config.method.optimizer.lr
        schedule.base_lrs = [lr for _ in schedule.base_lrs]
        rates = [lr * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, rate in zip(self.state.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = lr, rate
        schedule._last_lr = rates

    def evaluate(self, on_progress: Progress | None = None) -> None:
        """Measure the loss on held-out rows and, unless ``evaluation.test`` is false, each task and what was forgotten.

        Collective: call on every rank. Workers share the questions, and each gets the whole result. If the model is
        sharded, a forward takes all workers, so each answers every question.

        Args:
            on_progress: called with (task, finished requests, all requests) after each batch.

        Raises:
            TrainingFailure: a loss is NaN, so that the answers mean nothing either.
        """
        workers = self.state.optimizer.workers
        shares = workers.count > 1 and not self.state.optimizer.sharded
        self.state.optimizer.synchronize()
        if self._held_out is not None:
            self._validation_loss = _a_number("validation loss", self._held_out_loss())
        if not self.config.evaluation.test:
            return
        shard = (workers.rank, workers.count) if shares else None
        evaluation = self.config.evaluation
        results = evaluate(
            self.state.model,
            self.tokenizer,
            self.config.data,
            evaluation,
            on_progress=on_progress,
            cache=cache_folder() / "tokens",
            shard=shard,
        )
        found = evaluate_lm_eval(self.state.model, self.tokenizer, evaluation, shard=shard, on_progress=on_progress)
        self._lm_eval = next(own for own in workers.gather(found) if own is not None) if shares else found or {}
        reshard(self.state.model)
        if self._forgetting is not None:
            self._forgotten = self._forgetting.metrics(self.state.model)
        merged = merge_shards(workers.gather(results)) if shares else results
        for task, result in merged.items():
            _a_number(f"loss of the answers of {task}", result.loss)
        self._results = merged

    def lost_rows(self) -> list[str]:
        """One line per way in which training rows were lost."""
        return describe_lost_rows(self._data, self.config.data.max_length_tokens)

    def weights_sha256(self) -> str:
        """Hash all weights as they are now, trained or not; takes about a second for two gigabytes.

        Collective: call on every rank if the model is sharded.
        """
        self.state.optimizer.synchronize()
        reshard(self.state.model)
        return parameters_sha256(self.state.model)

    def outcome(self) -> RunOutcome:
        """What was measured so far."""
        state = self.state
        steps = self.config.training.steps
        contaminated = contaminated_tasks(self.config.data.suite, self._data["train"], training_steps=steps)
        metrics = score_metrics(self._results, contaminated=contaminated) | workload_metrics(self._results)
        metrics |= lm_eval_metrics(self._lm_eval) | self._forgotten
        if self._validation_loss is not None:
            metrics[VALIDATION] = self._validation_loss
        layers = state.tracer.trace.model_copy(deep=True)
        layers.without_effect = settings_without_effect(self.config)
        layers.recomputed = list(range(self.recomputed_layers))
        if state.trained:
            resident, host = state.optimizer.state_bytes()
            host += state.optimizer.weights.host_bytes
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
            metrics |= {"checkpoint/mib": self._checkpoint_mib, **state.memory.reserved_metrics()}
            if shares := state.series.get("data/padding_share"):
                metrics["data/padding_share"] = fmean(share for _, share in shares)
            visits = state.tracer.trace.visits
            if len(visits) <= MOST_UNITS_AS_SERIES:
                metrics |= {f"layers/visits_{layer:02d}": number for layer, number in enumerate(visits)}
        return RunOutcome(
            metrics=metrics,
            series=state.series,
            tasks=self._results,
            layers=layers if state.trained else None,
            data=self._data,
            lm_eval=self._lm_eval,
            model_revision=self._revision,
        )


def _a_number(what: str, loss: float | None) -> float | None:
    if loss is not None and isnan(loss):
        raise TrainingFailure("failed", f"{what} is {loss}: what the model computes are no numbers")
    return loss


def _load_data(config: RunConfig, tokenizer: Any) -> tuple[Batches, Batches | None, dict[str, Any]]:
    """The batches to train on, the held-out rows if there are any, and what the record says of both."""
    rows, cache = load_train_rows(config.data), cache_folder() / "tokens"
    train_rows: Sequence[AnyRow] = rows.rows
    held_out: Batches | None = None
    data: dict[str, Any] = {}
    if config.data.validation_rows is not None:
        train_rows, chosen = hold_out(rows.rows, config.data.validation_rows)
        held_out = Batches(chosen, tokenizer, config.data, batch_size=1, accumulation_steps=1, seed=0, cache=cache)
        data["validation"] = {"rows": held_out.summary()["train_rows_used"], "sha256": hash_rows(chosen)}
    batches = Batches(
        train_rows,
        tokenizer,
        config.data,
        batch_size=config.training.batch_size,
        accumulation_steps=config.training.accumulation_steps,
        seed=config.seed,
        cache=cache,
    )
    return batches, held_out, {"train": rows.provenance, **batches.summary(), **data}
