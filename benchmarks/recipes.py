"""Write the recipes of examples/recipes/ with what the memory plan says of each: which settings fit which card.

    python benchmarks/recipes.py            # writes every file anew; the figures follow the plan
    grass-ray train grass --config examples/recipes/llama2-7b.yaml --set method.weights=streamed

The figures are planned for the shapes of the models, without their weights; nothing is downloaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from grass_ray.config import ModelConfig, RunConfig
from grass_ray.config.files import whole_file
from grass_ray.memory.fit import TOLERANCE, longest_shape, plan_decided
from grass_ray.memory.plan import MemoryPlan, Planner
from grass_ray.training.report import GIB, RESERVE_BYTES, first_layers

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "recipes"
CARDS = (12, 16, 24, 80)
# the shape that the plan knows, and the model on the Hub that has it
MODELS = {
    "tinyllama-1.1b": "TinyLlama/TinyLlama_v1.1",
    "gemma-2b": "google/gemma-2b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
}
BEGINS = "# what fits which card"


def recipe(hub_id: str) -> dict[str, Any]:
    """The configuration of a recipe: what differs from the defaults."""
    return {
        "model": {"name": hub_id, "dtype": "bfloat16"},
        "method": {
            "name": "grass",
            "sampler": {"kind": "grad_norm", "num_active_layers": 2, "period": 25},
            "optimizer": {"lr": 1e-5},
            "offload": "auto",
            "weights": "resident",
        },
        "data": {
            "suite": "arithmetic",
            "tasks": ["gsm8k", "multiarith", "svamp"],
            "source": {"kind": "hub"},
            "max_length_tokens": 512,
        },
        "training": {
            "steps": 1000,
            "batch_size": 16,
            "accumulation_steps": 4,
            "warmup_steps": 50,
            "gradient_checkpointing": "auto",
            "checkpoint_every_steps": 200,
        },
    }


def text_of(shape: str) -> str:
    """The whole file of the recipe for a model of that shape."""
    values = recipe(MODELS[shape])
    head = [
        f"# grass-ray train grass --config examples/recipes/{shape}.yaml",
        "#",
        f"{BEGINS}: planned, not measured, with 10 % to spare; rows of 512 tokens. On another",
        "# machine than the one it will run on, --gpu-memory GIB says which card is meant.",
        *(f"#   {size:>2} GiB: {said}" for size, said in figures(shape).items()),
    ]
    return "\n".join(head) + "\n\n" + yaml.safe_dump(values, sort_keys=False)


def figures(shape: str) -> dict[int, str]:
    """For each card the settings that fit, and what they take."""
    config = RunConfig.parse(recipe(MODELS[shape]))
    planner = Planner(ModelConfig(name=shape, dtype=config.model.dtype), "cuda")
    return {size: card(config, planner, size) for size in CARDS}


def card(config: RunConfig, planner: Planner, size: int) -> str:
    """The settings of a run with which it fits ``size`` GiB, those that cost least time first."""
    memory = size * GIB - RESERVE_BYTES
    for settings, plan in candidates(config, planner, memory):
        if plan.peak_bytes * (1 + TOLERANCE) <= memory:
            count, layers = plan.recomputed_layers, plan.num_layers
            said = [f"--set {' '.join(settings)}" if settings else "as it is"]
            said += [f"offload {plan.offload}"]
            said += [f"recomputes {first_layers(count, layers) if count else 'nothing'}"]
            return ", ".join(said) + f"; {plan.peak_bytes / GIB:.1f} GiB, on the host {plan.host_bytes / GIB:.1f}"
    return "does not fit"


def candidates(config: RunConfig, planner: Planner, memory: float) -> Iterator[tuple[list[str], MemoryPlan]]:
    """Settings that differ from the recipe's, and the plan with them."""
    rows = config.training.batch_size // config.training.accumulation_steps
    for weights, halved in itertools.product(("resident", "streamed"), (1, 2, 4)):
        settings = ["method.weights=streamed"] if weights == "streamed" else []
        settings += [f"training.accumulation_steps={config.training.accumulation_steps * halved}"] if halved > 1 else []
        method = config.method.model_copy(update={"weights": weights})
        trained = planner.apply(method, config.training.steps)
        shape = replace(
            longest_shape(config), rows=rows // halved, micro_batches=config.training.accumulation_steps * halved
        )
        for mode in ("resident", "lazy"):
            yield settings, plan_decided(planner, trained, shape, mode, memory)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for shape in MODELS:
        with whole_file(FOLDER / f"{shape}.yaml") as file:
            file.write(text_of(shape))
        print(FOLDER / f"{shape}.yaml", flush=True)


if __name__ == "__main__":
    main()
