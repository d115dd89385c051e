"""Find the decoder stack of a model: which modules are its layers, and what else could train.

``find_decoder_stack(model)`` looks for the one list of blocks that the model's configuration describes, and fails
loudly with what it found when there is none or more than one. It knows no model by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

BARE_MODEL = "pass the bare model and LayerwiseOptions(process_group=...)"
# what wraps a model and fixes, when it is built, which parameters train; and what to do instead
WRAPPERS = {
    "DataParallel": f"{BARE_MODEL}, and start one process per GPU",
    "DistributedDataParallel": f"{BARE_MODEL}: the optimizer averages the active gradients",
    "FullyShardedDataParallel": f"shard with FSDP2 (fully_shard) instead, or {BARE_MODEL}",
    "DeepSpeedEngine": f"{BARE_MODEL}, or shard it with FSDP2 (fully_shard)",
}


@dataclass(frozen=True, kw_only=True)
class DecoderStack:
    """A model taken apart. Every parameter is in exactly one part; a tied head belongs to the embeddings.

    ``layers[i]`` are the parameters of decoder layer ``i`` in the order of ``named_parameters``; ``norm`` is the final
    norm and whatever else of the language model stands between embeddings, layers and head; ``unmanaged`` are
    parameters outside the language model's decoder (a vision tower, a prompt encoder), which never train layer-wise.
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
        model: a Hugging Face decoder, a peft model around one, the language model inside a vision-language model, or
            any module with one list of equal blocks. Single layers may be compiled.
        path: the name of the list of layers (such as ``"model.layers"``); found when None.

    Raises:
        ValueError: there is no decoder stack, or more than one candidate (the message lists what was found); the model
            is an encoder, or quantised; or it is wrapped in something that fixes which parameters train (DDP, FSDP1,
            DeepSpeed, a compiled whole model) or split by tensor parallelism.
    """
    _refuse_wrappers(model)
    refuse_encoders(model)
    _refuse_quantised(model)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module}
    if path is not None and path not in lists:
        raise ValueError(f"model has no list of layers called {path!r}; it has: {_listing(lists)}")
    chosen = path if path is not None else _choose(model, lists)
    _refuse_compiled(model, chosen)
    return _split(model, chosen, lists)


def decay_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters weight decay applies to: matrices of linear, convolution and embedding modules, and of experts.

    Norm scales and every bias are left out, decided by module type rather than by name.
    """
    decayed: set[nn.Parameter] = set()
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            continue
        decayed |= {p for name, p in module.named_parameters(recurse=False) if p.ndim >= 2 and "bias" not in name}
    return decayed


# -------------------------------------------------------------------------------------------------- what cannot work


def _refuse_wrappers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS:
                raise ValueError(
                    f"{name or 'the model'} is wrapped in {kind.__name__}, which fixes when it is built which "
                    f"parameters train, while layer-wise training changes them; {WRAPPERS[kind.__name__]}"
                )
    _refuse_foreign_shards(model)


