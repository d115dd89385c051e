"""Layer-wise fine-tuning with ``transformers.Trainer``, its checkpoints and its resume.

::

    python examples/transformers_trainer.py --output out
    python examples/transformers_trainer.py --output again --resume out/checkpoint-30   # ends in the same weights

One process and one GPU: with more, Trainer wraps the model in DistributedDataParallel, which fixes at its start which
gradients it synchronises, while the layers that train change (accelerate_loop.py shows several processes).
"""

from __future__ import annotations

import argparse

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, get_scheduler, set_seed
from word_problems import load, load_tokens, print_engagement, watch

from grass_ray import GradNormSampler, LayerwiseAdamW
from grass_ray.optim.holding import hold_while_probing


def main() -> None:
    """Train, then print which layers trained when."""
    parser = argparse.ArgumentParser(description="Fine-tune a model layer by layer with transformers.Trainer.")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2-135m, a folder, or a hub id")
    parser.add_argument("--steps", type=int, default=60, help="updates; probing comes on top")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--save-steps", type=int, default=30, help="steps between checkpoints")
    parser.add_argument("--output", default="trainer_output", help="where checkpoints and the model go")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="a checkpoint folder to go on from")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    options = parser.parse_args()

    set_seed(0)
    sampler = GradNormSampler(num_active_layers=2, period=5, probing_steps=4, refresh_period=20)
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=sampler.probing_steps + options.steps,
        per_device_train_batch_size=8,
        max_grad_norm=1.0,
        save_steps=options.save_steps,
        logging_steps=5,
        report_to=[],
        # computes in bfloat16, weights and states stay in float32
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),
    )
    model, tokenizer = load(options.model)
    model.to(arguments.device)  # before the optimizer is built, which looks where the weights are
    if options.gradient_checkpointing:
        # on the model and not in the arguments: Trainer would also make the inputs of the first layer require a
        # gradient, and backward would then run through every layer instead of stopping at the lowest active one
        # gradient_checkpointing_enable before transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()

    optimizer = LayerwiseAdamW(model, sampler, lr=options.lr)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=options.steps)
    history = watch(optimizer)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=load_tokens(tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        # Trainer steps the schedule after every step; held, it stands still while the optimizer is probing
        optimizers=(optimizer, hold_while_probing(schedule, optimizer)),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    print_engagement(optimizer, history)


if __name__ == "__main__":
    main()
