"""Optimizer-state offloading: what each mode costs in time and memory, beside its rivals.

    python benchmarks/offload.py                              # a GPU: TinyLlama-1.1B, Gemma-2B, LLaMA2-7B; or a CPU
    python benchmarks/offload.py --models llama2-7b --entries floor resident lazy --minutes 3
    python benchmarks/offload.py --gpu-memory 24                     # emulate a card of 24 GiB

First the machine: pinned copies in both directions, alone and at once, pinning, and the bandwidth of the fused AdamW.
Then real shapes with random weights, the same data and seed in every entry, two active layers that change every
``period`` steps. ``floor`` is forward and backward through the same layers with no optimizer at all: a mode's exposed
time is its step beyond that, its memory growth the peak beyond that peak. Repeats are shuffled over entries. Needs
torch, transformers and peft only; torchao and bitsandbytes are measured where they are installed. Ends within
``minutes``: entries that did not fit in are named.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import recording
import torch
import torch.nn.functional as functional
import tyro
from recording import Measure
from torch import Tensor, nn

from grass_ray import LayerwiseAdamW, LayerwiseOptions, UniformSampler
from grass_ray.config import LoraConfig, ModelConfig
from grass_ray.layerwise.stack import find_decoder_stack
from grass_ray.training.adapters import add_adapter
from grass_ray.training.built_in import SMOLLM2_SHAPE
from grass_ray.training.shapes import build_shape

GIB = 1024**3
GPU_MODELS = ("tinyllama-1.1b", "gemma-2b", "llama2-7b")
CPU_MODELS = ("small", "smollm2-135m")
LAYERWISE = {
    "none (published LISA)": {"offload": "none", "precision": "weights"},
    "resident": {"offload": "resident", "precision": "weights"},
    "blocking": {"offload": "blocking", "precision": "weights"},
    "overlap": {"offload": "overlap", "precision": "weights"},
    "lazy": {"offload": "lazy", "precision": "weights"},
    "resident rem16": {"offload": "resident", "precision": "rem16"},
    "lazy rem16": {"offload": "lazy", "precision": "rem16"},
    "lazy exact": {"offload": "lazy", "precision": "exact"},
}
OTHERS = ("floor", "adamw on two layers", "lora r16", "lora r128", "full", "torchao CPUOffloadOptimizer", "bnb paged")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    models: Annotated[tuple[str, ...] | None, tyro.conf.arg(help="default: three on a GPU, a small one on a CPU")] = (
        None
    )
    entries: Annotated[tuple[str, ...] | None, tyro.conf.arg(help="default: all")] = None
    batch_size: int | None = None
    seq_len: int | None = None
    steps: Annotated[int, tyro.conf.arg(help="timed steps a repeat")] = 8
    repeats: int = 3
    period: Annotated[int, tyro.conf.arg(help="steps between switches of layers")] = 4
    chunk_mib: int | None = None
    ring_slots: int = 4
    gpu_memory: Annotated[float | None, tyro.conf.arg(help="GiB that may be used, to emulate a smaller card")] = None
    minutes: float = 9.0
    output: Path = Path("benchmarks/results/offload")


@dataclass
class Entry:
    """One optimizer on one model. Times in seconds, memory in GiB; ``note`` says why there are none."""

    model: str
    name: str
    step_s: list[float] = field(default_factory=list)
    switch_step_s: list[float] = field(default_factory=list)
    peak_allocated_gib: float = 0.0
    peak_reserved_gib: float = 0.0
    host_gib: float = 0.0
    device_state_gib: float = 0.0
    hidden_share: float | None = None
    pinned: bool | None = None
    note: str = ""

    @property
    def median_s(self) -> float:
        """Median step without switches (with them where every step switches)."""
        return statistics.median(self.step_s or self.switch_step_s)


def build_model(name: str, device: torch.device) -> nn.Module:
    """A model with random weights: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    if name not in CPU_MODELS:
        return build_shape(ModelConfig(name=name, dtype="bfloat16"), device=str(device))
    from transformers import LlamaConfig, LlamaForCausalLM

    if name == "smollm2-135m":
        return LlamaForCausalLM(LlamaConfig(**SMOLLM2_SHAPE)).to(device)
    shape = LlamaConfig(
        vocab_size=2048,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    return LlamaForCausalLM(shape).to(device)


class Loop:
    """A training loop around one entry: ``step()`` is one optimizer step."""

    def __init__(self, name: str, model: nn.Module, options: Options, batch: Tensor) -> None:
        self.model = model
        self.optimizer: Any = None
        self._batch = batch
        self._layerwise = name in LAYERWISE
        model.train()
        if self._layerwise:
            mib = options.chunk_mib or (64 if batch.is_cuda else 4)
            self.optimizer = LayerwiseAdamW(
                model,
                UniformSampler(2, options.period, seed=0),
                lr=1e-5,
                options=LayerwiseOptions(chunk_bytes=mib * 1024 * 1024, ring_slots=options.ring_slots),
                **LAYERWISE[name],  # type: ignore[arg-type]
            )
        elif name.startswith("lora"):
            lora = LoraConfig(rank=int(name.split("r")[-1]), dropout=0.0, targets=("q_proj", "k_proj", "v_proj"))
            self.model = add_adapter(model, lora)
            self.optimizer = self._adamw([p for p in self.model.parameters() if p.requires_grad])
        elif name == "full":
            self.optimizer = self._adamw(list(model.parameters()))
        else:
            trained = self._two_layers()
            if name == "adamw on two layers":
                self.optimizer = self._adamw(trained)
            elif name == "torchao CPUOffloadOptimizer":
                from torchao.optim import CPUOffloadOptimizer

                self.optimizer = CPUOffloadOptimizer(trained, torch.optim.AdamW, fused=True, lr=1e-5)
            elif name == "bnb paged":
                from bitsandbytes.optim import PagedAdamW

                self.optimizer = PagedAdamW(trained, lr=1e-5)

    @staticmethod
    def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def _two_layers(self) -> list[nn.Parameter]:
        """Freeze all but the two layers that the layer-wise entries begin with."""
        layers = find_decoder_stack(self.model).layers
        sampler = UniformSampler(2, 1, seed=0)
        sampler.start([1] * len(layers))
        chosen = sampler.sample()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        trained = [p for index in chosen for p in layers[index]]
        for parameter in trained:
            parameter.requires_grad_(True)
        return trained

    def step(self) -> bool:
        """One step; whether the active layers were changed in it."""
        logits = self.model(input_ids=self._batch, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), self._batch[:, 1:].flatten())
        del logits
        loss.backward()
        before = self.optimizer.switches if self._layerwise else 0
        if self.optimizer is None:
            for parameter in self.model.parameters():
                parameter.grad = None
            return False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._layerwise and self.optimizer.switches > before