def _refuse_foreign_shards(model: nn.Module) -> None:
    """Parameters that something else than FSDP2 has split over workers."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "the model's parameters are partitioned by DeepSpeed ZeRO-3, which fixes at its start which of them train, "
            "while layer-wise training changes them; load the model without ZeRO-3 (FSDP2 works)"
        )
    if any(type(p).__name__ == "FlatParameter" or hasattr(p, "_fsdp_flattened") for p in model.parameters()):
        raise ValueError(
            "the model is the inside of a FullyShardedDataParallel, which fixes when it is built which parameters "
            "train, while layer-wise training changes them; shard it with FSDP2 (fully_shard) instead"
        )
    empty = [name for name, p in model.named_parameters() if not p.numel()]
    if empty:
        raise ValueError(
            f"{len(empty)} parameters have no elements ({', '.join(empty[:3])}), as where ZeRO or FSDP1 has them; "
            "pass the whole model, or shard it with FSDP2 (fully_shard)"
        )
    sharded = any(type(p).__name__ == "DTensor" or hasattr(p, "_local_tensor") for p in model.parameters())
    if sharded and not any(kind.__name__ == "FSDPModule" for m in model.modules() for kind in type(m).__mro__):
        raise ValueError(
            "the model's parameters are split over workers by tensor parallelism, which layer-wise training does not "
            "support; pass the bare model and LayerwiseOptions(process_group=...), or shard it with FSDP2 (fully_shard)"
        )


def refuse_encoders(model: nn.Module) -> None:
    """Raise ``ValueError`` on a language model whose tokens see those after them."""
    base = _unwrap(model)
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "can_generate"):
        return
    # BERT and its like can be both and are encoders unless told; XLM and XLNet say it in words of their own
    either = hasattr(config, "add_cross_attention") and getattr(config, "is_decoder", True) is False
    looks_ahead = either or not getattr(config, "causal", True) or getattr(config, "attn_type", "uni") == "bi"
    if getattr(config, "is_encoder_decoder", False) or looks_ahead or not base.can_generate():
        raise ValueError(
            f"{type(base).__name__} is not a decoder-only language model; layer-wise training needs one "
            "(a model loaded with AutoModelForCausalLM whose tokens see only those before them)"
        )


def _refuse_quantised(model: nn.Module) -> None:
    """Quantised weights take no gradient; adapters beside them do."""
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantised is not None and _unwrap(model) is model:
        raise ValueError(
            "the model is quantised, and quantised weights are not trained; load it in bfloat16 or float32, or put "
            "adapters on it first"
        )


def _refuse_compiled(model: nn.Module, path: str) -> None:
    """A compiled module around the layers is traced anew for every active set, until torch gives up."""
    for name, module in _around(model, path):
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{name or 'the model'} is compiled as a whole ({type(module).__name__}), and would be compiled again "
                "for every set of active layers; pass the bare model and compile its layers one by one: "
                f"for layer in model.{path.replace('_orig_mod.', '')}: layer.compile()"
            )


# ------------------------------------------------------------------------------------------------------ where it is


def _unwrap(model: nn.Module) -> Any:
    """The Hugging Face model inside a peft model; any other model as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _around(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules that the list at ``path`` lies in, with their names, from the innermost to the model itself."""
    names = path.split(".")
    outer = [".".join(names[:depth]) for depth in range(len(names) - 1, -1, -1)]
    return [(name, model.get_submodule(name)) for name in outer]


def _home(model: nn.Module, path: str) -> nn.Module:
    """The language model of the layers at ``path``: the innermost module around them that holds the embeddings."""
    inputs = _input_embeddings(model)
    for _, module in _around(model, path):
        if any(m is inputs if inputs is not None else isinstance(m, nn.Embedding) for m in module.modules()):
            return module
    return model


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    base = _unwrap(model)
    inputs = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    return inputs if isinstance(inputs, nn.Module) else None


def _choose(model: nn.Module, lists: dict[str, nn.ModuleList]) -> str:
    candidates = {name: layers for name, layers in lists.items() if any(True for _ in layers.parameters())}
    # a list inside another list's blocks (heads, experts) is not the stack
    candidates = {
        name: layers
        for name, layers in candidates.items()
        if not any(name.startswith(outer + ".") for outer in candidates if outer != name)
    }
    base = _unwrap(model)
    config = getattr(base, "config", None)
    length = None
    if config is not None and hasattr(config, "get_text_config"):
        length = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    named = {name: layers for name, layers in candidates.items() if len(layers) == length}
    # hybrid models mix classes of blocks; if no configuration describes the list, its blocks must be equal
    alike = {name: layers for name, layers in candidates.items() if len({type(layer) for layer in layers}) == 1}
    candidates = named or alike
    if len(candidates) > 1:
        # of two towers with as many layers, the language model's is the one whose home lies within the other's
        homes = {name: _home(model, name) for name in candidates}
        inner = min(homes.values(), key=lambda home: sum(1 for _ in home.modules()))
        candidates = {name: layers for name, layers in candidates.items() if homes[name] is inner}
    if len(candidates) != 1:
        what = "no decoder stack" if not candidates else f"{len(candidates)} possible decoder stacks"
        raise ValueError(
            f"found {what} in {type(base).__name__}; its lists of modules: {_listing(lists)}. "
            "Name the right one with LayerwiseOptions(layers='path.to.list')"
        )
    return next(iter(candidates))


def _listing(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{name} ({len(layers)} x {type(layers[0]).__name__})" for name, layers in lists.items()) or "none"


# --------------------------------------------------------------------------------------------------------- the parts


def _split(model: nn.Module, path: str, lists: dict[str, nn.ModuleList]) -> DecoderStack:
    claimed: set[nn.Parameter] = set()

    def claim(modules: Iterable[nn.Module | None]) -> tuple[nn.Parameter, ...]:
        parameters = dict.fromkeys(p for module in modules if module is not None for p in module.parameters())
        fresh = tuple(p for p in parameters if p not in claimed)
        claimed.update(fresh)
        return fresh

    modules = tuple(lists[path])
    layers = tuple(claim([module]) for module in modules)
    if any(not layer for layer in layers):
        empty = [index for index, layer in enumerate(layers) if not layer]
        raise ValueError(f"layers {empty} of {path} have no parameters of their own; shared layers cannot be sampled")
    base, home = _unwrap(model), _home(model, path)
    embeddings = claim([_input_embeddings(model)])
    unmanaged = claim(model.get_submodule(name) for name in _towers(path, lists))
    embeddings += claim(m for m in home.modules() if isinstance(m, nn.Embedding))
    if hasattr(base, "get_output_embeddings"):
        head = claim([base.get_output_embeddings()])
    else:
        head = claim(m for m in base.modules() if isinstance(m, nn.Linear))
    norm = claim([home])
    unmanaged += claim([model])
    return DecoderStack(
        path=path, modules=modules, layers=layers, embeddings=embeddings, head=head, norm=norm, unmanaged=unmanaged
    )


def _towers(path: str, lists: dict[str, nn.ModuleList]) -> list[str]:
    """Names of the largest modules that hold another list of blocks but not the one at ``path``."""
    towers: dict[str, None] = {}
    inside = path.split(".")
    for name in lists:
        parts = name.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(parts, inside, strict=False)) if a != b), None)
        if shared is not None:  # otherwise one of the two lies in the other
            towers[".".join(parts[: shared + 1])] = None
    return list(towers)
