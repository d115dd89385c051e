"""``grass-ray plan``: predict the peak memory of each method without loading weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ValidationError
from tyro.conf import arg

from grass_ray.commands.flags import Settings
from grass_ray.config import ConfigError, GradientCheckpointing, TrainingConfig
from grass_ray.method_files import methods_with
from grass_ray.methods import get_method
from grass_ray.overrides import parse


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict the peak memory of each method and offload mode, without weights, and what fits.

    For example:
      grass-ray plan --model llama2-7b --gpu-memory 24 --batch-size 4 --seq-len 1024
      grass-ray plan --model meta-llama/Llama-3.2-1B --gpu-memory 16 --methods grass lisa --format markdown
      grass-ray plan --model smollm2-135m --dtype float32 --device cpu --seq-len 256
    """

    model: str = "smollm2-135m"
    """Hub id, folder, built-in model, or a shape: tinyllama-1.1b, gemma-2b, llama2-7b,
    llama3.1-8b, qwen2.5-7b."""
    gpu_memory: float | None = None
    """Memory of the device in GiB. Defaults to that of this machine."""
    batch_size: int = 4
    """Number of rows per optimizer step."""
    seq_len: int = 1024
    """Number of tokens of the longest row."""
    labelled: int | None = None
    """Number of positions with a label. Defaults to all positions."""
    accumulation_steps: int = 1
    """Number of micro-batches per optimizer step."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Data type of the weights."""
    methods: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...")] = None
    """Methods to plan. Defaults to all methods."""
    method_file: Path | None = None
    """YAML file with methods of your own; its code is run."""
    gradient_checkpointing: Annotated[tuple[str, ...], arg(metavar="none|all|auto|N")] = ("none",)
    """Which decoder layers are recomputed: as few as fit (auto), or the first N. Without a value all."""
    device: Literal["cpu", "cuda"] | None = None
    """Device to plan for. Defaults to cuda if --gpu-memory is given, else to the device of this machine."""
    set: Settings = ()
    """Other settings by dotted key, for the methods that have the key."""
    format: Literal["table", "json", "markdown"] = "table"
    """Output format."""

    def run(self) -> int:
        """Print the plan and return the exit code."""
        from grass_ray.memory.report import make_report, make_request
        from grass_ray.memory.report_text import render_report

        known = methods_with(self.method_file)
        request = make_request(
            model=self.model,
            dtype=self.dtype,
            memory_gib=self.gpu_memory,
            device=self.device,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            labelled=self.labelled,
            accumulation_steps=self.accumulation_steps,
            checkpointing=_read_checkpointing(self.gradient_checkpointing),
            methods=known if self.methods is None else {name: get_method(name, known) for name in self.methods},
            settings=self.set,
        )

        def show(name: str) -> None:
            if sys.stderr.isatty():
                print(f"\rplanning {name:20}", end="", file=sys.stderr, flush=True)

        report = make_report(request, show)
        show("")
        print(render_report(report, self.format))
        return 0


def _read_checkpointing(words: tuple[str, ...]) -> GradientCheckpointing:
    """The value of ``--gradient-checkpointing`` as ``--set training.gradient_checkpointing=`` reads it."""
    try:
        given = parse([f"gradient_checkpointing={' '.join(words) or 'all'}"])
        return TrainingConfig.model_validate(given).gradient_checkpointing
    except ValidationError:
        raise ConfigError(
            f"--gradient-checkpointing {' '.join(words)}: give none, all, auto, or a number of layers, at least 1"
        ) from None
