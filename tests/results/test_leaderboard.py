from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from result_records import answers, make_history, make_record

from grass_ray.results.columns import row_values
from grass_ray.results.leaderboard import LeaderboardRow, build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render
from grass_ray.results.selection import Selection
from grass_ray.results.statistics import wilson_interval

KEYS = [
    *("rank", "method", "model", "suite", "accuracy", "accuracy_low", "accuracy_high", "tasks"),
    *("peak_allocated_gib", "peak_reserved_gib", "host_pinned_gib", "tokens_per_second", "train_s"),
    *("trainable_share", "seeds", "status"),
]


def rows_of(records: Sequence[RunRecord]) -> list[LeaderboardRow]:
    (table,) = build_leaderboard(records)
    return list(table.rows)


def test_ranked_by_accuracy_with_intervals() -> None:
    low, high = (
        make_record("lora", correct={"generated": answers(5, 10)}),
        make_record("grass", correct={"generated": answers(8, 10)}),
    )
    first, second = rows_of([low, high])
    assert [(row.rank, row.method, row.accuracy) for row in (first, second)] == [(1, "grass", 0.8), (2, "lora", 0.5)]
    assert (first.accuracy_low, first.accuracy_high) == pytest.approx(wilson_interval(8, 10))


def test_the_keys_of_a_row() -> None:
    (row,) = rows_of([make_record(metrics={"memory/peak_allocated_gib": math.nan}, layers=make_history())])
    values = row_values(row)
    assert list(values)[: len(KEYS)] == KEYS
    assert values["peak_allocated_gib"] is None
    assert values["trainable_share"] == 0.07
    assert values["seeds"] == [0]


def test_the_average_weighs_tasks_equally() -> None:
    (row,) = rows_of([make_record(correct={"boolq": answers(9, 10), "piqa": answers(50, 100)}, suite="commonsense")])
    assert row.accuracy == pytest.approx(0.7)
    assert row.tasks == {"boolq": 0.9, "piqa": 0.5}


def test_seeds_are_one_row() -> None:
    records = [
        make_record(
            seed=seed,
            correct={"generated": answers(right, 10)},
            metrics={"memory/peak_allocated_gib": gib, "throughput/tokens_per_second": speed, "time/train_s": 10.0},
        )
        for seed, right, gib, speed in ((0, 4, 1.0, 100.0), (1, 6, 3.0, 200.0), (2, 8, 2.0, 300.0))
    ]
    (row,) = rows_of(records)
    assert row.seeds == [0, 1, 2]
    assert (row.accuracy, row.accuracy_std) == pytest.approx((0.6, 0.2))
    assert (row.peak_allocated_gib, row.tokens_per_second) == (3.0, 200.0)
    assert (row.accuracy_low, row.accuracy_high) == pytest.approx(wilson_interval(6, 10)), "seeds add no questions"


def test_a_repeated_run_counts_once() -> None:
    old = make_record(correct={"generated": answers(1, 10)}, sweep_id="old", finished_at="2026-01-01T00:00:00+00:00")
    new = make_record(correct={"generated": answers(7, 10)}, sweep_id="new", finished_at="2026-01-02T00:00:00+00:00")
    (row,) = rows_of([new, old])
    assert (row.accuracy, row.seeds) == (0.7, [0])


def test_other_hyperparameters_are_other_rows_that_say_so() -> None:
    rows = rows_of(
        [
            make_record(correct={"generated": answers(8, 10)}, overrides=["method.sampler.temperature=0.1"]),
            make_record(correct={"generated": answers(7, 10)}),
            make_record("lora", correct={"generated": answers(6, 10)}, overrides=["evaluation.batch_size=2"]),
            make_record("lora", seed=1, correct={"generated": answers(6, 10)}),
        ]
    )
    assert [row.label for row in rows] == ["grass (temperature=0.1)", "grass (temperature=0.5)", "lora"]


def test_what_cannot_be_compared_is_in_another_table() -> None:
    records = [
        make_record(),
        make_record(hardware="GPU"),
        make_record(overrides=["model.name=tiny"]),
        make_record(overrides=["evaluation.limit=4"]),
        make_record(correct={"boolq": [True]}, suite="commonsense"),
    ]
    tables = build_leaderboard(records)
    assert len(tables) == 5
    assert all(len(table.rows) == 1 for table in tables)
    assert any("a sample of 4 examples" in table.title for table in tables)


