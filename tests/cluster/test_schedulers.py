"""Tune's schedulers as a search sets them up, fed by hand: whom ASHA stops, what a population's member takes over.

The trials are Tune's own, without an actor behind them.
"""

import pickle
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.pbt import _PBTTrialState

from grass_ray.cluster.schedulers import Asha, OneByOne, Population

SPACE = {"method.optimizer.lr": {"low": 1e-4, "high": 1e-2, "whole": False}}  # as a job holds it


def trial(key: str, **job: Any) -> Trial:
    return Trial("drive_trial", config={"job": {"key": key, **job}}, stub=True, trial_id=key)


def report(scheduler: Asha, one: Trial, train_step: int, loss: float) -> str:
    return scheduler.on_trial_result(None, one, {"step": train_step, "validation/loss": loss})


def test_asha_stops_what_is_not_among_the_best_third_at_a_rung_and_remembers_why() -> None:
    scheduler = Asha(36)
    good, bad = trial("good"), trial("bad")
    for one in (good, bad):
        scheduler.on_trial_add(None, one)
    assert report(scheduler, good, 4, 1.0) == TrialScheduler.CONTINUE
    assert report(scheduler, bad, 4, 1.5) == TrialScheduler.STOP
    assert scheduler.stopped.keys() == {"bad"}
    assert scheduler.stopped["bad"].describe(36).startswith("stopped early at step 4 of 36 by ASHA: its validation")
    assert report(scheduler, good, 12, 9.0) == TrialScheduler.CONTINUE, "the first at a rung has nobody to lose to"


def test_asha_never_stops_a_trial_at_its_end_nor_by_reports_without_a_loss() -> None:
    scheduler = Asha(36)
    good, late = trial("good"), trial("late")
    for one in (good, late):
        scheduler.on_trial_add(None, one)
        assert report(scheduler, one, 4, 1.0) == TrialScheduler.CONTINUE
        assert report(scheduler, one, 12, 1.0) == TrialScheduler.CONTINUE
    assert scheduler.on_trial_result(None, late, {"phase": "training"}) == TrialScheduler.CONTINUE
    assert scheduler.on_trial_result(None, late, {"phase": "ended", "status": "finished"}) == TrialScheduler.CONTINUE


def test_asha_of_a_resumed_search_counts_the_trials_before() -> None:
    scheduler = Asha(36)
    scheduler.remember("earlier", {4: 1.0, 12: 0.5})
    new = trial("new")
    scheduler.on_trial_add(None, new)
    assert report(scheduler, new, 4, 1.2) == TrialScheduler.STOP


def population(*losses: float) -> tuple[Population, list[Trial]]:
    scheduler = Population(36, seed=0)
    members = [trial(f"m{n}", space=SPACE, params={"method.optimizer.lr": 1e-3}, folder=f"f{n}") for n in range(4)]
    for member, loss in zip(members, losses, strict=True):
        scheduler._trial_state[member] = state = _PBTTrialState(member)
        state.last_score, state.last_train_time = -loss, 9
    return scheduler, members


def test_the_worst_quarter_goes_on_from_the_best() -> None:
    scheduler, members = population(1.0, 2.0, 3.0, 4.0)
    lower, upper = scheduler._quantiles()
    assert (lower, upper) == ([members[3]], [members[0]])


def test_a_member_that_takes_over_keeps_its_own_name_and_changes_its_donors_settings_the_same_way_again() -> None:
    scheduler, (donor, *_, worst) = population(1.0, 2.0, 3.0, 4.0)
    config, _ = scheduler._get_new_config(worst, donor)
    again, _ = scheduler._get_new_config(worst, donor)
    assert config == again
    assert (config["job"]["key"], config["job"]["folder"]) == ("m3", "f3")
    rate = config["job"]["params"]["method.optimizer.lr"]
    assert 1e-4 <= rate <= 1e-2
    assert rate != 1e-3
    assert donor.config["job"]["params"] == {"method.optimizer.lr": 1e-3}


def test_jobs_come_one_by_one_and_a_pickled_searcher_takes_nothing_of_the_driver_along() -> None:
    searcher = OneByOne(lambda: None)
    assert searcher.suggest("a") == "FINISHED"
    copy = pickle.loads(pickle.dumps(searcher))
    with pytest.raises(AssertionError, match="outside the driver"):
        copy.suggest("b")
