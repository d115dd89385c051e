"""The command line as a user meets it: a run, its leaderboard, its export, an interruption, and wrong input."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from grass_ray.cli import main
from grass_ray.config import ConfigError, ModelConfig
from grass_ray.training.models import load_model

pytestmark = pytest.mark.long

SMALL = [
    "--model=tiny",
    "--steps=6",
    "--limit=6",
    "--set",
    "data.source.train_rows=40",
    "data.source.test_rows=8",
]
FAST_SCHEDULE = ["method.sampler.period=2", "method.sampler.probing_steps=2", "method.sampler.refresh_period=3"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MLFLOW_TRACKING_URI": ""}


CODE = "from grass_ray.cli import main; main()"
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def grass_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in ``tmp_path``, carried out in this process: a process of its own would import for seconds."""

    def carry_out(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setenv("MLFLOW_TRACKING_URI", "")
            patch.setattr("sys.argv", ["grass-ray", *words])
            capsys.readouterr()
            with pytest.raises(SystemExit) as left:
                main(words)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(left.value.code or 0), said.out, said.err)

    return carry_out


def in_a_process(*arguments: object, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command line as a shell starts it, after the Python code ``before``."""
    command = [sys.executable, "-c", before + CODE, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, to be interrupted."""
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one readable message."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    said = " ".join((done.stderr + done.stdout).split())
    for word in words:
        assert word in said, said


def test_train_leaderboard_eval_export(grass_ray: Command, tmp_path: Path) -> None:
    done = in_a_process("train", "grass", *SMALL, *FAST_SCHEDULE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "grass_ray_results" / "train").iterdir()
    written = {path.name for path in run.iterdir()}
    assert {"config.yaml", "record.json", "examples.jsonl", "sampling.png", "loss.png", "checkpoint"} <= written
    assert "exactly the active units changed: yes" in (run / "engagement.txt").read_text()
    assert json.loads((run / "engagement.json").read_text())["only_active_layers_changed"] is True
    head = [line.split()[0] for line in done.stdout.splitlines()[:7]]
    assert head == ["run", "model", "method", "tasks", "trains", "device", "config"]
    assert yaml.safe_load((run / "config.yaml").read_text())["method"]["name"] == "grass"

    board = grass_ray("leaderboard", "--format", "json")
    assert board.returncode == 0, board.stderr
    (row,) = json.loads(board.stdout)
    record = json.loads((run / "record.json").read_text())
    assert row["method"] == "grass"
    assert row["accuracy"] == record["metrics"]["eval/average"]
    assert row["peak_allocated_gib"] > 0
    assert row["host_pinned_gib"] > 0
    assert record["layers"]["only_active_layers_changed"] is True

    export = grass_ray("export", run, "--output", "exported")
    assert export.returncode == 0, export.stderr
    assert "largest logit difference 0.0e+00" in export.stdout
    assert "| generated |" in (tmp_path / "exported" / "README.md").read_text()
    trained, exported = (
        grass_ray("eval", "--model", model, "--limit=6", "--set", "data.source.test_rows=8", "--output", out)
        for model, out in ((run, "eval-run"), ("exported", "eval-exported"))
    )
    assert trained.returncode == exported.returncode == 0, trained.stderr + exported.stderr
    outputs = [
        [json.loads(line)["output"] for line in (tmp_path / name / "examples.jsonl").read_text().splitlines()]
        for name in ("eval-run", "eval-exported")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 6

    again = grass_ray("train", "grass", *SMALL, *FAST_SCHEDULE)
    assert_refused(again, "exists and is not empty")
    assert_refused(grass_ray("export", run, "--output", "exported"), "exists and is not empty")
    listing = grass_ray("ls", "runs")
    assert "grass-tiny-generated-s0" in listing.stdout


def test_lora_export_merges_adapters(grass_ray: Command, tmp_path: Path) -> None:
    done = grass_ray("train", "lora", *SMALL, "method.optimizer.lr=0.01", "--output", "run")
    assert done.returncode == 0, done.stderr
    export = grass_ray("export", "run", "--output", "merged")
    assert export.returncode == 0, export.stderr
    assert not list((tmp_path / "merged").glob("adapter*"))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in model.named_parameters())

    adapter = grass_ray("export", "run", "--adapter", "--output", "adapter")
    assert adapter.returncode == 0, adapter.stderr
    assert "reloaded with peft, largest logit difference 0.0e+00" in adapter.stdout
    assert {path.name for path in (tmp_path / "adapter").glob("adapter*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    delta = grass_ray("export", "run", "--delta", "--output", "delta")
    assert_refused(delta, "run is a run of lora", "--adapter", "the merged model")
    assert not (tmp_path / "delta").exists()


def test_delta_there_and_back(
    grass_ray: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_draw = [*FAST_SCHEDULE, "method.sampler.period=6", "method.sampler.num_active_layers=1"]
    done = grass_ray("train", "grass", *SMALL, *one_draw, "--output", "run")
    assert done.returncode == 0, done.stderr
    whole = grass_ray("export", "run", "--output", "whole")
    assert whole.returncode == 0, whole.stderr
    there = grass_ray("export", "run", "--delta", "--output", "delta")
    assert there.returncode == 0, there.stderr
    assert re.search(r"wrote delta: 0\.1\d of 0\.8\d MiB \(1\d\.\d %\): decoder layer [0-3] \(of 4,", there.stdout)
    assert "base model tiny (built-in, float32)" in there.stdout
    files = {path.name: path.stat().st_size for path in (tmp_path / "delta").iterdir()}
    assert files.keys() == {"README.md", "delta.json", "delta.safetensors"}
    assert files["delta.safetensors"] < 0.2 * (tmp_path / "whole" / "model.safetensors").stat().st_size

    back = grass_ray("export", "delta", "--output", "back")
    assert back.returncode == 0, back.stderr
    assert "the same in every bit" in back.stdout
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()

    # "whole" is the trained model, not the base that the delta belongs on
    wrong = grass_ray("export", "delta", "--model", "whole", "--output", "wrong")
    assert_refused(wrong, "delta belongs on tiny (built-in, float32)", "has other values")
    assert not (tmp_path / "wrong").exists()
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["run", "--delta", "--output", "back"], "exists and is not empty"),
        (["delta", "--output", "back"], "exists and is not empty"),
        (["delta", "--delta", "--output", "new"], "is a delta already"),
        (["run", "--model", "tiny", "--output", "new"], "--model names the base model of a delta"),
        (["run", "--delta", "--adapter", "--output", "new"], "exclude each other"),
        (["run", "--adapter", "--output", "new"], "has no adapter"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["export", *arguments])
        assert left.value.code == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_interrupt_leaves_a_resumable_run(grass_ray: Command, tmp_path: Path) -> None:
    arguments = ["train", "grass", *SMALL, *FAST_SCHEDULE, "training.steps=400", "--output", "run"]
    process = start(*arguments, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if " step " in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "--resume" in out
    first = json.loads((tmp_path / "run" / "record.json").read_text())
    assert first["status"] == "stopped"

    stopped_at = len(first["series"]["train/loss"])
    assert 0 < stopped_at < 400
    resumed = grass_ray(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"after step {stopped_at}" in resumed.stdout
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "finished"
    assert [step for step, _ in record["series"]["train/loss"]] == list(range(1, 403))
    assert record["series"]["train/loss"][:stopped_at] == first["series"]["train/loss"]
    rows = json.loads(
        grass_ray("leaderboard", "--format", "json", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db").stdout
    )
    assert len(rows) == 1, "found again in the store, not doubled"


def test_a_model_folder_is_found_from_anywhere_and_never_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(ModelConfig(name="tiny"))
    folder, elsewhere = tmp_path / "org" / "model", tmp_path / "elsewhere"
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(folder)
    (elsewhere / "org" / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(elsewhere))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out + said.err

    small = ["--steps=2", "--limit=2", "--set", "data.source.train_rows=8", "data.source.test_rows=4"]
    where = ["--output=~/run", "--tracking-uri=sqlite:///~/x.db"]
    assert run("train", "lora", "--model", "org/model", *where, *small)[0] == 0
    assert yaml.safe_load((elsewhere / "run" / "config.yaml").read_text())["model"]["name"] == str(folder)
    assert (elsewhere / "x.db").is_file()
    monkeypatch.chdir(elsewhere)
    assert run("export", "run", "--adapter", "--output", "adapter")[0] == 0
    assert run("reproduce", "~/run", "--quiet")[0] == 0
    assert run("eval", "--model", "run", "--limit=2", "--quiet")[0] == 0
    code, said = run("eval", "--model", "adapter")
    assert code == 2
    assert f"LORA adapter of {folder}, not a model" in said
    folder.rename(tmp_path / "org" / "moved")
    for verb in (["eval", "--model", "run"], ["export", "run", "--output", "out"], ["reproduce", "run"]):
        code, said = run(*verb)
        assert code == 2
        assert f"there is no model folder '{folder}'" in said


def test_interrupt_while_evaluating_stops_and_can_go_on(grass_ray: Command, tmp_path: Path) -> None:
    arguments = ["train", "full", "--model=tiny", "--steps=2", "--limit=100", "--output", "run", "--set"]
    arguments += ["data.source.train_rows=40", "data.source.test_rows=100", "evaluation.batch_size=1"]
    arguments += ["training.warmup_steps=0"]
    process = start(*arguments, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if " evaluating " in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err == "stopped: interrupted while it was evaluated, after all 2 steps\n"
    assert f"go on     grass-ray {' '.join(arguments)} --resume" in out
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "stopped"
    assert statuses(tmp_path / "mlflow.db") == ["KILLED"]
    resumed = grass_ray(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 2" in resumed.stdout
    assert statuses(tmp_path / "mlflow.db") == ["FINISHED"]


def statuses(database: Path) -> list[str]:
    """Of the runs in a store, those that group others left out."""
    with closing(sqlite3.connect(database)) as connection:
        return [status for (status,) in connection.execute("SELECT status FROM runs WHERE name != 'train-train'")]


def test_files_that_cannot_be_written_are_one_message_and_a_run_that_can_go_on(
    grass_ray: Command, tmp_path: Path
) -> None:
    """A full disk, by a limit on the size of files: the store fits into it and the optimizer's states do not."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_300_000, resource.RLIM_INFINITY))\n"
    arguments = ["train", "full", *SMALL, "--output", "run"]
    done = in_a_process(*arguments, cwd=tmp_path, before=limit)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(
        r"failed: a file could not be written whole \(after step 6 of 6; .* free in run\)\n", done.stderr
    )
    assert "--resume" in done.stdout
    assert not list((tmp_path / "run").glob("checkpoint*"))
    assert statuses(tmp_path / "mlflow.db") == ["FAILED"]
    resumed = grass_ray(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert statuses(tmp_path / "mlflow.db") == ["FINISHED"]


def test_an_output_folder_belongs_to_one_process(tmp_path: Path) -> None:
    from grass_ray.commands.output import claimed

    again, below = claimed(tmp_path / "run"), claimed(tmp_path / "file" / "run")
    with claimed(tmp_path / "run"), pytest.raises(ConfigError, match="another run is writing"), again:
        pass
    assert not (tmp_path / "run").exists(), "nothing was written"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to the output .*file/run: Not a directory"), below:
        pass


def write_rows(folder: Path, text: str) -> None:
    for split in ("train", "test"):
        path = folder / "dataset" / "boolq" / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


ROW = {"instruction": "Is it?", "input": "", "output": "the correct answer is true", "answer": "true"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "gras"], ["unknown method 'gras'", "available: base, full", "Did you mean 'grass'?"]),
        (["train", "grass", "--model", "no/such-model"], ["cannot load model 'no/such-model'", "smollm2-135m, tiny"]),
        (["train", "grass", "--model", "./mine"], ["there is no model folder './mine'", "a hub id is"]),
        (["plan", "--model=~/nowhere", "--device", "cpu"], ["there is no model folder"]),
        (["train", "grass", "--task", "boolqq"], ["boolqq", "available", "boolq"]),
        (["train", "grass", "--task", "gsm8k", "boolq"], ["gsm8k", "boolq", "suite"]),
        (["train", "grass", "--colour", "red"], ["--colour"]),
        (["leaderboard", "--colour", "red"], ["--colour"]),
        (["train", "grass", "--model", "tiny", "--set", "method.sampler.num_active_layers=0"], ["given: 0"]),
        (
            ["train", "grass", "--model", "tiny", "--set", "method.sampler.num_active_layers=9"],
            ["gamma", "is 9", "4 decoder layers", "choose 1 to 4"],
        ),
        (["train", "grass", "--model", "tiny", "--steps", "many"], ["--steps"]),
        (["train", "grass", "--model", "tiny", "--tracking-uri", "http://127.0.0.1:9"], ["127.0.0.1:9"]),
        (["train", "grass", "--model", "tiny", "--resume", "--output", "nowhere"], ["nothing to resume in nowhere"]),
        (["export", "nowhere", "--output", "out"], ["nowhere is not a trained run"]),
        (["leaderboard", "--tracking-uri", "sqlite:///nowhere/mlflow.db"], ["no MLflow store"]),
        (["sweep", "sweeps/nowhere.py"], ["there is no sweep file sweeps/nowhere.py"]),
        (["train", "grass", "--model", "tiny", "--task", "boolq", "--data-dir", "empty"], ["boolq", "holds"]),
        (["train", "grass", "--model", "tiny", "--task", "boolq", "--data-dir", "broken"], ["boolq/test.json"]),
        (["train", "grass", "--model", "tiny", "--task", "boolq", "--data-dir", "keyless"], ["row 2", "answer"]),
        (
            ["train", "grass", "--model", "tiny", "--task", "boolq", "--data-dir", "missing"],
            ["missing", "not a folder"],
        ),
    ],
    ids=lambda value: " ".join(value[:6]) if isinstance(value, list) else None,
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], words: list[str], grass_ray: Command, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    write_rows(tmp_path / "broken", "[{")
    write_rows(tmp_path / "keyless", json.dumps([ROW, {key: ROW[key] for key in ROW if key != "answer"}]))
    assert_refused(grass_ray(*arguments), *words)


def test_a_shell_sees_the_message_and_the_exit_code(tmp_path: Path) -> None:
    done = in_a_process("train", "gras", cwd=tmp_path)
    assert_refused(done, "unknown method 'gras'")
    assert done.stderr.count("\n") == 1