def test_failures_stay_below_with_their_reason() -> None:
    rows = rows_of(
        [
            make_record("full", status="out_of_memory", failure="needs 40 GiB"),
            make_record("lora", status="failed", failure="loss is NaN"),
            make_record("grass", correct={"generated": answers(1, 10)}),
        ]
    )
    assert [(row.rank, row.method, row.status) for row in rows] == [
        (1, "grass", "finished"),
        (None, "full", "out_of_memory"),
        (None, "lora", "failed"),
    ]
    assert [row.failure for row in rows] == [None, "seed 0: needs 40 GiB", "seed 0: loss is NaN"]


def test_survivors_of_a_partly_failed_row_win_nothing() -> None:
    rows = rows_of(
        [
            make_record("grass", seed=0, correct={"generated": answers(9, 10)}),
            make_record("grass", seed=1, status="failed", failure="diverged"),
            make_record("lora", correct={"generated": answers(2, 10)}),
        ]
    )
    assert [(row.rank, row.method, row.status, row.seeds) for row in rows] == [
        (1, "lora", "finished", [0]),
        (None, "grass", "partial", [0]),
    ]
    assert rows[1].failure == "seed 1: diverged"
    assert rows[1].accuracy == 0.9


def test_a_run_without_all_tasks_is_not_ranked_among_the_others() -> None:
    whole = make_record("lora", correct={"boolq": answers(1, 10), "piqa": answers(1, 10)}, suite="commonsense")
    half = make_record("grass", correct={"boolq": answers(9, 10), "piqa": answers(9, 10)}, suite="commonsense")
    del half.tasks["piqa"]
    rows = rows_of([whole, half])
    assert [(row.method, row.rank) for row in rows] == [("lora", 1), ("grass", None)]
    assert rows[1].failure == "not evaluated on piqa"


def test_difference_to_full_is_per_question_with_p() -> None:
    pattern = [True] * 9 + [False] + [True] * 5 + [False] * 5
    rival = [False] * 9 + [True] + [True] * 5 + [False] * 5
    lisa = list(rival)
    (table,) = build_leaderboard(
        [
            make_record("grass", correct={"generated": pattern}),
            make_record("full", correct={"generated": rival}),
            make_record("lisa", correct={"generated": lisa}),
        ]
    )
    by_method = {row.method: row for row in table.rows}
    assert by_method["grass"].to_full.value == pytest.approx(0.4)
    assert by_method["grass"].to_full.p_value == pytest.approx(22 / 1024)
    assert by_method["grass"].to_full.p_adjusted == pytest.approx(44 / 1024)
    assert by_method["lisa"].to_full.p_value == 1.0
    assert by_method["full"].to_full is None
    assert any(note.startswith("p: exact McNemar against full") for note in table.notes)


def test_pairs_are_found_by_id_not_by_place() -> None:
    full, grass = (make_record(name, correct={"generated": answers(3, 6)}) for name in ("full", "grass"))
    score = grass.tasks["generated"]
    score.example_ids.reverse()
    score.correct.reverse()
    by_method = {row.method: row for row in rows_of([full, grass])}
    assert by_method["grass"].to_full.p_value == 1.0
    score.example_ids[:] = [f"other-{index}" for index in range(6)]
    assert [len(table.rows) for table in build_leaderboard([full, grass])] == [1, 1], "no pair, no common table"


def test_equal_prompts_are_paired_in_their_order() -> None:
    full = make_record("full", correct={"generated": [True, False, False, False]})
    grass = make_record("grass", correct={"generated": [True, True, True, True]})
    for record in (full, grass):
        record.tasks["generated"].example_ids[:] = ["the same"] * 4
    assert rows_of([full, grass])[0].to_full.p_value == pytest.approx(2 / 2**3), "three questions differ, not one mean"


