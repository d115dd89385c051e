"""Layer-wise supervised fine-tuning with TRL's ``SFTTrainer``.

::

    pip install trl
    python examples/trl_sft.py
    python examples/trl_sft.py --model smollm2-135m --lr 1e-4 --bf16 --gradient-checkpointing

One process and one GPU, as in transformers_trainer.py.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from transformers import get_scheduler
from trl import SFTConfig, SFTTrainer
from word_problems import load, load_texts, print_engagement, watch

from grass_ray import GradNormSampler, LayerwiseAdamW
from grass_ray.optim.holding import hold_while_probing


def main() -> None:
    """Train, then print which layers trained when."""
    parser = argparse.ArgumentParser(description="Fine-tune a model layer by layer with TRL's SFTTrainer.")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2-135m, a folder, or a hub id")
    parser.add_argument("--steps", type=int, default=60, help="updates; probing comes on top")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--output", default="trl_output", help="SFTTrainer's output folder")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    options = parser.parse_args()

    sampler = GradNormSampler(num_active_layers=2, period=5, probing_steps=4, refresh_period=20)
    config = SFTConfig(
        output_dir=options.output,
        max_steps=sampler.probing_steps + options.steps,
        per_device_train_batch_size=8,
        max_length=256,
        max_grad_norm=1.0,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        # SFTConfig turns both of these on unless told otherwise.
        # bf16 computes in bfloat16 under autocast; weights and states stay in float32.
        bf16=options.bf16,
        # Gradient checkpointing (activation checkpointing in newer transformers) is set on the model below: the
        # trainer would also make the inputs of the first layer require a gradient, and backward would run through every
        # layer instead of stopping at the lowest active one.
        activation_checkpointing=False,
        use_cpu=not torch.accelerator.is_available(),
    )
    model, tokenizer = load(options.model)
    model.to(config.device)  # before the optimizer is built, which looks where the weights are
    if options.gradient_checkpointing:
        # gradient_checkpointing_enable before transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()

    optimizer = LayerwiseAdamW(model, sampler, lr=options.lr)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=options.steps)
    history = watch(optimizer)
    trainer = SFTTrainer(
        model=model,  # the model itself, not its name: the optimizer holds these very weights
        args=config,
        train_dataset=Dataset.from_list(load_texts()),
        processing_class=tokenizer,
        optimizers=(optimizer, hold_while_probing(schedule, optimizer)),
    )
    trainer.train()
    print_engagement(optimizer, history)


if __name__ == "__main__":
    main()
