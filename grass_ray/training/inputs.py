"""Hashes of what decides a run's numbers beside its configuration, its rows and its weights.

::

    hash_inputs(config)   # {"package": "5c1f...", "files of the model": "9e0b...", ...}

A record keeps them (``data.inputs``), so that a later run knows whether the same names still mean the same things.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from grass_ray.config import DatasetSource, RunConfig
from grass_ray.paths import is_path
from grass_ray.tasks.conversations import own_template
from grass_ray.tasks.lm_eval_tasks import leaves, load_lm_eval
from grass_ray.training.weights import model_folder

PACKAGE = "package"
_MODEL_FILES = (".json", ".txt", ".jinja", ".model", ".py")  # configuration, tokenizer, templates, own code
_TASK_FILES = (".yaml", ".yml", ".py")


def hash_inputs(config: RunConfig) -> dict[str, str]:
    """Hash this package's code, and what the configuration names by a path or an id.

    Rows and weights are not among them: a record has hashes of its own for those. The tasks of lm-eval are loaded.

    Raises:
        ConfigError: a task of lm-eval cannot be loaded, or a chat template not be read.
    """
    found = {PACKAGE: package_sha256()}
    folder = model_folder(config.model)
    if folder is not None:
        found["files of the model"] = _hash_files(
            folder, (path for path in folder.iterdir() if path.suffix in _MODEL_FILES)
        )
    source = config.data.source
    if isinstance(source, DatasetSource) and (template := own_template(source)) is not None:
        found["lines of the chat template"] = hashlib.sha256(template.encode()).hexdigest()
    if config.evaluation.test and config.evaluation.lm_eval.tasks:
        found["tasks of lm-eval"] = _hash_tasks(config)
    return found


@lru_cache(maxsize=1)
def package_sha256() -> str:
    """Hash the code of this package as it is on the disk when this is first called."""
    folder = Path(__file__).resolve().parents[1]
    return _hash_files(folder, (path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")))


def _hash_tasks(config: RunConfig) -> str:
    """Hash the documents of lm-eval's tasks, and the files of the user's own."""
    own = config.evaluation.lm_eval
    digest = hashlib.sha256()
    for task in leaves(load_lm_eval(own).tasks):
        few = own.num_fewshot if own.num_fewshot is not None else task.config.num_fewshot
        for documents in (task.eval_docs, task.fewshot_docs() if few else ()):
            digest.update(f"\n{task.task_name}\n".encode())
            for document in documents:
                digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    for name in filter(is_path, own.tasks):
        path = Path(os.path.expanduser(name))
        folder = path if path.is_dir() else path.parent  # what a file includes is beside it
        digest.update(_hash_files(folder, (file for file in folder.rglob("*") if file.suffix in _TASK_FILES)).encode())
    return digest.hexdigest()


def _hash_files(folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{content}  {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()