def test_several_seeds_are_averaged_question_by_question() -> None:
    records = [
        make_record(method, seed=seed, correct={"generated": answers(right, 10)})
        for method, seed, right in (("full", 0, 4), ("full", 1, 4), ("grass", 0, 8))
    ]
    (table,) = build_leaderboard(records)
    best, _ = table.rows
    # four questions differ in both seeds of full: four flips of a coin, not eight
    assert best.to_full.p_value == pytest.approx(2 / 2**4, abs=0.02)
    assert best.to_full.value == pytest.approx(0.4)
    assert best.to_full.covers_training is False, "one seed on a side"
    assert any("sign-flip" in note for note in table.notes)


def test_with_seeds_on_both_sides_a_difference_covers_training() -> None:
    records = [
        make_record(method, seed=seed, correct={"generated": answers(right, 100)})
        for method, seed, right in (("full", 0, 40), ("full", 1, 42), ("grass", 0, 80), ("grass", 1, 86))
    ]
    (table,) = build_leaderboard(records)
    best, _ = table.rows
    # by hand: seeds' means vary by (0.01^2 + 0.03^2) 2 / 2 = .001; 38 questions all of the two, 8 one of them
    assert best.to_full.value == pytest.approx(0.42)
    assert best.to_full.covers_training is True
    assert 0.0004 < best.to_full.p_value < 0.01
    assert best.to_full is not None
    assert 0.2 < best.to_full.low < 0.33, "two degrees of freedom: wider than the questions alone"
    assert best.to_full.high - 0.42 == pytest.approx(0.42 - best.to_full.low)
    assert any("two-level t-test" in note for note in table.notes)


def test_other_seeds_still_compare_question_by_question() -> None:
    first, second = (
        make_record(method, seed=seed, correct={"generated": answers(right, 10)})
        for method, seed, right in (("full", 0, 4), ("grass", 7, 8))
    )
    assert rows_of([first, second])[0].to_full.p_value == pytest.approx(2 / 2**4)


def test_difference_to_the_best_row() -> None:
    records = [
        make_record("grass", correct={"generated": answers(18, 20)}),
        make_record("lisa", correct={"generated": answers(17, 20)}),
        make_record("full", correct={"generated": answers(8, 20)}),
    ]
    best, lisa, full = rows_of(records)
    assert best.to_best is None
    assert lisa.to_best.value == pytest.approx(-0.05)
    assert lisa.to_best.p_value == 1.0
    assert full.to_best.value == pytest.approx(-0.5)
    assert full.to_best.p_value == pytest.approx(2 / 2**10)
    assert full.to_best.p_adjusted == pytest.approx(2 * 2 / 2**10)
    assert best.to_full.p_value == full.to_best.p_value, "the same pair, whichever way round"


def test_without_full_there_is_still_the_best() -> None:
    rows = rows_of([make_record("grass"), make_record("lora", correct={"generated": [True, False, False, False]})])
    assert rows[1].to_full is None
    assert rows[1].to_best.value == pytest.approx(-0.25)


def test_several_tasks_weigh_alike_in_a_difference() -> None:
    small, large = ({"boolq": answers(right, 10), "piqa": answers(50, 100)} for right in (9, 5))
    first, second = (
        make_record(method, correct=correct, suite="commonsense")
        for method, correct in (("grass", small), ("full", large))
    )
    (table,) = build_leaderboard([first, second])
    assert table.rows[0].to_full.value == pytest.approx(0.2)
    assert any(note.startswith("p: paired sign-flip test of the average over tasks") for note in table.notes)


def test_pareto_front() -> None:
    def at(method: str, right: int, gib: float) -> RunRecord:
        return make_record(
            method, correct={"generated": answers(right, 10)}, metrics={"memory/peak_allocated_gib": gib}
        )

    untrained = make_record("base", correct={"generated": answers(5, 10)})
    rows = rows_of([at("full", 9, 10), at("grass", 8, 4), at("lora", 7, 5), at("lisa", 6, 3), untrained])
    assert {row.method for row in rows if row.pareto} == {"full", "grass", "lisa"}
    same = [at("full", 8, 5), at("grass", 8, 4), at("lora", 8, 4), at("lisa", 7, 4)]
    assert {row.method for row in rows_of(same) if row.pareto} == {"grass", "lora"}, "equal points are both on it"


def test_the_untrained_model_is_ranked_without_numbers_it_has_not() -> None:
    (row,) = rows_of([make_record("base")])
    assert (row.rank, row.peak_allocated_gib, row.tokens_per_second, row.train_s) == (1, None, None, None)