def measure(entry: Entry, options: Options, device: torch.device) -> None:
    """One repeat of an entry: build, warm up, time every step, note memory."""
    cuda = device.type == "cuda"
    batch_size = options.batch_size or (4 if cuda else 2)
    seq_len = options.seq_len or (1024 if cuda else 64)
    model = build_model(entry.model, device)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(0, vocabulary, (batch_size, seq_len), generator=generator).to(device)
    loop = Loop(entry.name, model, options, batch)
    for _ in range(2):
        loop.step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.steps):
        started = time.perf_counter()
        switched = loop.step()
        if cuda:
            # the training's stream alone: lazy updates may go on under the next step, which then has their cost
            torch.cuda.current_stream().synchronize()
        (entry.switch_step_s if switched else entry.step_s).append(time.perf_counter() - started)
    if cuda:
        entry.peak_allocated_gib = max(entry.peak_allocated_gib, torch.cuda.max_memory_allocated() / GIB)
        entry.peak_reserved_gib = max(entry.peak_reserved_gib, torch.cuda.max_memory_reserved() / GIB)
    if isinstance(loop.optimizer, LayerwiseAdamW):
        states, host = loop.optimizer.state_bytes()
        entry.device_state_gib, entry.host_gib = states / GIB, host / GIB
        entry.hidden_share = loop.optimizer.stats.hidden_share
        entry.pinned = loop.optimizer.stats.pinned


