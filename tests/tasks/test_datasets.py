"""Data sets as people have them: every file format and shape, and every kind of trouble with a clear message."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from task_parts import write

from grass_ray.config import ConfigError, DataConfig, DatasetSource
from grass_ray.tasks.dataset_rows import find_dataset
from grass_ray.tasks.rows import ChatRow, TextRow
from grass_ray.tasks.sources import check_data, load_test_rows, load_train_rows

CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
SHAREGPT = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Hi {number}?"}, {"role": "assistant", "content": f"Ho {number}."}]


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def load(path: Path, **settings: Any) -> Any:
    """The rows of a whole file, which are its own test set here, so that none is held out."""
    broken = settings.pop("broken_rows", "refuse")
    source = DatasetSource(name="mine", path=str(path), test=str(path), **settings)
    return load_test_rows("mine", DataConfig(suite="mine", tasks=("mine",), source=source, broken_rows=broken))


def messages_of(row: Any) -> Any:
    assert isinstance(row, ChatRow)
    return json.loads(row.messages)


# ------------------------------------------------------------------------------------------------------------- formats

PAIRS = [{"prompt": f"{n} and 1?", "completion": f"{n + 1}"} for n in range(5)]


def as_csv(separator: str) -> str:
    return "".join(separator.join(cells) + "\n" for cells in [("prompt", "completion"), *(r.values() for r in PAIRS)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", lines(PAIRS)),
        ("rows.ndjson", lines(PAIRS)),
        ("ROWS.JSONL", lines(PAIRS)),
        ("rows.json", json.dumps(PAIRS)),
        ("rows.json", lines(PAIRS)),
        ("rows.jsonl", "\ufeff" + lines(PAIRS).replace("\n", "\r\n")),
        ("rows.csv", as_csv(",")),
        ("rows.csv", "\ufeff" + as_csv(",").replace("\n", "\r\n")),
        ("rows.tsv", as_csv("\t")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_text_format_gives_the_same_rows(name: str, text: str, packed: bool, tmp_path: Path) -> None:
    path = write(tmp_path / (name + ".gz" * packed), gzip.compress(text.encode()) if packed else text.encode())
    rows = load(path)
    assert [row.plain for row in rows.rows] == [(pair["prompt"], pair["completion"]) for pair in PAIRS]
    assert rows.provenance["files"][0]["shape"] == "prompt_completion"


@pytest.mark.parametrize("records", [PAIRS, [{"messages": chat(n)} for n in range(5)]])
def test_parquet_and_saved_folders_give_the_rows_of_json(records: list[Any], tmp_path: Path) -> None:
    expected = load(write(tmp_path / "rows.jsonl", lines(records))).rows
    made = datasets.Dataset.from_list(records)
    made.to_parquet(str(tmp_path / "rows.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=made, test=made.select([4])).save_to_disk(str(tmp_path / "splits"))
    assert load(tmp_path / "rows.parquet").rows == expected
    assert load(tmp_path / "saved").rows == expected
    source = DatasetSource(name="mine", path=str(tmp_path / "splits"))
    data = DataConfig(suite="mine", tasks=("mine",), source=source)
    assert load_test_rows("mine", data).rows == expected[4:]
    assert load_train_rows(data).rows == expected[:4]  # a copy of a held-out row is not trained on


def test_old_folders_keep_a_list_of_messages_as_lists_of_their_parts(tmp_path: Path) -> None:
    columns = {"role": ["user", "assistant"], "content": ["Hi?", "Ho."]}
    assert messages_of(load(write(tmp_path / "a.jsonl", lines([{"messages": columns}]))).rows[0]) == CHAT


# -------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        ({"messages": CHAT}, "messages"),
        ({"messages": SHAREGPT}, "messages"),
        ({"conversations": SHAREGPT}, "conversations"),
        ({"conversations": CHAT}, "conversations"),
        ({"messages": json.dumps(CHAT)}, "messages"),
        ({"messages": CHAT, "text": "Hi? Ho."}, "messages"),
        ({"prompt": "Hi?", "completion": "Ho."}, "prompt_completion"),
        ({"instruction": "Hi?", "output": "Ho."}, "alpaca"),
        ({"instruction": "Hi?", "input": "", "output": "Ho.", "text": "all of it"}, "alpaca"),
    ],
)
def test_shapes_are_detected(record: Any, shape: str, tmp_path: Path) -> None:
    rows = load(write(tmp_path / "a.jsonl", lines([record])))
    assert rows.provenance["files"][0]["shape"] == shape
    assert messages_of(rows.rows[0]) == CHAT


def test_text_is_learned_whole(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.jsonl", lines([{"text": "Hi."}]))).rows == (TextRow(text="Hi."),)


def test_an_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    (row,) = load(write(tmp_path / "a.jsonl", lines([{"instruction": "Add.", "input": "1 2", "output": 3}]))).rows
    assert messages_of(row)[0]["content"] == "Add.\n\n1 2"
    assert row.plain[0].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"question": "Hi?", "reply": "Ho.", "text": "x"}]))
    (row,) = load(path, columns={"prompt": "question", "completion": "reply"}).rows
    assert messages_of(row) == CHAT
    assert isinstance(load(path, shape="text").rows[0], TextRow)


def test_tools_and_other_keys_are_left_alone(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "g", "x": []}}]
    record = {"messages": [CHAT[0], call, {"role": "tool", "content": "2", "name": "f"}, CHAT[1]], "tools": tools}
    (row,) = load(write(tmp_path / "a.jsonl", lines([record]))).rows
    assert json.loads(row.tools) == tools
    assert messages_of(row) == [
        CHAT[0],
        {**call, "content": ""},
        {"role": "tool", "content": "2", "name": "f"},
        CHAT[1],
    ]


# ------------------------------------------------------------------------------------------------------------ held out


def test_a_share_is_held_out_by_a_fixed_seed_and_copies_of_it_are_not_trained_on(tmp_path: Path) -> None:
    records = [{"messages": chat(number % 20)} for number in range(40)]
    path = write(tmp_path / "a.jsonl", lines(records))
    data = DataConfig(suite="a", tasks=("a",), source=find_dataset(str(path)))
    train, test = load_train_rows(data), load_test_rows("a", data)
    assert (len(train.rows), len(test.rows)) == (36, 2)
    assert not set(train.rows) & set(test.rows)
    entry = train.provenance["files"][0]
    assert (entry["duplicates"], entry["rows_held_out"], entry["rows"]) == (20, 4, 36)
    assert load_test_rows("a", data).rows == test.rows
    more = data.model_copy(update={"source": data.source.model_copy(update={"test_share": 0.25})})
    assert len(load_test_rows("a", more).rows) == 5


def test_another_file_can_be_held_out(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", lines([{"messages": chat(number)} for number in range(4)]))
    test = write(tmp_path / "b.csv", "prompt,completion\nHi 3?,Ho 3.\n")
    source = DatasetSource(name="a", path=str(train), test=str(test))
    data = DataConfig(suite="a", tasks=("a",), source=source)
    assert len(load_test_rows("a", data).rows) == 1
    assert len(load_train_rows(data).rows) == 4


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"text": "one"}]))
    assert load(path).rows == (TextRow(text="one"),)
    write(path, lines([{"text": "one"}, {"text": "two"}]))
    assert len(load(path).rows) == 2


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("chats.jsonl.gz", "chats"),
        ("my-chats v2.json", "my_chats_v2"),
        ("support/train.jsonl", "support"),
        ("gsm8k.csv", "gsm8k_rows"),
        ("生.json", "data"),
    ],
)
def test_a_task_is_named_after_its_file(given: str, name: str, tmp_path: Path) -> None:
    assert find_dataset(str(write(tmp_path / given, "[]"))).name == name


# -------------------------------------------------------------------------------------------------------------- trouble

GOOD = {"messages": CHAT}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "row 2: no 'messages'; it has no keys"),
        ({"message": CHAT}, "row 2: no 'messages'; it has 'message'"),
        ([], "row 2: it is a list, not an object"),
        (7, "row 2: it is a number, not an object"),
        ({"messages": []}, "row 2: 'messages' is empty"),
        ({"messages": None}, "row 2: 'messages' is null, not a list"),
        ({"messages": "hello"}, "row 2: 'messages' is text that is no JSON list: 'hello'"),
        ({"messages": [CHAT]}, "row 2: message 1 is a list, not an object with a role; several conversations are"),
        ({"messages": ["hi"]}, "row 2: message 1 is text, not an object with a role"),
        ({"messages": [{"content": "hi"}]}, "row 2: message 1 has no 'role' (or 'from'); it has 'content'"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "row 2: message 1 has the role 'robot'; known are system"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "row 2: message 1 has the role ['user']"),
        ({"messages": CHAT[:1]}, "row 2: it has no message of the assistant"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "  "}]}, "row 2: message 2 (assistant) is empty"),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, "row 2: message 2 (assistant): 'content' is null, not text"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": {"a": 1}}]}, "'content' is an object, not text"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": True}]}, "'content' is true or false, not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, CHAT[1]]},
            "row 2: message 1 (user) has a part that is not text",
        ),
        ({"messages": {"role": ["user"], "content": []}}, "row 2: 'messages' has lists of different lengths"),
        ({"messages": CHAT, "tools": "?"}, "row 2: 'tools' is text that is no JSON list"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "\ud800"}]}, "'messages' is not UTF-8 text"),
    ],
)
def test_a_broken_conversation_is_named_by_file_and_row(record: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", lines([GOOD, record, GOOD]))
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: 1 of 3 rows cannot be used: row 2: ")
    assert message in str(error.value)
    assert str(error.value).endswith(". data.broken_rows=skip leaves them out")
    skipped = load(path, broken_rows="skip")
    assert (len(skipped.rows), skipped.provenance["rows_skipped"]) == (2, 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "no 'completion'; it has 'prompt'"),
        ({"prompt": "a", "completion": None}, "'completion' is null, not text"),
        ({"prompt": CHAT, "completion": "b"}, "'prompt' is a list, not text; a list of messages is named with"),
        ({"prompt": {"a": 1}, "completion": "b"}, "'prompt' is an object, not text"),
        ({"prompt": "a", "completion": False}, "'completion' is true or false, not text"),
    ],
)
def test_a_broken_pair_is_named_by_file_and_row(record: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", lines([{"prompt": "a", "completion": "b"}, record]))
    with pytest.raises(ConfigError, match="1 of 2 rows cannot be used: row 2: ") as error:
        load(path)
    assert message in str(error.value)


def test_numbers_are_learned_as_text_and_counted(tmp_path: Path) -> None:
    rows = load(
        write(tmp_path / "a.jsonl", lines([{"prompt": 1, "completion": 2.5}, {"prompt": "a", "completion": 3}]))
    )
    assert [row.plain for row in rows.rows] == [("1", "2.5"), ("a", "3")]
    assert rows.provenance["files"][0]["numbers_as_text"] == 3


def test_what_a_csv_file_says_stays_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'prompt,completion\n007,NA\n"1,5","a ""b""\nc"\nnull,\n\n1e3,True\n')
    assert [row.plain for row in load(path).rows] == [
        ("007", "NA"),
        ("1,5", 'a "b"\nc'),
        ("null", ""),
        ("1e3", "True"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty; it must begin with a line that names the columns"),
        ("a.csv", "prompt,prompt\na,b\n", "names a column twice: prompt"),
        ("a.csv", "prompt,completion\na\nb,c\n", "row 1: it has 1 values, and the header 2"),
        ("a.csv", "prompt,completion\n", "holds no rows that are objects"),
        ("a.csv", 'prompt,completion\n"a,b\n', "is broken CSV in line"),
        ("a.csv", "prompt;completion\na;b\n", "has the columns prompt;completion, which are no shape"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), "is no text in UTF-8: it holds zero bytes"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", "", "is empty"),
        ("a.json", "{}", "holds an object; it must hold a JSON list of rows"),
        ("a.json", '{"data": [{"text": "a"}]}', "holds an object; it must hold a JSON list of rows"),
        ("a.json", '[{"text": "a"},', "is broken JSON"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "row 2: broken JSON"),
        (
            "a.jsonl",
            '{"question": "a", "answer": "b"}\n',
            "has the columns question, answer, which are no shape that is",
        ),
        ("a.jsonl", "[1, 2]\n", "holds a JSON list, and a .jsonl file one JSON object a line"),
        ("a.jsonl.gz", "not compressed", "it is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "it is not a whole gzip file"),
        ("a.parquet", "no parquet", "as Parquet"),
        ("a.parquet.gz", "no parquet", "is compressed twice"),
        ("a.txt", "hello", "is no data file that is known; give .json, .jsonl, .csv, .tsv, .parquet"),
        ("a.jsonl", b'{"text": "\xff"}\n', "row 1: 'text' is not UTF-8 text: it has the byte 0xff"),
    ],
)
def test_a_broken_file_has_one_clear_message(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def check(path: str, **settings: Any) -> None:
    source = find_dataset(path).model_copy(update=settings)
    check_data(DataConfig(suite=source.name, tasks=(source.name,), source=source))


def test_what_is_no_data_set_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"was not written by save_to_disk of datasets$"):
        check(str(folder))
    write(folder / "train.jsonl", "")
    with pytest.raises(ConfigError, match=r"it has train.jsonl: name one of them"):
        check(str(folder))
    for absent in ("gone.jsonl", "./gone", "/gone/a", "a/b/c"):
        with pytest.raises(ConfigError, match="there is no data set "):
            check(absent)
    with pytest.raises(ConfigError, match="cannot load the data set nobody/nothing from the Hugging Face Hub"):
        check("nobody/nothing")


def test_what_cannot_be_held_out_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"text": "one"}, {"text": "one"}]))
    with pytest.raises(ConfigError, match=r"has 1 different row\(s\), of which none can be held out"):
        check(str(path))
    with pytest.raises(ConfigError, match=r"has no row that is not held out, too"):
        check(str(path), test=str(path))
    with pytest.raises(
        ConfigError, match=r"data.source.test=test is no data file or folder, and no split: .* has no spl"
    ):
        check(str(path), test="test")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]))
    splits.save_to_disk(str(tmp_path / "saved"))
    check(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match=r"has no split 'dev' \(data.source.split\); it has train"):
        check(str(tmp_path / "saved"), split="dev")


def test_the_name_of_a_built_in_task_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"text": "one"}, {"text": "two"}]))
    with pytest.raises(ConfigError, match="the name 'boolq' is taken by a built-in task"):
        check(str(path), name="boolq")
