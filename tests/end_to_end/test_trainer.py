"""The optimizer alone inside ``transformers.Trainer``: no Ray, no MLflow, three lines."""

from __future__ import annotations

from pathlib import Path

import torch
from small import make_batch, make_llama
from transformers import Trainer, TrainingArguments

from grass_ray import GradNormSampler, LayerwiseAdamW


def make_trainer(folder: Path, steps: int) -> Trainer:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, GradNormSampler(2, 3, probing_steps=2, refresh_period=4), lr=1e-3)
    rows = [{"input_ids": row, "labels": row} for step in range(8) for row in make_batch(step)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=5,
        logging_steps=1,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))


def test_trainer_trains_layer_by_layer_and_resumes_bitwise(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, 10)
    untouched = make_llama()
    whole.train()
    changed = {
        name
        for (name, p), q in zip(whole.model.named_parameters(), untouched.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert changed
    assert all(name.startswith("model.layers.") for name in changed), "embeddings, head and norm stay frozen"
    resumed = make_trainer(tmp_path, 10)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
