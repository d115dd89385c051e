"""What every process of a trial does: train, evaluate, report to the driver and write the trial's folder.

It knows nothing of MLflow. A run that runs out of memory, whose loss is not finite, or whose configuration is wrong
ends normally, with a record that says so.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_ray.cluster.job import FAILURE_FILE, RECORD_FILE, TRACEBACK_FILE, Job
from grass_ray.cluster.listeners import ChangingSettings, EndTogether, PreemptionGuard, RayReporter, Validation
from grass_ray.cluster.ray_worker import RayWorker, TrainWorker, TuneWorker
from grass_ray.cluster.storage import Storage
from grass_ray.execute import RunResult, execute
from grass_ray.results.record import CHECKPOINT_FOLDER

if TYPE_CHECKING:
    from grass_ray.training.run import Run


def train_worker(settings: dict[str, Any]) -> None:
    """A worker of a trial with several; what Ray Train runs. ``settings`` is ``{"job": Job}``."""
    work(settings["job"], TrainWorker())


def single_worker(params: dict[str, Any]) -> None:
    """The only worker of a trial; what Ray Tune runs. ``params`` is ``{"job": Job.to_dict()}``."""
    job = Job.model_validate(params["job"])
    checkpoints = Storage(job.context.storage).join("ray", job.train_name)
    work(job, TuneWorker(checkpoints))
    checkpoints.remove()  # the record is written; nothing is left to continue


def work(job: Job, worker: RayWorker) -> None:
    """Train and evaluate one run and write its folder.

    Args:
        job: the trial.
        worker: this process among those of the trial.
    """
    for code in job.context.code:
        code.install()
    config, storage = job.config, Storage(job.context.storage)
    is_main, workers = worker.rank == 0, worker.workers
    if is_main:
        storage.write_text(config.to_yaml(), job.folder, "config.yaml")
        for name in (RECORD_FILE, TRACEBACK_FILE):  # of a crashed attempt; in this order, so that neither misleads
            storage.remove(job.folder, name)
    together = EndTogether(job)

    def prepare() -> Run:
        from grass_ray.memory.fit import fit_to_memory
        from grass_ray.training.metrics import release_memory
        from grass_ray.training.run import Run

        together.check()
        release_memory()  # of the trial that this process had before
        # what fits is predicted for a worker that holds the whole model
        fits = job.context.memory_check and job.context.parallel == "replicate"
        fitted = fit_to_memory(config, workers=workers, memory=job.context.memory_bytes) if fits else config
        return Run.prepare(fitted, parallel=job.context.parallel)

    result = execute(
        config,
        prepare=prepare,
        listeners=[
            together,
            ChangingSettings(job),
            PreemptionGuard(worker),
            RayReporter(job, worker),
            Validation(job, worker),  # waits behind the report
        ],
        until=job.until,
        threads=job.context.resources.cpus,  # Ray exports OMP_NUM_THREADS=1 to its workers on a cluster
    )
    if result.status == "stopped":
        return  # a generation of a population: its checkpoint says everything
    keeps = result.status == "finished" and job.context.keep_checkpoints and config.training.steps > 0
    if is_main:
        _write(job, storage, result, keeps=keeps)
    elif keeps and result.run is not None:
        result.run.save(None)
    worker.report({"phase": "ended", "status": result.status, "failure": result.failure, "steps": []})
    if is_main:
        storage.remove(job.folder, FAILURE_FILE)  # after the barrier: every worker has read it


def _write(job: Job, storage: Storage, result: RunResult, *, keeps: bool) -> None:
    """Write the trial's folder, the record last: a folder with a record is complete."""
    from grass_ray.results.figures.registry import write_run_plots

    record = result.record(job.run_context)
    with tempfile.TemporaryDirectory(prefix="grass_ray-") as name:
        folder = Path(name)
        write_run_plots(record, folder)
        result.write_files(folder)
        if result.run is not None and keeps:
            result.run.save(folder / CHECKPOINT_FOLDER)
        storage.upload(folder, job.folder)
    storage.write_text(record.model_dump_json(indent=1), job.folder, RECORD_FILE)
