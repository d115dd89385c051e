"""What several workers of a trial do where one of them alone has failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grass_ray.cluster.job import FAILURE_FILE, Job, SweepContext
from grass_ray.cluster.listeners import EndTogether
from grass_ray.cluster.resources import TrialResources
from grass_ray.config import ConfigError, RunConfig
from grass_ray.methods import METHODS
from grass_ray.training.report import TrainingFailure


def make_job(storage: Path, workers: int) -> Job:
    resources = TrialResources(cpus=1, gpus=0, workers=workers)
    context = SweepContext(sweep="sweep", sweep_id="sweep-1", storage=str(storage), resources=resources)
    return Job(config=RunConfig(method=METHODS["full"].config), key="key", folder="trials/key", context=context)


@pytest.mark.parametrize(
    ("problem", "status"),
    [
        (TrainingFailure("out_of_memory", "out of memory in step 3"), "out_of_memory"),
        (ConfigError("no test set of boolq on this machine"), "failed"),
    ],
)
def test_a_worker_that_failed_alone_leaves_its_reason_to_the_next_attempt(
    tmp_path: Path, problem: Exception, status: str
) -> None:
    job = make_job(tmp_path, workers=2)
    # it must die, so that Train stops the other, which may wait for it in a reduction
    with pytest.raises(RuntimeError, match="this worker ends the trial"):
        EndTogether(job).on_error(problem)
    assert json.loads((tmp_path / job.folder / FAILURE_FILE).read_text()) == {"status": status, "reason": str(problem)}
    for _ in range(job.context.resources.workers):
        together = EndTogether(job)
        with pytest.raises(TrainingFailure, match=str(problem)) as found:
            together.check()
        assert together.on_error(found.value) == (status, str(problem)), "it ends normally"


def test_what_every_worker_finds_in_the_same_step_needs_no_restart(tmp_path: Path) -> None:
    job = make_job(tmp_path, workers=2)
    failure = TrainingFailure("failed", "the loss of step 3 is nan")
    assert EndTogether(job).on_error(failure) == ("failed", "the loss of step 3 is nan")
    assert not (tmp_path / job.folder / FAILURE_FILE).exists()


def test_one_worker_ends_its_trial_itself(tmp_path: Path) -> None:
    job = make_job(tmp_path, workers=1)
    EndTogether(job).check()
    failure = TrainingFailure("out_of_memory", "out of memory in step 3")
    assert EndTogether(job).on_error(failure) == ("out_of_memory", "out of memory in step 3")
    assert not (tmp_path / job.folder / FAILURE_FILE).exists()
