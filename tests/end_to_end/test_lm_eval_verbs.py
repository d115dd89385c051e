"""lm-eval's own tasks through every verb: train, eval, reproduce, verify, export, a sweep with its base row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness_folder import write_harness_folder
from small import REPOSITORY

from grass_ray.cli import main
from grass_ray.config import RunConfig
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.recorded import find_results

pytestmark = pytest.mark.long

Said = tuple[int, str, str]
Command = Callable[..., Said]
TRAIN = ("train", "lora", "--model", "tiny", "--steps", "3", "--batch-size", "4", "--limit", "4", "--lr", "0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lm-eval")
    write_harness_folder(made / "mine")
    return made


@pytest.fixture
def grass_ray(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def carry_out(*words: object) -> Said:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
        monkeypatch.setattr("sys.argv", ["grass-ray", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([*map(str, words)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(left.value.code or 0), said.out, said.err

    return carry_out


@pytest.fixture
def run(folder: Path, grass_ray: Command) -> Path:
    if not (folder / "run").exists():
        more = ("--eval-tasks", "mine/", "--num-fewshot", "1", "--set", "evaluation.forgetting=generated")
        code, out, err = grass_ray(*TRAIN, *more, "--output", "run")
        assert code == 0, out + err
    return folder / "run"


def test_a_dry_run_shows_the_tasks_with_their_absolute_folder(folder: Path, grass_ray: Command) -> None:
    code, out, _ = grass_ray(*TRAIN, "--eval-tasks", "mine/,mine/digits.yaml", "--dry-run")
    assert code == 0
    config = RunConfig.parse(yaml.safe_load(out))
    assert config.evaluation.lm_eval.tasks == (str(folder / "mine"), str(folder / "mine" / "digits.yaml"))
    assert config.evaluation.scoring == "generation"


def test_a_run_records_every_example_is_reproduced_and_verified(run: Path, folder: Path, grass_ray: Command) -> None:
    record = RunRecord.load(run / "record.json")
    assert list(record.lm_eval) == ["digits", "prose", "sums"]
    assert record.metrics["lm_eval/sums/acc"] == record.lm_eval["sums"].value
    lines = [json.loads(line) for line in (run / "lm_eval_examples.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines if line["task"] == "sums"] == record.lm_eval["sums"].values
    assert [line["subtask"] for line in lines if line["task"] == "sums"] == ["sums_odd"] * 4 + ["sums_even"] * 4
    code, out, err = grass_ray("reproduce", run)
    assert code == 0, out + err
    assert "agrees   sums of lm-eval: every example" in out
    code, out, err = grass_ray("verify", run)
    assert code == 0, out + err
    moved = shutil.move(folder / "mine", folder / "elsewhere")
    try:
        code, _, err = grass_ray("reproduce", run, "--dry-run")
        assert code == 2
        assert f"there is no folder or file of tasks {folder}/mine" in err
        code, out, err = grass_ray("reproduce", run, "--eval-tasks", "elsewhere/")
        assert code == 0, out + err
    finally:
        shutil.move(moved, folder / "mine")


def test_eval_measures_the_same_and_what_was_forgotten(run: Path, folder: Path, grass_ray: Command) -> None:
    record = RunRecord.load(run / "record.json")
    code, out, err = grass_ray("eval", "--model", run, "--limit", 4, "--output", "evaluated")
    assert code == 0, out + err
    again = RunRecord.load(folder / "evaluated" / "record.json")
    assert again.tasks["generated"].correct == record.tasks["generated"].correct
    assert {name: score.values for name, score in again.lm_eval.items()} == {
        name: score.values for name, score in record.lm_eval.items()
    }
    for name in ("forgetting", "forgetting/loss_before", "forgetting/loss_after"):
        assert again.metrics[name] == pytest.approx(record.metrics[name], abs=1e-5)
    assert again.data["forgetting"] == record.data["forgetting"]
    assert again.metrics["forgetting"] != 0
    assert list((folder / "evaluated" / "lm_eval").rglob("samples_sums_odd_*.jsonl"))


def test_eval_of_lm_evals_tasks_alone_needs_no_others(folder: Path, grass_ray: Command) -> None:
    code, out, err = grass_ray("eval", "--model", "tiny", "--eval-tasks", "mine/", "--output", "alone")
    assert code == 0, out + err
    record = RunRecord.load(folder / "alone" / "record.json")
    assert not record.tasks
    assert record.config["evaluation"]["scoring"] == "lm_eval"
    assert "on the tasks of lm-eval" in out
    assert "bits_per_byte" in record.lm_eval["prose"].metrics


def test_the_card_names_them(run: Path, folder: Path, grass_ray: Command) -> None:
    code, out, err = grass_ray("export", run, "--output", "exported")
    assert code == 0, out + err
    record = RunRecord.load(run / "record.json")
    card = (folder / "exported" / "README.md").read_text()
    assert f"| sums | acc | {record.lm_eval['sums'].value:.3f} | {record.lm_eval['sums'].stderr:.3f} | 8 |" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eval-tasks", "gone/"), "there is no folder or file of tasks "),
        (("--eval-tasks", ","), "--eval-tasks: give at least one task of lm-eval"),
        (("--num-fewshot", "2"), "have no effect without tasks"),
        (("--eval-tasks", "mine/", "--num-fewshot", "-1"), "evaluation.lm_eval.num_fewshot: Input should be"),
        (("--eval-tasks", "mine/,mine/"), "a task is named twice"),
        (("--set", "evaluation.scoring=lm_eval"), "evaluates the tasks of lm_eval.tasks alone, and it has none"),
    ],
)
def test_wrong_input_is_one_message(grass_ray: Command, words: tuple[str, ...], message: str) -> None:
    code, out, err = grass_ray(*TRAIN, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_sweep_has_them_before_and_after(folder: Path, grass_ray: Command) -> None:
    script = REPOSITORY / "tests" / "mini_sweep.py"
    words = ("--methods", "lora", "--eval-tasks", "mine/", "--steps", "3", "--set", "method.optimizer.lr=0.1")
    code, out, err = grass_ray("sweep", script, *words)
    assert code == 0, out + err
    assert "sums vs base" in out
    records = [record for result in find_results(folder / "grass_ray_results" / "mini") for record in result.load()]
    assert {record.config["method"]["name"] for record in records} == {"base", "lora"}
    assert all(set(record.lm_eval) == {"digits", "prose", "sums"} for record in records)
    (table,) = build_leaderboard(records)
    lora = next(row for row in table.rows if row.method == "lora")
    assert lora.lm_eval_tasks["sums"].to_base is not None
