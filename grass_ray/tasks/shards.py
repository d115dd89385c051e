"""Split an evaluation over several workers, and merge their results.

Each worker evaluates the examples of one shard. The merged results equal those of a single worker::

    part = evaluate(model, tokenizer, data, evaluation, shard=(rank, world_size))
    results = merge_shards(all_gather(part))        # parts are plain data

Importing this module loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from grass_ray.tasks.scores import EvaluationResult, Workload

SHARD = "shard"  # key of the protocol that says which examples a part holds; removed by the merge


def split_by_cost(costs: Sequence[float], count: int) -> list[list[int]]:
    """Split examples into ``count`` shards that take about equally long.

    The most expensive remaining example goes to the shard with the least work (longest processing time first, Graham
    1969: at most a third longer than the best split). Equal costs give equal splits on every worker.

    Args:
        costs: cost of each example, in any unit.
        count: number of shards. Some are empty if there are fewer examples.

    Returns:
        Positions of the examples of each shard, ascending.
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
    """Merge the results of all workers into those of an evaluation that was never split.

    Args:
        parts: results of :func:`grass_ray.tasks.evaluation.evaluate` for every shard, in any order.

    Raises:
        ValueError: the parts are not from one evaluation, or one is missing or duplicate.
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
