"""The methods, one row each. A method is data, not a class.

A new method made of existing parts is a new row; ``grass-ray ls methods`` and the contract tests include it. The
learning rates are starting points for small models, not published values. A fair comparison searches the learning rate
of every method with the same budget.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grass_ray.config import (
    AllLayersConfig,
    ApolloConfig,
    ConfigError,
    ConvergingSamplerConfig,
    CyclicSamplerConfig,
    FixedSamplerConfig,
    FrequencySamplerConfig,
    GaLoreConfig,
    GradNormSamplerConfig,
    InactiveSGDConfig,
    LoraConfig,
    MatrixNormSamplerConfig,
    MethodConfig,
    MuonConfig,
    OptimizerConfig,
    OutlierSamplerConfig,
    PrefixConfig,
    PromptConfig,
    RewardSamplerConfig,
    SGDConfig,
    UniformSamplerConfig,
)
from grass_ray.peft_methods import PEFT_METHODS


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
        config: default configuration of the method.
        summary: what it does, in one line.
        source: paper it comes from.
        trains: whether it trains at all.
    """

    config: MethodConfig
    summary: str
    source: str
    trains: bool = True

    @property
    def name(self) -> str:
        """Name of the method on the command line."""
        return self.config.name


# embeddings, head and final norm are trained at every step
_OTHERS_TRAIN: dict[str, Any] = {"train_embeddings": True, "train_head": True, "train_norm": True}


def _row(name: str, *, summary: str, source: str, trains: bool = True, **parts: Any) -> Method:
    """Make a row; ``parts`` are the keys of :class:`MethodConfig`."""
    return Method(config=MethodConfig(name=name, **parts), summary=summary, source=source, trains=trains)


