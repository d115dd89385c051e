"""Whether what a record was made with is what there is now: versions, hardware, code, model and data.

::

    differences = compare_environments(record, environment_of(RunConfig.parse(record.config)))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from grass_ray.config import RunConfig
from grass_ray.results.provenance import git_state, hardware, versions
from grass_ray.results.record import RunRecord
from grass_ray.training.report import FORGETTING

_PACKAGE = "package"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What this process would run a configuration with. Hashes are None if the files are not here.

    ``inputs`` are the hashes of :func:`grass_ray.training.inputs.hash_inputs`; of none, nothing is compared.
    """

    versions: Mapping[str, str]
    hardware: str
    git_commit: str | None
    git_dirty: bool | None
    model_sha256: str | None
    train_sha256: str | None
    test_sha256: Mapping[str, str] = field(default_factory=dict)
    forgetting_sha256: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


def environment_of(config: RunConfig) -> Environment:
    """What this process would run the configuration with. Reads its data, and hashes its model's files.

    Raises:
        ConfigError: the data cannot be read.
    """
    from grass_ray.tasks.sources import load_test_rows, load_train_rows
    from grass_ray.tasks.unrelated import load_unrelated
    from grass_ray.training.inputs import hash_inputs
    from grass_ray.training.metrics import default_device
    from grass_ray.training.weights import base_model_sha256

    git = git_state()
    tests = {task: load_test_rows(task, config.data).provenance for task in config.data.tasks}
    forgetting = config.evaluation.forgetting
    return Environment(
        versions=versions(),
        hardware=hardware(default_device().type),
        git_commit=git.commit,
        git_dirty=git.dirty,
        model_sha256=base_model_sha256(config.model),
        train_sha256=load_train_rows(config.data).provenance["rows_sha256"],
        test_sha256={task: provenance["files"][0]["sha256"] for task, provenance in tests.items()},
        forgetting_sha256=None if forgetting is None else load_unrelated(str(forgetting)).provenance["sha256"],
        inputs=hash_inputs(config),
    )


def compare_environments(recorded: RunRecord, now: Environment) -> list[str]:
    """What differs here from where the record was made, one sentence each."""
    found = []
    for package in sorted(recorded.versions.keys() | now.versions.keys()):
        old, new = recorded.versions.get(package, "not installed"), now.versions.get(package, "not installed")
        if old != new:
            found.append(f"{package} was {old}, is {new}")
    if recorded.hardware != now.hardware:
        found.append(f"hardware was {recorded.hardware}, is {now.hardware}")
    found += _code(recorded, now)
    found += _hash("the base model's weights", recorded.model_sha256, now.model_sha256)
    found += _hash("the training rows", recorded.data.get("train", {}).get("rows_sha256"), now.train_sha256)
    for task, score in recorded.tasks.items():
        found += _hash(f"the test rows of {task}", score.protocol.get("test_sha256"), now.test_sha256.get(task))
    if FORGETTING in recorded.data:
        found += _hash(
            "the passages of evaluation.forgetting", recorded.data[FORGETTING]["sha256"], now.forgetting_sha256
        )
    return found


def _code(recorded: RunRecord, now: Environment) -> list[str]:
    """What differs in the package's code, and in what else the configuration names."""
    inputs = recorded.data.get("inputs", {})
    if not (inputs and now.inputs):
        return _commits(recorded, now)
    found = []
    if inputs[_PACKAGE] != now.inputs[_PACKAGE]:
        found = [*_hash("the files of grass_ray", inputs[_PACKAGE], now.inputs[_PACKAGE]), *_commits(recorded, now)]
    for name in dict.fromkeys((*inputs, *now.inputs)):
        if name != _PACKAGE and inputs.get(name) != now.inputs.get(name):
            found += _hash(f"the {name}", inputs.get(name), now.inputs.get(name))
    return found


def _commits(recorded: RunRecord, now: Environment) -> list[str]:
    old, new = (None if commit is None else commit[:9] for commit in (recorded.git_commit, now.git_commit))
    found = [] if old == new else [f"the commit was {old or 'not recorded'}, is {new or 'unknown: no checkout'}"]
    if recorded.git_dirty:
        found.append(f"the original ran with uncommitted changes on top of {old}")
    if now.git_dirty:
        found.append(f"this checkout has uncommitted changes on top of {new}")
    return found


def _hash(what: str, old: str | None, new: str | None) -> list[str]:
    if old == new:
        return [] if old is not None else [f"{what} were not hashed in the record and cannot be checked"]
    if old is None:
        return [f"{what} were not hashed in the record and cannot be checked"]
    return [f"{what} are others: sha256 was {old[:12]}, is {'unknown' if new is None else new[:12]}"]
