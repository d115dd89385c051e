"""The units that train now, and the switch from one active set to the next."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType

from torch import Tensor, nn

from grass_ray.layerwise.sampler import Sampler
from grass_ray.optim.data_parallel import Workers
from grass_ray.optim.options import LayerwiseOptions
from grass_ray.optim.parts import Parts
from grass_ray.optim.placement import OnDevice
from grass_ray.optim.proof import Proof
from grass_ray.optim.recompute import Recompute
from grass_ray.optim.streaming import OffloadStats
from grass_ray.optim.units import Unit
from grass_ray.optim.watch import Watch
from grass_ray.optim.weights import ResidentWeights


class Uninterrupted:
    """A block that is carried out whole: once an exception has left one, :meth:`check` raises."""

    def __init__(self) -> None:
        self._broken = False

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._broken = kind is not None

    def begin(self) -> None:
        """From here on, until :meth:`reset`, everything counts as interrupted."""
        self._broken = True

    def reset(self) -> None:
        """Forget an interruption: weights and states belong together again, since all was done or they were loaded."""
        self._broken = False

    def check(self) -> None:
        """Raise RuntimeError if a block was interrupted."""
        if self._broken:
            raise RuntimeError(
                "an earlier step was interrupted in the middle of its update or switch, so weights and states do not "
                "belong to one step any more; go back to the last checkpoint (load_state_dict)"
            )


class ActiveSet:
    """Which units of a model train now. All others are frozen, and their states are where the placement puts them.

    Args:
        parts: the model taken apart.
        sampler: draws the active sets.
        placement: where states live.
        weights: where weights live.
        watch: is told of every new active set.
        workers: must agree about the active set.
        stats: counts the seconds that switches take.
        options: of the optimizer.

    Attributes:
        parts: the model taken apart.
        sampler: draws the active sets.
        indices: of the units that train, ascending.
        corrected: of the inactive units that get small updates in backward.
        recompute: computes the layers again in backward while the sampler is probing. Then all of them train, and what
            they keep for backward would be more than any active set keeps.
        switches: active sets drawn after the first one.
        uninterrupted: for everything that changes weights and states together.
        proof: compares weights at switches; None unless :meth:`prove` was called.
    """

    def __init__(
        self,
        parts: Parts,
        sampler: Sampler,
        placement: OnDevice,
        weights: ResidentWeights,
        watch: Watch,
        workers: Workers,
        stats: OffloadStats,
        options: LayerwiseOptions,
    ) -> None:
        self.parts = parts
        self.sampler = sampler
        self._placement = placement
        self._weights = weights
        self._watch = watch
        self._workers = workers
        self._stats = stats
        self._reset = options.inactive_states == "reset"
        self.inactive_updates = options.inactive_updates
        self.corrected: tuple[int, ...] = ()
        self.indices: tuple[int, ...] = ()
        self.recompute = Recompute(parts.stack.modules)
        self.switches = 0
        self.uninterrupted = Uninterrupted()
        self.proof: Proof | None = None

    @property
    def units(self) -> list[Unit]:
        """The units that train: the active ones, and those that train at every step."""
        return [self.parts.units[index] for index in self.indices] + self.parts.constant

    @property
    def with_gradients(self) -> list[Unit]:
        """The units that backward brings gradients for."""
        return self.units + [self.parts.units[index] for index in self.corrected]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for unit in self.units for p in unit.parameters]

    def begin(self) -> None:
        """Activate the first set: all units while the sampler is probing, else its first draw, if it can draw yet."""
        if not self.sampler.trains_all:
            self._placement.prepare(self.parts.units)
        if self.sampler.probing:
            self.activate(range(len(self.parts.units)))
        else:
            self.activate(self.sampler.sample() if self.sampler.due else ())
        self._workers.check_agreement(self.indices)

    def switch_if_due(self) -> None:
        """Draw the next active set if it is time, and switch to it."""
        if self.sampler.due:
            self.switch(self.sampler.sample())

    def switch(self, chosen: tuple[int, ...]) -> None:
        """Make the units ``chosen`` the active ones.

        States of units that leave go before those of units that enter come, so that both never add up.
        """
        self._check_proof()
        started = time.perf_counter()
        with self.uninterrupted:
            self.switches += 1
            self._workers.check_agreement(chosen)
            leave = self._placement.forget if self._reset else self._placement.leave
            for index in sorted(set(self.indices) - set(chosen)):
                leave(self.parts.units[index])
            self._placement.host.synchronize(self.parts.device)
            self._settle_weights(chosen)
            for index in sorted(set(chosen) - set(self.indices)):
                self._placement.enter(self.parts.units[index])
            self.activate(chosen)
        self._stats.switch_s += time.perf_counter() - started
        self._stats.exposed_s += time.perf_counter() - started
        self._stats.pinned = self._placement.host.pinned

    def activate(self, indices: Iterable[int]) -> None:
        """Let exactly these units and the constant ones require gradients; frozen ones hold none."""
        self.indices = tuple(indices)
        self._watch.new_active_set()
        corrects = None if self.sampler.probing else self.inactive_updates
        self.corrected = () if corrects is None else corrects.units(len(self.parts.units), self.indices)
        for index, unit in enumerate(self.parts.units):
            for parameter in unit.parameters:
                parameter.requires_grad_(index in self.indices or index in self.corrected)
                if index not in self.indices:
                    parameter.grad = None
        self._settle_weights(self.indices)
        self.recompute.switch(self.sampler.probing)
        if not self.sampler.probing:
            self._placement.activate([self.parts.units[index] for index in self.indices])

    def _settle_weights(self, indices: Iterable[int]) -> None:
        """Weights that train stay on the device. Probing trains none: every layer's only pass through."""
        if self._weights.streams:
            indices = () if self.sampler.probing else indices
            self._placement.synchronize()
            self._weights.settle(p for index in indices for p in self.parts.units[index].parameters)

    def check_drawn(self) -> None:
        """Raise RuntimeError if the sampler needs a measurement before its first draw, and got none."""
        if self.parts.units and not self.indices:
            raise RuntimeError(
                f"{type(self.sampler).__name__} has not drawn yet: call optimizer.probe(measure) before the first "
                "step, or give the sampler its scores"
            )

    def prove(self, model: nn.Module | None) -> Proof:
        """Compare all weights at switches from now on; ``model`` is None if only the units are left of it."""
        known = set(self.parts.managed)
        frozen = [] if model is None else [p for p in model.parameters() if p not in known]
        self.proof = Proof(self.parts.units, frozen, self._workers if self.parts.shards is not None else None)
        return self.proof

    def note_step(self, trained: Iterable[int], skipped: Tensor | None = None) -> None:
        """Tell the proof, if any, which units a step has trained; ``skipped`` is above 0 if nothing was updated."""
        if self.proof is not None:
            self.proof.note(trained, skipped)
            self.proof.excuse(self.corrected)

    def note_unit(self, unit: Unit, skipped: Tensor) -> None:
        """Tell the proof, if any, that one unit was updated inside backward; ``skipped`` as in :meth:`note_step`."""
        if self.proof is not None and unit in self.parts.units:
            self.proof.note([self.parts.units.index(unit)], skipped, steps=0)

    def _check_proof(self) -> None:
        if self.proof is not None and self.proof.due:
            self._placement.synchronize()
            self._weights.rest()
            self.proof.check()
            self._watch.mistakes(self.proof.mistakes)
