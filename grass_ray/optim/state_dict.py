"""The layout in which an optimizer's states are saved, and what fits into which optimizer.

A parameter's state is saved as ``step``, moments and remainder, each in its own dtype and in the parameter's shape,
wherever it lived; so every offload mode reads what any other wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from grass_ray.optim.quantized import is_packed, packed, unpacked
from grass_ray.optim.refusals import described
from grass_ray.optim.sharded import Shards, local
from grass_ray.optim.states import STEP, States, tensors_of
from grass_ray.optim.units import Unit

Saved = Mapping[str, Tensor]


def gather(
    states: Mapping[int, Saved], ordered: Sequence[nn.Parameter], shards: Shards, *, keep: bool
) -> dict[int, Any]:
    """The states of whole parameters from every worker's rows, on the CPU. Collective: call on every rank.

    Args:
        states: this worker's.
        ordered: the parameters by their places.
        shards: how they lie over the workers.
        keep: whether this worker wants the result.
    """
    gathered: dict[int, Any] = {}
    for index, saved in states.items():
        gathered[index] = {STEP: saved[STEP]}
        # blocks of 8-bit moments may begin elsewhere in the whole parameter
        for name, rows in sorted(unpacked(tensors_of(saved)).items()):
            parameter = ordered[index]
            whole = shards.gather(rows.to(parameter.device), parameter.shape)
            if keep:
                gathered[index][name] = whole.cpu()
        if keep and is_packed(saved):
            gathered[index] = packed(gathered[index])
    return gathered


def adamw_layout(state: dict[str, Any], *, fused: bool) -> dict[str, Any]:
    """A saved state as ``torch.optim.AdamW`` has it: moments and counters, and its own options."""
    del state["layerwise"]
    options = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False}
    own = {"fused": fused, "decoupled_weight_decay": True}
    state["param_groups"] = [{**group, **options, **own} for group in state["param_groups"]]
    names = (STEP, "exp_avg", "exp_avg_sq")
    wide = {index: unpacked(saved) for index, saved in state["state"].items()}
    state["state"] = {index: {name: saved[name] for name in names if name in saved} for index, saved in wide.items()}
    return state


def check_fits(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    index: Mapping[nn.Parameter, int],
    states: States,
    *,
    units: int,
    whole: bool,
) -> None:
    """Compare a saved state with an optimizer before anything is overwritten.

    Args:
        state_dict: what was saved.
        groups: the optimizer's parameter groups.
        index: its parameters' places.
        states: what it keeps.
        units: how many units its sampler picks from.
        whole: whether the saved states are those of whole parameters, and not of a worker's rows.

    Raises:
        ValueError: it is of a model with other parameters, or of another precision or projection.
    """
    sizes = [sum(p in index for p in group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    if saved_sizes != sizes:
        raise ValueError(f"the saved state has parameter groups of {saved_sizes}, this optimizer of {sizes}")
    active = state_dict["layerwise"]["active_units"]
    if not set(active) <= set(range(units)):
        raise ValueError(f"the saved state has active units {list(active)}, this optimizer only {units} units")
    ordered = list(index)
    for place, saved in state_dict["state"].items():
        held = tensors_of(saved)
        expected, given = _kinds(ordered[place], held, states, whole=whole)
        if held and given != expected:
            raise ValueError(
                f"the saved state of parameter {place} has {described(given)}, this optimizer keeps "
                f"{described(expected)}; give the model and the settings (precision, projection) it was saved with"
            )


def _kinds(parameter: Tensor, held: Saved, states: States, *, whole: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shape and dtype of each state tensor, as it is kept and as it was saved; of projected ones only the names."""
    if parameter in states.projected:
        assert states.projection is not None
        return dict.fromkeys(tensors_of(states.projection.start(parameter))), dict.fromkeys(held)
    layout = states.layout(parameter)
    shapes = layout.shapes(parameter.shape if whole else local(parameter).shape)
    expected = {name: (tuple(shapes[name]), dtype) for name, dtype, _ in layout.tensors}
    return expected, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}


def check_shard(saved: Mapping[str, int] | None, shards: Shards | None) -> None:
    """Raise ValueError where ``saved`` are the rows of another worker than this one."""
    here = None if shards is None else shards.saved.to_dict()
    if saved is not None and saved != here:
        place = "this model is not sharded" if here is None else "this is worker {rank} of {count}".format(**here)
        raise ValueError(
            "the state has the rows of worker {rank} of {count}, and ".format(**saved)
            + f"{place}; full_state_dict() makes a state for any number of workers"
        )


def rows_of(saved: Saved, shards: Shards) -> dict[str, Tensor]:
    """This worker's rows of a whole parameter's state."""
    rows = {name: t if name == STEP else shards.own_rows(t) for name, t in unpacked(saved).items()}
    return packed(rows) if is_packed(saved) else rows


def of_unit(states: Mapping[int, Saved], unit: Unit, index: Mapping[nn.Parameter, int]) -> dict[nn.Parameter, Saved]:
    """The states of a unit's parameters, by parameter."""
    return {p: states[index[p]] for p in unit.parameters if index[p] in states}
