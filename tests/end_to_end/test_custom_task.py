"""examples/custom_task.md, exactly as it says."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest
from small import REPOSITORY

from grass_ray.cli import main
from grass_ray.config import ConfigError, CustomSource, DataConfig, RunConfig
from grass_ray.experiment.flags import choose_data
from grass_ray.methods import get_method
from grass_ray.tasks.custom import read_task_file
from grass_ray.tasks.extraction import extract_answer, process_results
from grass_ray.tasks.sources import check_data, load_test_rows, load_train_rows

pytestmark = pytest.mark.long

PAGE = (REPOSITORY / "examples" / "custom_task.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["reviews-train.jsonl", "reviews-test.jsonl", "reviews.yaml"]
    for name, text in files:
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_page_works_as_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [words[:2] for words in commands] == [["grass-ray", "train"], ["grass-ray", "eval"]]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    for words in commands:
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        assert ended.value.code == 0
        assert "reviews" in capsys.readouterr().out
    trained, evaluated = (
        json.loads((folder / name / "record.json").read_text()) for name in ("reviews-run", "reviews-eval")
    )
    test_hash = hashlib.sha256((folder / "reviews-test.jsonl").read_bytes()).hexdigest()
    for record in (trained, evaluated):
        score = record["tasks"]["reviews"]
        assert score["num_examples"] == 3
        assert score["protocol"]["test_sha256"] == test_hash
        assert score["protocol"]["test_file"] == str(folder / "reviews-test.jsonl")
        assert score["protocol"]["chance"] == 0.5
        accuracy = record["metrics"]["eval/reviews/accuracy"]
        assert record["metrics"]["eval/average_normalised"] == pytest.approx(2 * accuracy - 1)
    (entry,) = trained["data"]["train"]["files"]
    assert entry["name"] == str(folder / "reviews-train.jsonl")
    assert entry["sha256"] == hashlib.sha256((folder / "reviews-train.jsonl").read_bytes()).hexdigest()
    first = json.loads((folder / "reviews-run" / "examples.jsonl").read_text().splitlines()[0])
    assert "Is this review positive or negative?" in first["prompt"]
    assert "Wonderful music" in first["prompt"]
    chosen = [json.loads(line)["extracted"] for line in (folder / "reviews-eval" / "examples.jsonl").open()]
    assert set(chosen) <= {"positive", "negative"}
    config = RunConfig.from_yaml(folder / "reviews-run" / "config.yaml")
    assert isinstance(config.data.source, CustomSource)
    assert RunConfig.parse(config.to_dict()) == config


def test_skipped_test_rows_are_said_and_recorded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "reviews-test.jsonl").open("a") as file:
        file.write('{"text": "Fine.", "sentiment": "neutral"}\n')
    monkeypatch.chdir(folder)
    words = ["eval", "--model", "tiny", "--task", "reviews.yaml", "--scoring", "loglikelihood", "--output", "out"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--set", "data.broken_rows=skip"])
    assert ended.value.code == 0
    assert "skipped   1 test rows of reviews" in capsys.readouterr().out
    protocol = json.loads((folder / "out" / "record.json").read_text())["tasks"]["reviews"]["protocol"]
    assert (protocol["broken_rows"], protocol["test_rows_skipped"], protocol["test_rows"]) == ("skip", 1, 3)


def test_a_model_that_learnt_its_sentences_is_right_and_lost_rows_are_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels that published extraction cannot tell apart, in rows of which some are too long."""
    rows = [{"text": f"Proof {number}.", "sentiment": "incorrect"} for number in range(8)]
    long = [{"text": "word " * 400, "sentiment": "correct"}] * 3
    (folder / "reviews-train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + long))
    (folder / "reviews-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "reviews.yaml"
    path.write_text(path.read_text().replace("[positive, negative]", "[correct, incorrect]"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    words = ["train", "full", "--model", "tiny", "--task", "reviews.yaml", "--output", "out", "--steps", "60"]
    words += ["--lr", "3e-3", "--batch-size", "4", "--set", "training.lr_schedule=constant"]
    with pytest.raises(SystemExit) as refused:
        main([*words, "evaluation.extraction=published"])
    assert refused.value.code == 2
    assert "evaluation.extraction=strict" in capsys.readouterr().err
    assert not (folder / "out").exists(), "nothing was started"
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "answers   read by strict extraction" in said
    assert "dropped   3 of 11 training rows: no answer within 256 tokens; raise data.max_length_tokens" in said
    record = json.loads((folder / "out" / "record.json").read_text())
    assert record["metrics"]["eval/reviews/accuracy"] == 1.0
    assert record["tasks"]["reviews"]["extraction"] == "strict"


def data_of(path: Path) -> DataConfig:
    suite, tasks, source = choose_data([str(path)], None)
    return DataConfig(suite=suite, tasks=tasks, source=source)


def test_rows_learn_the_answer_where_they_have_no_output(folder: Path) -> None:
    rows = load_train_rows(data_of(folder / "reviews.yaml")).rows
    assert rows[0].output == "the correct answer is positive"
    assert rows[0].input == "I loved every minute of it."


def test_rows_without_a_text_learn_the_answer_too(folder: Path) -> None:
    with (folder / "reviews-train.jsonl").open("a") as file:
        file.write('{"text": null, "sentiment": "negative", "output": null}\n')
    row = load_train_rows(data_of(folder / "reviews.yaml")).rows[-1]
    assert (row.input, row.output) == ("", "the correct answer is negative")


def test_files_are_found_at_home_beside_the_task_file_and_in_strange_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    strange = tmp_path_factory.mktemp("x") / "what? #1 [of two] é"
    folder.rename(strange)
    monkeypatch.setenv("HOME", str(strange))
    monkeypatch.chdir(strange.parent)
    path = strange / "reviews.yaml"
    path.write_text(path.read_text().replace("test: reviews", "test: ~/reviews"))
    for name in (str(path), f"{strange.name}/reviews.yaml", "~/reviews.yaml"):
        data = data_of(Path(name))
        assert data.source.test == str(strange / "reviews-test.jsonl")
        assert data.source.train == str(strange / "reviews-train.jsonl")
        check_data(data)


def test_true_and_false_are_labels_in_any_case(folder: Path) -> None:
    (folder / "reviews-test.jsonl").write_text('{"text": "So?", "sentiment": true}\n')
    path = folder / "reviews.yaml"
    path.write_text(path.read_text().replace("[positive, negative]", '["True", "False"]').replace("train:", "#"))
    (row,) = load_test_rows("reviews", data_of(path)).rows
    assert row.answer == "True"


def test_a_sweep_takes_the_file(folder: Path) -> None:
    from grass_ray.experiment.flags import SweepOptions
    from grass_ray.experiment.plan import plan_trials
    from grass_ray.experiment.sweep import Sweep

    sweep = Sweep(name="s", question="?", models=("tiny",), methods=("grass",), tasks=("generated",), seeds=(0,))
    trials, _ = plan_trials(sweep, SweepOptions(tasks=(str(folder / "reviews.yaml"),)))
    assert [config.method.name for config in trials] == ["base", "grass"]
    for config in trials:
        assert (config.data.suite, config.data.tasks) == ("reviews", ("reviews",))
        assert config.data.source == read_task_file(folder / "reviews.yaml")


def test_a_configuration_that_names_another_task_is_refused(folder: Path) -> None:
    data = data_of(folder / "reviews.yaml").model_copy(update={"tasks": ("boolq",)})
    with pytest.raises(ConfigError, match="its own suite"):
        check_data(RunConfig(method=get_method("full").config, data=data).data)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("name: boolq", "is taken"),
        ("name: two words", "name: String should match"),
        ("answer: word", "answer: "),
        ("labels: [positive]", "at least two labels"),
        ("labels: [yes, no]", "labels.0"),
        ("test: absent.jsonl", "do not exist"),
        ("lables: [a, b]", "lables: Extra inputs"),
    ],
)
def test_a_wrong_task_file_is_one_clear_error(folder: Path, line: str, words: str) -> None:
    path = folder / "reviews.yaml"
    key = line.split(":")[0]
    kept = [old for old in path.read_text().splitlines() if not old.startswith(f"{key}:")]
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(ConfigError) as error:
        data_of(path)
    assert words in str(error.value), str(error.value)


def test_wrong_flags_and_absent_files(folder: Path) -> None:
    path = str(folder / "reviews.yaml")
    for names, data_dir, words in (
        ([path, "boolq"], None, "stands alone"),
        ([path], folder, "has no effect"),
        ([str(folder / "absent.yaml")], None, "cannot read the task file"),
    ):
        with pytest.raises(ConfigError, match=words):
            choose_data(names, data_dir)


def test_a_task_without_train_file_is_evaluated_but_not_trained(folder: Path) -> None:
    path = folder / "reviews.yaml"
    path.write_text(path.read_text().replace("train: reviews-train.jsonl\n", ""))
    check_data(data_of(path), training=False)
    with pytest.raises(ConfigError, match="has no train file"):
        check_data(data_of(path))


def test_broken_rows_name_the_users_own_keys(folder: Path) -> None:
    with (folder / "reviews-test.jsonl").open("a") as file:
        file.write('{"text": "Fine.", "mood": "positive"}\n{"text": "Fine.", "sentiment": "neutral"}\n')
    with pytest.raises(ConfigError) as error:
        check_data(data_of(folder / "reviews.yaml"))
    for words in ("2 of 5 rows", "row 4: no 'sentiment'", "row 5: unknown label 'neutral'"):
        assert words in str(error.value)


def test_labels_that_begin_or_contain_each_other_are_told_apart() -> None:
    from grass_ray.tasks.custom import find_task

    source = CustomSource(name="nli", answer="labels", labels=("Entailment", "Not entailment", "a+b"), test="x")
    task = find_task("nli", source)
    assert extract_answer("the correct answer is not entailment", task, "strict") == "Not entailment"
    assert extract_answer("Entailment.", task, "strict") == "Entailment"
    assert extract_answer("so it is a+b", task, "published") == "a+b"
    document = {"task": "nli", "kind": "labels", "labels": list(task.labels), "extraction": "strict"}
    assert process_results(document | {"answer": "Entailment"}, ["entailment"]) == {"acc": 1.0}
