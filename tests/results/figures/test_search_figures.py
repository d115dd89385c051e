"""Figures of searches, from hand-made records: the numbers behind them are the records'."""

from __future__ import annotations

from pathlib import Path

from result_records import asha, make_record, members, searching

from grass_ray.results.figures.figure import Runs
from grass_ray.results.figures.registry import draw_kind, write_sweep_plots
from grass_ray.results.figures.search import draw_population, draw_rungs, draw_search
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.searches import rung_losses, searched, winner


def test_a_search_is_its_trials_in_order_and_the_lowest_finished_loss_wins() -> None:
    (own,) = searched(asha()).values()
    assert [record.search.number for record in own if record.search] == [0, 1, 2]
    best = winner(own)
    assert best is not None
    assert best.search is not None
    assert best.search.number == 2
    assert rung_losses(best) == {4: 1.5, 12: 1.2}
    assert winner([record for record in own if record.status == "stopped"]) is None


def test_the_search_shows_every_trial_over_every_setting_that_varied(tmp_path: Path) -> None:
    figure = draw_search(Runs.of(asha()))
    assert figure is not None
    lr = {row[1]: (row[2], row[3], row[5]) for row in figure.rows if row[4] == "method.optimizer.lr"}
    assert lr == {0: ("finished", 1.3, "0.0001"), 1: ("stopped", 1.9, "0.0002"), 2: ("finished", 1.0, "0.0003")}
    assert "Best: grass 1.0000" in figure.description
    figure.save(tmp_path / "search.png")
    assert (tmp_path / "search.csv").read_text().startswith("method,trial,status,validation_loss,setting,value")


def test_the_rungs_show_how_far_each_trial_came() -> None:
    figure = draw_rungs(Runs.of(asha()))
    assert figure is not None
    assert [row[1:] for row in figure.rows] == [
        (0, "finished", False, 4, 1.6), (0, "finished", False, 12, 1.4), (0, "finished", False, 36, 1.3),
        (1, "stopped", False, 4, 1.9),
        (2, "finished", True, 4, 1.5), (2, "finished", True, 12, 1.2), (2, "finished", True, 36, 1.0),
    ]  # fmt: skip


def test_a_population_shows_its_settings_over_updates_and_counts_what_was_taken_over(tmp_path: Path) -> None:
    figure = draw_population(Runs.of(members()))
    assert figure is not None
    assert "1 times one went on from another's weights" in figure.description
    values = {row[3]: row[4] for row in figure.rows if row[1:3] == (1, "lr")}
    assert (min(values), max(values)) == (1, 36)
    assert (values[9], values[10]) == (0.1, 0.2)
    figure.save(tmp_path / "population.png")


def test_the_summary_of_a_search_has_its_figures_and_numbers_and_other_sweeps_have_none(tmp_path: Path) -> None:
    records = asha()
    names = {path.name for path in write_sweep_plots(Runs.of(records), tmp_path / "search")}
    assert {"search.png", "search.csv", "rungs.png", "rungs.csv"} <= names
    assert "population.png" not in names
    assert not {"search.png", "rungs.png"} & {
        path.name for path in write_sweep_plots(Runs.of([make_record()]), tmp_path / "x")
    }
    tables = build_leaderboard(records)
    assert [figure.name for figure in draw_kind("search", tables, records)] == ["search"]
    assert draw_kind("population", tables, records) == []


def test_the_budget_says_how_large_each_methods_search_was() -> None:
    (table,) = build_leaderboard(asha()[:4])
    assert table.budget is not None
    assert "a search of 3 trials of at most 36 steps" in table.budget
    other = searching(0, 1.0, rungs={}, method="lisa")
    (table,) = build_leaderboard([*asha()[:4], other])
    assert table.budget is not None
    assert table.budget.startswith("budgets differ: ")
    assert "a search of 1 trials of at most 36 steps (lisa)" in table.budget


def test_a_winners_tested_run_takes_the_row_of_the_trial_that_found_it() -> None:
    found = searching(2, 1.0, rungs={})
    tested = make_record(
        overrides=["method.optimizer.lr=0.0003", "training.steps=36"], finished_at="2026-05-02T10:10:00.000+00:00"
    )
    (table,) = build_leaderboard([found, tested])
    assert [(row.rank, row.accuracy) for row in table.rows] == [(1, 0.5)]
    (table,) = build_leaderboard([found])
    assert [(row.rank, row.failure) for row in table.rows] == [
        (None, "seed 0: searched, not tested; validation loss 1.0000")
    ]
