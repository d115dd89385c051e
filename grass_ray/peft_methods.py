"""The adapters of peft that are methods of their own, one row each, for :mod:`grass_ray.methods`.

They are put on the layers that ``lora`` is put on, where they are put on linear layers at all, with the settings that
their papers or peft start from. Some have no row: AdaLoRA gives ranks to other matrices while it trains, which the loop
does not do; BOFT builds a CUDA extension when it is put on a model; SHiRA draws its mask from the weights, so that
nothing of it can be checked or planned before they are loaded; trained tokens are rows of the embeddings, outside of
the layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from grass_ray.config import PeftConfig

_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


class PeftMethod(NamedTuple):
    """A row: its name, what it does, the paper it comes from, a learning rate to start with, and the adapter."""

    name: str
    summary: str
    source: str
    lr: float
    adapter: PeftConfig


def _of(peft_type: str, **settings: Any) -> PeftConfig:
    return PeftConfig.model_validate({"peft_type": peft_type, "target_modules": _TARGETS, **settings})


PEFT_METHODS = (
    PeftMethod(
        "rslora",
        "lora scaled by the square root of the rank (peft)",
        "arXiv 2312.03732",
        1e-3,
        _of("LORA", r=32, lora_alpha=64, lora_dropout=0.05, use_rslora=True),
    ),
    PeftMethod(
        "pissa",
        "lora that begins with the top singular directions of each weight (peft)",
        "arXiv 2404.02948",
        3e-4,
        _of("LORA", r=32, lora_alpha=32, init_lora_weights="pissa"),
    ),
    PeftMethod(
        "vera",
        "two trained vectors around random matrices that all layers share (peft)",
        "arXiv 2310.11454",
        1e-2,
        _of("VERA", r=256),
    ),
    PeftMethod(
        "randlora",
        "trained scales of sums of random matrices, updates of full rank (peft)",
        "arXiv 2502.00987",
        1e-3,
        _of("RANDLORA", r=32, randlora_alpha=64),
    ),
    PeftMethod(
        "loha",
        "Hadamard products of two low-rank updates (peft)",
        "arXiv 2108.06098",
        1e-3,
        _of("LOHA", r=32, alpha=32),
    ),
    PeftMethod(
        "lokr", "Kronecker products of small matrices (peft)", "arXiv 2309.14859", 1e-3, _of("LOKR", r=32, alpha=32)
    ),
    PeftMethod(
        "miss",
        "one trained block per weight, repeated over its shards (peft)",
        "arXiv 2409.15371",
        1e-3,
        _of("MISS", r=32),
    ),
    PeftMethod(
        "oft", "block-wise rotations of the weights (peft)", "arXiv 2306.07280", 1e-3, _of("OFT", oft_block_size=32)
    ),
    PeftMethod("c3a", "circular convolutions of blocks (peft)", "arXiv 2407.19342", 1e-2, _of("C3A", block_size=32)),
    PeftMethod(
        "fourierft",
        "a thousand trained frequencies of each update (peft)",
        "arXiv 2405.03003",
        1e-2,
        _of("FOURIERFT", n_frequency=1000, scaling=300),
    ),
    PeftMethod(
        "ia3",
        "trained scales of keys, values and hidden units (peft)",
        "arXiv 2205.05638",
        1e-2,
        _of("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    PeftMethod(
        "ln-tuning",
        "the norms of the layers (peft)",
        "arXiv 2312.11420",
        1e-3,
        _of("LN_TUNING", target_modules=["input_layernorm", "post_attention_layernorm"]),
    ),
)
