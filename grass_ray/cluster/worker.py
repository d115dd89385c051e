"""The function that Ray Train runs in every worker of a trial.

It trains, evaluates, reports to Tune and writes the trial's folder; it knows nothing of MLflow. A run that runs out of
memory, whose loss is not finite, or whose configuration is wrong ends normally, with a record that says so.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train

from grass_ray.cluster.job import FAILURE_FILE, RECORD_FILE, TRACEBACK_FILE, Job
from grass_ray.cluster.listeners import ChangingSettings, EndTogether, PreemptionGuard, RayReporter, Validation
from grass_ray.cluster.storage import Storage
from grass_ray.execute import RunResult, execute

if TYPE_CHECKING:
    from grass_ray.training.run import Run


def train_worker(settings: dict[str, Any]) -> None:
    """Train and evaluate one run and write its folder.

    Args:
        settings: ``{"job": Job}``.
    """
    job: Job = settings["job"]
    for code in job.context.code:
        code.install()
    config, storage = job.config, Storage(job.context.storage)
    world = ray.train.get_context()
    is_main, workers = world.get_world_rank() == 0, world.get_world_size()
    if is_main:
        storage.write_text(config.to_yaml(), job.folder, "config.yaml")
        for name in (RECORD_FILE, TRACEBACK_FILE):  # of a crashed attempt; in this order, so that neither misleads
            storage.remove(job.folder, name)
    together = EndTogether(job)

    def prepare() -> Run:
        from grass_ray.memory.fit import fit_to_memory
        from grass_ray.training.run import Run

        together.check()
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
            PreemptionGuard(is_main=is_main),
            RayReporter(job, is_main=is_main),
            Validation(job, is_main=is_main),  # waits behind the report
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
    ray.train.report({"phase": "ended", "status": result.status, "failure": result.failure, "steps": []})
    if is_main:
        storage.remove(job.folder, FAILURE_FILE)  # after the barrier: every worker has read it


def _write(job: Job, storage: Storage, result: RunResult, *, keeps: bool) -> None:
    """Write the trial's folder, the record last: a folder with a record is complete."""
    from grass_ray.export.model import CHECKPOINT_FOLDER
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
