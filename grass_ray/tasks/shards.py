"""An evaluation split over several workers, and put together again.

Every worker evaluates the examples of one shard; the gathered parts merge into what one worker alone returns::

    part = evaluate(model, tokenizer, data, evaluation, shard=(rank, world_size))
    results = merge_shards(all_gather(part))        # a part is plain data: dataclasses of text and numbers

Importing this module loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from grass_ray.tasks.scores import EvaluationResult, Workload

SHARD = "shard"  # the protocol's key that says which examples a part holds; gone after the merge


def split_by_cost(costs: Sequence[float], count: int) -> list[list[int]]:
    """Split examples into ``count`` shards that take about equally long.

    The costliest example that is left goes to the shard with the least work so far (longest processing time first,
    Graham 1969: at most a third longer than the best split). The same costs give the same split everywhere.

    Args:
        costs: what each example costs, in any unit.
        count: number of shards; some are empty where there are fewer examples.

    Returns:
        The positions of each shard's examples, ascending.
    """
    if count < 1:
        raise ValueError(f"cannot split into {count} shards; the number of shards is at least 1")
    shards: list[list[int]] = [[] for _ in range(count)]
    work = [0.0] * count
    for position in sorted(range(len(costs)), key=lambda position: (-costs[position], position)):
        least = min(range(count), key=lambda index: (work[index], len(shards[index]), index))
        shards[least].append(position)
        work[least] += costs[position]
    return [sorted(shard) for shard in shards]


def merge_shards(parts: Sequence[Mapping[str, EvaluationResult]]) -> dict[str, EvaluationResult]:
    """Put the parts of all workers together: the result of an evaluation that was never split.

    Args:
        parts: what :func:`grass_ray.tasks.evaluation.evaluate` returned for every shard, in any order.

    Raises:
        ValueError: the parts are not those of one evaluation, or one is missing or there twice.
    """
    if not parts:
        raise ValueError("there are no shards to merge")
    if any(tuple(part) != tuple(parts[0]) for part in parts):
        raise ValueError(f"the shards hold different tasks: {'; '.join(', '.join(part) for part in parts)}")
    return {task: _merge_task([part[task] for part in parts]) for task in parts[0]}


def _merge_task(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    shards = [part.protocol[SHARD] for part in parts]
    indices, count = sorted(shard["index"] for shard in shards), shards[0]["count"]
    if indices != list(range(count)):
        raise ValueError(f"{parts[0].task}: given shards {indices} of {count}; each is needed exactly once")
    whole = [
        dataclasses.replace(
            part, examples=(), protocol={key: value for key, value in part.protocol.items() if key != SHARD}
        )
        for part in parts
    ]
    if any(part != whole[0] for part in whole):
        raise ValueError(f"{parts[0].task}: the shards were evaluated in different ways and cannot be merged")
    placed = {
        position: example
        for part, shard in zip(parts, shards, strict=True)
        for position, example in zip(shard["positions"], part.examples, strict=True)
    }
    return dataclasses.replace(
        whole[0],
        examples=tuple(placed[position] for position in sorted(placed)),
        workload=sum((part.workload for part in parts), Workload()),
    )
