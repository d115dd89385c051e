"""How much of the device's memory training does not need for a while, so that it can be lent."""

from __future__ import annotations

import torch


class Room:
    """Backward frees what forward has kept, and the next forward needs it again only when it comes to the same layer.

    A layer's own backward takes about as much on top of what is held as that of any other layer. So the peak stays
    where it was if no more is lent than backward has freed since it began, less the gradients that are still to come.
    A layer that is computed again in backward takes more than others: then what is freed counts from the highest of
    those. Which they are, and which backward pass of a step is its last, was seen in the step before; until there was
    one nothing is lent.

    Args:
        device: whose memory; only a CUDA device says how much of it is in use, and others lend nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._passes = 0
        self._expected = 0
        self._in_pass = False
        # the highest layer that is computed again: in the step before and so far in this one; -1 if none is
        self._again, self._seen_again = -1, -1
        # bytes in use when what is freed begins to count
        self._begin: int | None = None

    def in_use(self) -> tuple[int, int]:
        """Bytes of the device that tensors take, and that the allocator holds for them."""
        if self._device.type != "cuda":
            return 0, 0
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        return int(stats["allocated_bytes"]["all"]["current"]), int(stats["reserved_bytes"]["all"]["current"])

    def forward(self) -> None:
        """A forward begins, or goes on: the next layer of backward will be the first one of its pass."""
        self._in_pass = False

    def backward(self, layer: int, *, again: bool, lent: int) -> None:
        """Backward has reached a layer.

        Args:
            layer: its index.
            again: it is computed again.
            lent: bytes that are lent now.
        """
        if not self._in_pass:
            self._in_pass = True
            self._passes += 1
            self._begin = None
        if again:
            self._seen_again = max(self._seen_again, layer)
        if self._begin is None and (self._again < 0 or layer <= self._again):
            self._begin = self.in_use()[0] - lent

    def bytes(self, *, to_come: int) -> int:
        """Bytes that can be lent now; ``to_come`` are those of the gradients that backward will still make."""
        if self._passes != self._expected or self._begin is None:
            return 0
        used, held = self.in_use()
        return max(0, min(self._begin - used - to_come, held - used))

    def end_step(self) -> None:
        """A step ends: the next one is expected to be like it."""
        self._expected, self._again = self._passes, self._seen_again
        self.forget()

    def forget(self) -> None:
        """What happened since the last step was no part of one."""
        self._passes, self._seen_again, self._begin = 0, -1, None
