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

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size  # type: ignore[import-untyped]

# Most tokens of a batch with ``auto``, by device: padding and room for the answer included. A GPU starts from more than
# some can hold, and halves.
MOST_TOKENS = {"cpu": 16_384, "cuda": 65_536}
# What a forward pass costs besides its tokens, in tokens: weights are read, kernels started. Measured with SmolLM2-135M
# on a CPU, where a pass over one token takes 60 ms and each further token about 3.
PASS_TOKENS = {"cpu": 25, "cuda": 2_048}

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
        self.pass_tokens = PASS_TOKENS.get(device, PASS_TOKENS["cpu"])
        self.halvings = 0

    def run(
        self,
        requests: Sequence[Request],
        lengths: Sequence[int],
        answer: Callable[[list[Request]], list[Answer]],
        *,
        room: int = 0,
    ) -> list[Answer]:
        """Answer all requests.

        Args:
            requests: in any order.
            lengths: of each request, in tokens.
            answer: one forward pass, or one generation, over a batch.
            room: most tokens that an answer may have, each of which is a pass of its own.

        Returns:
            The answers in the order of the requests.

        Raises:
            RuntimeError: a single request does not fit into memory.
        """
        order = sorted(range(len(requests)), key=lambda place: (-lengths[place], place))
        answers: dict[int, Answer] = {}
        while len(answers) < len(order):
            left = order[len(answers) :]
            places = left[: self._count([lengths[place] for place in left], room)]
            found = self._attempt([requests[place] for place in places], answer)
            if found is None:
                self._halve(len(places), lengths[places[0]] + room)
            else:
                answers.update(zip(places, found, strict=True))
        return [answers[place] for place in range(len(requests))]

    def _count(self, lengths: Sequence[int], room: int) -> int:
        """How many of the requests, longest first, share the next batch.

        With ``auto``: as many as fit, until padding has cost what the passes of another batch would.
        """
        if self.rows is not None:
            return self.rows
        most = max(1, self.most // max(lengths[0] + room, 1))
        worth, padding = self.pass_tokens * max(room, 1), 0
        for count, length in enumerate(lengths[:most]):
            padding += lengths[0] - length
            if padding > worth:
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
