"""One trial with several workers in Ray Tune: a function that starts a Ray Train run and waits for it.

::

    Tuner(tune.with_resources(drive_trial, {"memory": 1}), param_space={"job": tune.grid_search(jobs)})

A process that dies is started again from its last checkpoint; when that keeps happening the reason goes into
``traceback.txt``, and ``--resume`` tries the trial again.
"""

from __future__ import annotations

import traceback
from typing import Any

import ray.train
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from grass_ray.cluster.job import TRACEBACK_FILE, Job, describe_death
from grass_ray.cluster.storage import Storage
from grass_ray.cluster.worker import train_worker


class TrainCallback(TuneReportCallback):  # type: ignore[misc]
    """Passes on to Tune what workers report, and why they died before Train starts them again."""

    def __init__(self) -> None:
        super().__init__()
        self._deaths = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """One or more workers died."""
        self._deaths += 1
        errors = "\n".join(f"{type(error).__name__}: {error}" for error in worker_exceptions.values())
        message = {"phase": "died", "failure": describe_death(errors, self._deaths), "steps": []}
        self.after_report(run_context, [message], None)


def drive_trial(params: dict[str, Any]) -> None:
    """Run one Train run and wait for it; a Tune function that does no work itself."""
    job = Job.model_validate(params["job"])
    storage = Storage(job.context.storage)
    if train(job, storage) is not None:
        storage.remove("ray", job.train_name)  # the record is written; nothing is left to continue


def train(job: Job, storage: Storage) -> ray.train.Result | None:
    """Carry out a Train run, passing its reports on to Tune.

    Returns:
        Train's result; None if its workers died too often, which is reported to Tune.

    Raises:
        ray.train.ControllerError: Train's own processes died. Tune starts the trial again, which finds its checkpoint.
    """
    from ray.train.torch import TorchConfig, TorchTrainer  # loads torch, which a sweep's own process may not need

    resources, max_failures = job.context.resources, job.context.max_failures
    each = {"CPU": resources.cpus, "GPU": resources.gpus} if resources.gpus else {"CPU": resources.cpus}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(resources.min_workers, resources.workers) if resources.elastic else resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=each,
        ),
        run_config=ray.train.RunConfig(
            name=job.train_name,
            storage_path=storage.join("ray").uri,
            failure_config=ray.train.FailureConfig(
                max_failures=max_failures, controller_failure_limit=max_failures + 1
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=[TrainCallback()],
        ),
    )
    try:
        return trainer.fit()
    except ray.train.ControllerError:
        raise
    except ray.train.TrainingFailedError as error:
        storage.write_text(traceback.format_exc(), job.folder, TRACEBACK_FILE)
        ray.tune.report({"phase": "crashed", "failure": describe_death(str(error), max_failures + 1), "steps": []})
        return None
