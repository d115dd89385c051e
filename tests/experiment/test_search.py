"""A search's plan: the same number of trials a method, judged without the test; and combinations that make no sense."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from mini_search import SWEEP

from grass_ray.cluster.job import Job, SweepContext
from grass_ray.cluster.pbt import MemberState, next_generation
from grass_ray.cluster.resources import TrialResources, driver_memory
from grass_ray.commands.sweep import main
from grass_ray.config import ConfigError
from grass_ray.experiment.flags import SweepOptions
from grass_ray.experiment.plan import SweepPlan, plan_trials
from grass_ray.experiment.search import MUTABLE, SearchPlan, generation_ends, rungs
from grass_ray.results.record import LineageStep, SearchPart


def search(**flags: Any) -> SearchPlan:
    made = plan_trials(SWEEP, SweepOptions(**flags))[1]
    assert made is not None
    return made


def make_plan(**flags: Any) -> SweepPlan:
    trials, search = plan_trials(SWEEP, SweepOptions(**flags))
    return SweepPlan(
        name="mini-search", sweep_id="20260101-000000-abcd", question=SWEEP.question,
        tracking_uri="sqlite:////x/mlflow.db", trials=trials, search=search,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"search": "optuna"}, "--search optuna needs --num-samples N"),
        ({"scheduler": "pbt"}, "--scheduler pbt needs --num-samples N, the population"),
        ({"scheduler": "pbt", "search": "optuna", "num_samples": 4}, "does not go with --search optuna"),
        ({"scheduler": "pbt", "search": "grid"}, "does not go with --search grid"),
        ({"scheduler": "pbt", "num_samples": 1}, "2 or more"),
        ({"scheduler": "asha", "num_samples": 4, "steps": 8}, "8 are too few, give 9 or more"),
        ({"scheduler": "pbt", "num_samples": 4, "steps": 3}, "3 steps are too few"),
        ({"search": "optuna", "num_samples": 4, "set": ("data.validation_rows=null",)}, "never by test questions"),
        ({"scheduler": "asha", "num_samples": 4, "set": ("data.validation_rows=null",)}, "data.validation_rows=64"),
        ({"search": "optuna", "num_samples": 4, "models": ("tiny", "smollm2-135m")}, "one model at a time"),
        ({"search": "optuna", "num_samples": 4, "methods": ("base",)}, "no method to search for"),
        ({"scheduler": "asha", "methods": ("lora",)}, "the method 'lora' has nothing that"),
    ],
)
def test_what_does_not_go_together_is_one_message(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(**flags)


def test_a_mistake_ends_the_command_with_2_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(SWEEP, ["--storage-path", str(tmp_path / "results"), "--search", "optuna"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --search optuna needs --num-samples N")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("flags", [{"search": "random"}, {"scheduler": "asha"}, {"scheduler": "pbt"}])
def test_every_method_has_the_same_number_of_trials_and_none_meets_the_test(flags: dict[str, Any]) -> None:
    made = search(num_samples=5, seeds=(3, 4), methods=("grass", "lora", "full"), **flags)
    assert [(spec.method, len(spec.points)) for spec in made.methods] == [("grass", 5), ("lora", 5), ("full", 5)]
    assert len(made.trials) == 15
    assert not any(config.evaluation.test for config in made.trials)
    assert {config.seed for config in made.trials} == {3}
    finals = made.methods[0].finals(made.methods[0].points[0], made.seeds)
    assert [(config.seed, config.evaluation.test) for config in finals] == [(3, True), (4, True)]
    assert made.num_trials == 15 + 3 * (1 if made.scheduler == "pbt" else 2)


def test_optuna_knows_no_point_beforehand_and_counts_on_all_of_them() -> None:
    made = search(search="optuna", num_samples=5, methods=("grass", "full"))
    assert made.trials == []
    assert made.num_trials == 2 * 5 + 2


def test_a_search_that_was_not_asked_for_stays_a_sweep_of_tested_trials() -> None:
    assert plan_trials(SWEEP, SweepOptions())[1] is None
    unjudged = SweepOptions(search="random", num_samples=2, set=("data.validation_rows=null",))
    trials, search = plan_trials(SWEEP, unjudged)
    assert search is None
    assert [config.method.name for config in trials] == ["base", "grass", "grass"]


def test_a_population_changes_only_what_may_change_in_mid_training() -> None:
    (spec,) = search(scheduler="pbt", num_samples=4, methods=("grass",)).methods
    assert "method.sampler.num_active_layers" not in spec.space
    assert set(spec.space) <= set(MUTABLE)
    assert {"method.optimizer.lr", "method.sampler.period", "method.sampler.temperature"} <= set(spec.space)


def test_a_plan_with_a_search_reads_back_equal() -> None:
    plan = make_plan(scheduler="asha", num_samples=3)
    again = SweepPlan.from_yaml(plan.to_yaml(), "sweep.yaml")
    assert yaml.safe_load(again.to_yaml()) == yaml.safe_load(plan.to_yaml())
    assert again.known_trials == plan.known_trials
    assert again.search is not None
    assert again.search.trials


@pytest.mark.parametrize(
    ("file", "flags"),
    [
        ("mini_search_asha.yaml", {"search": "random", "scheduler": "asha", "num_samples": 4}),
        ("mini_search_optuna.yaml", {"search": "optuna", "num_samples": 6}),
    ],
)
def test_a_search_that_an_older_version_began_is_the_one_its_flags_ask_for(file: str, flags: dict[str, Any]) -> None:
    """The file is a sweep.yaml in the form of the time before plans were pydantic models."""
    text = (Path(__file__).parent / "plans" / file).read_text()
    assert "groups" in yaml.safe_load(text)["tuning"]
    plan = make_plan(**flags, models=("tiny",), set=("data.validation_rows=8",))
    assert SweepPlan.from_yaml(text, file).model_dump(mode="json") == plan.model_dump(mode="json")


def test_rungs_and_generations_end_before_the_training_does() -> None:
    assert rungs(36) == (4, 12)
    assert rungs(9) == (1, 3)
    assert generation_ends(36) == (9, 18, 27, 36)
    assert generation_ends(10) == (3, 6, 9, 10)
    assert generation_ends(4) == (1, 2, 3, 4)


def test_as_many_drivers_fit_as_trials_may_run_at_once() -> None:
    for machines in ((1000,), (1000, 3000), (700, 700, 700)):
        for slots in range(len(machines), 9):
            size = driver_memory(machines, slots)
            assert 1 <= sum(memory // size for memory in machines) <= slots
    assert 1000 // driver_memory((1000,), 3) == 3


def member() -> Job:
    (spec,) = search(scheduler="pbt", num_samples=2, methods=("grass",)).methods
    context = SweepContext(sweep="s", sweep_id="i", storage="/x", resources=TrialResources(cpus=1, gpus=0))
    part = SearchPart(search="random", scheduler="pbt", stage="search", number=0)
    return Job(
        config=spec.config, key="a" * 12, folder="f", context=context, search=part,
        space=spec.space, params=spec.points[0],
    )  # fmt: skip


def test_a_member_goes_on_from_its_own_checkpoint_without_a_new_entry_in_its_lineage() -> None:
    first = next_generation(member(), MemberState(train_step=0, checkpoint=None, key="a" * 12))
    assert (first.until, first.validate_at, first.start_from) == (9, (9,), None)
    assert first.search is not None
    lineage = first.search.lineage
    assert [(step.step, step.weights_of) for step in lineage] == [(0, "a" * 12)]
    own = next_generation(member(), MemberState(train_step=9, checkpoint="/c", key="a" * 12, lineage=lineage))
    assert own.search is not None
    assert (own.until, own.start_from, own.search.lineage) == (18, "/c", lineage)
    last = next_generation(member(), MemberState(train_step=27, checkpoint="/d", key="a" * 12, lineage=lineage))
    assert (last.until, last.validate_at) == (36, ())
    assert len({job.train_name for job in (first, own, last)}) == 3


def test_taking_over_another_members_weights_is_written_down_with_the_changed_settings() -> None:
    before = [LineageStep(step=0, weights_of="b" * 12, settings={"method.optimizer.lr": 0.5})]
    job = next_generation(member(), MemberState(train_step=9, checkpoint="/c", key="b" * 12, lineage=before))
    assert job.search is not None
    assert job.search.lineage[0] == before[0]
    assert (job.search.lineage[1].step, job.search.lineage[1].weights_of) == (9, "b" * 12)
    assert job.config.method.optimizer.lr == job.search.lineage[1].settings["method.optimizer.lr"]
