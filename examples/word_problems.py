"""What the examples share: a model, word problems to learn, and a picture of which layers trained when."""

from __future__ import annotations

from typing import Any

from grass_ray import LayerwiseAdamW
from grass_ray.config import DataConfig, ModelConfig
from grass_ray.tasks.sources import load_train_rows
from grass_ray.tasks.templates import render_prompt, render_response
from grass_ray.training.models import load_model


def load(name: str) -> tuple[Any, Any]:
    """Load a model in float32 and its tokenizer.

    Args:
        name: ``tiny`` (random, made on the spot), ``smollm2-135m``, a folder, or any hub id.
    """
    loaded = load_model(ModelConfig(name=name))
    return loaded.model, loaded.tokenizer


def load_texts() -> list[dict[str, str]]:
    """Generated arithmetic word problems: a prompt and its completion each."""
    rows = load_train_rows(DataConfig()).rows
    return [{"prompt": render_prompt(row, "clean"), "completion": render_response(row)} for row in rows]


def load_tokens(tokenizer: Any) -> list[dict[str, list[int]]]:
    """The same, tokenised; the loss is taken over the completion alone (labels of -100 are left out)."""
    encoded = []
    for text in load_texts():
        prompt = tokenizer(text["prompt"])["input_ids"]
        completion = tokenizer(text["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        encoded.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return encoded


def watch(optimizer: LayerwiseAdamW) -> list[tuple[int, ...]]:
    """A list that grows by one entry an optimizer step: the layers it trains, none while probing."""
    history: list[tuple[int, ...]] = []
    optimizer.register_step_pre_hook(
        lambda *_: history.append(() if optimizer.probing else tuple(optimizer.active_layers))
    )
    return history


def print_engagement(optimizer: LayerwiseAdamW, history: list[tuple[int, ...]]) -> None:
    """Print which layers trained when, one row a layer, one column a step."""
    active = sum(p.numel() for p in optimizer.active_parameters())
    total = sum(p.numel() for layer in optimizer.stack.layers for p in layer)
    print(f"\nactive layers over {len(history)} steps (# trains, . frozen, p probing)")
    for layer in reversed(range(optimizer.stack.num_layers)):
        print(f"{layer:>5}  " + "".join("p" if not step else "#" if layer in step else "." for step in history))
    print(f"{active:,} of the layers' {total:,} parameters train at a time")
