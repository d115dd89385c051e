"""Layer-wise fine-tuning of a model that FSDP2 shards over several processes, for models that outgrow one GPU.

::

    torchrun --nproc-per-node 2 examples/fsdp2.py                       # two processes on a CPU, or two GPUs
    torchrun --nproc-per-node 8 examples/fsdp2.py --model FOLDER --lr 1e-5 --output trained

Each process holds some rows of every weight, and optimizer states for its rows of the layers that were active. What is
frozen costs no reduction of gradients.
"""

from __future__ import annotations

import argparse
import itertools
import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import DataCollatorForSeq2Seq, get_scheduler
from word_problems import load, load_tokens, print_engagement, watch

from grass_ray import GradNormSampler, LayerwiseAdamW


def main() -> None:
    """Train, print which layers trained when, and write the whole model."""
    parser = argparse.ArgumentParser(description="Fine-tune a sharded model layer by layer (FSDP2, torchrun).")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2-135m, a folder, or a hub id")
    parser.add_argument("--steps", type=int, default=60, help="updates; probing comes on top")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--output", help="folder for the trained model, as save_pretrained writes it")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    torch.manual_seed(0)  # the same weights everywhere, before they are cut
    model, tokenizer = load(options.model)
    model.train()
    for layer in model.model.layers:  # a layer is whole on the device only while it computes
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # the same seed everywhere: every process draws the same layers (and the optimizer checks it)
    sampler = GradNormSampler(num_active_layers=2, period=5, probing_steps=4, refresh_period=20, seed=0)
    optimizer = LayerwiseAdamW(model, sampler, lr=options.lr, max_grad_norm=1.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=options.steps)
    history = watch(optimizer)

    rows = load_tokens(tokenizer)
    loader = DataLoader(
        rows,
        batch_size=4,
        sampler=DistributedSampler(rows, seed=0, drop_last=True),
        drop_last=True,
        collate_fn=DataCollatorForSeq2Seq(tokenizer),
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, batch in zip(range(1, sampler.probing_steps + options.steps + 1), batches, strict=False):
        loss = model(**batch.to(device), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.probed:
            schedule.step()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        if dist.get_rank() == 0:
            phase = "probe" if optimizer.probed else "train"
            print(f"step {step:>4}  {phase}  loss {mean.item():.4f}")

    # every process takes part; the first one gets the whole weights
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        print_engagement(optimizer, history)
        if options.output:
            model.save_pretrained(options.output, state_dict=whole)
            tokenizer.save_pretrained(options.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
