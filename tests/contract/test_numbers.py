"""Numbers at the edge of what floats hold, for every method and placement of its states: what happens is defined.

Gradients of zero, denormal ones and spikes are trained on; what is not finite ends the run, changes no weight and no
state, and the record says where. ``--slow`` takes every method with every placement and precision.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small import short_run

import grass_ray.training.loss
from grass_ray.config import PLACEMENTS, ConfigError, RunConfig
from grass_ray.execute import Action, Listener, RunContext, RunResult, execute
from grass_ray.methods import METHODS
from grass_ray.results.record import RunRecord
from grass_ray.training.batches import IGNORED, Batch
from grass_ray.training.built_in import TINY_POSITIONS
from grass_ray.training.checks import check_run
from grass_ray.training.loss import accumulate_gradients, summed_loss
from grass_ray.training.report import StepReport, TrainingFailure
from grass_ray.training.run import Run

TRAINED = [name for name, row in METHODS.items() if row.trains]
PLACES: dict[str, tuple[str, ...]] = {
    **{mode: (f"method.offload={mode}",) for mode in PLACEMENTS},
    "streamed": ("method.offload=lazy", "method.weights=streamed"),
    "in-backward": ("method.offload=lazy", "method.update_in_backward=true", "method.optimizer.max_grad_norm=null"),
    **{
        f"bfloat16-{precision}": ("model.dtype=bfloat16", f"method.optimizer.precision={precision}")
        for precision in ("weights", "rem16", "exact", "int8")
    },
    "int8": ("method.optimizer.precision=int8",),
}
# a norm of the model's, or of the adapter's own, keeps what they compute among the floats however large they become
BOUNDED = {"dora", "prefix", "prompt", "ia3"}


def possible(method: str, place: str) -> bool:
    try:
        short_run(method, *PLACES[place])
    except ConfigError:
        return False
    return True


PAIRS = [(method, place) for method in TRAINED for place in PLACES if possible(method, place)]
CASES = [
    pytest.param(*pair, id="-".join(pair), marks=[] if pair[1] == "none" or pair[0] == "grass" else [pytest.mark.slow])
    for pair in PAIRS
]


class Times(torch.autograd.Function):
    """The loss times a number, and its gradients times another."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, factor: float, of_gradients: float) -> torch.Tensor:
        ctx.of_gradients = of_gradients
        return loss * factor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient * ctx.of_gradients, None, None


class Remember(Listener):
    """Weights and states as they are before each step, whose number :attr:`next` is."""

    def __init__(self) -> None:
        self.next = 1
        self.run: Run | None = None

    def on_start(self, run: Run) -> None:
        self.run = run
        self.before, self.switches = self.now(), 0

    def on_step(self, run: Run, report: StepReport) -> Action:
        self.next = report.step + 1
        self.before, self.switches = self.now(), run.state.optimizer.switches
        return Action.GO

    def now(self) -> dict[str, torch.Tensor]:
        """All that a step may change; a state that is still zero is as one that is not there yet."""
        assert self.run is not None
        found = {name: p.detach().clone() for name, p in self.run.state.model.named_parameters()}
        for number, state in self.run.state.optimizer.state_dict()["state"].items():
            found |= {f"{number}.{name}": value.clone() for name, value in state.items() if value.any()}
        return found


