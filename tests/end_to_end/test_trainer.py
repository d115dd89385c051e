"""The optimizer alone inside ``transformers.Trainer``: no Ray, no MLflow, three lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import make_batch, make_llama, recompute_layers
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from grass_ray import GradNormSampler, LayerwiseAdamW
from grass_ray.optim.holding import hold_while_probing

pytestmark = pytest.mark.long

PROBING, STEPS = 2, 10


def make_trainer(folder: Path, *, held: bool = True, save_steps: int = 100) -> Trainer:
    """Ten steps, of which two only measure; Trainer's own schedule, or a cosine that stands still meanwhile."""
    model = make_llama()
    optimizer = LayerwiseAdamW(model, GradNormSampler(2, 3, probing_steps=PROBING, refresh_period=4), lr=1e-3)
    cosine = get_scheduler("cosine", optimizer, 2, STEPS - PROBING) if held else None
    rows = [{"input_ids": row, "labels": row} for step in range(8) for row in make_batch(step)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        save_steps=save_steps,
        logging_steps=1,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    schedule = hold_while_probing(cosine, optimizer) if cosine is not None else None
    return Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule))


@pytest.mark.parametrize("held", [False, True])
def test_trainer_trains_layer_by_layer(tmp_path: Path, held: bool) -> None:
    trainer = make_trainer(tmp_path, held=held)
    untouched = make_llama()
    trainer.train()
    changed = {
        name
        for (name, p), q in zip(trainer.model.named_parameters(), untouched.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert changed
    assert all(name.startswith("model.layers.") for name in changed), "embeddings, head and norm stay frozen"


def test_trainer_resumes_bitwise(tmp_path: Path) -> None:
    """From a checkpoint in probing, from one at its end, and from one in the middle of an interval."""
    whole = make_trainer(tmp_path, save_steps=1)
    whole.train()
    for step in (1, PROBING, 7):
        resumed = make_trainer(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(p, q), (step, name)
        assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


def test_checkpointing_set_on_the_model_stops_at_the_lowest_active_layer(tmp_path: Path) -> None:
    """Trainer leaves it as it was set; its own switch would let backward run through every layer."""
    trainer = make_trainer(tmp_path)
    model: Any = trainer.model
    recompute_layers(model)
    model.disable_input_require_grads()
    optimizer: Any = trainer.optimizer
    needed: dict[int, bool] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda module, inputs, output, index=index: needed.__setitem__(index, output.requires_grad)
        )
    lowest = []

    class Check(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            lowest.append(optimizer.active_layers[0])
            assert needed == {index: index >= lowest[-1] for index in range(4)}
            assert model.model.layers[0].gradient_checkpointing

    trainer.add_callback(Check())
    trainer.train()
    assert len(lowest) == STEPS
    assert max(lowest) > 0
