"""What several workers of a trial do where one of them alone has failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grass_ray.cluster.storage import Storage
from grass_ray.cluster.trial import FAILURE_FILE, Job, ending_together
from grass_ray.config import ConfigError
from grass_ray.training.report import TrainingFailure


def make_job(storage: Path, workers: int) -> Job:
    return Job(
        config={},
        key="key",
        folder="trials/key",
        sweep="sweep",
        sweep_id="sweep-1",
        storage=str(storage),
        cpus=1,
        gpus=0,
        workers=workers,
    )


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
    job, storage = make_job(tmp_path, workers=2), Storage(str(tmp_path))
    # it must die, so that Train stops the other, which may wait for it in a reduction
    with pytest.raises(RuntimeError, match="this worker ends the trial"), ending_together(job, storage):
        raise problem
    assert json.loads((tmp_path / job.folder / FAILURE_FILE).read_text()) == {"status": status, "reason": str(problem)}
    for _ in range(job.workers):
        reached = False
        with pytest.raises(TrainingFailure, match=str(problem)) as ending, ending_together(job, storage):
            reached = True
        assert ending.value.status == status
        assert not reached, "the reason is found before anything is loaded"


def test_what_every_worker_finds_in_the_same_step_needs_no_restart(tmp_path: Path) -> None:
    job, storage = make_job(tmp_path, workers=2), Storage(str(tmp_path))
    with pytest.raises(TrainingFailure, match="loss"), ending_together(job, storage):
        raise TrainingFailure("failed", "the loss of step 3 is nan")
    assert not (tmp_path / job.folder / FAILURE_FILE).exists()


def test_one_worker_ends_its_trial_itself(tmp_path: Path) -> None:
    job, storage = make_job(tmp_path, workers=1), Storage(str(tmp_path))
    with pytest.raises(TrainingFailure, match="memory"), ending_together(job, storage):
        raise TrainingFailure("out_of_memory", "out of memory in step 3")
    assert not (tmp_path / job.folder / FAILURE_FILE).exists()
