"""Power: what a comparison could have seen, and what a planned one finds, against formulas, scipy and simulation."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from result_records import make_record
from scipy.stats import nct, t

from benchmarks import power as benchmark
from grass_ray.results.columns import row_values
from grass_ray.results.leaderboard import LeaderboardTable, build_leaderboard
from grass_ray.results.power import Design, Spread, power, questions_needed, seeds_needed, smallest_difference
from grass_ray.results.power_report import Wish, render_power, reports
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render

SPREAD = Spread(seeds=0.01**2, questions=0.2**2, disagreement=0.1**2)


# ------------------------------------------------------------------------------------------------------------ formulas


def test_without_seeds_it_is_the_power_of_the_paired_t_test() -> None:
    n, variance, difference = 40, 0.09, 0.12
    shift = difference / (variance / n) ** 0.5
    limit = t.ppf(0.975, n - 1)
    exact = nct.sf(limit, n - 1, shift) + nct.cdf(-limit, n - 1, shift)
    assert power(difference, [], [(n, variance)]) == pytest.approx(exact, abs=0.01)


def test_with_seeds_of_one_spread_it_is_near_the_t_test_over_seeds() -> None:
    """Of many questions that differ by nothing, only the seeds are left."""
    n, variance, difference = 8, 0.0001, 0.015
    shift = difference / (2 * variance / n) ** 0.5
    limit = t.ppf(0.975, 2 * n - 2)
    exact = nct.sf(limit, 2 * n - 2, shift) + nct.cdf(-limit, 2 * n - 2, shift)
    assert power(difference, [(n, variance)] * 2, [(10**6, 1e-9)]) == pytest.approx(exact, abs=0.02)


def test_the_smallest_difference_has_the_wanted_power() -> None:
    for sides, questions in (
        ([], [(100, 0.2)]),
        ([(2, 0.0001), (3, 0.0001)], [(300, 0.09), (50, 0.2)]),
        ([(5, 0.0004)], [(1319, 0.1)]),
    ):
        for wanted in (0.5, 0.8, 0.95):
            found = smallest_difference(sides, questions, wanted=wanted)
            assert found is not None
            assert power(found, sides, questions) == pytest.approx(wanted, abs=1e-4)
    assert smallest_difference([], [(1, 0.0)]) is None, "one question says nothing"


def test_what_is_needed_is_the_fewest_that_is_enough() -> None:
    questions = questions_needed(0.02, SPREAD, seeds=8)
    assert questions is not None
    assert Design(seeds=8, questions=questions).power(0.02, SPREAD) >= 0.8
    assert Design(seeds=8, questions=questions - 1).power(0.02, SPREAD) < 0.8
    seeds = seeds_needed(0.02, SPREAD, questions=2000)
    assert seeds is not None
    assert Design(seeds=seeds, questions=2000).power(0.02, SPREAD) >= 0.8
    assert Design(seeds=seeds - 1, questions=2000).power(0.02, SPREAD) < 0.8
    assert questions_needed(0.02, SPREAD, seeds=3) is None, "the spread over three seeds alone is too large"
    assert seeds_needed(0.001, SPREAD, questions=100) is None
    assert questions_needed(0.02, SPREAD, seeds=8, tasks=4) == pytest.approx(questions / 4, abs=1)


# ---------------------------------------------------------------------------------------------------------- simulation


@pytest.mark.parametrize("index", [1, 3, 4], ids=["five seeds", "four tasks", "two seeds that do not vary"])
def test_a_planned_experiment_finds_its_difference_and_nothing_where_nothing_is(index: int) -> None:
    """0.02 nats, planned for 80 %; with 400 experiments three standard errors are 6 points, and four at 5 % are 4.4."""
    found = benchmark.run(benchmark.CASES[index], 400)
    assert 0.74 <= found.found <= 0.86
    assert found.called <= 0.094
    assert found.covered >= 0.906


def test_a_smaller_experiment_finds_less() -> None:
    """What is simulated depends on the size: the plan for twice the difference finds it seldom."""
    case = benchmark.CASES[3]
    needed = questions_needed(2 * benchmark.DIFFERENCE, case.spread, seeds=case.seeds, tasks=case.tasks)
    assert needed is not None
    p_values = [
        benchmark.experiment(case, np.random.default_rng(number), case.seeds, needed, benchmark.DIFFERENCE)[0].p_value
        for number in range(200)
    ]
    assert np.mean(np.array(p_values) < 0.05) < 0.5


def test_the_parts_are_found_again_in_answers() -> None:
    case = benchmark.Case(seed_sd=0.05, question_sd=0.2, interaction_sd=0.1, seeds=40, tasks=2)
    comparison, seeds = benchmark.experiment(case, np.random.default_rng(0), 40, 3000, 0.0)
    spread = seeds.spread([comparison])
    assert spread is not None
    assert (spread.seeds, spread.questions, spread.disagreement) == pytest.approx((0.0025, 0.04, 0.01), rel=0.3)


# ---------------------------------------------------------------------------------------------------- tables and text


def runs(method: str, seeds: int, *, skill: float = 0.0, losses: bool = True) -> list[RunRecord]:
    ease = np.random.default_rng(3).normal(0, 1, size=(2, 200))
    found = []
    for seed in range(seeds):
        chance = np.random.default_rng([seed, len(method)])
        strength = ease + skill + chance.normal(0, 0.3, size=(2, 200)) + chance.normal(0, 0.05)
        by_task = dict(zip(("boolq", "piqa"), strength, strict=True))
        found.append(
            make_record(
                method,
                seed=seed,
                suite="commonsense",
                correct={task: (own > 0).tolist() for task, own in by_task.items()},
                losses={task: np.log1p(np.exp(-own)).tolist() for task, own in by_task.items()} if losses else None,
            )
        )
    return found


def table_of(*groups: list[RunRecord]) -> LeaderboardTable:
    (table,) = build_leaderboard([record for group in groups for record in group])
    return table


def test_every_table_says_what_it_could_have_seen() -> None:
    table = table_of(runs("full", 3), runs("grass", 3, skill=0.1))
    (note,) = [note for note in table.all_notes if "could have seen" in note]
    assert note.startswith("smallest difference to full that this table could have seen (80 % power")
    row = next(row for row in table.rows if row.method == "grass")
    assert row.to_full.detectable is not None
    assert f"{100 * row.to_full.detectable:.1f} points of accuracy, {row.loss_to_full.detectable:.3f} nats" in note
    for format in ("table", "markdown", "html"):
        assert "could have seen" in " ".join(render([table], format).split()), format  # type: ignore[arg-type]
    values = row_values(row)
    assert values["detectable_to_full"] == row.to_full.detectable
    assert values["loss_detectable_to_full"] == row.loss_to_full.detectable


def test_a_tables_comparison_could_see_what_its_design_can() -> None:
    table = table_of(runs("full", 4), runs("grass", 4, skill=0.1))
    row = next(row for row in table.rows if row.method == "grass")
    spread = table.spreads["loss"]
    assert spread.seeds is not None
    expected = Design(seeds=4, questions=200, tasks=2).smallest(spread)
    assert row.loss_to_full.detectable == pytest.approx(expected, rel=0.02)


def test_disagreements_that_cancel_in_an_average_are_not_taken_for_a_spread_of_averages() -> None:
    """One seed says yes to everything and one says no: half the questions right either way."""
    right = [[number % 2 == seed for number in range(100)] for seed in (0, 1)]
    records = [
        make_record(method, seed=seed, correct={"generated": right[seed][shift:] + right[seed][:shift]})
        for method, shift in (("full", 0), ("grass", 2))
        for seed in (0, 1)
    ]
    for record in records[:1]:
        record.tasks["generated"].correct[:2] = [True, True]
    table = table_of(records[:2], records[2:])
    spread = table.spreads["accuracy"]
    assert spread.seeds == 0.0
    assert spread.disagreement < 0.05, "of 0.5 that each answer flips by"
    row = next(row for row in table.rows if row.to_full is not None)
    assert row.to_full.detectable == pytest.approx(Design(seeds=2, questions=100).smallest(spread), rel=0.05)


def test_one_seed_speaks_of_these_runs_alone() -> None:
    table = table_of(runs("full", 1), runs("grass", 1, skill=0.1))
    assert table.spreads["loss"].seeds is None
    (report,) = reports(table, ("loss",), Wish(difference=0.02))
    assert [line.seeds for line in report.plan] == [None]
    assert "of these runs alone" in render_power([report])


def test_reports_of_records_in_every_format() -> None:
    table = table_of(runs("full", 3), runs("grass", 3, skill=0.1), runs("base", 1))
    found = reports(table, ("accuracy", "loss"), Wish(difference=0.02, seeds=(3, 9)))
    assert [report.metric for report in found] == ["accuracy", "loss"]
    text = render_power(found)
    assert "questions a task that see 2.0" in text
    assert "questions a task that see 0.020" in text
    assert render_power(found, "markdown").count("| seeds a row |") == 2
    data = json.loads(render_power(found, "json"))
    assert [line["seeds"] for line in data[1]["plan"]] == [3, 9]
    assert data[1]["questions"] == 200
    assert data[1]["tasks"] == 2
    assert data[1]["difference"] == 0.02
    without = table_of(runs("full", 2, losses=False), runs("grass", 2, losses=False))
    assert [report.metric for report in reports(without, ("accuracy", "loss"), Wish())] == ["accuracy"]
    assert render_power([]) == "no rows that can be compared"


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def power_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    from grass_ray.cli import main

    def run(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main(["power", *map(str, arguments)])
        said = capsys.readouterr()
        assert left.value.code == code, said.err
        return said.out if code == 0 else said.err

    return run


def test_figures_by_hand(power_command: Callable[..., str]) -> None:
    by_hand = ("--question-sd", 0.2, "--seed-sd", 0.01, "--interaction-sd", 0.1, "--format", "json")
    (report,) = json.loads(power_command(*by_hand, "--difference", 0.02, "--num-seeds", 8, 12, "--num-questions", 500))
    assert report["spread"] == pytest.approx({"seeds": 0.0001, "questions": 0.04, "disagreement": 0.01})
    assert [line["questions_needed"] for line in report["plan"]] == [
        questions_needed(0.02, SPREAD, seeds=seeds) for seeds in (8, 12)
    ]
    assert report["plan"][0]["detectable"] == pytest.approx(Design(seeds=8, questions=500).smallest(SPREAD))
    assert report["seeds_needed"] == seeds_needed(0.02, SPREAD, questions=500)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--question-sd", 0.2), "need --difference, --num-questions, or both"),
        (("--question-sd", -1, "--difference", 0.1), "--question-sd -1: it must be above 0"),
        (("--difference", 0), "--difference 0: it must be above 0"),
        (("--level", 1), "--level 1: it must be between 0 and 1"),
        (("--power", 0.01), "--power 0.01 must be above --level 0.05"),
        (("--num-seeds", 1), "--num-seeds: with less than two seeds"),
        (("--num-questions", 1), "--num-questions 1: it must be at least 2"),
    ],
)
def test_bad_input_is_one_message(arguments: tuple[object, ...], said: str, power_command: Callable[..., str]) -> None:
    assert said in power_command(*arguments, code=2)
