"""What an optimizer saves and loads: torch's layout, with the states of every offload mode and of every worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_ray.optim.active_set import ActiveSet
from grass_ray.optim.placement import OnDevice
from grass_ray.optim.state_dict import Saved, adamw_layout, check_fits, of_unit
from grass_ray.optim.states import States
from grass_ray.optim.sync import GradientSync


class StateSaver:
    """Saves and loads the states of an optimizer, and which units are active.

    Args:
        active: which units train.
        states: of all parameters.
        placement: where the states of sampled units live.
        sync: how the parameters lie over the workers.
        index: place of each parameter in the saved state.
    """

    def __init__(
        self,
        active: ActiveSet,
        states: States,
        placement: OnDevice,
        sync: GradientSync,
        index: Mapping[nn.Parameter, int],
    ) -> None:
        self._active = active
        self._units = active.parts.units
        self._states = states
        self._placement = placement
        self._sync = sync
        self._index = index

    def save(self, torch_state: dict[str, Any]) -> dict[str, Any]:
        """Complete torch's state dictionary by the states on the host, the sampler's state and the active units.

        The host must be able to read every block (``placement.synchronize_host()``).
        """
        for group in torch_state["param_groups"]:
            group["params"] = [index for index in group["params"] if index < len(self._index)]
        torch_state["state"] = self._with_offloaded(torch_state["state"])
        torch_state["layerwise"] = {
            "sampler": self._active.sampler.state_dict(),
            "active_units": list(self._active.indices),
            "switches": self._active.switches,
            "on_host": self._placement.host.units,
            **self._sync.entry(),
        }
        return torch_state

    def _with_offloaded(self, held: Mapping[int, Saved]) -> dict[int, Saved]:
        """All states by the parameters' places, in their order, with those on the host read from their blocks."""
        states = dict(held)
        for unit in self._units:
            if self._placement.offloaded(unit):
                for parameter in unit.parameters:
                    place = self._index[parameter]
                    if place in states:
                        read = self._placement.read(unit, parameter, torch.device("cpu"))
                        states[place] = {**states[place], **read}
        # the same order whatever happened first: equal states are equal files
        return dict(sorted(states.items()))

    def whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """A saved state with the states of whole parameters, on rank 0. Collective: call on every rank."""
        state["layerwise"].pop("shard", None)
        state["state"] = self._sync.gather(state["state"], list(self._index))
        return state if self._sync.workers.rank == 0 else {}

    def adamw(self, state: dict[str, Any]) -> dict[str, Any]:
        """A saved state in the layout of ``torch.optim.AdamW``; whole parameters on rank 0 if the model is sharded."""
        if self._sync.sharded:
            state = self.whole(state)
        fused = self._active.parts.device.type in ("cpu", "cuda")
        return adamw_layout(state, fused=fused) if state else state

    def load(self, state: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """Put everything that :meth:`save` or :meth:`whole` has saved where it belongs.

        Args:
            state: what was saved.
            groups: the optimizer's parameter groups.

        Raises:
            ValueError: the state belongs to another model, to another optimizer, or to another worker. Nothing has
                changed then.
        """
        if "layerwise" not in state:
            raise ValueError("this state was not saved by LayerwiseAdamW: it has no 'layerwise' entry")
        own = state["layerwise"]
        shard = own.get("shard")
        self._sync.check_entry(shard)
        check_fits(state, groups, self._index, self._states, units=len(self._units), whole=shard is None)
        self._active.sampler.load_state_dict(own["sampler"])
        for group, saved_group in zip(groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved_group.items() if key != "params"})
        self._placement.synchronize()
        self._active.switches = own["switches"]
        self._active.uninterrupted.reset()
        self._placement.clear()
        self._active.activate(own["active_units"])
        states = self._sync.own(state["state"], shard)
        for place, unit in enumerate(self._units):
            saved = of_unit(states, unit, self._index)
            active, on_host = place in self._active.indices, unit.name in own["on_host"]
            self._placement.load(unit, saved, active=active, on_host=on_host)
        for unit in self._active.parts.constant:
            self._placement.hold(of_unit(states, unit, self._index))
        self._placement.host.synchronize(self._active.parts.device)
