"""The plan of a sweep: what is expanded, what is deduplicated, and keys that any process agrees on."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from grass_ray.config import ConfigError, RunConfig, TrainingConfig
from grass_ray.experiment.flags import SweepOptions, TrialFlags
from grass_ray.experiment.plan import SweepPlan, differences, plan_trials
from grass_ray.experiment.space import LogUniform
from grass_ray.experiment.sweep import Preset, Sweep

FLAGS = {field.name for field in fields(SweepOptions)} - {field.name for field in fields(Preset)}


def plan(**given: Any) -> tuple[list[RunConfig], Any]:
    """The trials and the search of a sweep; arguments are its fields, or flags where it has no such field."""
    flags = {name: given.pop(name) for name in [*given] if name in FLAGS or name == "search"}
    start = {"methods": ("full", "grass"), "models": ("tiny",), "tasks": ("generated",), "seeds": (0,)}
    trials, search = plan_trials(Sweep(name="mini", question="why: so?", **start | given), SweepOptions(**flags))
    return list(trials), search


def expand(**given: Any) -> list[RunConfig]:
    trials, search = plan(**given)
    assert search is None
    return trials


def names(configs: list[RunConfig]) -> list[str]:
    return [config.name for config in configs]


def test_every_method_model_and_seed_is_a_trial_and_the_untrained_model_one_a_model() -> None:
    trials = expand(models=("tiny", "smollm2-135m"), seeds=(0, 1))
    assert names(trials) == [
        f"{method}-{model}-generated-s{seed}"
        for model in ("tiny", "smollm2_135m")
        for method, seeds in (("base", (0,)), ("full", (0, 1)), ("grass", (0, 1)))
        for seed in seeds
    ]
    assert {config.training.steps for config in trials if config.method.name == "base"} == {0}


def test_equal_trials_are_one() -> None:
    once = expand(seeds=(0, 1))
    twice = expand(methods=("full", "grass", "full", "base"), models=("tiny", "tiny"), seeds=(0, 1, 0))
    assert {config.fingerprint for config in twice} == {config.fingerprint for config in once}
    assert len(twice) == len(once) == 5


def test_a_relative_model_folder_is_absolute_in_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    held_out = {"data.validation_rows": 4}
    searches: list[dict[str, Any]] = [
        {},
        {"search": "optuna", "num_samples": 2},
        {"scheduler": "pbt", "num_samples": 2},
    ]
    for changes in searches:
        configs, search = plan(models=("org/model",), methods=("full",), settings=held_out, **changes)
        configs += [spec.config for spec in search.methods] if search else []
        assert {config.model.name for config in configs} == {str(folder)}
        assert all("-model-generated-" in config.name for config in configs)
    assert expand(models=("org/model", "./org/model"), base=False) == expand(models=(str(folder),), base=False)
    with pytest.raises(ConfigError, match=r"there is no model folder './model'"):
        expand(models=("./model",))


@pytest.mark.parametrize(("given", "flag"), [("model.name=gpt2", "--models"), ("seed=1", "--seeds")])
def test_what_a_sweep_sets_itself_is_not_silently_lost(given: str, flag: str) -> None:
    key, value = given.split("=")
    for changes in ({"set": (given,)}, {"settings": {key: value}}, {"grid": {key: (value,)}}):
        with pytest.raises(ConfigError, match=f"a sweep sets {key} itself.*{flag}"):
            expand(**changes)


def test_the_untrained_row_can_be_left_out() -> None:
    assert names(expand(base=False)) == ["full-tiny-generated-s0", "grass-tiny-generated-s0"]


@pytest.mark.long
def test_keys_are_the_same_in_a_fresh_process() -> None:
    script = (
        "from grass_ray.experiment import Sweep\n"
        "from grass_ray.experiment.plan import SweepOptions, plan_trials\n"
        "sweep = Sweep(name='s', question='?', methods=('full', 'grass'), models=('tiny',), tasks=('generated',),"
        " seeds=(0, 1))\n"
        "print(*(config.fingerprint for config in plan_trials(sweep, SweepOptions(num_samples=3))[0]))"
    )
    fresh = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert fresh.stdout.split() == [config.fingerprint for config in expand(seeds=(0, 1), num_samples=3)]


@pytest.mark.long
def test_planning_loads_neither_ray_nor_torch() -> None:
    script = "import sys, grass_ray.experiment.plan, grass_ray.experiment.flags, grass_ray.progress\n"
    script += "print([name for name in ('ray', 'torch', 'mlflow') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_setting_reaches_the_methods_that_have_it_and_the_last_word_wins() -> None:
    trials = expand(
        training=TrainingConfig(steps=7),
        settings={"method.sampler.period": 5},
        method_settings={"grass": {"method.sampler.period": 6}},
        set=("training.steps=9",),
    )
    by_method = {config.method.name: config for config in trials}
    assert by_method["full"].training.steps == by_method["grass"].training.steps == 9
    assert by_method["base"].training.steps == 0
    assert by_method["grass"].method.sampler.period == 6  # type: ignore[union-attr]


def test_a_sweep_without_seeds_is_refused_if_it_trains() -> None:
    sweep = Sweep(name="mini", question="?", models=("tiny",), methods=("full",), tasks=("generated",))
    with pytest.raises(ConfigError, match="the sweep mini has no seeds; name one or more in its file or with --seeds"):
        plan_trials(sweep, SweepOptions())
    assert len(plan_trials(sweep, SweepOptions(seeds=(3,)))[0]) == 2
    assert len(plan_trials(sweep, SweepOptions(methods=("base",)))[0]) == 1


def test_a_setting_that_no_method_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no method .* 'method.sampler.perod'; available: .*method.sampler.period"):
        expand(set=("method.sampler.perod=5",))


def test_a_grid_takes_every_combination_of_what_a_method_has() -> None:
    trials = expand(
        methods=("lisa", "grass"),
        base=False,
        grid={"method.sampler.num_active_layers": (1, 2), "method.sampler.temperature": (0.5, 2.0, 1e-5)},
    )
    assert names(trials).count("lisa-tiny-generated-s0") == 2
    points = [
        (config.method.sampler.num_active_layers, config.method.sampler.temperature)  # type: ignore[union-attr]
        for config in trials
        if config.method.name == "grass"
    ]
    assert sorted(points) == [(gamma, tau) for gamma in (1, 2) for tau in (1e-5, 0.5, 2.0)]


def test_what_changes_one_at_a_time_is_not_combined_and_reaches_the_methods_that_have_it() -> None:
    trials = expand(
        methods=("lisa", "grass"),
        base=False,
        settings={"method.sampler.num_active_layers": 2},
        one_at_a_time={"method.sampler.num_active_layers": (1, 2), "method.sampler.temperature": (0.1, 0.2)},
    )
    points = [
        (config.method.sampler.num_active_layers, getattr(config.method.sampler, "temperature", None))  # type: ignore[union-attr]
        for config in trials
    ]
    assert points == [(2, None), (1, None), (2, 0.5), (1, 0.5), (2, 0.1), (2, 0.2)]


def test_samples_are_shared_by_seeds_and_models_and_lie_in_the_space() -> None:
    trials = expand(methods=("full",), models=("tiny", "smollm2-135m"), seeds=(0, 1), num_samples=4, base=False)
    rates = [config.method.optimizer.lr for config in trials]
    assert len(trials) == 16
    assert len(set(rates)) == 4
    assert all(2e-5 <= rate <= 5e-4 for rate in rates)


def test_log_uniform_is_even_on_the_logarithmic_scale() -> None:
    import random

    space, rng = LogUniform(low=1e-4, high=1e-2), random.Random(0)
    below = sum(space.draw(rng) < 1e-3 for _ in range(2000))
    assert 900 < below < 1100


def test_a_plan_reads_back_equal() -> None:
    made = SweepPlan(
        name="mini", sweep_id="20260101-000000-abcd", question="why: so?", trials=tuple(expand(seeds=(0, 1))),
        tracking_uri="sqlite:////x/mlflow.db", flags=TrialFlags(workers_per_trial=2, parallel="shard"),
    )  # fmt: skip
    assert SweepPlan.from_yaml(made.to_yaml(), "sweep.yaml") == made
    for text in ("name: mini", "", "[1]", "a: ["):
        with pytest.raises(ConfigError, match=r"/x/sweep.yaml is not a sweep's plan"):
            SweepPlan.from_yaml(text, "/x/sweep.yaml")
    with pytest.raises(ConfigError, match=r"/x/sweep.yaml is not a sweep's plan"):
        SweepPlan.from_yaml("name: mini", "/x/sweep.yaml")


def test_a_plan_that_an_older_version_wrote_has_the_trials_of_its_sweep() -> None:
    from mini_sweep import SWEEP

    file = Path(__file__).parent / "plans" / "mini.yaml"
    assert SweepPlan.from_yaml(file.read_text(), "mini.yaml").trials == plan_trials(SWEEP, SweepOptions())[0]


def test_differences_name_what_varies_inside_a_method() -> None:
    trials = expand(methods=("grass",), seeds=(0, 1), base=False)
    assert differences(trials) == ["seed=0", "seed=1"]
    assert RunConfig.parse(trials[0].to_dict()).fingerprint == trials[0].fingerprint


def test_where_effective_layers_are_given_no_temperature_is_searched() -> None:
    settings = ("method.sampler.effective_layers=8", "method.sampler.temperature=null")
    trials = expand(methods=("grass",), set=settings, num_samples=3, base=False)
    assert len(trials) == 3
    assert {config.method.sampler.temperature for config in trials} == {None}  # type: ignore[union-attr]
