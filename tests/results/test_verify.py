"""``grass-ray verify``: everything that is committed agrees, and a number that was changed is found, by name."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from result_records import answers, make_record
from small import REPOSITORY

from grass_ray.cli import main
from grass_ray.results.record import RunRecord
from grass_ray.results.recorded import find_results, read_records
from grass_ray.results.verification.verify import VerifiedResult, verify, without_records

RESULTS = REPOSITORY / "benchmarks" / "results"
Edit = Callable[[Path], None]


def found_in(results: list[VerifiedResult]) -> list[str]:
    return [f"{check.what}: {text}" for result in results for check in result.checks for text in check.disagreements]


def test_everything_that_is_committed_agrees() -> None:
    results = verify(RESULTS)
    assert found_in(results) == [], "grass-ray verify benchmarks/results --rewrite makes tables anew from their records"
    assert {result.folder for result in results} == {path.parent for path in RESULTS.rglob("records")}
    assert sum(result.num_records for result in results) >= 74
    for result in results:
        compared = {check.what for check in result.checks if check.numbers}
        assert {"answers", "averages", "steps", "configurations", "leaderboard.json", "leaderboard.md"} <= compared
    assert "offload.json" in without_records(RESULTS)["."]


# --------------------------------------------------------------------------------------------------- changed numbers


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Two recorded results: one with a search of learning rates, one whose run ids name fingerprints."""
    for name in ("comparison", "example_sweep"):
        shutil.copytree(RESULTS / name, tmp_path / name, ignore=shutil.ignore_patterns("*.png"))
    return tmp_path


