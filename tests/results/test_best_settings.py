"""The best settings of a search: judged by held-out rows over all seeds, written, and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
from result_records import asha, make_record, members

from grass_ray.config import ConfigError
from grass_ray.results.record import RunRecord
from grass_ray.results.searches import best_settings, left_out, read_settings, write_settings


def trial(lr: float, loss: float | None, *, seed: int = 0, method: str = "grass", **more: object) -> RunRecord:
    metrics = {} if loss is None else {"validation/loss": loss}
    return make_record(method, seed=seed, metrics=metrics, overrides=[f"method.optimizer.lr={lr}"], **more)  # type: ignore[arg-type]


def test_the_lowest_mean_loss_over_seeds_wins_whatever_the_accuracy() -> None:
    records = [trial(1e-4, 0.5), trial(1e-4, 0.5, seed=1), trial(1e-3, 0.1), trial(1e-3, 1.2, seed=1)]
    assert best_settings(records) == {"grass": ["method.optimizer.lr=0.0001"]}


def test_a_point_with_a_failed_trial_is_not_chosen() -> None:
    records = [trial(1e-4, 0.5), trial(1e-3, 0.1), trial(1e-3, None, seed=1, status="failed", failure="NaN")]
    assert best_settings(records) == {"grass": ["method.optimizer.lr=0.0001"]}


def test_without_held_out_rows_or_without_a_choice_there_is_no_best() -> None:
    assert best_settings([trial(1e-4, None), trial(1e-3, None)]) == {}
    assert best_settings([trial(1e-4, 0.3), trial(1e-4, 0.4, seed=1)]) == {}


def test_schedules_are_settings_and_survive_the_file(tmp_path: Path) -> None:
    schedule = "method.sampler.temperature={kind: linear, start: 2.0, end: 0.2}"
    records = [
        make_record(metrics={"validation/loss": 0.2}, overrides=[schedule]),
        make_record(metrics={"validation/loss": 0.4}, overrides=["method.sampler.temperature=0.5"]),
    ]
    best = best_settings(records)
    write_settings(best, tmp_path / "best.yaml")
    found = read_settings(tmp_path / "best.yaml")
    again = make_record(overrides=found["grass"])
    assert again.config["method"]["sampler"]["temperature"]["end"] == 0.2


def test_what_a_population_changed_in_mid_training_becomes_a_schedule(tmp_path: Path) -> None:
    first, second = members()  # the first has the lower loss
    assert second.search is not None
    before, after = second.search.lineage
    before.settings = {"method.sampler.temperature": 2.0, "method.optimizer.lr": 0.1, "method.sampler.period": 5}
    after.settings = {"method.sampler.temperature": 0.5, "method.optimizer.lr": 0.2, "method.sampler.period": 5}
    second.metrics["validation/loss"] = 0.1
    write_settings(best_settings([first, second]), tmp_path / "best.yaml")
    config = make_record(overrides=read_settings(tmp_path / "best.yaml")["grass"]).config["method"]
    assert config["sampler"]["temperature"]["values"] == [2.0, 0.5]
    assert config["sampler"]["temperature"]["at_progress"] == [0.25]
    assert (config["sampler"]["period"], config["optimizer"]["lr"]) == (5, 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: {gras: [a=1]}", "unknown method 'gras'.*'grass'"),
        ("grass: [a=1]", "must have the form"),
        ("methods: {grass: {lr: 1}}", "must have the form"),
        ("methods: [", "not YAML"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "best.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(tmp_path / "best.yaml")
    with pytest.raises(ConfigError, match="cannot read the file of settings"):
        read_settings(tmp_path / "absent.yaml")


def test_one_lucky_seed_of_an_interrupted_search_is_not_chosen() -> None:
    """Three seeds of one rate, and of the other only the seed that both rates find easy."""
    records = [trial(1e-4, loss, seed=seed) for seed, loss in enumerate((1.00, 1.10, 1.20))]
    for lucky in (1.05, 0.90):
        interrupted = [*records, trial(3e-4, lucky)]
        assert best_settings(interrupted) == {"grass": ["method.optimizer.lr=0.0001"]}
        (line,) = left_out(interrupted)
        assert line.startswith("grass: 1 of 2 settings finished with every seed and model")
        assert "left out: method.optimizer.lr=0.0003 (1 of 3 runs)" in line
    assert left_out([*records, *(trial(3e-4, 0.9, seed=seed) for seed in range(3))]) == []


def test_settings_are_compared_over_the_same_models() -> None:
    def of(model: str, lr: float, loss: float) -> RunRecord:
        overrides = [f"model.name={model}", f"method.optimizer.lr={lr}"]
        return make_record(metrics={"validation/loss": loss}, overrides=overrides)

    easy = [of("tiny", 1e-4, 0.5), of("smollm2-135m", 3e-4, 2.0)]
    assert best_settings(easy) == {}, "no model is common"
    assert "0 of 2 settings" in left_out(easy)[0]
    both = [*easy, of("smollm2-135m", 1e-4, 3.0), of("tiny", 3e-4, 0.4)]
    assert best_settings(both) == {"grass": ["method.optimizer.lr=0.0003"]}


def test_equal_means_are_equal_whatever_their_order() -> None:
    losses = (0.1, 0.2, 0.3)
    records = [
        trial(lr, loss, seed=seed)
        for lr, own in ((1e-3, losses[::-1]), (1e-4, losses))
        for seed, loss in enumerate(own)
    ]
    assert best_settings(records) == {"grass": ["method.optimizer.lr=0.001"]}, "the first of equal ones"
    assert best_settings(records[3:] + records[:3]) == {"grass": ["method.optimizer.lr=0.0001"]}


def test_trials_and_a_population_of_one_method_are_compared_by_their_losses() -> None:
    trials, population = asha()[:3], members()
    for offset, best in ((5.0, trials), (-9.0, population)):
        for record in population:
            record.metrics["validation/loss"] += offset
        assert best_settings([*trials, *population]) == best_settings(best) != {}
