"""The plan of a sweep: what is expanded, what is deduplicated, and keys that any process agrees on."""

import subprocess
import sys
from pathlib import Path

import pytest

from grass_ray.config import ConfigError, RunConfig
from grass_ray.experiment.plan import (
    LogUniform,
    PlanChoices,
    SweepPlan,
    TrialSpec,
    differences,
    expand,
    make_tuning,
    untrained,
)


def choices(**changes: object) -> PlanChoices:
    given = {"methods": ("full", "grass"), "models": ("tiny",), "suite": "generated", "tasks": ("generated",)}
    return PlanChoices(**{**given, **changes})  # type: ignore[arg-type]


def names(specs: list[TrialSpec]) -> list[str]:
    return [spec.config.name for spec in specs]


def test_every_method_model_and_seed_is_a_trial_and_the_untrained_model_one_a_model() -> None:
    specs = expand(choices(models=("tiny", "smollm2-135m"), seeds=(0, 1)))
    assert names(specs) == [
        f"{method}-{model}-generated-s{seed}"
        for model in ("tiny", "smollm2_135m")
        for method, seeds in (("base", (0,)), ("full", (0, 1)), ("grass", (0, 1)))
        for seed in seeds
    ]
    assert {spec.config.training.steps for spec in specs if spec.config.method.name == "base"} == {0}


def test_equal_trials_are_one() -> None:
    once = expand(choices(seeds=(0, 1)))
    twice = expand(choices(methods=("full", "grass", "full", "base"), models=("tiny", "tiny"), seeds=(0, 1, 0)))
    assert {spec.key for spec in twice} == {spec.key for spec in once}
    assert len(twice) == len(once) == 5


def test_a_relative_model_folder_is_absolute_in_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    held_out = ("data.validation_rows=4",)
    for changes in ({}, {"search": "optuna", "num_samples": 2}, {"scheduler": "pbt", "num_samples": 2}):
        given = choices(models=("org/model",), methods=("full",), settings=held_out, **changes)
        tuning = make_tuning(given)
        configs = [spec.config for spec in (expand(given) if tuning is None else untrained(given))]
        configs += [group.config for group in tuning.groups] if tuning else []
        assert {config.model.name for config in configs} == {str(folder)}
        assert all("-model-generated-" in config.name for config in configs)
    assert expand(choices(models=("org/model", "./org/model"), base_row=False)) == expand(
        choices(models=(str(folder),), base_row=False)
    )
    with pytest.raises(ConfigError, match=r"there is no model folder './model'"):
        expand(choices(models=("./model",)))


@pytest.mark.parametrize(("given", "flag"), [("model.name=gpt2", "--models"), ("seed=1", "--seeds")])
def test_what_a_sweep_sets_itself_is_not_silently_lost(given: str, flag: str) -> None:
    key, value = given.split("=")
    for changes in ({"overrides": (given,)}, {"settings": (given,)}, {"grid": {key: (value,)}}):
        with pytest.raises(ConfigError, match=f"a sweep sets {key} itself.*{flag}"):
            expand(choices(**changes))


def test_the_untrained_row_can_be_left_out() -> None:
    assert names(expand(choices(base_row=False))) == ["full-tiny-generated-s0", "grass-tiny-generated-s0"]


@pytest.mark.long
def test_keys_are_the_same_in_a_fresh_process() -> None:
    script = (
        "from grass_ray.experiment.plan import *\n"
        "c = PlanChoices(methods=('full', 'grass'), models=('tiny',), suite='generated', tasks=('generated',),"
        " seeds=(0, 1), num_samples=3)\n"
        "print(*(s.key for s in expand(c)))"
    )
    fresh = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert fresh.stdout.split() == [spec.key for spec in expand(choices(seeds=(0, 1), num_samples=3))]


