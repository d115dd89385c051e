"""The command line that runs a record's configuration again.

::

    print(reproduce_command(record.config))          # grass-ray train grass --model tiny --steps 6 --set ...

Only what differs from the method's row is said, so that the line shows what was chosen. A folder of data is written as
``DATA``: where it lies is each machine's own matter, what it holds is in the record as hashes.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from grass_ray.config import ConfigError, RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import assignment, diff
from grass_ray.tasks.suites import SUITES

_FLAGS = {
    "training.steps": "--steps",
    "training.batch_size": "--batch-size",
    "method.optimizer.lr": "--lr",
    "seed": "--seed",
    "evaluation.limit": "--limit",
}

_OWN = ("custom", "dataset")  # sources of the user's own


def reproduce_command(config: Mapping[str, Any], *, data_dir: str = "DATA") -> str | None:
    """``grass-ray train ...`` for a configuration, None for one that this version cannot read.

    Args:
        config: plain values, as a record holds them.
        data_dir: what to write for the folder of data, where the configuration has one.
    """
    try:
        wanted = RunConfig.parse(config).to_dict()
    except ConfigError:
        return None
    row = METHODS.get(wanted["method"]["name"])
    if row is None:
        return None
    start = RunConfig(method=row.config).to_dict()
    words = ["grass-ray", "train", row.name]
    if wanted["model"]["name"] != start["model"]["name"]:
        words += ["--model", wanted["model"]["name"]]
    words += _data_flags(wanted["data"], data_dir)
    start["model"]["name"] = wanted["model"]["name"]
    kind = wanted["data"]["source"]["kind"]
    if kind not in _OWN:  # said whole, by settings
        start["data"] |= {key: wanted["data"][key] for key in ("suite", "tasks")}
    if kind not in ("generated", *_OWN):
        start["data"]["source"] = wanted["data"]["source"]
    if not row.trains:
        start["training"]["steps"] = 0
    rest = []
    for key, value in diff(start, wanted).items():
        if key in _FLAGS and value is not None:
            words += [_FLAGS[key], str(value)]
        else:
            rest.append(assignment(key, value))
    return shlex.join([*words, *(["--set", *rest] if rest else [])])


def _data_flags(data: Mapping[str, Any], data_dir: str) -> list[str]:
    words = []
    if data["suite"] in SUITES and data["suite"] != "generated":
        whole = tuple(data["tasks"]) == SUITES[data["suite"]].tasks
        words += ["--task", *([data["suite"]] if whole else data["tasks"])]
    if data["source"]["kind"] == "folder":
        words += ["--data-dir", data_dir]
    return words
