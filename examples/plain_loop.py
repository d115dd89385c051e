"""Layer-wise fine-tuning in a plain PyTorch loop.

::

    python examples/plain_loop.py                                  # a tiny random Llama, seconds on a CPU
    python examples/plain_loop.py --model smollm2-135m --lr 1e-4   # or a folder, or any hub id
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, get_scheduler
from word_problems import load, load_tokens, print_engagement, watch

from grass_ray import GradNormSampler, LayerwiseAdamW


def main() -> None:
    """Train, then print which layers trained when."""
    parser = argparse.ArgumentParser(description="Fine-tune a model layer by layer in a plain PyTorch loop.")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2-135m, a folder, or a hub id")
    parser.add_argument("--steps", type=int, default=60, help="updates; probing comes on top")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model, tokenizer = load(options.model)
    model.to(device).train()  # to its device first: the optimizer looks where the weights are
    if options.gradient_checkpointing:
        # non-reentrant, and inputs need no gradient: backward stops at the lowest active layer
        # gradient_checkpointing_enable before transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()

    sampler = GradNormSampler(num_active_layers=2, period=5, probing_steps=4, refresh_period=20)
    optimizer = LayerwiseAdamW(model, sampler, lr=options.lr, max_grad_norm=1.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=options.steps)
    history = watch(optimizer)

    loader = DataLoader(
        load_tokens(tokenizer), batch_size=8, shuffle=True, drop_last=True, collate_fn=DataCollatorForSeq2Seq(tokenizer)
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, batch in zip(range(1, sampler.probing_steps + options.steps + 1), batches, strict=False):
        loss = model(**batch.to(device), use_cache=False).loss
        loss.backward()
        optimizer.step()  # probes, or clips, updates and switches layers
        optimizer.zero_grad()
        if not optimizer.probed:  # a probing step updates nothing, and uses up nothing of the schedule
            schedule.step()
        phase = "probe" if optimizer.probed else "train"
        print(f"step {step:>4}  {phase}  loss {loss.item():.4f}")
    print_engagement(optimizer, history)


if __name__ == "__main__":
    main()
