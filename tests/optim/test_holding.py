"""Schedules that stand still while the optimizer only measures: torch's, transformers', in Trainer and Accelerate."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from small import backward, make_batch, make_llama
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from grass_ray import GradNormSampler, LayerwiseAdamW
from grass_ray.optim.holding import hold_while_probing

PROBING, UPDATES = 3, 8

SCHEDULES: dict[str, Callable[[Any], LRScheduler]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, UPDATES),
    "one_cycle": lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=UPDATES + 1, cycle_momentum=False),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, total_iters=3), ConstantLR(optimizer)], milestones=[3]
    ),
    "transformers_linear": lambda optimizer: get_scheduler("linear", optimizer, 2, UPDATES),
    "transformers_cosine": lambda optimizer: get_scheduler("cosine", optimizer, 2, UPDATES),
}


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def make_optimizer(model: Any, probing: int = PROBING) -> LayerwiseAdamW:
    return LayerwiseAdamW(model, GradNormSampler(2, 3, probing_steps=probing), lr=1e-2)


def follow(schedule: LRScheduler, optimizer: Any, model: Any, steps: int) -> list[float]:
    """The learning rate of every step."""
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_probing_uses_up_no_step_of_the_schedule(name: str) -> None:
    """After probing, the rates are those of an optimizer that never probed."""
    model, plain = make_llama(), make_llama()
    optimizer, other = make_optimizer(model), make_optimizer(plain, probing=0)
    schedule = SCHEDULES[name](optimizer)
    kind = type(schedule)
    held = hold_while_probing(schedule, optimizer)
    assert held is schedule
    assert isinstance(held, kind)
    rates = follow(held, optimizer, model, PROBING + UPDATES)
    expected = follow(SCHEDULES[name](other), other, plain, UPDATES)
    assert rates[PROBING:] == expected
    assert rates[:PROBING] == expected[:1] * PROBING
    assert len(set(expected)) > 2


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [1, PROBING, PROBING + 4])
def test_state_round_trips(name: str, stop: int) -> None:
    """Stopped in probing, at its end and in training; the state is the schedule's own and plain data."""
    model = make_llama()
    optimizer = make_optimizer(model)
    schedule = SCHEDULES[name](optimizer)
    keys = set(schedule.state_dict())
    hold_while_probing(schedule, optimizer)
    follow(schedule, optimizer, model, stop)
    assert set(schedule.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save((optimizer.state_dict(), schedule.state_dict()), buffer)
    resumed = make_llama()
    resumed.load_state_dict(model.state_dict())
    other = make_optimizer(resumed)
    loaded = hold_while_probing(SCHEDULES[name](other), other)
    buffer.seek(0)
    optimizer_state, schedule_state = torch.load(buffer, weights_only=True)
    other.load_state_dict(optimizer_state)
    loaded.load_state_dict(schedule_state)
    rest = PROBING + UPDATES - stop
    assert follow(loaded, other, resumed, rest) == follow(schedule, optimizer, model, rest)


def test_two_optimizers_do_not_share_a_hold() -> None:
    """The class made for one schedule leaves torch's class, and other schedules, alone."""
    model, other = make_llama(), make_llama()
    optimizer, unheld = make_optimizer(model), make_optimizer(other)
    held = hold_while_probing(SCHEDULES["lambda"](optimizer), optimizer)
    free = SCHEDULES["lambda"](unheld)
    follow(held, optimizer, model, 2)
    follow(free, unheld, other, 2)
    assert (held.last_epoch, free.last_epoch) == (0, 2)


@pytest.mark.parametrize("name", ["lambda", "one_cycle", "transformers_cosine"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate(name: str, accumulation: int) -> None:
    """Accelerate wraps optimizer and schedule; what was held stays held, and its checkpoint restores both."""
    model, plain = make_llama(), make_llama()
    other = make_optimizer(plain, probing=0)
    expected = follow(SCHEDULES[name](other), other, plain, UPDATES)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    optimizer = make_optimizer(model)
    schedule = hold_while_probing(SCHEDULES[name](optimizer), optimizer)
    prepared, wrapped, held = accelerator.prepare(model, optimizer, schedule)
    assert wrapped.optimizer is optimizer
    rates = []
    for step in range((PROBING + UPDATES) * accumulation):
        with accelerator.accumulate(prepared):
            if accelerator.sync_gradients:
                rates.append(optimizer.param_groups[0]["lr"])
            batch = make_batch(step)
            accelerator.backward(prepared(input_ids=batch, labels=batch).loss)
            wrapped.step()
            held.step()
            wrapped.zero_grad()
    assert rates[PROBING:] == expected


def test_accelerates_checkpoint(tmp_path: Path) -> None:
    def build() -> tuple[Any, Any, Any, Any]:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        accelerator = Accelerator(cpu=True)
        model = make_llama()
        optimizer = make_optimizer(model)
        schedule = hold_while_probing(SCHEDULES["transformers_cosine"](optimizer), optimizer)
        return accelerator, *accelerator.prepare(model, optimizer, schedule)

    accelerator, model, optimizer, schedule = build()
    follow(schedule, optimizer, model, PROBING + 2)
    accelerator.save_state(str(tmp_path))
    expected = follow(schedule, optimizer, model, 4)
    accelerator, resumed, optimizer, schedule = build()
    accelerator.load_state(str(tmp_path))
    assert follow(schedule, optimizer, resumed, 4) == expected
    for (name, left), right in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(left, right[1]), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer(tmp_path: Path, accumulation: int) -> None:
    """Trainer's steps include the probing ones; the schedule counts updates."""

    class Rates(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            self.seen.append(optimizer.param_groups[0]["lr"])

    plain = make_llama()
    other = make_optimizer(plain, probing=0)
    expected = follow(SCHEDULES["transformers_cosine"](other), other, plain, UPDATES)
    model = make_llama()
    optimizer = make_optimizer(model)
    schedule = hold_while_probing(SCHEDULES["transformers_cosine"](optimizer), optimizer)
    rates = Rates()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=PROBING + UPDATES,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for step in range(8) for row in make_batch(step)]
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule), callbacks=[rates]
    )
    trainer.train()
    assert rates.seen[PROBING:] == expected
    assert rates.seen[:PROBING] == expected[:1] * PROBING


def test_refuses_what_cannot_say_whether_it_measured() -> None:
    model = make_llama()
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="optimizer is AdamW; hold_while_probing needs the LayerwiseAdamW itself"):
        hold_while_probing(SCHEDULES["lambda"](adamw), adamw)  # type: ignore[arg-type]
