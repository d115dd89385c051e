"""Hand-made run records for the tests of this folder."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from grass_ray.config import RunConfig
from grass_ray.methods import METHODS
from grass_ray.results.record import LayerHistory, RunRecord, Status, TaskScore


def make_record(
    method: str = "grass",
    *,
    correct: Mapping[str, Sequence[bool]] | None = None,
    seed: int = 0,
    status: Status = "finished",
    failure: str | None = None,
    metrics: Mapping[str, float] | None = None,
    overrides: Sequence[str] = (),
    suite: str = "generated",
    hardware: str = "Test CPU, 2 cores, 24 GiB",
    finished_at: str = "2026-05-01T10:10:00.000+00:00",
    sweep_id: str = "s1",
    layers: LayerHistory | None = None,
    series: Mapping[str, list[tuple[int, float]]] | None = None,
) -> RunRecord:
    """A record as a run would write it; ``correct`` lists each task's answers (failed runs have none)."""
    if correct is None:
        correct = {"generated": [True, False, True, False]} if status == "finished" else {}
    tasks = list(correct) or ["generated"]
    names = [f"data.suite={suite}", f"data.tasks=[{', '.join(tasks)}]", f"seed={seed}"]
    config = RunConfig(method=METHODS[method].config).override([*names, *overrides])
    return RunRecord(
        run_id=f"{sweep_id}-{config.fingerprint}",
        name=config.name,
        sweep="quickstart",
        sweep_id=sweep_id,
        status=status,
        failure=failure,
        config=config.to_dict(),
        metrics=dict(metrics or {}),
        series=dict(series or {}),
        tasks={task: make_score(answers) for task, answers in correct.items()},
        layers=layers,
        hardware=hardware,
        git_commit="0123456789abcdef",
        git_dirty=False,
        started_at="2026-05-01T10:00:00.000+00:00",
        finished_at=finished_at,
    )


def make_score(answers: Sequence[bool]) -> TaskScore:
    return TaskScore(
        accuracy=sum(answers) / len(answers),
        num_examples=len(answers),
        correct=list(answers),
        example_ids=[f"question-{index}" for index in range(len(answers))],
        scoring="generation",
        extraction="published",
    )


def answers(right: int, total: int) -> list[bool]:
    """The first ``right`` of ``total`` answers are correct."""
    return [index < right for index in range(total)]


def make_history(num_layers: int = 30, steps: int = 200, period: int = 10, refreshed: bool = True) -> LayerHistory:
    """Draws every ``period`` steps after ten probing steps, refreshed every forty."""
    chance = random.Random(0)
    refreshes, intervals = [], []
    for step in range(10, steps, 40) if refreshed else ():
        norms = [1 + layer / 10 + chance.random() + step / 100 for layer in range(num_layers)]
        weights = [math.exp(norm) for norm in norms]
        refreshes.append((step, tuple(norms), tuple(weight / sum(weights) for weight in weights)))
    for first in range(11 if refreshed else 1, steps, period):
        intervals.append((first, tuple(sorted(chance.sample(range(num_layers), 2)))))
    visits = [sum(layer in active for _, active in intervals) for layer in range(num_layers)]
    return LayerHistory(
        num_layers=num_layers,
        total_parameters=1000,
        trainable_parameters=70,
        trainable_share=0.07,
        intervals=intervals,
        refreshes=refreshes,
        visits=visits,
        only_active_layers_changed=True,
        resident_state_bytes=10,
        host_state_bytes=20,
    )


def make_series(seed: int, level: float, steps: int = 200) -> dict[str, list[tuple[int, float]]]:
    """A falling noisy loss and step times."""
    chance = random.Random(seed)
    losses = [level + 2 * math.exp(-step / 40) + chance.gauss(0, 0.15) for step in range(1, steps + 1)]
    return {
        "train/loss": list(enumerate(losses, start=1)),
        "time/step_s": [(step, 1.5 + level / 2) for step in range(1, steps + 1)],
    }
