"""Where rows come from: a folder, the hub, a user's own task file, or the project's generator; one interface.

::

    train = load_train_rows(config.data)             # RowSet: rows and provenance (files, sha256, counts)
    test = load_test_rows("boolq", config.data)
    check_data(config.data)                          # everything that can be wrong, before any model is loaded
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from grass_ray.config import ConfigError, CustomSource, DataConfig, FolderSource, GeneratedSource, HubSource
from grass_ray.tasks.custom import check_selection, read_custom
from grass_ray.tasks.folder import DataFolder
from grass_ray.tasks.generated import generate
from grass_ray.tasks.mappings import MAPPINGS
from grass_ray.tasks.rows import BrokenRows, Row, RowError, RowSet, hash_rows, take_rows
from grass_ray.tasks.suites import SUITES, TASKS, Task

SUBSET_SEED = 20_240_531  # which rows max_train_rows keeps and how built mixtures are shuffled; never a run's own seed

Loaded = tuple[tuple[Row, ...], dict[str, Any]]


def load_train_rows(data: DataConfig) -> RowSet:
    """The rows to train on: the suite's mixture where there is one, else the train sets at hand.

    ``data.max_train_rows`` keeps a random subset that is the same in every run. Raises :class:`ConfigError` where
    there is nothing to train on or a row is broken.
    """
    check_selection(data)
    source = data.source
    if isinstance(source, GeneratedSource):
        _check_generated(data)
        rows = generate("train", rows=source.train_rows, seed=source.seed)
        loaded = rows, _made(rows, "train", source), f"generated with seed {source.seed}"
    elif isinstance(source, FolderSource):
        loaded = _folder_train(DataFolder(source.path, data.broken_rows), data)
    elif isinstance(source, CustomSource):
        rows, entry = read_custom(source, "train", data.broken_rows)
        loaded = rows, [entry], f"the train file of {source.name}"
    else:
        loaded = _hub_train(data)
    rows, files, description = loaded
    used = rows
    if data.max_train_rows is not None and data.max_train_rows < len(rows):
        used = tuple(Random(SUBSET_SEED).sample(rows, data.max_train_rows))
    provenance = {
        "source": source.kind,
        "description": description,
        "files": files,
        "rows": len(used),
        "rows_available": len(rows),
        "rows_sha256": hash_rows(used),
        **_skipping(data, files),
    }
    return RowSet(rows=used, provenance=provenance)


def load_test_rows(task: str, data: DataConfig) -> RowSet:
    """The whole test set of one task. Raises :class:`ConfigError` where it is missing or a row is broken."""
    check_selection(data.model_copy(update={"tasks": (task,)}))
    source = data.source
    if isinstance(source, GeneratedSource):
        _check_generated(data)
        rows = generate("test", rows=source.test_rows, seed=source.seed)
        files = _made(rows, "test", source)
    elif isinstance(source, FolderSource):
        folder = DataFolder(source.path, data.broken_rows)
        _check_folder_tests(folder, (task,))
        path = folder.find_task_file(TASKS[task], "test")
        assert path is not None
        rows, entry = folder.read(path, TASKS[task])
        files = [entry]
    elif isinstance(source, CustomSource):
        rows, entry = read_custom(source, "test", data.broken_rows)
        files = [entry]
    else:
        rows, entry = _hub_rows(TASKS[task], TASKS[task].hub_test_split, data.broken_rows)
        files = [entry]
    provenance = {"source": source.kind, "files": files, "rows": len(rows), **_skipping(data, files)}
    return RowSet(rows=rows, provenance=provenance)


def check_data(data: DataConfig, *, training: bool = True) -> None:
    """Raise :class:`ConfigError` on all that is wrong with the data and can be seen without a model or a network.

    Args:
        data: which data.
        training: whether there must be something to train on; an evaluation needs only the test sets.
    """
    check_selection(data)
    if isinstance(data.source, HubSource):
        _check_hub(data.tasks)
        if training:
            _hub_train_tasks(data)
        return
    if isinstance(data.source, FolderSource):
        _check_folder_tests(DataFolder(data.source.path), data.tasks)
    for task in data.tasks:
        load_test_rows(task, data)
    if training:
        load_train_rows(data)


def _skipping(data: DataConfig, files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What became of broken rows, for the provenance."""
    return {"broken_rows": data.broken_rows, "rows_skipped": sum(entry.get("rows_skipped", 0) for entry in files)}