MATH = {"gsm8k": answers(2, 10), "svamp": answers(4, 10), "addsub": answers(9, 10)}


def trained_on(record: RunRecord, *files: str, description: str = "", sha256: str = "ab" * 32) -> RunRecord:
    rows = [{"name": name, "sha256": sha256, "rows": 5} for name in files]
    record.data["train"] = {"source": "folder", "description": description, "files": rows, "rows_sha256": sha256}
    return record


def test_contaminated_tasks_have_an_average_without_them() -> None:
    record = trained_on(make_record(correct=MATH, suite="arithmetic"), "ft-training_set/math_10k.json")
    (table,) = build_leaderboard([record])
    assert table.rows[0].accuracy == pytest.approx(0.5)
    assert table.rows[0].accuracy_clean == pytest.approx(0.3)
    assert table.rows[0].contaminated == ["addsub"]
    assert any("contains test questions of AddSub; average without them: grass 30.0" in note for note in table.notes)


def test_clean_averages_are_over_the_same_tasks_in_every_row_and_can_be_sorted() -> None:
    better = MATH | {"addsub": answers(1, 10), "svamp": answers(6, 10)}
    records = [
        trained_on(make_record("grass", correct=MATH, suite="arithmetic"), "ft-training_set/math_10k.json"),
        trained_on(make_record("lora", correct=better, suite="arithmetic"), "dataset/gsm8k/train.json"),
    ]
    tables = build_leaderboard(records)
    assert [row.method for row in tables[0].rows] == ["grass", "lora"]
    assert [row.accuracy_clean for row in tables[0].rows] == pytest.approx([0.3, 0.4])
    (table,) = Selection(sort="accuracy_clean").tables(tables)
    assert [row.method for row in table.rows] == ["lora", "grass"]
    assert "accuracy_clean" in render(tables, "csv").splitlines()[0]
    assert "clean %" in render(tables, "markdown")
    assert json.loads(render(tables, "json"))[1]["accuracy_clean"] == pytest.approx(0.4)


def test_the_average_above_chance_needs_every_tasks_chance() -> None:
    def at(**chances: float) -> float | None:
        correct = {"boolq": answers(6, 10), "piqa": answers(10, 10)}
        record = make_record(correct=correct, suite="commonsense")
        for task, chance in chances.items():
            record.tasks[task].protocol["chance"] = chance
        return rows_of([record])[0].accuracy_normalised

    assert at(boolq=0.5, piqa=0.5) == pytest.approx((0.2 + 1.0) / 2)
    assert at(boolq=0.5) is None
    assert at(boolq=0.0, piqa=0.0) is None, "without options it says nothing new"


@pytest.mark.parametrize("files", [("dataset/gsm8k/train.json",), ()])
def test_other_training_data_is_not_called_contaminated(files: tuple[str, ...]) -> None:
    """As in test_sources: a mixture built in place of math_10k names it in its description."""
    record = make_record(correct=MATH, suite="arithmetic")
    if files:
        trained_on(record, *files, description="built from the train sets of gsm8k (9), in place of math_10k")
    (table,) = build_leaderboard([record])
    assert table.rows[0].accuracy_clean is None
    assert table.rows[0].contaminated == []
    assert not any("test questions" in note for note in table.notes)


def test_the_caption_says_which_rows_are_contaminated() -> None:
    records = [
        trained_on(make_record("grass", correct=MATH, suite="arithmetic"), "ft-training_set/math_10k.json"),
        trained_on(make_record("lora", correct=MATH, suite="arithmetic"), "dataset/gsm8k/train.json"),
        make_record("base", correct=MATH, suite="arithmetic", overrides=["training.steps=0"]),
    ]
    (table,) = build_leaderboard(records)
    (note,) = [note for note in table.notes if "test questions" in note]
    assert note.startswith("the training data of grass contains")
    assert "lora" not in note


def test_the_same_budget_is_said() -> None:
    records = [trained_on(make_record(method), "x.json") for method in ("full", "grass")]
    (table,) = build_leaderboard([*records, make_record("base", overrides=["training.steps=0"])])
    assert table.budget == (
        "same budget: 50 steps, 8 rows a step, 1 learning rate tried in these runs, the same training rows"
    )


