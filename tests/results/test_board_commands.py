"""``grass-ray leaderboard`` and ``grass-ray plot`` over real stores: filters, formats, two stores, two sweeps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from result_records import answers, asha, make_history, make_record, make_series, members
from small import REPOSITORY

from grass_ray.cli import main
from grass_ray.commands.plot import Plot
from grass_ray.results.figures.registry import FIGURES
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render
from grass_ray.results.tracker import Tracker


def sweep(sweep_id: str, experiment: str) -> list[RunRecord]:
    rights = {"full": 10, "grass": 14, "lora": 12}
    records = [
        make_record(
            method,
            correct={"generated": answers(right + (sweep_id == "second"), 20)},
            sweep_id=sweep_id,
            metrics={"memory/peak_allocated_gib": right / 10},
            series=make_series(0, 1.0, steps=20),
            layers=make_history(steps=20) if method == "grass" else None,
        )
        for method, right in rights.items()
    ]
    records.append(make_record("lisa", sweep_id=sweep_id, status="failed", failure="loss became nan"))
    return [record.model_copy(update={"sweep": experiment}) for record in records]


@pytest.fixture(scope="module")
def stores(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """The name of an experiment with one sweep in one store, and a second store with that sweep and another."""
    folder = tmp_path_factory.mktemp("second store")
    experiment = "board-commands"

    def log(uri: str, records: list[RunRecord], experiment: str = experiment) -> None:
        tracker = Tracker(uri, experiment)
        tracker.open()
        parent = tracker.start_sweep(records[0].sweep_id, {}, {})
        for record in records:
            key = record.run_id.removeprefix(f"{record.sweep_id}-")
            run = tracker.start_trial(record.sweep_id, key, record.name, {}, {})
            tracker.finish(run, record, folder)
        tracker.finish_sweep(parent)
        assert tracker.close() == 0

    log(store, sweep("first", experiment))
    population = [record.model_copy(update={"sweep_id": "p", "run_id": f"p-{record.run_id}"}) for record in members()]
    log(store, [*asha(), *population, *sensitive()], "board-searches")
    second = f"sqlite:///{folder}/mlflow.db"
    shutil.copy(store.removeprefix("sqlite:///"), folder / "mlflow.db")
    log(second, sweep("second", experiment))
    return experiment, store, second


@pytest.fixture
def grass_ray(stores: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a verb on the first store and returns what it printed; ``code`` is the exit code expected."""

    def run(verb: str, *arguments: object, code: int = 0) -> str:
        words = [verb, *map(str, arguments)]
        if not {"--tracking-uri", "--records"} & set(words):
            words += ["--experiment", stores[0], "--tracking-uri", stores[1]]
        with pytest.raises(SystemExit) as left:
            main(words)
        said = capsys.readouterr()
        assert left.value.code == code, said.err
        return said.out if code == 0 else said.err

    return run


def sensitive() -> list[RunRecord]:
    """Rows that differ in a setting, on two tasks."""
    correct = {"boolq": answers(5, 10), "piqa": answers(6, 10)}
    rates = [f"method.optimizer.lr={lr}" for lr in (0.1, 0.2)]
    series = make_series(0, 1.0, steps=20)
    return [make_record("lisa", correct=correct, suite="commonsense", overrides=[lr], series=series) for lr in rates]


def methods_of(text: str) -> list[str]:
    return [row["method"] for row in json.loads(text)]


def test_filters_and_sorting(grass_ray: Callable[..., str]) -> None:
    board = grass_ray("leaderboard", "--format", "json")
    assert methods_of(board) == ["grass", "lora", "full", "lisa"]
    assert list(json.loads(board)[0])[:16] == [
        *("rank", "method", "model", "suite", "accuracy", "accuracy_low", "accuracy_high", "tasks"),
        *("peak_allocated_gib", "peak_reserved_gib", "host_pinned_gib", "tokens_per_second", "train_s"),
        *("trainable_share", "seeds", "status"),
    ]
    assert methods_of(grass_ray("leaderboard", "--format", "json", "--method", "lora", "full")) == ["lora", "full"]
    assert methods_of(grass_ray("leaderboard", "--format", "json", "--status", "failed")) == ["lisa"]
    by_memory = grass_ray("leaderboard", "--format", "json", "--sort", "peak_allocated_gib")
    assert methods_of(by_memory) == ["full", "lora", "grass", "lisa"]
    assert methods_of(grass_ray("leaderboard", "--format", "json", "--seed", "1")) == []
    assert "no runs yet" in grass_ray("leaderboard", "--task", "boolq")


def test_two_stores_are_merged_and_what_is_in_both_counts_once(
    grass_ray: Callable[..., str], stores: tuple[str, str, str]
) -> None:
    experiment, first, second = stores
    both = ["--tracking-uri", first, "--tracking-uri", second, "--experiment", experiment]
    rows = json.loads(grass_ray("leaderboard", *both, "--format", "json"))
    assert [row["method"] for row in rows] == ["grass", "lora", "full", "lisa"]
    assert all(row["run_ids"][0].startswith("second-") for row in rows), "the later run of a configuration counts"
    unknown = ["--tracking-uri", first, "--tracking-uri", second, "--experiment", "nowhere"]
    assert "unknown experiment 'nowhere'" in grass_ray("leaderboard", *unknown, code=2)


