"""Find the decoder stack of a model: which modules are its layers, and what else could train.

``find_decoder_stack(model)`` looks for the one list of equal blocks that the model's configuration speaks of, and
fails loudly with what it found when there is none or more than one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class DecoderStack:
    """A model taken apart. Every parameter is in exactly one part; a tied head belongs to the embeddings.

    ``layers[i]`` are the parameters of decoder layer ``i`` in the order of ``named_parameters``; ``unmanaged`` are
    parameters outside the language model's decoder (a vision tower), which never train layer-wise.
    """

    path: str
    modules: tuple[nn.Module, ...]
    layers: tuple[tuple[nn.Parameter, ...], ...]
    embeddings: tuple[nn.Parameter, ...]
    head: tuple[nn.Parameter, ...]
    norm: tuple[nn.Parameter, ...]
    unmanaged: tuple[nn.Parameter, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, L."""
        return len(self.layers)


def find_decoder_stack(model: nn.Module, path: str | None = None) -> DecoderStack:
    """Take ``model`` apart into decoder layers, embeddings, head and final norm.

    Args:
        model: a Hugging Face decoder, a peft model around one, or any module with one list of equal blocks.
        path: the name of the list of layers (such as ``"model.layers"``); found when None.

    Raises:
        ValueError: there is no decoder stack, or more than one candidate; the message lists what was found.
    """
    _refuse_encoders(model)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module}
    if path is not None:
        if path not in lists:
            raise ValueError(f"model has no list of layers called {path!r}; it has: {_listing(lists)}")
        chosen = path
    else:
        chosen = _choose(model, lists)
    modules = tuple(lists[chosen])
    return _split(model, chosen, modules)


def decay_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters weight decay applies to: matrices of linear, convolution and embedding modules.

    Norm scales and every bias are left out, decided by module type rather than by name.
    """
    decayed: set[nn.Parameter] = set()
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            continue
        decayed |= {p for name, p in module.named_parameters(recurse=False) if p.ndim >= 2 and "bias" not in name}
    return decayed


def _refuse_encoders(model: nn.Module) -> None:
    base = _unwrap(model)
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "can_generate"):
        return
    if getattr(config, "is_encoder_decoder", False) or not base.can_generate():
        raise ValueError(
            f"{type(base).__name__} is not a decoder-only language model; layer-wise training needs one "
            "(a model loaded with AutoModelForCausalLM)"
        )


def _unwrap(model: nn.Module) -> Any:
    """The Hugging Face model inside a peft model; any other model as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _choose(model: nn.Module, lists: dict[str, nn.ModuleList]) -> str:
    candidates = {
        name: layers
        for name, layers in lists.items()
        if len({type(layer) for layer in layers}) == 1 and any(True for _ in layers.parameters())
    }
    # a list inside another list's blocks (heads, experts) is not the stack
    candidates = {
        name: layers
        for name, layers in candidates.items()
        if not any(name.startswith(outer + ".") for outer in candidates if outer != name)
    }
    base = _unwrap(model)
    config = getattr(base, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        length = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        candidates = {name: layers for name, layers in candidates.items() if len(layers) == length}
        if len(candidates) > 1 and hasattr(base, "get_decoder"):
            inside = {id(module) for module in base.get_decoder().modules()}
            candidates = {name: layers for name, layers in candidates.items() if id(layers) in inside}
    if len(candidates) != 1:
        what = "no decoder stack" if not candidates else f"{len(candidates)} possible decoder stacks"
        raise ValueError(
            f"found {what} in {type(base).__name__}; its lists of modules: {_listing(lists)}. "
            "Name the right one with layers='path.to.list'"
        )
    return next(iter(candidates))


def _listing(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{name} ({len(layers)} x {type(layers[0]).__name__})" for name, layers in lists.items()) or "none"


def _split(model: nn.Module, path: str, modules: tuple[nn.Module, ...]) -> DecoderStack:
    claimed: set[nn.Parameter] = set()

    def claim(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
        fresh = tuple(p for p in dict.fromkeys(parameters) if p not in claimed)
        claimed.update(fresh)
        return fresh

    layers = tuple(claim(module.parameters()) for module in modules)
    if any(not layer for layer in layers):
        empty = [index for index, layer in enumerate(layers) if not layer]
        raise ValueError(f"layers {empty} of {path} have no parameters of their own; shared layers cannot be sampled")
    base = _unwrap(model)
    has_decoder = hasattr(base, "get_decoder") and hasattr(base, "config")
    language_model = base.get_decoder() if has_decoder else base
    embeddings = claim(p for m in language_model.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    output = base.get_output_embeddings() if has_decoder else None
    outer = [output] if output is not None else [m for m in base.modules() if isinstance(m, nn.Linear)]
    head = claim(p for module in outer for p in module.parameters())
    norm = claim(language_model.parameters())
    unmanaged = claim(model.parameters())
    return DecoderStack(
        path=path, modules=modules, layers=layers, embeddings=embeddings, head=head, norm=norm, unmanaged=unmanaged
    )
