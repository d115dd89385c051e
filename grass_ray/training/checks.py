"""Check a run's configuration before any weights are loaded.

::

    check_run(config)      # ConfigError lists every mistake at once
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

from grass_ray.config import ConfigError, GradientCheckpointing, ModelConfig, Parallel, RunConfig
from grass_ray.tasks.evaluation import check_evaluation
from grass_ray.tasks.lm_eval_tasks import check_lm_eval
from grass_ray.tasks.readback import check_answers
from grass_ray.tasks.sources import check_data
from grass_ray.tasks.unrelated import load_unrelated
from grass_ray.training.adapters import add_adapter
from grass_ray.training.lost_rows import check_some_row_fits
from grass_ray.training.models import build_skeleton, check_lengths, check_model, load_tokenizer
from grass_ray.training.optimizer import build_optimizer
from grass_ray.training.packing import check_packed_adapter
from grass_ray.training.sharding import check_shardable


def check_run(
    config: RunConfig,
    workers: int = 1,
    parallel: Parallel = "replicate",
    min_workers: int | None = None,
    checked: set[Hashable] | None = None,
) -> None:
    """Find every mistake that shows before weights are loaded: model, method, data, evaluation, workers.

    Args:
        config: the run.
        workers: number of workers that share the micro-batches of every step.
        parallel: whether each of them holds the whole model, or shards of it.
        min_workers: of an elastic run, which goes on with any number of workers from this one up; None for others.
        checked: what was found good and is not looked at again: rows, and runs but for seed and learning rate; new
            ones are added.

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

    min_workers = workers if min_workers is None else min_workers
    attempt(lambda: _check_workers(config, min_workers, workers))
    if parallel == "shard":
        attempt(lambda: check_shardable(config, min_workers))
    trained = config.override({"method.optimizer.lr": 1.0, "seed": 0}).fingerprint  # neither decides what can train
    if checked is None or trained not in checked:
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
        attempt(lambda: check_lm_eval(config.evaluation.lm_eval))
        if config.evaluation.forgetting is not None:
            attempt(lambda: load_unrelated(str(config.evaluation.forgetting)))
    if mistakes:
        raise ConfigError("; ".join(dict.fromkeys(mistakes)))
    if checked is not None:
        checked.update((rows, trained))


def _check_workers(config: RunConfig, fewest: int, most: int) -> None:
    # workers take whole micro-batches, so that importance is measured on the same gradients whatever their number
    training = config.training
    method = config.method
    in_backward = {"update_in_backward": method.update_in_backward, "inactive_updates": method.inactive_updates}
    if most > 1 and (named := [name for name, value in in_backward.items() if value]):
        raise ConfigError(
            f"method.{named[0]} needs one worker, not {most}: the gradients of several are complete only after backward"
        )
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
    """Load a model's tokenizer once for all trials of a sweep; it must not be changed."""
    return load_tokenizer(model)


def _check_model(config: RunConfig) -> None:
    """Build everything but the weights, so that what cannot work with this model shows."""
    check_model(config.model)
    model = add_adapter(build_skeleton(config.model), config.method.adapter)
    # nothing is streamed here, so no host memory is taken for it
    method = config.method.model_copy(update={"offload": "none", "weights": "resident"})
    try:
        sampler = method.sampler.build(seed=config.seed, train_steps=config.training.steps)
        optimizer = build_optimizer(model, sampler, method)
    except ValueError as error:
        raise ConfigError(f"{config.model.name}: {error}") from None
    check_recomputed(config.training.gradient_checkpointing, optimizer.stack.num_layers)


def check_recomputed(setting: GradientCheckpointing, num_layers: int) -> None:
    """Raise :class:`ConfigError` if more layers should be recomputed than the model has."""
    if isinstance(setting, int) and setting > num_layers:
        raise ConfigError(
            f"training.gradient_checkpointing is {setting}, but the model has {num_layers} decoder layers; give none, "
            f"all, auto, or 1 to {num_layers}"
        )