# ------------------------------------------------------------------------------------------------------- generated


def _check_generated(data: DataConfig) -> None:
    if data.tasks != ("generated",):
        raise ConfigError(
            f"the generated source makes only the task 'generated', not {', '.join(data.tasks)}; "
            "give a folder (--data-dir DIR; in a configuration, source: {kind: folder, path: DIR}) "
            "or the hub (source: {kind: hub})"
        )


def _made(rows: Sequence[Row], split: str, source: GeneratedSource) -> list[dict[str, Any]]:
    return [{"name": f"generated/{split}-seed{source.seed}", "sha256": hash_rows(rows), "rows": len(rows)}]


# ---------------------------------------------------------------------------------------------------------- folder


def _check_folder_tests(folder: DataFolder, tasks: Sequence[str]) -> None:
    missing = [key for key in tasks if folder.find_task_file(TASKS[key], "test") is None]
    if missing:
        names = ", ".join(f"{key} (dataset/{TASKS[key].folder}/test.json)" for key in missing)
        raise ConfigError(f"the data folder {folder.path} has no test set of {names}. It holds: {folder.describe()}")


def _folder_train(folder: DataFolder, data: DataConfig) -> tuple[tuple[Row, ...], list[dict[str, Any]], str]:
    suite = SUITES[data.suite]
    if mixture := folder.find_mixture(suite):
        rows, entry = folder.read(mixture[1], None)
        return rows, [entry], f"the mixture {mixture[0]}"
    for tasks in (data.tasks, suite.tasks):
        present = {key: path for key in tasks if (path := folder.find_task_file(TASKS[key], "train"))}
        if present:
            parts = {key: folder.read(path, TASKS[key]) for key, path in present.items()}
            return _build(parts, suite.mixtures, [key for key in data.tasks if key not in present])
    expected = ", ".join(f"ft-training_set/{name}.json" for name in suite.mixtures) or "a mixture"
    raise ConfigError(
        f"the data folder {folder.path} has nothing to train {data.suite} on; it needs {expected} or "
        f"dataset/<Name>/train.json of one of {', '.join(suite.tasks)}. It holds: {folder.describe()}"
    )


def _build(
    parts: dict[str, Loaded], mixtures: Sequence[str], absent: Sequence[str]
) -> tuple[tuple[Row, ...], list[dict[str, Any]], str]:
    """One shuffled mixture of several train sets, the same in every run."""
    rows = [row for part, _ in parts.values() for row in part]
    Random(SUBSET_SEED).shuffle(rows)
    counts = ", ".join(f"{key} ({len(part)})" for key, (part, _) in parts.items())
    description = f"built from the train sets of {counts}"
    if mixtures:
        description += f", in place of {' or '.join(mixtures)}"
    if absent:
        description += f"; no train set of {', '.join(absent)}"
    return tuple(rows), [entry for _, entry in parts.values()], description


# ------------------------------------------------------------------------------------------------------------- hub


def _check_hub(tasks: Sequence[str]) -> None:
    missing = [key for key in tasks if key not in MAPPINGS]
    if missing:
        raise ConfigError(
            f"the hub source does not serve {', '.join(missing)}; it serves {', '.join(MAPPINGS)}. "
            "For the others give a folder in the published layout (--data-dir DIR)"
        )


def _hub_train_tasks(data: DataConfig) -> tuple[str, ...]:
    served = tuple(key for key in data.tasks if key in MAPPINGS)
    served = served or tuple(key for key in SUITES[data.suite].tasks if key in MAPPINGS)
    if not served:
        _check_hub(data.tasks)
    return served


def _hub_train(data: DataConfig) -> tuple[tuple[Row, ...], list[dict[str, Any]], str]:
    tasks = _hub_train_tasks(data)
    parts = {key: _hub_rows(TASKS[key], "train", data.broken_rows) for key in tasks}
    return _build(parts, SUITES[data.suite].mixtures, [key for key in data.tasks if key not in tasks])


def _hub_rows(task: Task, split: str, broken_rows: BrokenRows) -> Loaded:
    """Load one split of the original data set and map it. Raises :class:`ConfigError` when it cannot be had."""
    _check_hub((task.key,))
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

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
    reading = take_rows(rows, mistakes, f"{task.hub_id} ({split})", broken_rows)
    name = "/".join(part for part in (task.hub_id, task.hub_config, split) if part)
    return reading.rows, {"name": name, "sha256": hash_rows(reading.rows), **reading.provenance}
