import json
from dataclasses import replace

import pytest
from task_parts import read_rows, record, write

from grass_ray.config import ConfigError
from grass_ray.tasks.row_files import read_file
from grass_ray.tasks.rows import MAX_ROW_CHARACTERS, Row
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
        (record(float("nan")), GSM8K, ["row 2", "'nan' is not a number"]),
        (record("1e999999"), GSM8K, ["row 2", "'1e999999' is not a number"]),
        (record("9" * 6000), GSM8K, ["row 2", "(6,000 characters)' is not a number"]),
        (record("1,5"), GSM8K, ["row 2", "'1,5' is not a number; a comma separates thousands"]),
        (record("12,34"), GSM8K, ["row 2", "a comma separates thousands"]),
        (record("1_000"), GSM8K, ["row 2", "'1_000' is not a number"]),
        (record("12 %"), GSM8K, ["row 2", "'12 %' is not a number"]),
        (record(None), GSM8K, ["row 2", "'answer' is NoneType"]),
        (record({"a": 1}), GSM8K, ["row 2", "'answer' is dict"]),
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


def test_what_a_file_holds_decides_how_it_is_read(tmp_path):
    records = [record("true"), record("false")]
    wanted = read_rows(write(tmp_path / "a.json", records), BOOLQ)
    lines = "\n".join(map(json.dumps, records))
    for name, content in {
        "lines.json": lines,
        "UPPER.JSONL": lines,
        "UPPER.JSON": records,
        "a.ndjson": lines,
        "no_suffix": lines,
        "a.txt": json.dumps(records, indent=1),
        "mark.jsonl": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode(),
        "mark.json": b"\xef\xbb\xbf\n " + lines.encode(),
        "a b#c?.jsonl": lines,
    }.items():
        assert read_rows(write(tmp_path / name, content), BOOLQ) == wanted, name


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", json.dumps([record()], indent=1), ["holds a JSON list", "rename it to .json"]),
        ("a.jsonl", json.dumps([record(), record()]), ["holds a JSON list"]),
        ("a.csv", "text,label\na,good\n", ["begins with 'text,label", ".jsonl (one object a line)"]),
        ("a.parquet", b"PAR1\x15\x04", ["is no JSON"]),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00\x00", ["is not a whole gzip file"]),
        ("a.json", json.dumps([record()]).encode("utf-16"), ["is no JSON in UTF-8"]),
        ("a.jsonl", json.dumps(record()).encode("utf-16-le"), ["is no JSON in UTF-8"]),
    ],
)
def test_a_file_of_another_kind_is_told_what_it_should_be(tmp_path, name, content, words):
    message = refused(write(tmp_path / name, content))
    assert all(word in message for word in words), message


def test_answers_that_are_written_differently_are_the_same_label(tmp_path):
    numbered = replace(BOOLQ, labels=("1", "2.5", "caf\u00e9"))
    rows = [record(1), record(1.0), record("1"), record(2.5), record("cafe\u0301 "), record("caf\u00e9")]
    found = [row.answer for row in read_rows(write(tmp_path / "a.json", rows), numbered)]
    assert found == ["1", "1", "1", "2.5", "caf\u00e9", "caf\u00e9"]


def test_an_input_of_null_is_none(tmp_path):
    assert read_rows(write(tmp_path / "a.json", [record(input=None)]), BOOLQ)[0].input == ""


@pytest.mark.parametrize("text", ["1,500", "-1,234,567.25", "1,00,000", "12.", ".5", "+3", "1e-05", "-0"])
def test_numbers_as_people_write_them(tmp_path, text):
    assert read_rows(write(tmp_path / "a.json", [record(text)]), GSM8K)[0].answer == text


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
    "too many digits": (json.dumps(record())[:-1] + f', "id": {"7" * 5000}}}', "number of more than 4,300 digits"),
    "nested too deeply": (json.dumps(record())[:-1] + f', "tree": {"[" * 9000}{"]" * 9000}}}', "nested too deeply"),
    "nested too deeply, with brackets in text": (
        f'{{"instruction": "a ] \\" }} , [ b", "tree": {"[" * 9000}{"]" * 9000}}}',
        "nested too deeply",
    ),
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
