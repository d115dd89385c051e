"""Loss on held-out rows that have no right answer: conversations, pairs and texts.

Each row has the sum of the losses of its learned tokens (of a conversation, the assistant's), their number, and the
bytes of their text, so that nats per token, bits per byte and perplexity follow. Importing this module loads no torch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from grass_ray.config import ConfigError, DataConfig, DatasetSource, EvaluationConfig
from grass_ray.tasks.conversations import find_template
from grass_ray.tasks.encoding import EncodedRow, EncodedRows, encode_rows, is_chat
from grass_ray.tasks.questions import LIMIT_SEED, select_examples
from grass_ray.tasks.rows import RowSet, canonical
from grass_ray.tasks.scores import EvaluationResult, Example
from grass_ray.tasks.shards import SHARD, split_by_cost
from grass_ray.tasks.sources import load_test_rows
from grass_ray.tasks.suites import Task

if TYPE_CHECKING:
    from grass_ray.tasks.inference.harness import ObservedLM

OnProgress = Callable[[str, int, int], None]


class Progress:
    """Counts the finished requests of a task and reports them."""

    def __init__(self, listener: OnProgress | None) -> None:
        self.listener = listener
        self.task, self.finished, self.total = "", 0, 0

    def start(self, task: str, total: int) -> None:
        """Begin with a task of ``total`` requests."""
        self.task, self.finished, self.total = task, 0, total

    def advance(self, requests: int) -> None:
        """Count finished requests."""
        self.finished = min(self.finished + requests, self.total)
        if self.listener:
            self.listener(self.task, self.finished, self.total)

    def finish(self) -> None:
        """Count the requests that lm-eval answered without a forward pass (options with the same text)."""
        if self.finished < self.total:
            self.advance(self.total - self.finished)


def measure_held_out(
    lm: ObservedLM,
    task: Task,
    data: DataConfig,
    evaluation: EvaluationConfig,
    progress: Progress,
    shard: tuple[int, int] | None,
) -> EvaluationResult:
    """Measure the loss of each held-out row.

    Args:
        lm: the model.
        task: the data set.
        data: source, maximum length and template.
        evaluation: limit.
        progress: told of every batch.
        shard: (index, count) to measure only one of ``count`` shards of the rows.

    Raises:
        ConfigError: no held-out row has anything to learn within the maximum length.
    """
    tests = load_test_rows(task.key, data)
    encoded = encode_rows(tests.rows, lm.tokenizer, _within(data, lm.max_length))
    usable = [row for row in encoded.rows if row.targets]
    if not usable:
        raise ConfigError(
            f"none of {len(tests.rows)} held-out rows has anything to learn within {data.max_length_tokens} tokens; "
            "raise data.max_length_tokens"
        )
    rows = select_examples(usable, evaluation.limit)
    ids = _ids(task, rows)
    protocol = _protocol(lm, tests, encoded, data, evaluation)
    if shard is not None:
        positions = split_by_cost([len(row.ids) for row in rows], shard[1])[shard[0]]
        rows, ids = [rows[at] for at in positions], [ids[at] for at in positions]
        protocol[SHARD] = {"index": shard[0], "count": shard[1], "positions": positions}
    progress.start(task.key, len(rows))
    started = time.perf_counter()
    losses = lm.score_learned([(row.ids, row.learned) for row in rows])
    workload = replace(lm.take_workload(), seconds=time.perf_counter() - started)
    return EvaluationResult(
        task=task.key,
        scoring="loss",
        extraction=evaluation.extraction,
        examples=tuple(_example(lm.tokenizer, *parts) for parts in zip(ids, rows, losses, strict=True)),
        protocol=protocol,
        workload=workload,
    )


def _within(data: DataConfig, positions: int) -> DataConfig:
    """The data with rows that are no longer than the model's context."""
    return data.model_copy(
        update={"max_length_tokens": min(data.max_length_tokens, positions), "train_on_inputs": False}
    )


def _ids(task: Task, rows: Sequence[EncodedRow]) -> list[str]:
    """16 hexadecimal digits of a hash of the task, the row and, for a repeated row, its number."""
    seen: dict[str, int] = {}
    found = []
    for row in rows:
        text = f"{task.key}\n{canonical(row.row)}"
        repetition = seen[text] = seen.get(text, 0) + 1
        name = text + (f"\n#{repetition}" if repetition > 1 else "")
        found.append(hashlib.sha256(name.encode()).hexdigest()[:16])
    return found


def _example(tokenizer: Any, name: str, row: EncodedRow, nats: float) -> Example:
    runs = groupby(zip(row.ids[1:], row.learned[1:], strict=True), key=lambda pair: pair[1])
    learned = [tokenizer.decode([token for token, _ in run], skip_special_tokens=True) for own, run in runs if own]
    return Example(
        id=name,
        prompt=tokenizer.decode(row.ids),
        target="\n".join(learned),
        output="",
        extracted=None,
        correct=False,
        answer_nats=nats,
        answer_tokens=row.targets,
        answer_bytes=sum(len(text.encode()) for text in learned),
    )


def _protocol(
    lm: ObservedLM, tests: RowSet, encoded: EncodedRows, data: DataConfig, evaluation: EvaluationConfig
) -> dict[str, Any]:
    """How the loss is measured: what must be equal for two losses to be compared, and what was lost."""
    file = tests.provenance["files"][0]
    chats = any(is_chat(row.row, data, lm.tokenizer) for row in encoded.rows)
    rendering: dict[str, Any] = {"rendering": "plain", "template": data.template}
    if chats and isinstance(data.source, DatasetSource):
        template = find_template(data.source, lm.tokenizer)
        rendering = {"rendering": "chat", "template_sha256": hashlib.sha256(template.encode()).hexdigest()}
    return {
        **rendering,
        "scoring": "loss",
        "extraction": None,
        "shape": file["shape"],
        "max_length_tokens": min(data.max_length_tokens, lm.max_length),
        "limit": evaluation.limit,
        "limit_seed": LIMIT_SEED,
        "batch_size": evaluation.batch_size,
        "test_file": file["name"],
        "test_sha256": file["sha256"],
        "test_rows": sum(row.targets > 0 for row in encoded.rows),
        "test_rows_skipped": tests.provenance["rows_skipped"],
        "test_rows_cut": sum(row.is_cut for row in encoded.rows),
        "test_rows_unused": len(tests.rows) - sum(row.targets > 0 for row in encoded.rows),
        "broken_rows": data.broken_rows,
    }