def test_records_of_a_folder_in_place_of_a_store(grass_ray: Callable[..., str], tmp_path: Path) -> None:
    for record in sweep("first", "one") + sweep("second", "other"):
        (tmp_path / record.sweep_id / record.name).mkdir(parents=True)
        record.save(tmp_path / record.sweep_id / record.name / "record.json.gz")
    words = ["leaderboard", "--format", "json", "--records", tmp_path]
    rows = json.loads(grass_ray(*words, "--experiment", "one"))
    assert [(row["method"], row["accuracy"]) for row in rows] == [
        ("grass", 0.7), ("lora", 0.6), ("full", 0.5), ("lisa", None),
    ]  # fmt: skip
    assert methods_of(grass_ray(*words, "--method", "lora")) == ["lora"]
    unknown = grass_ray(*words, "--experiment", "nowhere", code=2)
    assert "unknown experiment 'nowhere' in this folder; available: one, other" in unknown
    assert "give one of them" in grass_ray(*words, "--tracking-uri", "sqlite:///mlflow.db", code=2)
    assert "there are no run records in" in grass_ray("leaderboard", "--records", tmp_path / "none", code=2)
    recorded = REPOSITORY / "benchmarks" / "results" / "example_sweep"
    beside, inside = (grass_ray("leaderboard", "--records", at) for at in (recorded, recorded / "records"))
    assert beside == inside


def test_two_sweeps_side_by_side(grass_ray: Callable[..., str], stores: tuple[str, str, str]) -> None:
    board = grass_ray("leaderboard", "--compare", "first", "second", "--tracking-uri", stores[2], "--format", "json")
    compared = {row["label"]: row for row in json.loads(board)["rows"]}
    assert compared["grass"]["difference"] == pytest.approx(0.05)
    assert [change["example_id"] for change in compared["grass"]["changes"]] == ["question-14"]
    assert compared["lisa"]["difference"] is None
    assert "no run belongs to" in grass_ray("leaderboard", "--compare", "first", "third", code=2)
    assert "leave --sort" in grass_ray("leaderboard", "--compare", "first", "x", "--sort", "seeds", code=2)


def test_the_page_is_written(grass_ray: Callable[..., str], tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    assert "wrote" in grass_ray("leaderboard", "--format", "html", "--output", page)
    assert "<svg" in page.read_text(encoding="utf-8")


def test_every_picture_of_the_registry_can_be_asked_for_and_says_what_it_lacks() -> None:
    assert get_args(get_type_hints(Plot)["kind"]) == tuple(FIGURES), "the command line's choices are the registry's"
    assert all(figure.missing for figure in FIGURES.values())


def test_the_page_has_no_figure_that_is_not_in_the_registry() -> None:
    records = [*sweep("first", "board"), *sensitive()]
    page = render(build_leaderboard(records), "html", records=records)
    shown = set(re.findall(r'download="([a-z-]+)-\d+\.csv"', page))
    assert shown <= set(FIGURES), "not in the registry"
    assert shown >= {"pareto", "loss", "sensitivity", "sampling"}


@pytest.mark.parametrize("kind", ["search", "rungs", "population", "sensitivity", "tasks"])
def test_pictures_of_searches_are_drawn_from_a_store(
    kind: str, grass_ray: Callable[..., str], stores: tuple[str, str, str], tmp_path: Path
) -> None:
    where = ["--experiment", "board-searches", "--tracking-uri", stores[1], "--output", tmp_path / "x.png"]
    assert "x.png and " in grass_ray("plot", kind, *where)
    assert (tmp_path / "x.png").stat().st_size > 5000
    assert len((tmp_path / "x.csv").read_text(encoding="utf-8").splitlines()) > 2


@pytest.mark.parametrize("kind", ["pareto", "loss", "sampling"])
def test_pictures_with_their_numbers(kind: str, grass_ray: Callable[..., str], tmp_path: Path) -> None:
    said = grass_ray("plot", kind, "--output", tmp_path / "x.svg")
    assert "x.svg and " in said
    assert (tmp_path / "x.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert len((tmp_path / "x.csv").read_text(encoding="utf-8").splitlines()) > 2


def test_what_cannot_be_drawn_is_said(grass_ray: Callable[..., str], tmp_path: Path) -> None:
    assert "there is nothing to draw: no method has rows" in grass_ray("plot", "sensitivity", code=2)
    assert "must end in .png" in grass_ray("plot", "loss", "--output", tmp_path / "x.jpeg", code=2)
    assert "unknown method 'gras'" in grass_ray("plot", "loss", "--method", "gras", code=2)
    assert list(tmp_path.iterdir()) == []
