"""Form batches of requests: sorted by length, as many as fit, half as many if memory runs out.

::

    batcher = Batcher("auto", device="cpu")
    answers = batcher.run(requests, [len(request) for request in requests], answer_batch)

Requests of similar length share a batch, which needs little padding. The longest come first, so memory runs out early
if at all. Then the batch is halved and repeated; earlier answers are kept, and no answer changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size  # type: ignore[import-untyped]

# Maximum number of tokens of an automatic batch, by device, with padding and generated tokens. For GPUs it is more than
# some can hold, since it is halved if needed.
MAX_TOKENS = {"cpu": 16_384, "cuda": 65_536}
# Fixed cost of a forward pass (reading weights, launching kernels), in tokens. Measured with SmolLM2-135M on a CPU,
# where a pass over one token takes 60 ms and each further token about 3 ms.
PASS_TOKENS = {"cpu": 25, "cuda": 2_048}


def pass_tokens(device: str) -> int:
    """Fixed cost of a forward pass on a type of device, in tokens."""
    return PASS_TOKENS.get(device, PASS_TOKENS["cpu"])


def similar_groups(lengths: Sequence[int], cost: int) -> list[int]:
    """Cut rows into groups that cost least to read, each padded to its longest row.

    Args:
        lengths: numbers of tokens, longest first.
        cost: of reading another group, in tokens.

    Returns:
        The number of rows of each group, in order.
    """
    best, first = [0], [0]  # of the first rows: what they cost, and where their last group begins
    for end in range(1, len(lengths) + 1):
        least = min((best[start] + cost + (end - start) * lengths[start], start) for start in range(end))
        best.append(least[0])
        first.append(least[1])
    sizes, end = [], len(lengths)
    while end:
        sizes.append(end - first[end])
        end = first[end]
    return sizes[::-1]


Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Batcher:
    """Runs requests in batches.

    Args:
        batch_size: maximum number of requests per batch; ``auto`` chooses it by length.
        device: type of the device, ``cpu`` or ``cuda``.

    Attributes:
        halvings: how often a batch did not fit into memory.
    """

    def __init__(self, batch_size: int | Literal["auto"], device: str) -> None:
        self.rows = None if batch_size == "auto" else batch_size
        self.max_tokens = MAX_TOKENS.get(device, MAX_TOKENS["cpu"])
        self.pass_tokens = pass_tokens(device)
        self.halvings = 0

    def run(
        self,
        requests: Sequence[Request],
        lengths: Sequence[int],
        answer: Callable[[list[Request]], list[Answer]],
        *,
        room: int = 0,
        in_groups: bool = False,
    ) -> list[Answer]:
        """Answer all requests.

        Args:
            requests: in any order.
            lengths: number of tokens of each request.
            answer: runs one forward pass, or one generation, on a batch.
            room: maximum number of tokens to generate, each of which is a forward pass.
            in_groups: ``answer`` reads the requests of a batch in groups of similar length (:func:`similar_groups`), so
                that their lengths do not limit an automatic batch.

        Returns:
            The answers in the order of the requests.

        Raises:
            RuntimeError: a single request does not fit into memory.
        """
        order = sorted(range(len(requests)), key=lambda place: (-lengths[place], place))
        answers: dict[int, Answer] = {}
        while len(answers) < len(order):
            left = order[len(answers) :]
            places = left[: self._count([lengths[place] for place in left], room, in_groups)]
            found = self._attempt([requests[place] for place in places], answer)
            if found is None:
                self._halve(len(places), lengths[places[0]] + room)
            else:
                answers.update(zip(places, found, strict=True))
        return [answers[place] for place in range(len(requests))]

    def _count(self, lengths: Sequence[int], room: int, in_groups: bool) -> int:
        """Return how many of the requests, longest first, share the next batch.

        With ``auto`` as many as fit, until their padding costs more than the passes of another batch.
        """
        if self.rows is not None:
            return self.rows
        most = max(1, self.max_tokens // max(lengths[0] + room, 1))
        if in_groups:
            return most
        worth, padding = self.pass_tokens * max(room, 1), 0
        for count, length in enumerate(lengths[:most]):
            padding += lengths[0] - length
            if padding > worth:
                return count
        return most

    def _attempt(self, batch: list[Request], answer: Callable[[list[Request]], list[Answer]]) -> list[Answer] | None:
        """Return the answers of a batch; None if memory ran out."""
        try:
            return answer(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
        # outside the except block, where the traceback no longer holds the tensors of the failed pass
        clear_device_cache(garbage_collection=True)
        return None

    def _halve(self, rows: int, longest: int) -> None:
        self.halvings += 1
        if self.rows is not None:
            self.rows = rows // 2
        else:
            self.max_tokens = rows // 2 * max(longest, 1)