def measure_machine(device: torch.device) -> dict[str, float]:
    """Bandwidths in GB/s and the seconds that pinning a GiB takes."""
    size = 256 * 1024 * 1024
    found: dict[str, float] = {}
    weights = torch.zeros(size // 16, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    states = [torch.zeros_like(weights) for _ in range(2)]
    step = torch.ones((), device=device)

    def adamw() -> None:
        torch._fused_adamw_(
            [weights],
            [weights],
            [states[0]],
            [states[1]],
            [],
            [step],
            lr=1e-5,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    touched = weights.numel() * weights.element_size() * 7  # four reads, three writes
    found["fused_adamw_gb_s"] = touched / _seconds(adamw, device) / 1e9
    if device.type == "cuda":
        started = time.perf_counter()
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        found["pin_s_per_gib"] = (time.perf_counter() - started) * GIB / size
        other = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        one, two = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
        found["host_to_device_gb_s"] = size / _seconds(lambda: one.copy_(host, non_blocking=True), device) / 1e9
        found["device_to_host_gb_s"] = size / _seconds(lambda: other.copy_(two, non_blocking=True), device) / 1e9
        up, down = torch.cuda.Stream(), torch.cuda.Stream()

        def both() -> None:
            with torch.cuda.stream(up):
                one.copy_(host, non_blocking=True)
            with torch.cuda.stream(down):
                other.copy_(two, non_blocking=True)

        found["both_at_once_gb_s"] = 2 * size / _seconds(both, device) / 1e9
    return found


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure_all(options: Options, device: torch.device) -> list[Entry]:
    """Every entry on every model, repeats shuffled; what does not fit into the time says so."""
    names = options.entries or (*OTHERS, *LAYERWISE)
    models = options.models or (GPU_MODELS if device.type == "cuda" else CPU_MODELS[:1])
    entries = [Entry(model, name) for model in models for name in names]
    deadline = time.monotonic() + 60 * options.minutes
    shuffler = random.Random(0)
    for repeat in range(options.repeats):
        for model in models:
            own = [entry for entry in entries if entry.model == model and not entry.note]
            shuffler.shuffle(own)
            for entry in own:
                if time.monotonic() > deadline:
                    entry.note = entry.note or ("" if entry.step_s else "no time left")
                    continue
                _attempt(entry, options, device)
            print(f"repeat {repeat + 1}/{options.repeats}, {model}: {_progress(own)}", flush=True)
    return entries


def _attempt(entry: Entry, options: Options, device: torch.device) -> None:
    try:
        measure(entry, options, device)
    except ImportError as error:
        entry.note = f"not installed: {error.name}"
    except torch.OutOfMemoryError:
        entry.note = "out of memory"
    except (RuntimeError, MemoryError, ValueError) as error:
        entry.note = f"failed: {str(error).splitlines()[0][:120]}"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _progress(entries: list[Entry]) -> str:
    return "  ".join(f"{e.name} {e.note or f'{1000 * e.median_s:.0f} ms'}" for e in entries)


def table(entries: list[Entry]) -> str:
    """The result in Markdown, one table a model."""
    parts = []
    for model in dict.fromkeys(entry.model for entry in entries):
        own = {entry.name: entry for entry in entries if entry.model == model}
        floor = own.get("floor")
        resident = own.get("resident")
        lines = [
            f"### {model}",
            "",
            "| entry | step ms | exposed ms | / resident | switch step ms | peak GiB | growth GiB | reserved GiB "
            "| states on device GiB | on host GiB | fetched ahead |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for entry in own.values():
            if entry.note or not (entry.step_s or entry.switch_step_s):
                lines.append(f"| {entry.name} | {entry.note or '-'} |" + " |" * 9)
                continue
            exposed = f"{1000 * (entry.median_s - floor.median_s):+.0f}" if _has(floor) else "-"  # type: ignore[union-attr]
            ratio = f"{entry.median_s / resident.median_s:.3f}" if _has(resident) else "-"  # type: ignore[union-attr]
            growth = f"{entry.peak_allocated_gib - floor.peak_allocated_gib:.2f}" if _has(floor) else "-"  # type: ignore[union-attr]
            switch = f"{1000 * statistics.median(entry.switch_step_s):.0f}" if entry.switch_step_s else "-"
            memory = [f"{entry.peak_allocated_gib:.2f}", growth, f"{entry.peak_reserved_gib:.2f}"]
            if not entry.peak_allocated_gib:
                memory = ["-"] * 3
            ahead = "-" if entry.hidden_share is None else f"{100 * entry.hidden_share:.0f} %"
            lines.append(
                f"| {entry.name} | {1000 * entry.median_s:.0f} | {exposed} | {ratio} | {switch} | {' | '.join(memory)} "
                f"| {entry.device_state_gib:.3f} | {entry.host_gib:.3f} | {ahead} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _has(entry: Entry | None) -> bool:
    return entry is not None and bool(entry.step_s or entry.switch_step_s)


def draw(entries: list[Entry], path: Path) -> None:
    """Bars of step time, the floor's part grey; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    models = list(dict.fromkeys(entry.model for entry in entries))
    figure = Figure(figsize=(8, 1 + 3 * len(models)), layout="constrained")
    for axes, model in zip(figure.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        own = [entry for entry in entries if entry.model == model and _has(entry)]
        floor = next((entry.median_s for entry in own if entry.name == "floor"), 0.0)
        names, times = [entry.name for entry in own], [1000 * entry.median_s for entry in own]
        axes.barh(names, [min(t, 1000 * floor) for t in times], color="#b0b0b0", label="forward and backward alone")
        beyond = [max(0.0, t - 1000 * floor) for t in times]
        axes.barh(names, beyond, left=[min(t, 1000 * floor) for t in times], color="#D55E00", label="beyond that")
        axes.invert_yaxis()
        axes.set(title=model, xlabel="step, ms")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.gpu_memory and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.gpu_memory / total))
    machine = measure_machine(device)
    print("  ".join(f"{name} {value:.2f}" for name, value in machine.items()), flush=True)
    entries = measure_all(options, device)
    heading = (
        f"# Offloading\n\n{recording.made_on()}. {options.repeats} shuffled repeats of {options.steps} steps, layers "
        f"switch every {options.period} steps. Machine: "
        + ", ".join(f"{name} {value:.2f}" for name, value in machine.items())
        + ".\n\n"
    )
    measured = [entry for entry in entries if not entry.note and _has(entry)]
    measures = [Measure(f"{e.model} {e.name} step", "s", e.step_s or e.switch_step_s) for e in measured]
    measures += [Measure(f"{e.model} {e.name} peak", "GiB", [e.peak_allocated_gib]) for e in measured]
    recording.write(
        options.output,
        recording.facts(options) | {"machine": machine, "entries": [asdict(entry) for entry in entries]},
        f"{heading}{table(entries)}\n\n![step time]({options.output.with_suffix('.png').name})",
        measures=measures,
        draw=lambda path: draw(entries, path),
    )


if __name__ == "__main__":
    main()
