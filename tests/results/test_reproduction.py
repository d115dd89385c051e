"""What a comparison of a record with its rerun finds: each number that was changed, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from result_records import make_history, make_record, make_series

from grass_ray.results.environment import Environment, compare_environments
from grass_ray.results.record import RunRecord
from grass_ray.results.reproduction import compare_records


def record(**changes: object) -> RunRecord:
    made = make_record(
        metrics={"eval/average": 0.5, "train/loss": 1.0, "time/train_s": 10.0},
        series=make_series(0, 1.0, steps=20) | {"layers/p_00": [(10, 0.4)], "layers/p_01": [(10, 0.6)]},
        layers=make_history(num_layers=4, steps=60),
    )
    return made.model_copy(deep=True, update={"versions": {"torch": "2.13.0"}, "model_sha256": "a" * 64, **changes})


def differing(rerun: RunRecord, **options: object) -> list[str]:
    return [check.what for check in compare_records(record(), rerun, **options) if check.agrees is False]  # type: ignore[arg-type]


def test_a_record_agrees_with_itself_and_times_never_decide() -> None:
    rerun = record()
    rerun.metrics["time/train_s"] = 99.0
    rerun.series["offload/exposed_s"] = [(1, 0.5)]
    rerun.series["time/step_s"] = [(step, 7.0) for step, _ in rerun.series["time/step_s"]]
    assert differing(rerun) == []
    shown = {check.what: check.detail for check in compare_records(record(), rerun) if check.agrees is None}
    assert shown["time/train_s"] == "10, now 99 (9.90 times)"


def test_the_last_bit_of_one_loss_is_found() -> None:
    rerun = record()
    step, loss = rerun.series["train/loss"][6]
    rerun.series["train/loss"][6] = (step, math.nextafter(loss, 9.0))
    (check,) = [check for check in compare_records(record(), rerun) if check.agrees is False]
    assert check.what == "train/loss, every step"
    assert "1 of 20 values differ" in check.detail
    assert f"the first at step {step}: {loss!r}" in check.detail


def test_each_kind_of_change_is_found() -> None:
    rerun = record()
    rerun.metrics["eval/average"] = 0.75
    rerun.tasks["generated"].correct[1] = True
    assert rerun.layers is not None
    rerun.layers.visits[2] += 1
    rerun.series["layers/p_01"] = [(10, 0.61)]
    assert differing(rerun) == [
        "layers/p_01, every step",
        "layers: visits",
        "eval/average",
        "generated: right or wrong, every question",
    ]
    assert differing(record(status="failed", failure="loss became nan")) == ["status"]
    shorter = record()
    shorter.series["train/loss"] = shorter.series["train/loss"][:5]
    assert differing(shorter) == ["train/loss, every step"]


def test_an_accuracy_that_its_own_answers_do_not_give_is_found() -> None:
    forged = record()
    forged.tasks["generated"].accuracy = 0.9
    found = [check.what for check in compare_records(forged, record()) if check.agrees is False]
    assert found == ["generated: accuracy of the record itself"]


def test_numbers_that_are_none_agree_with_each_other() -> None:
    one, other = record(), record()
    for made in (one, other):
        made.metrics["train/loss"] = math.nan
        assert made.layers is not None
        made.layers.refreshes[0] = (10, (math.nan,) * 4, (0.25,) * 4)
    assert all(check.agrees is not False for check in compare_records(one, other))


def test_other_questions_and_other_answers_are_told_apart() -> None:
    rerun = record()
    rerun.tasks["generated"].example_ids[0] = "another"
    assert differing(rerun) == ["generated: questions"]
    answers = {("generated", "q0"): ["4"], ("generated", "q1"): [None]}
    changed = {**answers, ("generated", "q1"): ["5"]}
    assert differing(record(), answers=answers, new_answers=answers) == []
    assert differing(record(), answers=answers, new_answers=changed) == ["extracted answers, every question"]


def test_of_a_stopped_run_the_steps_it_came_to_are_compared() -> None:
    stopped = record(status="stopped", failure="interrupted after step 5 of 20", tasks={}, metrics={}, layers=None)
    for name, points in stopped.series.items():
        stopped.series[name] = points[:5]
    checks = compare_records(stopped, record())
    assert all(check.agrees is not False for check in checks)
    assert "its 10 steps" in checks[0].detail


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"versions": {"torch": "2.6.0"}}, "torch was 2.13.0, is 2.6.0"),
        ({"hardware": "Another CPU"}, "hardware was Test CPU, 2 cores, 24 GiB, is Another CPU"),
        ({"git_commit": "fedcba9876543210"}, "the commit was 012345678, is fedcba987"),
        ({"git_commit": None}, "the commit was 012345678, is unknown: no checkout"),
        ({"git_dirty": True}, "this checkout has uncommitted changes on top of 012345678"),
        ({"model_sha256": "b" * 64}, f"the base model's weights are others: sha256 was {'a' * 12}, is {'b' * 12}"),
        ({"train_sha256": "d" * 64}, f"the training rows are others: sha256 was {'c' * 12}, is {'d' * 12}"),
        ({"test_sha256": {}}, f"the test rows of generated are others: sha256 was {'e' * 12}, is unknown"),
    ],
)
def test_what_is_different_here_is_said(changes: dict[str, object], sentence: str) -> None:
    recorded = record(data={"train": {"rows_sha256": "c" * 64}})
    recorded.tasks["generated"].protocol["test_sha256"] = "e" * 64
    same: dict[str, object] = {
        "versions": recorded.versions,
        "hardware": recorded.hardware,
        "git_commit": recorded.git_commit,
        "git_dirty": False,
        "model_sha256": recorded.model_sha256,
        "train_sha256": "c" * 64,
        "test_sha256": {"generated": "e" * 64},
    }
    assert compare_environments(recorded, Environment(**same)) == []  # type: ignore[arg-type]
    assert compare_environments(recorded, Environment(**same | changes)) == [sentence]  # type: ignore[arg-type]


def test_a_record_of_an_older_version_says_what_cannot_be_checked() -> None:
    recorded = record(model_sha256=None, git_dirty=True)
    now = Environment(
        versions=recorded.versions,
        hardware=recorded.hardware,
        git_commit=recorded.git_commit,
        git_dirty=False,
        model_sha256="b" * 64,
        train_sha256=None,
    )
    said = compare_environments(recorded, now)
    assert "the original ran with uncommitted changes on top of 012345678" in said
    assert sum("were not hashed in the record" in sentence for sentence in said) == 3


def test_the_code_is_compared_by_its_files_where_the_record_hashed_them() -> None:
    recorded = make_record()
    recorded.data["inputs"] = {"package": "a" * 64, "tasks of lm-eval": "b" * 64}
    recorded.git_commit, recorded.git_dirty = "1" * 40, True
    same: dict[str, Any] = {
        "versions": recorded.versions,
        "hardware": recorded.hardware,
        "git_commit": "2" * 40,
        "git_dirty": True,
        "model_sha256": recorded.model_sha256,
        "train_sha256": recorded.data.get("train", {}).get("rows_sha256"),
        "test_sha256": {task: score.protocol.get("test_sha256") for task, score in recorded.tasks.items()},
    }

    def said(**inputs: str) -> list[str]:
        here = Environment(**same, inputs={name.replace("_", " "): value for name, value in inputs.items()})
        return [line for line in compare_environments(recorded, here) if "cannot be checked" not in line]

    tasks = {"tasks of lm-eval": "b" * 64}
    assert said(package="a" * 64, **tasks) == [], "another commit of the same files"
    assert said(package="c" * 64, **tasks)[:2] == [
        f"the files of grass_ray are others: sha256 was {'a' * 12}, is {'c' * 12}",
        f"the commit was {'1' * 9}, is {'2' * 9}",
    ]
    changed = f"the tasks of lm-eval are others: sha256 was {'b' * 12}, is {'d' * 12}"
    assert said(package="a" * 64, **{"tasks of lm-eval": "d" * 64}) == [changed]