def in_record(name: str, change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return edit


def in_text(name: str, old: str, new: str) -> Edit:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return edit


def in_row(method: str, **values: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "comparison" / "leaderboard.json"
        rows = json.loads(path.read_text())
        next(row for row in rows if row["method"] == method).update(values)
        path.write_text(json.dumps(rows))

    return edit


def swap_rows(folder: Path) -> None:
    path = folder / "comparison/leaderboard.md"
    lines = path.read_text().splitlines()
    lines[4:6] = reversed(lines[4:6])
    path.write_text("\n".join(lines))


def flip(answers: list[bool]) -> None:
    answers[0] = not answers[0]


GRASS = "comparison/records/grass-s1.json"
SWEPT = "example_sweep/records/grass-smollm2_135m-generated-s1.json"
FALSIFIED: dict[str, tuple[Edit, str]] = {
    "an accuracy": (
        in_record(GRASS, lambda record: record["tasks"]["arc_easy"].update(accuracy=0.5)),
        "answers: grass-s1.json, accuracy of arc_easy: 0.5 given, 0.4166666666666667 recomputed",
    ),
    "a right answer": (
        in_record(GRASS, lambda record: flip(record["tasks"]["openbookqa"]["correct"])),
        "answers: grass-s1.json, accuracy of openbookqa: 0.25 given, 0.3333333333333333 recomputed",
    ),
    "a question left out": (
        in_record(
            GRASS,
            lambda record: record["tasks"]["openbookqa"].update(
                {key: record["tasks"]["openbookqa"][key][1:] for key in ("correct", "example_ids")},
                num_examples=11,
                accuracy=3 / 11,
            ),
        ),
        "answers: grass-s1.json, number of questions of openbookqa: 11 given, 12 recomputed",
    ),
    "a task left out": (
        in_record(GRASS, lambda record: record["tasks"].pop("openbookqa")),
        "answers: grass-s1.json, tasks: ['arc_easy', 'arc_challenge'] given, ['arc_easy', 'arc_challenge', 'op",
    ),
    "an average": (
        in_record(GRASS, lambda record: record["metrics"].update({"eval/average": 0.3})),
        "averages: grass-s1.json, eval/average: 0.3 given, 0.2777777777777778 recomputed",
    ),
    "an average that nothing makes": (
        in_record(GRASS, lambda record: record["metrics"].update({"eval/gsm8k/accuracy": 0.3})),
        "averages: grass-s1.json, eval/gsm8k/accuracy: 0.3 given, none recomputed",
    ),
    "a speed": (
        in_record(SWEPT, lambda record: record["metrics"].update({"throughput/tokens_per_second": 300.0})),
        "averages: grass-smollm2_135m-generated-s1.json, throughput/tokens_per_second: 300.0 given, 119.9",
    ),
    "the time of a step": (
        in_record(SWEPT, lambda record: record["series"]["time/step_s"].__setitem__(4, [5, 0.1])),
        "averages: grass-smollm2_135m-generated-s1.json, time/train_s: 76.85",
    ),
    "host memory": (
        in_record(SWEPT, lambda record: record["metrics"].update({"memory/host_pinned_gib": 0.1})),
        "averages: grass-smollm2_135m-generated-s1.json, memory/host_pinned_gib: 0.1 given, 0.26",
    ),
    "a step": (
        in_record(GRASS, lambda record: record["series"]["train/loss"].pop(7)),
        "steps: grass-s1.json, number of steps: 15 given, 16 recomputed",
    ),
    "steps in disorder": (
        in_record(GRASS, lambda record: record["series"]["train/loss"].insert(0, [3, 1.0])),
        "steps: grass-s1.json, steps of train/loss: [3, 1, 2, ",
    ),
    "a draw": (
        in_record(GRASS, lambda record: record["layers"]["intervals"].__setitem__(0, [2, [0, 1]])),
        "layers: grass-s1.json, visits: ",
    ),
    "a probability": (
        in_record(GRASS, lambda record: record["series"]["layers/p_05"].__setitem__(0, [1, 0.5])),
        "layers: grass-s1.json, layers/p_05 of step 1: 0.5 given, 0.0252",
    ),
    "a setting": (
        in_record(SWEPT, lambda record: record["config"]["method"]["sampler"].update(temperature=1.0)),
        "configurations: grass-smollm2_135m-generated-s1.json, fingerprint of the configuration in 20261126-",
    ),
    "a learning rate": (
        in_record(GRASS, lambda record: record["config"]["method"]["optimizer"].update(lr=0.001)),
        "learning rates: grass-s1, best of its search: 0.001 given, 0.003 recomputed",
    ),
    "a seed": (
        in_record(GRASS, lambda record: record["config"].update(seed=5)),
        "configurations: grass-s1.json, name: grass-smollm2_135m-commonsense-s1 given, grass-smollm2_135m-common",
    ),
    "a file under another name": (
        lambda folder: (folder / GRASS).rename(folder / "comparison/records/lora-s3.json"),
        "configurations: lora-s3.json, name of the file: lora-s3 given, must be grass-s1 or",
    ),
    "a hash": (
        in_record(SWEPT, lambda record: record.update(model_sha256="a672150f")),
        "hashes: grass-smollm2_135m-generated-s1.json, model_sha256: a672150f given, must be a hash in hexadecimal",
    ),
    "other questions": (
        in_record(GRASS, lambda record: record["tasks"]["arc_easy"]["example_ids"].__setitem__(0, "0" * 16)),
        "questions: grass-s1.json, questions of arc_easy: others given, must be those of apollo-s1.json",
    ),
    "a run twice": (
        lambda folder: shutil.copy(folder / GRASS, (folder / GRASS).with_name("grass-s3.json")),
        "questions: grass-s3.json, run id: grass-s1 given, must be its own, grass-s1.json has it",
    ),
    "a record that is none": (
        lambda folder: (folder / GRASS).write_text("{"),
        "files: grass-s1.json: ",
    ),
    "a record without settings": (
        in_record(GRASS, lambda record: record["config"].pop("method")),
        "files: grass-s1.json: ",
    ),
    "a seed's record removed": (
        lambda folder: (folder / GRASS).unlink(),
        "leaderboard.json: grass: there is no record of run grass-s1",
    ),
    "a method's records removed": (
        lambda folder: [path.unlink() for path in (folder / "comparison/records").glob("lora-*")],
        "leaderboard.md: lora: no such row can be made of the records",
    ),
    "a p-value": (
        in_row("grass", p_value=0.04),
        "leaderboard.json: grass, p_value: 0.04 given, ",
    ),
    "a value that one row lacks": (
        in_text("comparison/leaderboard.json", '"p_value": 0.3009517170388347,', ""),
        "leaderboard.json: lisa-keep, p_value: (missing) given, 0.3009517170388347 recomputed",
    ),
    "a bound": (
        in_row("lora", difference_to_best_high=-0.001),
        "leaderboard.json: lora, difference_to_best_high: -0.001 given, ",
    ),
    "a rank": (
        in_row("apollo", rank=1),
        "leaderboard.json: apollo, rank: 1 given, 4 recomputed",
    ),
    "a row of JSON": (
        lambda folder: (folder / "comparison/leaderboard.json").write_text(
            json.dumps(json.loads((folder / "comparison/leaderboard.json").read_text())[:-1])
        ),
        "leaderboard.json: prefix: the records have this row, the table has not",
    ),
    "JSON that is none": (
        lambda folder: (folder / "comparison/leaderboard.json").write_text("[{"),
        "leaderboard.json: cannot be read",
    ),
    "a cell of CSV": (
        in_text("comparison/leaderboard.csv", "0.3194444444444444", "0.3194444544444444"),
        "leaderboard.csv: lisa-keep, accuracy: 0.3194444544444444 given, 0.3194444444444444 recomputed",
    ),
    "a cell of Markdown": (
        in_text("comparison/leaderboard.md", "| 31.9 ±5.9 |", "| 32.9 ±5.9 |"),
        "leaderboard.md: lisa-keep, acc. %: 32.9 ±5.9 given, 31.9 ±5.9 recomputed",
    ),
    "a number in a note": (
        in_text("comparison/leaderboard.md", "6.0 k (apollo)", "5.0 k (apollo)"),
        "leaderboard.md: note: - budgets differ: tokens read, those for measuring included: 5.0 k (apollo)",
    ),
    "a number in a title": (
        in_text("comparison/leaderboard.md", "a sample of 12 examples", "a sample of 120 examples"),
        "leaderboard.md: note: smollm2-135m on commonsense",
    ),
    "a row that is none": (
        in_text("comparison/leaderboard.md", "| 1 | lisa-keep", "| 1 | lisa-kept"),
        "leaderboard.md: lisa-kept: no such row can be made of the records",
    ),
    "rows in another order": (
        swap_rows,
        "leaderboard.md: rows are in another order: badam, lisa-keep, grass-static",
    ),
    "a page's own table": (
        in_text("comparison/README.md", "| dora | 0.2043 |", "| dora | 0.1043 |"),
        "README.md: table 1, dora, test answer loss, mean of seeds: 0.1043 given, 0.2043 recomputed",
    ),
    "a leaderboard in a page": (
        in_text("comparison/README.md", "| 29.2 ±2.0 |", "| 39.2 ±2.0 |"),
        "README.md: table 2, badam, acc. %: 39.2 ±2.0 given, 29.2 ±2.0 recomputed",
    ),
    "a loss of the search": (
        in_text("comparison/search/dora.json", "0.20258712200891404", "0.30258712200891404"),
        "learning rates: dora-s1, best of its search: 0.00316 given, 0.001 recomputed",
    ),
    "a chosen rate": (
        in_text("comparison/settings.yaml", "lr=0.000316", "lr=0.0316"),
        "learning rates: settings.yaml, apollo: ['method.optimizer.lr=0.0316'] given",
    ),
}


@pytest.mark.parametrize("what", FALSIFIED)
def test_a_changed_number_is_found(copy: Path, what: str) -> None:
    edit, expected = FALSIFIED[what]
    edit(copy)
    found = found_in(verify(copy))
    assert any(text.startswith(expected) for text in found), found[:20]


def test_what_was_extracted_from_a_text_is_extracted_again(tmp_path: Path) -> None:
    record = make_record("grass", correct={"generated": answers(1, 2)}, overrides=["training.steps=0"])
    ids = ["0" * 16, "1" * 16]
    record.tasks["generated"].example_ids = ids
    record.metrics = {"eval/average": 0.5, "eval/generated/accuracy": 0.5}
    record.save(tmp_path / "record.json")
    texts = [("the answer is 12", "12", True), ("the answer is 7", "7", False)]
    rows = [
        {"task": "generated", "id": id, "target": "12", "output": text, "extracted": number, "correct": right}
        for id, (text, number, right) in zip(ids, texts, strict=True)
    ]

    def written() -> list[str]:
        (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return found_in(verify(tmp_path))

    assert written() == []
    rows[1] |= {"extracted": "12", "correct": True}
    assert written() == [
        f"examples: record.json, generated {ids[1]}, answer in the text: 12 given, 7 recomputed",
        f"examples: record.json, generated {ids[1]}, right or wrong: True given, False recomputed",
        f"examples: record.json, generated, example as in examples.jsonl: ('{ids[1]}', False, None, None, None, None) "
        f"given, ('{ids[1]}', True, None, None, None, None) recomputed",
    ]


def test_losses_of_answers_are_averaged_again(tmp_path: Path) -> None:
    record = make_record("grass", correct={"boolq": [True, False]}, suite="commonsense", overrides=["training.steps=0"])
    score, ids = record.tasks["boolq"], ["0" * 16, "1" * 16]
    score.example_ids, score.scoring = ids, "loglikelihood"
    score.answer_nats, score.answer_tokens, score.option_nats = [2.0, 3.0], [4, 4], [0.5, 0.9]
    record.metrics = {"eval/average": 0.5, "eval/boolq/accuracy": 0.5, "eval/boolq/loss": 0.7, "eval/loss": 0.7}

    def found() -> list[str]:
        record.save(tmp_path / "record.json")
        return found_in(verify(tmp_path))

    assert found() == []
    score.option_nats[1] = 0.6
    assert found() == [
        f"answers: record.json, boolq, wrong although likeliest: ['{ids[1]}'] given, must be no question",
        "averages: record.json, eval/boolq/loss: 0.7 given, 0.55 recomputed",
        "averages: record.json, eval/loss: 0.7 given, 0.55 recomputed",
    ]
    score.option_nats[1], score.answer_nats[0] = 0.9, -2.0
    del record.metrics["eval/loss"]
    assert found() == [
        "answers: record.json, boolq, answer_nats: -2.0 given, must be at least 0",
        "averages: record.json, eval/loss: none given, 0.7 recomputed",
    ]


def test_the_search_of_a_rate_may_be_records(tmp_path: Path) -> None:
    losses = {0.001: 1.5, 0.003: 1.2, 0.01: 1.4}
    for folder in ("records", "search"):
        (tmp_path / folder).mkdir()

    def searching(rate: float, loss: float) -> RunRecord:
        overrides = [f"method.optimizer.lr={rate}", "evaluation.test=false"]
        record = make_record("grass", correct={}, status="stopped", overrides=overrides)
        record.run_id, record.metrics = f"grass-{rate}", {"validation/loss": loss}
        return record

    def found(**metrics: float) -> list[str]:
        for rate, loss in losses.items():
            record = searching(rate, loss)
            record.metrics |= metrics
            record.save(tmp_path / "search" / f"{record.run_id}.json.gz")
        return found_in(verify(tmp_path))

    tested = make_record("grass", overrides=["method.optimizer.lr=0.003", "training.steps=4"], status="stopped")
    tested.run_id = "grass-s0"
    tested.save(tmp_path / "records" / "grass-s0.json")
    assert found() == []
    assert found(**{"eval/average": 0.5}) == [
        f"averages: search/grass-{rate}.json.gz, eval/average: 0.5 given, none recomputed" for rate in losses
    ]
    losses[0.01] = 1.1
    assert found() == ["learning rates: grass-s0, best of its search: 0.003 given, 0.01 recomputed"]
    (result,) = verify(tmp_path)
    assert "the best learning rate is the smallest or largest that was tried: grass on generated" in result.remarks
    (tmp_path / "search" / "lora.json").write_text("[1]")
    assert "lora.json is no search of learning rates" in "\n".join(found())


# ------------------------------------------------------------------------------------------------- tables and records


@pytest.mark.long
def test_tables_are_written_anew_from_records_that_agree(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy / "comparison"
    names = ("leaderboard.json", "leaderboard.csv", "leaderboard.md", "README.md")
    for name in names:
        text = (folder / name).read_text()
        assert "lisa-keep" in text
        (folder / name).write_text(text.replace("0.3194444444444444", "0.9").replace("31.9", "90.0"))
    assert run(capsys, folder)[0] == 1
    code, said, _ = run(capsys, folder, "--rewrite")
    assert (code, "37 records; tables written anew" in said) == (0, True)
    assert {name: (folder / name).read_text() for name in names} == {
        name: (RESULTS / "comparison" / name).read_text() for name in names
    }
    assert (folder / "accuracy_memory.png").stat().st_size > 10_000


def test_nothing_is_written_from_records_that_disagree(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FALSIFIED["an accuracy"][0](copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    code, said, _ = run(capsys, copy / "comparison", "--rewrite")
    assert (code, "nothing written, since records disagree with themselves" in said) == (1, True)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_columns_that_only_one_side_has_are_named(copy: Path) -> None:
    folder = copy / "comparison"
    rows = json.loads((folder / "leaderboard.json").read_text())
    for row in rows:
        row["speed"] = row.pop("tokens_per_second")
    (folder / "leaderboard.json").write_text(json.dumps(rows))
    text = (folder / "leaderboard.md").read_text()
    (folder / "leaderboard.md").write_text(text.replace("| alloc. GiB |", "| memory |"))
    (result,) = verify(folder)
    assert found_in([result]) == []
    assert [text for text in result.remarks if text.startswith("leaderboard.")] == [
        "leaderboard.json: columns that are made now are missing: tokens_per_second",
        "leaderboard.json: columns that are not made any more: speed",
        "leaderboard.md: columns that are made now are missing: alloc. GiB",
        "leaderboard.md: columns that are not made any more: memory",
    ]


def test_records_may_be_compressed(copy: Path) -> None:
    folder = copy / "example_sweep"
    plain = read_records(folder)
    sizes = 0
    for path in sorted((folder / "records").iterdir()):
        RunRecord.load(path).save(path.with_name(f"{path.name}.gz"))
        sizes += path.stat().st_size
        path.unlink()
    assert sum(path.stat().st_size for path in (folder / "records").iterdir()) < sizes / 3
    assert [record.model_dump_json() for record in read_records(folder)] == [one.model_dump_json() for one in plain]
    (result,) = verify(folder)
    assert (result.disagreements, result.num_records) == (0, 37)
    path = next((folder / "records").iterdir())
    first = path.read_bytes()
    RunRecord.load(path).save(path)
    assert path.read_bytes() == first, "equal records are equal files"
    path.write_bytes(first[:-20])
    (broken,) = found_in(verify(folder))[:1]
    assert "it is not compressed by gzip, or cut short" in broken
    path.write_bytes(gzip.compress(b"{}")[5:])
    assert "it is not compressed by gzip, or cut short" in found_in(verify(folder))[0]


def test_records_of_runs_are_taken_into_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, mine = tmp_path / "runs", tmp_path / "results" / "mine"
    (runs / "search").mkdir(parents=True)
    for rate, loss in ((0.001, 1.5), (0.003, 1.2), (0.01, 1.4)):
        overrides = [f"method.optimizer.lr={rate}", "evaluation.test=false"]
        searched = make_record("lora", correct={}, status="stopped", overrides=overrides)
        searched.metrics = {"validation/loss": loss}
        (runs / "search" / str(rate)).mkdir()
        searched.save(runs / "search" / str(rate) / "record.json")
    code, out, _ = run(capsys, mine, "--take", runs / "search")
    assert (code, f"took 3 records of {runs / 'search'} into {mine}" in out) == (0, True)
    assert (mine / "settings.yaml").read_text() == "methods:\n  lora:\n  - method.optimizer.lr=0.003\n"
    failed = make_record("lora", status="failed", failure="loss became nan", overrides=["method.optimizer.lr=0.003"])
    failed.save(runs / "record.json")
    assert run(capsys, mine, "--take", runs)[0] == 0
    assert run(capsys, mine, "--take", runs, "--rewrite")[0] == 0, "what is there already is left alone"
    names = sorted(path.relative_to(mine).as_posix() for path in mine.rglob("*.gz"))
    assert [name.split("-")[0] for name in names] == ["records/lora", *["search/lora"] * 3]
    assert "loss became nan" in (mine / "leaderboard.md").read_text()
    failed.model_copy(update={"failure": "another"}).save(runs / "record.json")
    code, _, err = run(capsys, mine, "--take", runs)
    assert (code, "holds another run of the same configuration and seed" in err) == (2, True)
    assert run(capsys, mine, "--take", tmp_path / "nowhere")[0] == 2
    assert run(capsys, mine, runs, "--take", runs)[0] == 2


def test_a_folder_of_runs_is_one_result(tmp_path: Path) -> None:
    for seed in (0, 1):
        record = make_record("grass", seed=seed)
        (tmp_path / record.name).mkdir()
        record.save(tmp_path / record.name / "record.json")
    (result,) = find_results(tmp_path)
    assert (result.folder, len(result.files)) == (tmp_path, 2)
    (alone,) = find_results(tmp_path / record.name)
    assert (alone.folder, len(alone.files)) == (tmp_path / record.name, 1)


# -------------------------------------------------------------------------------------------------- entry rules, words


def test_rules_of_entry_that_a_program_sees_are_remarks(copy: Path) -> None:
    (copy / "comparison" / "records" / "lora-s2.json").unlink()
    (result,) = verify(copy / "comparison")
    said = "\n".join(result.remarks)
    assert "35 of 36 runs with uncommitted changes in the tree" in said
    assert "36 of 36 runs without the hash of the base model" in said
    assert "18 rows with fewer than 3 seeds" in said
    assert "rows with different seeds: 1 2 (" in said
    assert "; 1 (lora)" in said
    assert "the best learning rate is the smallest or largest that was tried: badam, grass, hift, lift" in said
    assert "no plan from before the runs" in said
    for again, test in (("a", True), ("b", False)):
        record = RunRecord.load(copy / SWEPT)
        record.run_id, record.config["evaluation"]["test"] = again, test
        record.save((copy / SWEPT).with_name(f"{again}.json"))
    (repeated,) = verify(copy / "example_sweep")
    assert "1 of 39 runs of a configuration and seed that a later run has, too" in "\n".join(repeated.remarks)
    for again in ("a", "b"):
        (copy / SWEPT).with_name(f"{again}.json").unlink()
    (swept,) = verify(copy / "example_sweep")
    assert "no search of the learning rate is here for" in "\n".join(swept.remarks)
    assert not any("hash" in remark or "changes" in remark for remark in swept.remarks)
    (copy / "example_sweep" / "README.md").write_text("As [planned](../../sweep/PLAN.md).\n")
    (planned,) = verify(copy / "example_sweep")
    assert not any("no plan" in remark for remark in planned.remarks)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["verify", *map(str, words)])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_the_command_says_what_agrees_and_what_does_not(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "notes.md").touch()
    code, out, _ = run(capsys, copy)
    assert code == 0
    assert "comparison: 37 records" in out
    assert "measured, nothing to recompute: memory/peak_reserved_gib, test/answer_loss" in out
    assert "  .: notes.md" in out
    assert out.splitlines()[-1].startswith("verified: all 1")
    FALSIFIED["a p-value"][0](copy)
    code, out, _ = run(capsys, copy / "comparison", "--quiet")
    assert code == 1
    assert "DIFFERS  leaderboard.json" in out
    assert "grass, p_value: 0.04 given" in out
    assert "agrees" not in out
    assert out.splitlines()[-1].startswith("not verified: 1 disagreements in ")
    for path in (copy / "comparison" / "records").glob("f*"):
        path.unlink()
    shortened, whole = (run(capsys, copy / "comparison", *words)[1] for words in ((), ("--all",)))
    assert "more: --all prints them" in shortened
    assert len(whole.splitlines()) > len(shortened.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs a folder"),
        (["nowhere"], "there is no folder nowhere"),
        ([str(REPOSITORY / "sweeps")], "there are no run records in"),
    ],
)
def test_a_wrong_folder_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *words)
    assert (code, message in err) == (2, True)
