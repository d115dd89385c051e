from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from result_records import answers, make_history, make_record

from grass_ray.results.leaderboard import LeaderboardRow, build_leaderboard
from grass_ray.results.record import RunRecord
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
    values = row.to_dict()
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
    assert by_method["grass"].difference_to_full == pytest.approx(0.4)
    assert by_method["grass"].p_value == pytest.approx(22 / 1024)
    assert by_method["grass"].p_adjusted == pytest.approx(44 / 1024)
    assert by_method["lisa"].p_value == 1.0
    assert by_method["full"].difference_to_full is None
    assert not any("pooled" in note for note in table.notes)


def test_pairs_are_found_by_id_not_by_place() -> None:
    full, grass = (make_record(name, correct={"generated": answers(3, 6)}) for name in ("full", "grass"))
    score = grass.tasks["generated"]
    score.example_ids.reverse()
    score.correct.reverse()
    by_method = {row.method: row for row in rows_of([full, grass])}
    assert by_method["grass"].p_value == 1.0
    score.example_ids[:] = [f"other-{index}" for index in range(6)]
    by_method = {row.method: row for row in rows_of([full, grass])}
    assert by_method["grass"].p_value is None


def test_pooling_over_seeds_is_said() -> None:
    records = [
        make_record(method, seed=seed, correct={"generated": answers(right, 10)})
        for method, right in (("full", 4), ("grass", 8))
        for seed in (0, 1)
    ]
    (table,) = build_leaderboard(records)
    assert table.rows[0].p_value == pytest.approx(2 / 2**8)
    assert any("pooled" in note for note in table.notes)


def test_pareto_front() -> None:
    def at(method: str, right: int, gib: float) -> RunRecord:
        return make_record(
            method, correct={"generated": answers(right, 10)}, metrics={"memory/peak_allocated_gib": gib}
        )

    rows = rows_of([at("full", 9, 10), at("grass", 8, 4), at("lora", 7, 5), at("lisa", 6, 3), make_record("base")])
    assert {row.method for row in rows if row.pareto} == {"full", "grass", "lisa"}


def test_the_untrained_model_is_ranked_without_numbers_it_has_not() -> None:
    (row,) = rows_of([make_record("base")])
    assert (row.rank, row.peak_allocated_gib, row.tokens_per_second, row.train_s) == (1, None, None, None)


def test_contaminated_tasks_have_an_average_without_them() -> None:
    correct = {"gsm8k": answers(2, 10), "svamp": answers(4, 10), "addsub": answers(9, 10)}
    (table,) = build_leaderboard([make_record(correct=correct, suite="arithmetic")])
    assert table.rows[0].accuracy == pytest.approx(0.5)
    assert table.rows[0].accuracy_clean == pytest.approx(0.3)
    assert any("AddSub" in note for note in table.notes)


def test_equal_accuracies_share_a_rank() -> None:
    records = [make_record(method) for method in ("lora", "lisa")]
    records.append(make_record("full", correct={"generated": [False] * 4}))
    assert [row.rank for row in rows_of(records)] == [1, 1, 3]


def test_nothing_makes_nothing() -> None:
    assert build_leaderboard([]) == []