def test_different_budgets_are_said() -> None:
    series = {
        "time/step_s": [(1, 2.0), (2, 2.0)],
        "throughput/tokens_per_second": [(1, 100.0), (2, 100.0)],
    }
    longer = {key: [*points, (3, points[0][1])] for key, points in series.items()}
    records = [
        make_record("full", series=series),
        make_record("lora", series=longer, overrides=["training.steps=60"]),
        make_record("lora", series=series, overrides=["method.optimizer.lr=0.5"]),
    ]
    (table,) = build_leaderboard(records)
    assert table.budget is not None
    for part in (
        "budgets differ: 50 steps (most rows), 60 steps (lora)",
        "400 (full) to 600 (lora (lr=0.001, steps=60))",
        "2 learning rates tried in these runs",
        "the same: 8 rows a step",
    ):
        assert part in table.budget, table.budget
    (rows,) = [[row for row in table.rows if row.method == "lora"]]
    assert [row.learning_rates_tried for row in rows] == [2, 2]


def test_other_training_rows_are_another_budget() -> None:
    records = [
        trained_on(make_record("full"), "a.json", sha256="aa" * 32),
        trained_on(make_record("grass"), "b.json", sha256="bb" * 32),
        make_record("lora", status="failed", failure="before it read anything"),
    ]
    (table,) = build_leaderboard(records)
    assert table.budget is not None
    assert "training rows by hash: aaaaaaaa (most rows), bbbbbbbb (grass)" in table.budget


def test_equal_accuracies_share_a_rank() -> None:
    records = [make_record(method) for method in ("lora", "lisa")]
    records.append(make_record("full", correct={"generated": [False] * 4}))
    assert [row.rank for row in rows_of(records)] == [1, 1, 3]


def test_ties_are_ties_to_the_last_bit() -> None:
    """17/72 twice: five, seven and five of 24, and seven, four and six."""
    tasks = ("arc_easy", "arc_challenge", "openbookqa")
    records = [
        make_record(
            method, suite="commonsense", correct={t: answers(n, 24) for t, n in zip(tasks, counts, strict=True)}
        )
        for method, counts in (("lora", (5, 7, 5)), ("lisa", (7, 4, 6)), ("full", (6, 6, 6)))
    ]
    rows = rows_of(records)
    assert [(row.rank, row.method) for row in rows] == [(1, "full"), (2, "lisa"), (2, "lora")]
    assert rows[1].accuracy == rows[2].accuracy == 17 / 72
    assert rows[1].to_full.value == rows[2].to_full.value == -1 / 72
    seeds = [
        make_record(method, seed=seed, correct={"generated": answers(right, 30)})
        for method, counts in (("lora", (1, 2, 10)), ("lisa", (10, 1, 2)))
        for seed, right in enumerate(counts)
    ]
    assert [row.rank for row in rows_of(seeds)] == [1, 1]


def test_nothing_makes_nothing() -> None:
    assert build_leaderboard([]) == []


def test_a_schedule_tells_a_row_apart_in_few_words() -> None:
    records = [
        make_record(overrides=["method.sampler.temperature={kind: linear, start: 2.0, end: 0.2}"]),
        make_record(overrides=["method.sampler.temperature={kind: cosine, start: 2.0, end: 0.2, steps: 40}"]),
        make_record(overrides=["method.sampler.temperature={kind: step, values: [2, 0.5], at_progress: [0.25]}"]),
        make_record(overrides=["method.sampler.temperature=0.7"]),
    ]
    (table,) = build_leaderboard(records)
    assert {row.variant.removeprefix("temperature=") for row in table.rows} == {
        "linear 2 to 0.2",
        "cosine 2 to 0.2 over 40 steps",
        "step 2, 0.5 at 0.25",
        "0.7",
    }


def test_a_limit_that_no_task_reaches_is_no_sample() -> None:
    def title(questions: int) -> str:
        record = make_record(correct={"generated": answers(3, questions)}, overrides=["evaluation.limit=10"])
        (table,) = build_leaderboard([record])
        return table.title

    assert "a sample of 10 examples a task" in title(10)
    assert "sample" not in title(9)
