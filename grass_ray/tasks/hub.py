"""Rows from the original datasets on the Hugging Face Hub, mapped to the published wording."""

from __future__ import annotations

from collections.abc import Sequence

from grass_ray.config import ConfigError, HubSource
from grass_ray.tasks.mappings import MAPPINGS
from grass_ray.tasks.row_files import take_rows
from grass_ray.tasks.row_source import LoadedRows, RowSource, build_mixture
from grass_ray.tasks.rows import RowError, hash_rows
from grass_ray.tasks.suites import SUITES, TASKS


class HubRows(RowSource[HubSource]):
    """Rows of ``source: {kind: hub}``."""

    def check(self, *, training: bool) -> None:
        """Check that the datasets of the tasks are known; nothing is downloaded."""
        _check_known(self.data.tasks)
        if training:
            self._train_tasks()

    def train_rows(self) -> LoadedRows:
        """The training sets of the tasks, or of the whole suite if the tasks have none."""
        tasks = self._train_tasks()
        parts = {key: self._load(key, "train") for key in tasks}
        absent = [key for key in self.data.tasks if key not in tasks]
        return build_mixture(parts, SUITES[self.data.suite].mixtures, absent)

    def test_rows(self, task: str) -> LoadedRows:
        """The test set of a task, or the validation set if the labels of the test set are hidden."""
        return self._load(task, TASKS[task].hub_test_split)

    def _train_tasks(self) -> tuple[str, ...]:
        known = tuple(key for key in self.data.tasks if key in MAPPINGS)
        known = known or tuple(key for key in SUITES[self.data.suite].tasks if key in MAPPINGS)
        if not known:
            _check_known(self.data.tasks)
        return known

    def _load(self, key: str, split: str) -> LoadedRows:
        _check_known((key,))
        import datasets
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        task = TASKS[key]
        assert task.hub_id is not None
        try:
            dataset = datasets.load_dataset(task.hub_id, task.hub_config, split=split)
        except (OSError, HfHubHTTPError, OfflineModeIsEnabled, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(
                f"cannot load {task.hub_id} for {task.key} from the Hugging Face Hub ({type(error).__name__}: "
                f"{str(error)[:200]}). Without a network give a folder (--data-dir DIR) or --task generated"
            ) from None
        rows, mistakes = [], []
        for number, record in enumerate(dataset, start=1):
            try:
                rows.append(MAPPINGS[task.key](record))
            except RowError as mistake:
                mistakes.append(f"row {number}: {mistake}")
        reading = take_rows(rows, mistakes, f"{task.hub_id} ({split})", self.data.broken_rows)
        name = "/".join(part for part in (task.hub_id, task.hub_config, split) if part)
        entry = {"name": name, "sha256": hash_rows(reading.rows), **reading.provenance}
        return LoadedRows(rows=reading.rows, files=[entry])


def _check_known(tasks: Sequence[str]) -> None:
    missing = [key for key in tasks if key not in MAPPINGS]
    if missing:
        raise ConfigError(
            f"the hub source does not serve {', '.join(missing)}; it serves {', '.join(MAPPINGS)}. "
            "For the others give a folder in the published layout (--data-dir DIR)"
        )
