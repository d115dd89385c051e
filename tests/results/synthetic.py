"""Whole sweeps of made-up records: many trials, true differences of a known size, or nothing but failures."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
from result_records import make_history, make_record, make_series

from grass_ray.config import PeftConfig
from grass_ray.methods import METHODS
from grass_ray.results.record import RunRecord

CONTROLS = ("uniform", "top", "inverse", "first-third", "middle-third", "last-third", "sgd", "muon", "grass-muon")
# an adapter of each kind is enough
TRAINED = [
    name
    for name, row in METHODS.items()
    if row.trains and name not in CONTROLS and not isinstance(row.config.adapter, PeftConfig)
]


def synthetic_records(trials: int, *, only_failures: bool = False, seed: int = 0) -> list[RunRecord]:
    """So many trials of all methods on three commonsense tasks, with learning rates, seeds and some failures."""
    chance = random.Random(seed)
    records = []
    for number in range(trials):
        method = TRAINED[number % len(TRAINED)]
        place = number // len(TRAINED)
        point = f"method.optimizer.lr={(1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)[place // 2 % 6]}"
        more = f"method.optimizer.weight_decay={place // 12 / 100}"
        common = {"suite": "commonsense", "seed": place % 2, "overrides": [point, more, "training.steps=200"]}
        if only_failures or chance.random() < 0.08:
            memory = chance.random() < 0.5
            reason = "step 3: CUDA out of memory, 2.00 GiB asked for" if memory else f"loss became nan at step {number}"
            status = "out_of_memory" if memory else "failed"
            record = make_record(method, status=status, failure=reason, **common)
            record.config["data"]["tasks"] = ["boolq", "piqa", "arc_easy"]
            records.append(record)
            continue
        skill = 0.45 + TRAINED.index(method) / 100 + 0.05 * chance.random()
        correct = {task: [chance.random() < skill for _ in range(200)] for task in ("boolq", "piqa", "arc_easy")}
        gib = 1.2 + 0.2 * TRAINED.index(method) + 0.2 * chance.random()
        drawn = METHODS[method].config.sampler.kind != "all"
        records.append(
            make_record(
                method,
                correct=correct,
                metrics={
                    "memory/peak_allocated_gib": gib,
                    "memory/peak_reserved_gib": gib * 1.3,
                    "memory/host_pinned_gib": 0.3 if method.startswith("grass") else 0.0,
                    "throughput/tokens_per_second": 900 / gib,
                    "time/train_s": 60 * gib,
                    "time/measure_s": 3.0 if method.startswith("grass") else 0.0,
                },
                layers=make_history(refreshed=method.startswith("grass")) if drawn else None,
                series=make_series(number, gib),
                **common,
            )
        )
    return records


def simulated_sweep(skills: Mapping[str, float], *, questions: int, seeds: int, draw: int) -> list[RunRecord]:
    """Methods that answer a question right with its own probability plus their ``skill``, each seed anew."""
    chance = np.random.default_rng(draw)
    easy = chance.uniform(0.15, 0.75, size=questions)
    return [
        make_record(method, seed=seed, correct={"generated": (chance.random(questions) < easy + skill).tolist()})
        for method, skill in skills.items()
        for seed in range(seeds)
    ]