@pytest.mark.long
def test_planning_loads_neither_ray_nor_torch() -> None:
    script = "import sys, grass_ray.experiment.plan, grass_ray.experiment.flags, grass_ray.progress\n"
    script += "print([name for name in ('ray', 'torch', 'mlflow') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_setting_reaches_the_methods_that_have_it_and_the_last_word_wins() -> None:
    specs = expand(
        choices(
            settings=("training.steps=7", "method.sampler.period=5"),
            method_settings={"grass": ("method.sampler.period=6",)},
            overrides=("training.steps=9",),
        )
    )
    by_method = {spec.config.method.name: spec.config for spec in specs}
    assert by_method["full"].training.steps == by_method["grass"].training.steps == 9
    assert by_method["base"].training.steps == 0
    assert by_method["grass"].method.sampler.period == 6  # type: ignore[union-attr]


def test_a_setting_that_no_method_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no method .* 'method.sampler.perod'; available: .*method.sampler.period"):
        expand(choices(overrides=("method.sampler.perod=5",)))


def test_a_grid_takes_every_combination_of_what_a_method_has() -> None:
    specs = expand(
        choices(
            methods=("lisa", "grass"),
            base_row=False,
            grid={"method.sampler.num_active_layers": (1, 2), "method.sampler.temperature": (0.5, 2.0, 1e-5)},
        )
    )
    assert names(specs).count("lisa-tiny-generated-s0") == 2
    points = [
        (spec.config.method.sampler.num_active_layers, spec.config.method.sampler.temperature)  # type: ignore[union-attr]
        for spec in specs
        if spec.config.method.name == "grass"
    ]
    assert sorted(points) == [(gamma, tau) for gamma in (1, 2) for tau in (1e-5, 0.5, 2.0)]


def test_what_changes_one_at_a_time_is_not_combined_and_reaches_the_methods_that_have_it() -> None:
    specs = expand(
        choices(
            methods=("lisa", "grass"),
            base_row=False,
            settings=("method.sampler.num_active_layers=2",),
            one_at_a_time={"method.sampler.num_active_layers": (1, 2), "method.sampler.temperature": (0.1, 0.2)},
        )
    )
    points = [
        (spec.config.method.sampler.num_active_layers, getattr(spec.config.method.sampler, "temperature", None))  # type: ignore[union-attr]
        for spec in specs
    ]
    assert points == [(2, None), (1, None), (2, 0.5), (1, 0.5), (2, 0.1), (2, 0.2)]


def test_samples_are_shared_by_seeds_and_models_and_lie_in_the_space() -> None:
    specs = expand(
        choices(methods=("full",), models=("tiny", "smollm2-135m"), seeds=(0, 1), num_samples=4, base_row=False)
    )
    rates = [spec.config.method.optimizer.lr for spec in specs]
    assert len(specs) == 16
    assert len(set(rates)) == 4
    assert all(2e-5 <= rate <= 5e-4 for rate in rates)


def test_log_uniform_is_even_on_the_logarithmic_scale() -> None:
    import random

    space, rng = LogUniform(low=1e-4, high=1e-2), random.Random(0)
    below = sum(space.draw(rng) < 1e-3 for _ in range(2000))
    assert 900 < below < 1100


def test_a_plan_reads_back_equal() -> None:
    plan = SweepPlan(
        name="mini", sweep_id="20260101-000000-abcd", question="why: so?", specs=tuple(expand(choices(seeds=(0, 1)))),
        tracking_uri="sqlite:////x/mlflow.db",
    )  # fmt: skip
    assert SweepPlan.from_yaml(plan.to_yaml(), "sweep.yaml") == plan
    with pytest.raises(ConfigError, match=r"/x/sweep.yaml is not a sweep's plan"):
        SweepPlan.from_yaml("name: mini", "/x/sweep.yaml")


def test_differences_name_what_varies_inside_a_method() -> None:
    specs = expand(choices(methods=("grass",), seeds=(0, 1), base_row=False))
    assert differences(specs) == ["seed=0", "seed=1"]
    assert RunConfig.parse(specs[0].config.to_dict()).fingerprint == specs[0].key


def test_where_effective_layers_are_given_no_temperature_is_searched() -> None:
    settings = ("method.sampler.effective_layers=8", "method.sampler.temperature=null")
    specs = expand(choices(methods=("grass",), overrides=settings, num_samples=3, base_row=False))
    assert len(specs) == 3
    assert {spec.config.method.sampler.temperature for spec in specs} == {None}  # type: ignore[union-attr]