def train(
    config: RunConfig, factors: Mapping[int, tuple[float, float]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RunResult, RunRecord, Remember]:
    """Carry out a run whose loss and gradients are multiplied at the steps of ``factors``, and read its record back."""
    memory = Remember()

    def loss(*arguments: Any, **settings: Any) -> torch.Tensor:
        own = summed_loss(*arguments, **settings)
        found: torch.Tensor = own
        if own.requires_grad:
            found = Times.apply(own, *factors.get(memory.next, (1.0, 1.0)))  # type: ignore[no-untyped-call]
        return found

    monkeypatch.setattr(grass_ray.training.loss, "summed_loss", loss)
    result = execute(config, listeners=[memory])
    result.record(RunContext(sweep="s", sweep_id="s", run_id="r")).save(folder / "record.json")
    return result, RunRecord.load(folder / "record.json"), memory


# ------------------------------------------------------------------------------------------------------------ gradients

ZERO, DENORMAL, SPIKE = (1.0, 0.0), (1.0, 1e-40), (1.0, 1e6)


@pytest.mark.parametrize(("method", "place"), CASES)
def test_gradients_of_every_size(method: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros first, while GRASS probes and GaLore takes its first projection; then denormals, a spike, and no number."""
    factors = {
        1: ZERO,
        2: ZERO,
        3: ZERO,
        4: DENORMAL,
        5: SPIKE,
        7: (1.0, math.inf if place == "resident" else math.nan),
    }
    config = short_run(method, *PLACES[place])
    result, record, memory = train(config, factors, tmp_path, monkeypatch)
    assert (result.status, result.failure, record.tasks) == ("failed", record.failure, {})
    assert str(record.failure).startswith("gradient norm became")
    assert str(record.failure).endswith("at step 7")
    norms = record.series["train/grad_norm"]
    assert [step for step, _ in norms] == [1, 2, 3, 4, 5, 6]
    assert [norm for _, norm in norms[:3]] == [0.0] * 3
    trained = [points for name, points in record.series.items() if name.startswith("train/")]
    assert all(math.isfinite(value) for points in trained for _, value in points)
    assert all(value.isfinite().all() for value in memory.before.values())
    assert memory.run is not None
    after, switched = memory.now(), memory.run.state.optimizer.switches > memory.switches
    assert all(torch.equal(value, memory.before[name]) for name, value in after.items())
    # the step counts for the sampler: a switch that is due may put states back
    assert switched or after.keys() == memory.before.keys()


@pytest.mark.parametrize(("method", "place"), [pair for pair in PAIRS if "none" in pair or "grass" in pair])
def test_a_run_that_leaves_the_floats_fails_and_says_where(method: str, place: str, tmp_path: Path) -> None:
    config = short_run(method, "method.optimizer.lr=1e30", *PLACES[place], steps=6)
    result = execute(config)
    result.record(RunContext(sweep="s", sweep_id="s", run_id="r")).save(tmp_path / "record.json")
    record = RunRecord.load(tmp_path / "record.json")
    assert all(math.isfinite(loss) for _, loss in record.series.get("train/loss", ()))
    if method in BOUNDED:
        assert record.status == "finished"
    else:
        assert (record.status, record.failure, record.tasks) == ("failed", result.failure, {})
        assert record.failure is not None
        assert " at step " in record.failure or record.failure.startswith("step "), record.failure


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["full", "grass", "lora", "ist", "bread"])
def test_a_loss_that_is_no_number(method: str, bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 5):
        _, record, memory = train(short_run(method), {step: (bad, math.nan)}, tmp_path, monkeypatch)
        assert record.failure == f"loss became {bad} at step {step}"
        assert memory.run is not None
        weights = dict(memory.run.state.model.named_parameters())
        assert all(torch.equal(memory.before[name], p) for name, p in weights.items())


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("held_out", [False, True])
def test_a_model_that_computes_no_numbers_has_no_accuracy(held_out: bool) -> None:
    """Its last step broke it, or it was broken before: an answer of such a model would count as any other."""
    rows = ["data.validation_rows=4"] * held_out
    broken = execute(short_run("full", "method.optimizer.lr=1e30", *rows, steps=1))

    def prepare() -> Run:
        run = Run.prepare(short_run("base", *rows, steps=0))
        with torch.no_grad():
            next(run.state.model.parameters()).fill_(math.nan)
        return run

    for result in (broken, execute(short_run("base", *rows, steps=0), prepare=prepare)):
        what = "validation loss" if held_out else "loss of the answers of generated"
        assert (result.status, result.failure) == ("failed", f"{what} is nan: what the model computes are no numbers")
        assert result.outcome is not None
        assert result.outcome.tasks == {}


# -------------------------------------------------------------------------------------------------------- the batches


def without_labels(batch: Batch) -> Batch:
    return dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORED))


def gradients(run: Run, batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    run.state.model.zero_grad()
    loss = accumulate_gradients(run.state.model, batches, run.state.device)
    return loss, [p.grad.clone() for p in run.state.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("method", TRAINED)
def test_a_micro_batch_without_labels_adds_nothing(method: str) -> None:
    """No row of data makes one, since rows without anything to learn are left out (``train_rows_dropped``)."""
    run = Run.prepare(short_run(method, "training.accumulation_steps=2"))
    run.state.model.eval()  # no dropout
    first, second = run.state.batches[0]
    weights = {name: value.clone() for name, value in run.state.model.state_dict().items()}
    loss, expected = gradients(run, [second])
    for batches in ([without_labels(first), second], [second, without_labels(first)]):
        run.state.model.load_state_dict(weights)  # bread has moved some in backward
        found = gradients(run, batches)
        assert found[0] == loss
        assert all(torch.equal(one, other) for one, other in zip(found[1], expected, strict=True))
    with pytest.raises(TrainingFailure, match="no token of the batch has a label, so there is no loss"):
        gradients(run, [without_labels(first), without_labels(second)])


@pytest.mark.parametrize("method", ["full", "grass", "lora", *sorted(BOUNDED)])
def test_rows_as_long_as_the_model_and_longer(method: str, tmp_path: Path) -> None:
    """Longer rows are cut at the longest length that the model takes, and counted; a longer length is refused."""
    adapter = METHODS[method].config.adapter
    most = TINY_POSITIONS - (0 if adapter is None else adapter.virtual_tokens)
    sides = {"instruction": "Is it so?", "answer": "good"}
    texts = ["because " * words + "the correct answer is good" for words in (3, 3000, 5, 2000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**sides, "output": text}) + "\n" for text in texts))
    source = {"kind": "custom", "name": "own", "answer": "labels", "labels": ["good", "bad"], "max_new_tokens": 30_000}
    data = {"suite": "own", "tasks": ["own"], "max_length_tokens": most, "template": "clean"}
    values = short_run(method, steps=2).to_dict()
    values["data"] |= {**data, "source": {**source, "train": str(path), "test": str(path)}}
    config = RunConfig.parse(values).override({"training.batch_size": 2, "evaluation.test": False})
    check_run(config)
    run = Run.prepare(config)
    lengths = {batch.input_ids.shape[1] for step in range(2) for batch in run.state.batches[step]}
    assert max(lengths) == most
    assert all(math.isfinite(report.loss) for report in run.fit())
    assert run.outcome().data["train_rows_truncated"] == 2
    with pytest.raises(ConfigError, match=rf"has {TINY_POSITIONS} positions, but training rows take up to {most + 1}"):
        check_run(config.override({"data.max_length_tokens": most + 1}))
