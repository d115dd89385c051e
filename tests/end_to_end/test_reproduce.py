"""``grass-ray reproduce``: a real run agrees with itself, a changed number is found, the original stays as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from small import short_run

from grass_ray.cli import main
from grass_ray.commands.train import train_locally
from grass_ray.results.record import RunRecord

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce") / "run"
    config = short_run("grass", "evaluation.limit=4")
    assert train_locally(config, output=folder, tracking_uri=None, resume=False, dry_run=False, quiet=True) == 0
    return folder


def reproduce(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["reproduce", *map(str, arguments)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return int(left.value.code or 0), said.out, said.err


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_real_run_agrees_in_every_bit_and_is_not_touched(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(run)
    code, out, _ = reproduce(capsys, run, "--output", tmp_path / "again")
    assert code == 0, out
    assert "agrees   train/loss, every step" in out
    assert "agrees   generated: right or wrong, every question" in out
    assert "agrees   extracted answers, every question" in out
    assert "reproduced: all " in out
    assert bytes_of(run) == before
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        "config.yaml", "record.json", "examples.jsonl", "reproduction.json",
    }  # fmt: skip
    rerun = RunRecord.load(tmp_path / "again" / "record.json")
    assert rerun.series["train/loss"] == RunRecord.load(run / "record.json").series["train/loss"]
    code, _, err = reproduce(capsys, run, "--output", run)
    assert (code, bytes_of(run)) == (2, before)
    assert "exists and is not empty" in err


def test_by_its_id_in_mlflow(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{run.parent}/mlflow.db"
    client = MlflowClient(uri)
    experiments = [item.experiment_id for item in client.search_experiments()]
    found = client.search_runs(experiments, "tags.method = 'grass' and metrics.\"eval/average\" >= 0")
    code, out, _ = reproduce(capsys, found[0].info.run_id, "--tracking-uri", uri, "--quiet")
    assert code == 0, out
    assert out.startswith("reproduced: all ")
    assert len(out.splitlines()) == 1
    with pytest.raises(SystemExit) as left:
        main(["export", found[0].info.run_id, "--tracking-uri", uri, "--output", f"{run.parent}/model", "--log"])
    assert left.value.code == 0, capsys.readouterr().err
    assert "model/README.md" in {item.path for item in client.list_artifacts(found[0].info.run_id, "model")}


def test_a_changed_number_is_found_and_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = RunRecord.load(run / "record.json")
    record.metrics["eval/average"] += 0.25
    step, loss = record.series["train/loss"][4]
    record.series["train/loss"][4] = (step, loss * 1.001)
    record.save(tmp_path / "tampered.json")
    code, out, _ = reproduce(capsys, tmp_path / "tampered.json", "--quiet")
    assert code == 1
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("DIFFERS  train/loss, every step")
    assert "1 of 11 values differ" in lines[0]
    assert "DIFFERS  eval/average" in lines[1]
    assert lines[2].startswith("not reproduced: 2 of ")


def test_a_dry_run_says_what_differs_here_and_trains_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord.load(run / "record.json")
    record.versions["torch"] = "1.0.0"
    record.model_sha256 = "b" * 64
    record.hardware = "Another machine"
    record.data["train"]["rows_sha256"] = "c" * 64
    record.save(tmp_path / "record.json")
    code, out, err = reproduce(capsys, tmp_path, "--dry-run", "--output", tmp_path / "again")
    assert code == 0
    assert "runs      grass on tiny, seed 0: 11 steps, then evaluates" in out
    assert "step 1/" not in out
    assert not (tmp_path / "again").exists()
    for words in ("torch was 1.0.0", "hardware was Another machine", "the base model's weights are others"):
        assert f"warning: {words}" in err
    assert "warning: the training rows are others" in err


def test_a_run_that_was_stopped_agrees_as_far_as_it_came(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord.load(run / "record.json")
    record.status, record.failure = "stopped", "interrupted after step 6 of 11"
    record.series = {name: [point for point in points if point[0] <= 6] for name, points in record.series.items()}
    record.tasks, record.metrics, record.layers = {}, {}, None
    record.save(tmp_path / "record.json")
    code, out, _ = reproduce(capsys, tmp_path / "record.json")
    assert code == 0, out
    assert "its 6 steps are compared" in out
    assert "evaluating" not in out


def test_a_run_that_failed_fails_again_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = short_run("full", "method.optimizer.lr=1e30")
    assert train_locally(config, output=tmp_path / "run", tracking_uri=None, resume=False, dry_run=False) == 1
    code, out, _ = reproduce(capsys, tmp_path / "run")
    assert code == 0, out
    assert "agrees   status" in out
    assert "became" in out


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "nowhere", "there is no run"),
        (lambda folder: folder, "has no record.json"),
        (lambda folder: folder / "broken.json", "is not a run record"),
    ],
)
def test_what_is_no_record_is_one_message(
    make: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.json").write_text("{}")
    assert callable(make)
    code, _, err = reproduce(capsys, make(tmp_path))
    assert code == 2
    assert words in err


def test_a_data_folder_that_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    row = {"instruction": "Is it?", "input": "", "output": "the correct answer is true", "answer": "true"}
    for split in ("train", "test"):
        (old / "dataset" / "boolq").mkdir(parents=True, exist_ok=True)
        (old / "dataset" / "boolq" / f"{split}.json").write_text(json.dumps([row] * 6))
    values = yaml.safe_load(short_run("full", steps=2).to_yaml())
    values["data"] |= {"suite": "commonsense", "tasks": ["boolq"], "source": {"kind": "folder", "path": str(old)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as left:
        main(["train", "full", "--config", f"{tmp_path}/config.yaml", "--output", f"{tmp_path}/run", "--quiet"])
    assert left.value.code == 0, capsys.readouterr().err
    shutil.move(old, new)
    code, _, err = reproduce(capsys, tmp_path / "run")
    assert code == 2
    assert os.fspath(old) in err
    code, out, err = reproduce(capsys, tmp_path / "run", "--data-dir", new)
    assert code == 0, out
    assert "rows are others" not in err
