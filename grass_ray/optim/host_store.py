"""Where optimizer states of frozen layers live: host memory, pinned when there is a CUDA device.

A block is allocated at a state's first eviction and used again at every later one, so layers that are never drawn
cost nothing. Machines without CUDA follow the same protocol with ordinary memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HostStore:
    """Host blocks, one for each evicted tensor.

    Args:
        device: where the states live while their layer is active.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: dict[tuple[int, str], Tensor] = {}
        self.pinned = device.type == "cuda"

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.numel() * block.element_size() for block in self._blocks.values())

    def evict(self, parameter: int, name: str, state: Tensor) -> Tensor:
        """Copy ``state`` to its host block and return the block; valid after :meth:`synchronize`."""
        block = self.reserve(parameter, name, state)
        block.copy_(state, non_blocking=True)
        return block

    def reserve(self, parameter: int, name: str, like: Tensor) -> Tensor:
        """The block of a state, allocated when there is none yet."""
        block = self._blocks.get((parameter, name))
        if block is None:
            block = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=self.pinned)
            self._blocks[parameter, name] = block
        return block

    def reserved(self) -> list[int]:
        """The parameters that have blocks."""
        return sorted({parameter for parameter, _ in self._blocks})

    def fetch(self, block: Tensor) -> Tensor:
        """A copy of ``block`` on the device."""
        if self._device.type == "cpu":
            return block.clone()
        return block.to(self._device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until every eviction has arrived, so that device memory may be used again and blocks be read."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
