"""What one optimizer step did."""

from __future__ import annotations

from dataclasses import dataclass

from grass_ray.layerwise.sampler import Sampler
from grass_ray.optim.streaming import OffloadStats


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What the last step of :class:`~grass_ray.optim.layerwise_adamw.LayerwiseAdamW` did.

    Attributes:
        probed: the step only measured.
        active_units: indices of the units that trained (that were measured, if ``probed``).
        active_layers: indices of the decoder layers in which something trained.
        probabilities: of each unit to be drawn first at the next draw, as the sampler tells.
        importance: of each unit, as the sampler tells.
        ages: steps since each unit's importance was measured, as the sampler tells.
        refreshed: the importance entered the probabilities since the step before.
        switched: another active set was drawn since the step before.
        bytes_in: bytes of states that went to the device since the step before.
        bytes_out: bytes of states that came from the device since the step before.
        stall_s: seconds in which training waited for states since the step before.
    """

    probed: bool
    active_units: tuple[int, ...]
    active_layers: tuple[int, ...]
    probabilities: tuple[float, ...] | None
    importance: tuple[float, ...] | None
    ages: tuple[float, ...] | None
    refreshed: bool
    switched: bool
    bytes_in: int
    bytes_out: int
    stall_s: float


class StepRecorder:
    """Makes each step's :class:`StepInfo` from counters that only grow.

    Args:
        sampler: of the optimizer.
        stats: what moving states has cost so far.
    """

    def __init__(self, sampler: Sampler, stats: OffloadStats) -> None:
        self._sampler = sampler
        self._stats = stats
        self.begin(switches=0)

    def begin(self, *, switches: int) -> None:
        """Count from here on."""
        self._refreshes, self._switches = self._sampler.refreshes, switches
        self._bytes_in, self._bytes_out = self._stats.bytes_in, self._stats.bytes_out
        self._exposed_s = self._stats.exposed_s

    def step(
        self, active_units: tuple[int, ...], active_layers: tuple[int, ...], *, probed: bool, switches: int
    ) -> StepInfo:
        """What happened since the step before; ``switches`` counts all active sets drawn after the first one."""
        sampler, stats = self._sampler, self._stats
        info = StepInfo(
            probed=probed,
            active_units=active_units,
            active_layers=active_layers,
            probabilities=sampler.probabilities(),
            importance=sampler.importance(),
            ages=sampler.ages(),
            refreshed=sampler.refreshes > self._refreshes,
            switched=switches > self._switches,
            bytes_in=stats.bytes_in - self._bytes_in,
            bytes_out=stats.bytes_out - self._bytes_out,
            stall_s=stats.exposed_s - self._exposed_s,
        )
        self.begin(switches=switches)
        return info
