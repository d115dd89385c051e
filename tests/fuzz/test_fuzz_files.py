"""Data rows, records, checkpoints, deltas and caches, broken at random: read whole, or refused in one message."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import JUNK, LEAVES, TEXT, changed, damaged, outcome
from hypothesis import given
from hypothesis import strategies as st
from result_records import asha, make_history, make_record, make_series, members
from small import make_llama, short_run
from torch import nn

from grass_ray.config import DataConfig, ModelConfig
from grass_ray.export.delta import apply_delta, save_delta
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.page.page import render_page
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render
from grass_ray.results.searches import best_settings, left_out
from grass_ray.results.verification.verify import verify
from grass_ray.tasks.conversations import SIMPLE, encode_chat
from grass_ray.tasks.dataset_rows import DatasetRows, find_dataset
from grass_ray.tasks.inference.token_cache import TokenCache
from grass_ray.tasks.row_files import read_file
from grass_ray.tasks.rows import ChatRow, RowError
from grass_ray.tasks.suites import TASKS
from grass_ray.training.checks import tokenizer_to_check
from grass_ray.training.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------------------------------------------------- data rows

QUESTION = {"instruction": "Is it true or false?", "input": "", "output": "true", "answer": "true"}
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}]
SHAPES: list[dict[str, Any]] = [
    {"messages": CHAT},
    {"messages": CHAT, "tools": TOOLS},
    {"conversations": SHAREGPT},
    {"prompt": "1 + 1 =", "completion": "2"},
    {"instruction": "Add", "input": "1 and 2", "output": "3"},
    {"text": "A text."},
]


@st.composite
def json_files(draw: st.DrawFn, row: Any) -> tuple[str, bytes]:
    """A name and the bytes of a file with good and broken rows."""
    rows = [row, *draw(st.lists(st.one_of(changed(row), st.just(row), JUNK), max_size=4))]
    name = draw(st.sampled_from(["a.json", "a.jsonl", "a.jsonl", "a.ndjson", "a.json.gz", "a.jsonl.gz"]))
    lines = name.removesuffix(".gz") != "a.json"
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    content = text.encode()
    if draw(st.integers(0, 3)) == 0:
        content = draw(damaged(content))
    if name.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
        content = draw(damaged(content)) if draw(st.integers(0, 2)) == 0 else content
    return name, content


@given(json_files(QUESTION), st.sampled_from(["refuse", "skip"]))
def test_rows_of_a_task(folder: Path, file: tuple[str, bytes], broken_rows: Any) -> None:
    path = folder / file[0]
    path.write_bytes(file[1])
    reading = outcome(lambda: read_file(path, TASKS["boolq"], broken_rows=broken_rows))
    if reading is not None:
        assert reading.rows
        assert all(row.answer in ("true", "false") for row in reading.rows)


@st.composite
def table_files(draw: st.DrawFn) -> tuple[str, bytes]:
    row = draw(st.sampled_from(SHAPES))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=draw(st.sampled_from([",", "\t"])))
    writer.writerow(row)
    for _ in range(draw(st.integers(0, 4))):
        cells = draw(changed({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}))
        writer.writerow(cells.values() if isinstance(cells, dict) else [str(cells)])
    content = text.getvalue().encode("utf-8", errors="surrogatepass")
    if draw(st.integers(0, 2)) == 0:
        content = draw(damaged(content))
    return draw(st.sampled_from(["a.csv", "a.tsv", "a.parquet"])), content


@given(st.one_of(st.sampled_from(SHAPES).flatmap(json_files), table_files()), st.sampled_from(["refuse", "skip"]))
def test_a_data_set_in_any_shape(folder: Path, file: tuple[str, bytes], broken_rows: Any) -> None:
    path = folder / file[0]
    path.write_bytes(file[1])
    source = find_dataset(str(path))
    data = DataConfig(suite=source.name, tasks=(source.name,), source=source, broken_rows=broken_rows)
    rows = DatasetRows(source, data)
    outcome(lambda: rows.check(training=True))
    loaded = outcome(rows.train_rows)
    tokenizer = tokenizer_to_check(ModelConfig(name="tiny"))
    for row in loaded.rows if loaded is not None else ():
        if isinstance(row, ChatRow):
            try:
                ids, learned = encode_chat(tokenizer, row, SIMPLE)
            except RowError:
                continue
            assert len(ids) == len(learned)
            assert any(learned)


# ------------------------------------------------------------------------------------------------------------- records

RECORDS = [
    *(record.model_dump_json() for record in (*asha()[:2], members()[1], make_record("full"))),
    make_record("grass", layers=make_history(), series=make_series(0, 2.0)).model_dump_json(),
    make_record("lora", status="failed", failure="no memory").model_dump_json(),
    make_record("lisa", losses={"generated": [0.1, 0.5, 0.2, 3.0]}).model_dump_json(),
]


@st.composite
def record_files(draw: st.DrawFn) -> tuple[str, bytes]:
    text = draw(st.sampled_from(RECORDS))
    if draw(st.integers(0, 4)) == 0:
        content = draw(damaged(text.encode()))
    else:
        content = json.dumps(draw(changed(json.loads(text)))).encode()
    if draw(st.booleans()):
        packed = gzip.compress(content, mtime=0)
        return "record.json.gz", draw(st.one_of(st.just(packed), damaged(packed)))
    return "record.json", content


@given(record_files())
def test_a_record_and_everything_made_of_it(folder: Path, file: tuple[str, bytes]) -> None:
    path = folder / file[0]
    path.write_bytes(file[1])
    record = outcome(lambda: RunRecord.load(path))
    if record is None:
        return
    others = [RunRecord.model_validate_json(RECORDS[0]), make_record("full", seed=1)]
    for records in ([record], [record, *others]):
        tables = outcome(lambda records=records: build_leaderboard(records))
        for form in ("table", "markdown", "csv", "json"):
            outcome(lambda form=form, tables=tables: render(tables or [], form))  # type: ignore[arg-type]
        outcome(lambda records=records: (best_settings(records), left_out(records)))


@pytest.mark.long
@given(record_files())
def test_the_page_and_the_verification_of_a_record(tmp_path_factory: pytest.TempPathFactory, file: Any) -> None:
    place = tmp_path_factory.mktemp("result") / "run"
    place.mkdir()
    (place / file[0]).write_bytes(file[1])
    record = outcome(lambda: RunRecord.load(place / file[0]))
    outcome(lambda: verify(place))
    if record is not None:
        page = outcome(lambda: render_page(build_leaderboard([record]), [record]))
        assert page is None or "<script>alert" not in page


# # ------------------------------------------------------------------------------------- checkpoints and deltas


SUMS = "SHA256SUMS"


def make_run() -> Run:
    return Run.prepare(short_run("grass", steps=4), torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("good") / "checkpoint"
    run = make_run()
    for _ in run.fit(2):
        pass
    run.save(place)
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.fixture(scope="module")
def started() -> Run:
    return make_run()


@given(st.data())
def test_a_checkpoint(folder: Path, checkpoint: dict[str, bytes], started: Run, data: st.DataObject) -> None:
    place = folder / "checkpoint"
    place.mkdir(exist_ok=True)
    chosen = data.draw(st.sampled_from(sorted(checkpoint)))
    for name, content in checkpoint.items():
        if name == chosen and name == "state.json" and data.draw(st.booleans()):
            content = json.dumps(data.draw(changed(json.loads(content)))).encode()
        elif name == chosen:
            content = data.draw(damaged(content))
        (place / name).write_bytes(content)
    same = all((place / name).read_bytes() == content for name, content in checkpoint.items())
    loaded = outcome(lambda: started.restore(place) or True)
    assert (loaded is not None) == same, chosen
    # a file that somebody made, with hashes that are right
    sums = [f"{hashlib.sha256((place / name).read_bytes()).hexdigest()}  {name}" for name in checkpoint if name != SUMS]
    (place / SUMS).write_text("\n".join(sums) + "\n")
    outcome(lambda: started.restore(place))


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module, Path]:
    base, trained = make_llama(), make_llama()
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight += 1
    place = tmp_path_factory.mktemp("delta") / "mine"
    save_delta(base, trained, place, base_model=ModelConfig(name="some/llama", revision="abc"))
    return base, trained, place


@given(st.data())
def test_a_delta(folder: Path, delta: tuple[nn.Module, nn.Module, Path], data: st.DataObject) -> None:
    base, trained, good = delta
    place = folder / "delta"
    place.mkdir(exist_ok=True)
    chosen = data.draw(st.sampled_from(sorted(path.name for path in good.iterdir())))
    for path in good.iterdir():
        content = path.read_bytes()
        if path.name == chosen == "delta.json" and data.draw(st.booleans()):
            content = json.dumps(data.draw(changed(json.loads(content)))).encode()
        elif path.name == chosen:
            content = data.draw(damaged(content))
        (place / path.name).write_bytes(content)
    model = make_llama()
    applied = outcome(lambda: apply_delta(model, place))
    expected = (base if applied is None else trained).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    if applied is not None:
        assert applied.describe()


@given(st.data())
def test_the_token_cache(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tokenizer = tokenizer_to_check(ModelConfig(name="tiny"))
    place = tmp_path_factory.mktemp("cache")
    texts = [f"What is {number} + 3?" for number in range(12)]
    expected = TokenCache(tokenizer, place).encode(texts)
    (file,) = place.iterdir()
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    assert TokenCache(tokenizer, place).encode(texts) == expected


@given(st.dictionaries(TEXT, LEAVES, max_size=4))
def test_a_row_without_any_shape(folder: Path, row: dict[str, Any]) -> None:
    path = folder / "odd.jsonl"
    path.write_text(json.dumps(row) + "\n")
    source = find_dataset(str(path))
    data = DataConfig(suite=source.name, tasks=(source.name,), source=source)
    outcome(lambda: DatasetRows(source, data).check(training=True))
