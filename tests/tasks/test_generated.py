import re

import pytest
from task_parts import read_rows, write

from grass_ray.config import ConfigError
from grass_ray.tasks.extraction import extract_answer, is_correct
from grass_ray.tasks.generated import KINDS, generate, split_of
from grass_ray.tasks.suites import TASKS

TASK = TASKS["generated"]


def test_train_and_test_never_meet_whatever_the_seeds():
    train = {row.instruction for seed in (0, 1) for row in generate("train", rows=4000, seed=seed)}
    test = {row.instruction for seed in (0, 1, 2) for row in generate("test", rows=1000, seed=seed)}
    assert len(train) > 7000
    assert not train & test
    assert {split_of(question) for question in train} == {"train"}
    assert {split_of(question) for question in test} == {"test"}


def test_the_same_arguments_give_the_same_rows_and_more_only_adds():
    assert generate("train", rows=50, seed=3) == generate("train", rows=80, seed=3)[:50]
    assert generate("train", rows=50, seed=3) != generate("train", rows=50, seed=4)


def test_no_problem_comes_twice():
    assert len({row.instruction for row in generate("test", rows=3000, seed=0)}) == 3000


def test_every_worked_step_is_right_and_ends_in_the_answer():
    for row in generate("train", rows=1500, seed=0):
        steps = re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)", row.output)
        assert 1 <= len(steps) <= 2
        for a, sign, b, result in steps:
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b), "/": int(a) / int(b)}[sign]
            assert value == int(result), row.output
        assert steps[-1][3] == row.answer
        assert row.output.endswith(f"The answer is {row.answer}.")
        assert 1 <= int(row.answer) < 100
        for extraction in ("published", "strict"):
            assert is_correct(extract_answer(row.output, TASK, extraction), row.answer, TASK)


def test_all_kinds_are_made_and_are_short():
    rows = generate("test", rows=500, seed=0)
    openings = {re.sub(r"\d+|[A-Z][a-z]+ |\b[a-z]+s\b", "", row.instruction)[:25] for row in rows}
    assert len(KINDS) >= 6
    assert len(openings) >= 6
    assert max(len(row.instruction.split()) for row in rows) <= 24


def test_the_rows_pass_the_checks_for_files(tmp_path):
    rows = [vars(row) for row in generate("test", rows=20, seed=0)]
    assert len(read_rows(write(tmp_path / "a.json", rows), TASK)) == 20


def test_more_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="at most"):
        generate("train", rows=10_000_000, seed=0)
