import json

import pytest
from task_parts import record, write

from grass_ray.config import ConfigError
from grass_ray.tasks.rows import MAX_ROW_CHARACTERS, Row, read_file, read_rows
from grass_ray.tasks.suites import TASKS

BOOLQ, GSM8K = TASKS["boolq"], TASKS["gsm8k"]


def refused(path, task=BOOLQ) -> str:
    with pytest.raises(ConfigError) as error:
        read_rows(path, task)
    assert str(path) in str(error.value)
    return str(error.value)


def test_json_list_and_json_lines_give_the_same_rows(tmp_path):
    records = [record("true"), record("false")]
    rows = read_rows(write(tmp_path / "a.json", records), BOOLQ)
    assert rows == read_rows(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)) + "\n\n"), BOOLQ)
    assert rows[1] == Row(instruction="Is it so?", input="", output="the correct answer is false", answer="false")


def test_numbers_may_be_numbers_and_input_may_be_absent(tmp_path):
    row = record(12.5)
    del row["input"]
    assert read_rows(write(tmp_path / "a.json", [row]), GSM8K)[0].answer == "12.5"


def test_line_separators_inside_json_lines_do_not_split_rows(tmp_path):
    text = json.dumps(record(instruction="one\u2028two"), ensure_ascii=False)
    assert read_rows(write(tmp_path / "a.jsonl", text), BOOLQ)[0].instruction == "one\u2028two"


@pytest.mark.parametrize(
    ("bad", "task", "words"),
    [
        ({"instruction": "q", "output": "o"}, BOOLQ, ["row 2", "no 'answer'", "'instruction', 'output'"]),
        ({}, BOOLQ, ["row 2", "no 'instruction' and no 'output' and no 'answer'"]),
        (record(instruction=3), BOOLQ, ["row 2", "'instruction' is int, not text"]),
        (record(output=None), BOOLQ, ["row 2", "'output' is NoneType"]),
        (record(True), BOOLQ, ["row 2", "'answer' is bool"]),
        (record(["true"]), BOOLQ, ["row 2", "'answer' is list"]),
        (record("maybe"), BOOLQ, ["row 2", "unknown label 'maybe'", "true, false"]),
        (record("F"), TASKS["aqua"], ["row 2", "unknown label 'F'"]),
        (record("twelve"), GSM8K, ["row 2", "'twelve' is not a number"]),
        (record("inf"), GSM8K, ["row 2", "'inf' is not a number"]),
        (record(instruction="  "), BOOLQ, ["row 2", "'instruction' is empty"]),
        ("text", BOOLQ, ["row 2", "it is text, not an object"]),
    ],
)
def test_a_broken_row_is_named(tmp_path, bad, task, words):
    good = record({"number": "7", "letter": "A", "labels": "true"}[task.answer])
    message = refused(write(tmp_path / "a.json", [good, bad]), task)
    assert all(word in message for word in [*words, "1 of 2 rows"]), message


def test_five_mistakes_are_shown_and_all_are_counted(tmp_path):
    message = refused(write(tmp_path / "a.json", [record("maybe")] * 9 + [record()]))
    assert "9 of 10 rows" in message
    assert message.count("unknown label") == 5
    assert "and 4 more" in message


def test_a_broken_line_is_named_by_its_number(tmp_path):
    message = refused(write(tmp_path / "a.jsonl", json.dumps(record()) + "\n\n{'no': json}\n"))
    assert "row 3: broken JSON" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty"]),
        ("[]", ["holds no rows"]),
        ('{"a": 1}', ["holds an object", "JSON list"]),
        (json.dumps([record(), record()])[:-20], ["broken JSON", "about row 2"]),
        (json.dumps([record()]).encode()[:-2] + b"\n\xff]", ["broken JSON", "line 2"]),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, content, words):
    message = refused(write(tmp_path / "a.json", content))
    assert all(word in message for word in words), message


def test_an_empty_json_lines_file(tmp_path):
    assert "holds no rows" in refused(write(tmp_path / "a.jsonl", "\n"))


def test_a_missing_file(tmp_path):
    assert "No such file" in refused(tmp_path / "absent.json")


def test_a_mixture_does_not_check_labels(tmp_path):
    assert len(read_rows(write(tmp_path / "a.json", [record("true"), record("option2"), record("12")]), None)) == 3


BROKEN = {
    "missing key": (json.dumps({"instruction": "q", "answer": "true"}), "no 'output'"),
    "wrong type": (json.dumps(record(output=5)), "'output' is int, not text"),
    "unknown label": (json.dumps(record("perhaps")), "unknown label 'perhaps'"),
    "invalid UTF-8": (json.dumps(record(instruction="caf@?")).encode().replace(b"@", b"\xe9"), "has the byte 0xe9"),
    "lone surrogate": (json.dumps(record(instruction="\ud800?")), "the lone surrogate U+D800"),
    "huge": (json.dumps(record(instruction="x" * (MAX_ROW_CHARACTERS + 1))), "a row may have 1,000,000"),
    "not an object": ("[1, 2]", "it is a list, not an object"),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_refused_or_left_out_and_counted(tmp_path, kind, suffix):
    bad, words = BROKEN[kind]
    lines = [
        json.dumps(record()).encode(),
        bad if isinstance(bad, bytes) else bad.encode(),
        json.dumps(record()).encode(),
    ]
    content = b"\n".join(lines) if suffix == "jsonl" else b"[" + b",".join(lines) + b"]"
    path = write(tmp_path / f"a.{suffix}", content)
    message = refused(path)
    assert "1 of 3 rows" in message
    assert "row 2: " in message
    assert words in message
    assert "data.broken_rows=skip" in message
    reading = read_file(path, BOOLQ, broken_rows="skip")
    assert len(reading.rows) == 2
    assert reading.provenance["rows_skipped"] == 1
    assert words in reading.provenance["mistakes"][0]


def test_a_line_that_is_not_json_can_be_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps(record()) + "\nnonsense\n")
    assert read_file(path, BOOLQ, broken_rows="skip").skipped[0].startswith("row 2: broken JSON")


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "[{", json.dumps([record("perhaps")])])
def test_a_file_without_a_good_row_is_refused_even_when_skipping(tmp_path, content):
    with pytest.raises(ConfigError, match=r"a\.json"):
        read_file(write(tmp_path / "a.json", content), BOOLQ, broken_rows="skip")