_ROWS = (
    _row("base", summary="the model as it is, not trained; the floor of every comparison", source="-", trains=False),
    _row(
        "full",
        summary="full fine-tuning: every parameter, AdamW states resident",
        source="AdamW, arXiv 1711.05101",
        sampler=AllLayersConfig(),
        optimizer=OptimizerConfig(lr=1e-4),
        **_OTHERS_TRAIN,
    ),
    _row(
        "lora",
        summary="low-rank adapters in every layer (peft)",
        source="arXiv 2106.09685",
        adapter=LoraConfig(),
        optimizer=OptimizerConfig(lr=1e-3),
    ),
    _row(
        "dora",
        summary="lora with a trained magnitude for every output (peft)",
        source="arXiv 2402.09353",
        adapter=LoraConfig(dora=True),
        optimizer=OptimizerConfig(lr=1e-3),
    ),
    _row(
        "prefix",
        summary="trained keys and values before every layer's own (peft)",
        source="arXiv 2101.00190",
        adapter=PrefixConfig(),
        optimizer=OptimizerConfig(lr=1e-2),
    ),
    _row(
        "prompt",
        summary="trained embeddings before the text (peft)",
        source="arXiv 2104.08691",
        adapter=PromptConfig(),
        optimizer=OptimizerConfig(lr=3e-2),
    ),
    *(
        _row(
            own.name, summary=own.summary, source=own.source, adapter=own.adapter, optimizer=OptimizerConfig(lr=own.lr)
        )
        for own in PEFT_METHODS
    ),
    _row(
        "lisa",
        summary="layers drawn uniformly; embeddings, head and norm always train; states reset at a switch",
        source="arXiv 2403.17919",
        sampler=UniformSamplerConfig(num_active_layers=2, period=20),
        optimizer=OptimizerConfig(lr=3e-4),
        inactive_states="reset",
        **_OTHERS_TRAIN,
    ),
    _row(
        "lisa-keep",
        summary="lisa as its public code runs: states of left layers stay on the device and add up to full AdamW",
        source="arXiv 2403.17919",
        sampler=UniformSamplerConfig(num_active_layers=2, period=20),
        optimizer=OptimizerConfig(lr=3e-4),
        inactive_states="keep",
        **_OTHERS_TRAIN,
    ),
    _row(
        "ows",
        summary="layers drawn by their share of outlier weights, measured once on a calibration batch",
        source="Findings of ACL 2025, OWS",
        sampler=OutlierSamplerConfig(num_active_layers=5, period=50),
        optimizer=OptimizerConfig(lr=3e-4),
        inactive_states="reset",
        **_OTHERS_TRAIN,
    ),
    _row(
        "ows-galore",
        summary="ows with GaLore's projected moments on the drawn layers, states kept",
        source="Findings of ACL 2025, OWS",
        sampler=OutlierSamplerConfig(num_active_layers=5, period=50),
        optimizer=OptimizerConfig(lr=3e-4, eps=1e-6, projection=GaLoreConfig(rank=256, refresh_period=100, scale=1.0)),
        inactive_states="keep",
        **_OTHERS_TRAIN,
    ),
    _row(
        "ist",
        summary="lora in a quarter of the layers at a time, drawn by what damping a layer's adapters costs",
        source="Findings of EMNLP 2024, IST",
        adapter=LoraConfig(),
        sampler=RewardSamplerConfig(),
        optimizer=OptimizerConfig(lr=1e-3),
    ),
    _row(
        "lift",
        summary="one layer at a time, front to back, one pass over training (no public code: order and pace inferred)",
        source="OpenReview u0INlprg3U",
        sampler=CyclicSamplerConfig(num_active_layers=1, period=None, order="ascending"),
        optimizer=OptimizerConfig(lr=3e-4),
        offload="resident",
    ),
    _row(
        "hift",
        summary="every layer, the embeddings, norm and head in turn, one a step; learning rate constant in a sweep",
        source="arXiv 2401.15207",
        sampler=CyclicSamplerConfig(num_active_layers=1, period=1, order="ascending", hold_lr=True),
        granularity="block",
        optimizer=OptimizerConfig(lr=1e-4),
        offload="resident",
    ),
    _row(
        "badam",
        summary="block coordinate descent: one layer for 50 steps, random order every cycle, fresh Adam states",
        source="arXiv 2404.02827",
        sampler=CyclicSamplerConfig(num_active_layers=1, period=50, order="random"),
        optimizer=OptimizerConfig(lr=3e-4),
        inactive_states="reset",
    ),
    _row(
        "bread",
        summary="badam, and a step of SGD on every other layer as backward passes it",
        source="openreview zs6bRl05g8",
        sampler=CyclicSamplerConfig(num_active_layers=1, period=100, order="random"),
        optimizer=OptimizerConfig(lr=3e-4),
        inactive_states="reset",
        inactive_updates=InactiveSGDConfig(lr_scale=5.0),
    ),
    _row(
        "misa",
        summary="weight matrices drawn by gradient norm until 3 % of the parameters train",
        source="arXiv 2511.00056",
        sampler=MatrixNormSamplerConfig(),
        granularity="matrix",
        optimizer=OptimizerConfig(lr=3e-4),
        inactive_states="reset",
    ),
    _row(
        "grades",
        summary="every layer's matrices, each frozen for good when its gradients stand still",
        source="arXiv 2509.01842",
        sampler=ConvergingSamplerConfig(),
        granularity="matrix",
        optimizer=OptimizerConfig(lr=1e-4),
        inactive_states="reset",
        **_OTHERS_TRAIN,
    ),
    _row(
        "adagradselect",
        summary="layers of large gradients at first, later those drawn most often (no public code: details inferred)",
        source="arXiv 2512.15764",
        sampler=FrequencySamplerConfig(),
        optimizer=OptimizerConfig(lr=3e-4),
        offload="resident",
    ),
    _row(
        "galore",
        summary="all layers; moments along the top singular directions of each gradient",
        source="arXiv 2403.03507",
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-6, projection=GaLoreConfig()),
        **_OTHERS_TRAIN,
    ),
    _row(
        "apollo",
        summary="all layers; channel-wise scaled gradients from moments in a random small space",
        source="arXiv 2412.05270",
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-6, projection=ApolloConfig()),
        **_OTHERS_TRAIN,
    ),
    _row(
        "sgd",
        summary="full fine-tuning by SGD with momentum in place of AdamW",
        source="control of arXiv 1711.05101",
        optimizer=OptimizerConfig(lr=1e-1, projection=SGDConfig()),
        **_OTHERS_TRAIN,
    ),
    _row(
        "muon",
        summary="full fine-tuning by Muon, which makes the moments of matrices orthogonal; AdamW for all else",
        source="arXiv 2502.16982",
        optimizer=OptimizerConfig(lr=1e-4, projection=MuonConfig()),
        **_OTHERS_TRAIN,
    ),
    _row(
        "grass",
        summary="layers drawn by mean gradient norm, refreshed in training; states of frozen layers on the host",
        source="arXiv 2604.07808",
        sampler=GradNormSamplerConfig(),
        optimizer=OptimizerConfig(lr=3e-4),
        offload="resident",
    ),
    _row(
        "grass-static",
        summary="grass whose probabilities stay what probing measured (the paper's ablation)",
        source="arXiv 2604.07808",
        sampler=GradNormSamplerConfig(refresh_period=None),
        optimizer=OptimizerConfig(lr=3e-4),
        offload="resident",
    ),
    _row(
        "grass-fresh",
        summary="grass whose old importance follows the level of the gradients, with a floor under every layer",
        source="arXiv 2604.07808, changed here",
        sampler=GradNormSamplerConfig(staleness="level", exploration=0.05),
        optimizer=OptimizerConfig(lr=3e-4),
        offload="resident",
    ),
    _row(
        "grass-muon",
        summary="grass with Muon in place of AdamW, and so fewer states on the host",
        source="arXiv 2604.07808, changed here",
        sampler=GradNormSamplerConfig(),
        optimizer=OptimizerConfig(lr=3e-4, projection=MuonConfig()),
        offload="resident",
    ),
    _row(
        "uniform",
        summary="control: grass with equal probabilities, all else the same",
        source="control of arXiv 2604.07808",
        sampler=GradNormSamplerConfig(exploration=1.0),
        optimizer=OptimizerConfig(lr=3e-4),
        offload="resident",
    ),
    _row(
        "top",
        summary="control: grass that always trains the most important layers",
        source="control of arXiv 2604.07808",
        sampler=GradNormSamplerConfig(temperature=1e-3),
        optimizer=OptimizerConfig(lr=3e-4),
        offload="resident",
    ),
    _row(
        "inverse",
        summary="control: grass with a negative temperature, which prefers the least important layers",
        source="control of arXiv 2604.07808",
        sampler=GradNormSamplerConfig(temperature=-0.5),
        optimizer=OptimizerConfig(lr=3e-4),
        offload="resident",
    ),
    *(
        _row(
            f"{third}-third",
            summary=f"control: the {third} third of the layers throughout",
            source="control of arXiv 2604.07808",
            sampler=FixedSamplerConfig(layers=third),
            optimizer=OptimizerConfig(lr=3e-4),
        )
        for third in ("first", "middle", "last")
    ),
)

METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}


def get_method(name: str, methods: Mapping[str, Method] = METHODS) -> Method:
    """Return the method called ``name``. Raises :class:`ConfigError` with the available names if there is none."""
    if name not in methods:
        raise ConfigError(unknown("method", name, methods))
    return methods[name]


def unknown(kind: str, given: str, available: Mapping[str, object] | list[str]) -> str:
    """Return a message about a name that does not exist, with the available names and the closest one."""
    names = list(available)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {given!r}; available: {', '.join(names)}.{hint}"
