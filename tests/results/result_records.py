"""Hand-made run records for the tests of this folder."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from grass_ray.config import RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.results.record import RunRecord, SearchPart, Status, TaskScore
from grass_ray.training.report import LayerTrace


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
    layers: LayerTrace | None = None,
    series: Mapping[str, list[tuple[int, float]]] | None = None,
    losses: Mapping[str, Sequence[float]] | None = None,
) -> RunRecord:
    """A record as a run would write it; ``correct`` lists each task's answers (failed runs have none).

    ``losses`` are those of the options of each task.
    """
    if correct is None:
        correct = {"generated": [True, False, True, False]} if status == "finished" else {}
    tasks = list(correct) or ["generated"]
    names = [f"data.suite={suite}", f"data.tasks=[{', '.join(tasks)}]", f"seed={seed}"]
    config = RunConfig(method=METHODS[method].config).override(parse([*names, *overrides]))
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
        tasks={task: make_score(answers, (losses or {}).get(task)) for task, answers in correct.items()},
        layers=layers,
        hardware=hardware,
        git_commit="0123456789abcdef",
        git_dirty=False,
        started_at="2026-05-01T10:00:00.000+00:00",
        finished_at=finished_at,
    )


def make_score(answers: Sequence[bool], losses: Sequence[float] | None = None) -> TaskScore:
    return TaskScore(
        accuracy=sum(answers) / len(answers),
        num_examples=len(answers),
        correct=list(answers),
        example_ids=[f"question-{index}" for index in range(len(answers))],
        scoring="generation",
        extraction="published",
        option_nats=None if losses is None else list(losses),
    )


def answers(right: int, total: int) -> list[bool]:
    """The first ``right`` of ``total`` answers are correct."""
    return [index < right for index in range(total)]


def make_history(num_layers: int = 30, steps: int = 200, period: int = 10, refreshed: bool = True) -> LayerTrace:
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
    return LayerTrace(
        num_layers=num_layers,
        total_parameters=1000,
        trainable_parameters=70,
        intervals=intervals,
        refreshes=refreshes,
        ages=[(step, tuple(float(chance.randrange(step)) for _ in range(num_layers))) for step, _, _ in refreshes],
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


def searching(
    number: int,
    loss: float,
    *,
    rungs: dict[int, float],
    scheduler: str = "asha",
    stage: Any = "search",
    method: str = "grass",
    **more: Any,
) -> RunRecord:
    """A trial with ten probing steps, as GRASS has them."""
    record = make_record(
        method,
        metrics={"validation/loss": loss},
        correct={},
        series={"validation/loss": [(10 + updates, value) for updates, value in rungs.items()]},
        overrides=["evaluation.test=false", f"method.optimizer.lr={(number + 1) / 10_000}", "training.steps=36"],
        **more,
    )
    record.search = SearchPart(search="optuna", scheduler=scheduler, stage=stage, number=number)
    return record


def asha() -> list[RunRecord]:
    """A search with a trial that was stopped early, its winner's tested run, and a run that is no part of it."""
    return [
        searching(2, 1.0, rungs={4: 1.5, 12: 1.2}),
        searching(0, 1.3, rungs={4: 1.6, 12: 1.4}),
        searching(1, 1.9, rungs={4: 1.9}, status="stopped", failure="stopped early at step 4 of 36 by ASHA"),
        searching(3, 0.1, rungs={}, stage="winner"),
        make_record("full"),
    ]


def members() -> list[RunRecord]:
    """A population of two; the second took over the first's weights after nine updates."""
    found = [searching(number, 1.0 + number, rungs={9: 2.0}, scheduler="pbt") for number in range(2)]
    for number, record in enumerate(found):
        assert record.search is not None
        before = {"step": 0, "weights_of": "a", "settings": {"lr": 0.1}}
        after = {"step": 9, "weights_of": "a", "settings": {"lr": 0.2}}
        lineage = [before, after] if number else [before]
        record.search = SearchPart.model_validate({**record.search.model_dump(), "lineage": lineage})
        record.series["hparam/lr"] = [(10 + step, 0.2 if number and step > 9 else 0.1) for step in range(-9, 37)]
    return found
