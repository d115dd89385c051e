"""The methods: one row each. A method is data, not a class tree.

A new method made of known parts is one more row here; ``grass-ray ls methods`` and the contract tests pick it up.
Learning rates are this project's own starting points for small models, not published values; a fair comparison
searches them with the same budget for every method.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from grass_ray.config import (
    AllLayersConfig,
    ConfigError,
    GradNormSamplerConfig,
    LoraConfig,
    MethodConfig,
    OptimizerConfig,
    UniformSamplerConfig,
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: the default configuration of a method, what it is, and where it comes from."""

    config: MethodConfig
    summary: str
    source: str
    trains: bool = True

    @property
    def name(self) -> str:
        """The name users type."""
        return self.config.name


_ROWS = (
    Method(
        config=MethodConfig(name="base"),
        summary="the model as it is, not trained; the floor of every comparison",
        source="-",
        trains=False,
    ),
    Method(
        config=MethodConfig(
            name="full",
            sampler=AllLayersConfig(),
            optimizer=OptimizerConfig(lr=1e-4),
            train_embeddings=True,
            train_head=True,
            train_norm=True,
        ),
        summary="full fine-tuning: every parameter, AdamW states resident",
        source="AdamW, arXiv 1711.05101",
    ),
    Method(
        config=MethodConfig(name="lora", adapter=LoraConfig(), optimizer=OptimizerConfig(lr=1e-3)),
        summary="low-rank adapters in every layer (peft)",
        source="arXiv 2106.09685",
    ),
    Method(
        config=MethodConfig(
            name="lisa",
            sampler=UniformSamplerConfig(num_active_layers=2, period=20),
            optimizer=OptimizerConfig(lr=3e-4),
            inactive_states="reset",
            train_embeddings=True,
            train_head=True,
            train_norm=True,
        ),
        summary="layers drawn uniformly; embeddings, head and norm always train; states reset at a switch",
        source="arXiv 2403.17919",
    ),
    Method(
        config=MethodConfig(
            name="grass",
            sampler=GradNormSamplerConfig(),
            optimizer=OptimizerConfig(lr=3e-4),
            offload="resident",
        ),
        summary="layers drawn by mean gradient norm, refreshed in training; states of frozen layers on the host",
        source="arXiv 2604.07808",
    ),
    Method(
        config=MethodConfig(
            name="grass-static",
            sampler=GradNormSamplerConfig(refresh_period=None),
            optimizer=OptimizerConfig(lr=3e-4),
            offload="resident",
        ),
        summary="grass whose probabilities stay what probing measured (the paper's ablation)",
        source="arXiv 2604.07808",
    ),
)

METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}


def get_method(name: str) -> Method:
    """The row called ``name``. Raises :class:`ConfigError` that lists the rows when there is none."""
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    return METHODS[name]


def unknown(kind: str, given: str, available: Mapping[str, object] | list[str]) -> str:
    """One readable sentence about a name that does not exist, with the nearest that does."""
    names = list(available)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {given!r}; available: {', '.join(names)}.{hint}"
