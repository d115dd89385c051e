"""Run trials through Ray Tune.

::

    run_trials(TuneRun(name="tune", jobs=jobs), context, trial_store)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from grass_ray.cluster.callback import SweepCallback
from grass_ray.cluster.job import Job, SweepContext
from grass_ray.cluster.lost_answers import survive_lost_answers
from grass_ray.cluster.pbt import drive_member, single_member
from grass_ray.cluster.reporter import TrialStore
from grass_ray.cluster.schedulers import OneByOne
from grass_ray.cluster.storage import Storage
from grass_ray.cluster.trial import drive_trial
from grass_ray.cluster.worker import single_worker


@dataclass(frozen=True, kw_only=True)
class TuneRun:
    """Trials that one Tuner runs.

    Attributes:
        name: of its folder.
        jobs: the trials that are known.
        searcher: chooses others instead, one by one.
        num_samples: how many the searcher chooses.
        scheduler: stops trials early, or changes their settings; None lets all come to their end.
        population: whether the trials are members of one, which sleep between generations.
        driver_memory: bytes that a trial's process claims.
    """

    name: str
    jobs: Sequence[Job] = ()
    searcher: Searcher | None = None
    num_samples: int = 1
    scheduler: TrialScheduler | None = None
    population: bool = False
    driver_memory: int = 1


def run_trials(tune_run: TuneRun, context: SweepContext, trial_store: TrialStore) -> None:
    """Run every trial; a failed one does not stop the others.

    Args:
        tune_run: the trials.
        context: what they share.
        trial_store: where their results go.
    """
    survive_lost_answers()
    for _ in range(1 + context.max_failures):
        trial_store.lost.clear()
        _tuner(tune_run, context, trial_store).fit()
        lost = [job for job in tune_run.jobs if job.key in trial_store.lost]
        if not lost or tune_run.scheduler is not None:
            break
        tune_run = replace(tune_run, jobs=lost)
    for key, (failure, error) in trial_store.lost.items():
        trial_store.end(key, failure, error)
    trial_store.settle()


def _tuner(tune_run: TuneRun, context: SweepContext, trial_store: TrialStore) -> tune.Tuner:
    resources, population = context.resources, tune_run.population
    alone = resources.workers == 1  # then a trial is one process to its end, and needs no Ray Train
    trial, member = (single_worker, single_member) if alone else (drive_trial, drive_member)
    # A driver claims memory alone, and mostly one byte: it must hold no CPU that its own workers wait for.
    own = {"CPU": resources.cpus, "GPU": resources.gpus} if alone else {}
    claims = {**own, "memory": tune_run.driver_memory}
    jobs, space, searcher, number = tune_run.jobs, None, tune_run.searcher, tune_run.num_samples
    if population:
        space = {"job": tune.grid_search([job.to_dict() for job in jobs])}
    elif jobs:  # as a grid all of them would be copied for each of them
        searcher, number = OneByOne(functools.partial(next, iter(jobs), None)), len(jobs)
    return tune.Tuner(
        tune.with_resources(member if population else trial, claims),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=number,
            scheduler=tune_run.scheduler,
            # a population's sleeping members count, too: the memory that they claim limits it instead
            max_concurrent_trials=None if population else resources.slots,
            reuse_actors=alone,  # with everything that is imported
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=tune_run.name,
            storage_path=Storage(context.storage).join("ray").uri,
            # how often a single worker or a driver may die; Train counts the deaths of its own workers
            failure_config=tune.FailureConfig(max_failures=context.max_failures),
            callbacks=[SweepCallback(trial_store, tune_run.scheduler)],
            verbose=0,
        ),
    )


def _trial_name(trial: Any) -> str:
    return str(trial.config["job"]["key"])
