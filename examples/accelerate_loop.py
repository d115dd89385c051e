"""Layer-wise fine-tuning in a loop with Hugging Face Accelerate: accumulation, mixed precision, checkpoints.

::

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py --mixed-precision bf16

The model is not given to ``accelerator.prepare``, which would wrap it in DistributedDataParallel: that fixes which
gradients it synchronises, while the active layers change. LayerwiseAdamW averages their gradients itself.
"""

from __future__ import annotations

import argparse
import itertools

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, get_scheduler
from word_problems import load, load_tokens, print_engagement, watch

from grass_ray import GradNormSampler, LayerwiseAdamW
from grass_ray.optim.holding import hold_while_probing


def main() -> None:
    """Train, then print which layers trained when."""
    parser = argparse.ArgumentParser(description="Fine-tune a model layer by layer in a loop with Accelerate.")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2-135m, a folder, or a hub id")
    parser.add_argument("--steps", type=int, default=60, help="updates; probing comes on top")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--accumulation-steps", type=int, default=2, help="micro-batches an optimizer step")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    options = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulation_steps, mixed_precision=options.mixed_precision
    )
    model, tokenizer = load(options.model)
    model.to(accelerator.device).train()

    sampler = GradNormSampler(num_active_layers=2, period=5, probing_steps=4, refresh_period=20)
    optimizer = LayerwiseAdamW(model, sampler, lr=options.lr, max_grad_norm=1.0)
    # Accelerate steps a schedule once for every process
    updates = options.steps * accelerator.num_processes
    schedule = hold_while_probing(get_scheduler("cosine", optimizer, 5, updates), optimizer)
    history = watch(optimizer)
    loader = DataLoader(
        load_tokens(tokenizer), batch_size=4, shuffle=True, drop_last=True, collate_fn=DataCollatorForSeq2Seq(tokenizer)
    )
    prepared, loader, schedule = accelerator.prepare(optimizer, loader, schedule)

    steps = sampler.probing_steps + options.steps
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch in batches:
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss = model(**batch, use_cache=False).loss
            accelerator.backward(loss)
            prepared.step()
            schedule.step()
            prepared.zero_grad()
        if accelerator.sync_gradients:
            phase = "probe" if optimizer.probed else "train"
            accelerator.print(f"step {len(history):>4}  {phase}  loss {loss.item():.4f}")
            if len(history) == steps:
                break
    if accelerator.is_main_process:
        print_engagement(optimizer, history)
    accelerator.end_training()


if __name__ == "__main__":
    main()
