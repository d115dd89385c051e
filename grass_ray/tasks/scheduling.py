"""Which requests share a forward pass: sorted by length, as many as fit, half as many when memory runs out.

::

    scheduler = Scheduler("auto", device="cpu")
    answers = scheduler.run(requests, [len(request) for request in requests], answer_batch)

Requests of about one length share a batch, so there is little padding, and what takes most memory comes first. A batch
that does not fit into memory is halved and repeated; what was answered before is kept, and no answer changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

# Most tokens of a batch with ``auto``, by device: padding and room for the answer included. A GPU starts from more than
# some can hold, and halves.
MOST_TOKENS = {"cpu": 16_384, "cuda": 65_536}
# From so many tokens on a pass is no more efficient with more: then shorter requests are left to the next batch.
ENOUGH_TOKENS = {"cpu": 512, "cuda": 8_192}
ENOUGH_ROWS = {"cpu": 32, "cuda": 256}  # the same for answers that are generated token by token
CLOSE = 0.9  # the shortest request of a batch that has enough, over the longest
FAR = 0.5  # the shortest request of one that has not

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Scheduler:
    """Runs requests in batches, and counts in ``halvings`` how often a batch did not fit into memory.

    Args:
        batch_size: most requests of a batch; ``auto`` takes as many as are efficient.
        device: its type, ``cpu`` or ``cuda``.
    """

    def __init__(self, batch_size: int | Literal["auto"], device: str) -> None:
        self.rows = None if batch_size == "auto" else batch_size
        self.most = MOST_TOKENS.get(device, MOST_TOKENS["cpu"])
        self.enough_tokens = ENOUGH_TOKENS.get(device, ENOUGH_TOKENS["cpu"])
        self.enough_rows = ENOUGH_ROWS.get(device, ENOUGH_ROWS["cpu"])
        self.halvings = 0

    def run(
        self,
        requests: Sequence[Request],
        lengths: Sequence[int],
        answer: Callable[[list[Request]], list[Answer]],
        *,
        generating: bool = False,
    ) -> list[Answer]:
        """Answer all requests.

        Args:
            requests: in any order.
            lengths: of each request, in tokens.
            answer: one forward pass, or one generation, over a batch.
            generating: whether answers are generated token by token: many rows are then worth some padding.

        Returns:
            The answers in the order of the requests.

        Raises:
            RuntimeError: a single request does not fit into memory.
        """
        order = sorted(range(len(requests)), key=lambda place: (-lengths[place], place))
        answers: dict[int, Answer] = {}
        while len(answers) < len(order):
            left = order[len(answers) :]
            places = left[: self._count([lengths[place] for place in left], generating)]
            found = self._attempt([requests[place] for place in places], answer)
            if found is None:
                self._halve(len(places), lengths[places[0]])
            else:
                answers.update(zip(places, found, strict=True))
        return [answers[place] for place in range(len(requests))]

    def _count(self, lengths: Sequence[int], generating: bool) -> int:
        """How many of the requests, longest first, share the next batch."""
        if self.rows is not None:
            return self.rows
        longest = max(lengths[0], 1)
        most = max(1, self.most // longest)
        for count, length in enumerate(lengths[:most]):
            enough = count >= self.enough_rows if generating else count * longest >= self.enough_tokens
            if length < longest * (CLOSE if enough else 0 if generating else FAR):
                return count
        return most

    def _attempt(self, batch: list[Request], answer: Callable[[list[Request]], list[Answer]]) -> list[Answer] | None:
        """The batch's answers, or None where memory ran out."""
        try:
            return answer(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
        # the failed pass is only now forgotten, and its memory with it
        clear_device_cache(garbage_collection=True)
        return None

    def _halve(self, rows: int, longest: int) -> None:
        self.halvings += 1
        if self.rows is not None:
            self.rows = rows // 2
        else:
            self.most = rows // 2 * max(longest, 1)
