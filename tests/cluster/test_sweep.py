"""A sweep killed in the middle, resumed, and resumed again: real Ray, real MLflow, real training of a tiny model.

One sweep serves all tests of this file, because Ray takes long to start.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from small import REPOSITORY

from grass_ray.config import RunConfig
from grass_ray.results.record import RunRecord
from grass_ray.results.store import load_records
from grass_ray.training.run import Run

pytestmark = pytest.mark.long

SCRIPT = REPOSITORY / "tests" / "mini_sweep.py"


@dataclass(frozen=True, kw_only=True)
class Story:
    """What was seen of the sweep: after the kill, after the resume, after a second resume."""

    storage: Path
    killed: dict[str, bytes]  # records there when the driver was killed
    unfinished: set[str]
    resumed: subprocess.CompletedProcess[str]
    after_resume: dict[str, bytes]
    again: subprocess.CompletedProcess[str]

    @property
    def folder(self) -> Path:
        (folder,) = (self.storage / "mini").iterdir()
        return folder

    def records(self) -> dict[str, RunRecord]:
        found = [RunRecord.load(path) for path in self.folder.glob("*/record.json")]
        return {record.config["method"]["name"]: record for record in found}

    def runs(self) -> list[Any]:
        client = self.client()
        return list(client.search_runs([client.get_experiment_by_name("mini").experiment_id]))

    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.storage}/mlflow.db")


def command(storage: Path, *flags: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--storage-path", str(storage), "--cpus-per-trial", "1", *flags]


def written(storage: Path) -> dict[str, bytes]:
    """Every trial's record by the trial's key."""
    return {path.parent.name[-12:]: path.read_bytes() for path in storage.glob("mini/*/*/record.json")}


def with_checkpoint(storage: Path) -> set[str]:
    """The keys of trials that have a checkpoint."""
    return {path.parent.name.removeprefix("train-") for path in storage.glob("mini/*/ray/train-*/latest")}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    storage = tmp_path_factory.mktemp("sweep") / "results"
    log = storage.parent / "driver.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with log.open("w") as output:
        driver = subprocess.Popen(
            command(storage), stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        deadline = time.monotonic() + 240
        while not (written(storage) and with_checkpoint(storage) - written(storage).keys()):
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    time.sleep(5)  # the driver's Ray notices its death; until then a trial may still come to its end
    killed, unfinished = written(storage), with_checkpoint(storage) - written(storage).keys()

    def resume() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(storage, "--resume"), capture_output=True, text=True, timeout=400, env=environment
        )

    resumed = resume()
    after_resume = written(storage)
    return Story(
        storage=storage,
        killed=killed,
        unfinished=unfinished,
        resumed=resumed,
        after_resume=after_resume,
        again=resume(),
    )


def test_the_resumed_sweep_ends_with_every_trial_and_says_that_one_failed(story: Story) -> None:
    assert story.resumed.returncode == 1, story.resumed.stdout + story.resumed.stderr
    assert "Traceback" not in story.resumed.stderr
    statuses = {method: record.status for method, record in story.records().items()}
    assert statuses == {"base": "finished", "full": "finished", "grass": "finished", "lora": "failed"}
    assert re.search(r"became (nan|inf) at step", story.records()["lora"].failure or "")
    assert "grass-ray ui --tracking-uri sqlite:///" in story.resumed.stdout


def test_what_had_finished_is_not_redone_and_what_had_not_goes_on_from_its_checkpoint(story: Story) -> None:
    for key, record in story.killed.items():
        assert story.after_resume[key] == record
    went_on = set(re.findall(r"(\w{12})  goes on from its checkpoint after step \d+", story.resumed.stdout))
    assert story.unfinished
    assert story.unfinished <= went_on


@pytest.mark.parametrize("method", ["full", "grass"])
def test_trials_have_the_numbers_of_runs_that_were_never_interrupted_and_alone_in_their_process(
    story: Story, method: str
) -> None:
    record = story.records()[method]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = Run.prepare(RunConfig.parse(record.config))
        losses = [(report.step, report.loss) for report in run.fit()]
    finally:
        torch.set_num_threads(threads)
    assert record.series["train/loss"] == losses


def test_mlflow_holds_one_parent_and_one_child_a_trial_with_the_right_status(story: Story) -> None:
    parents = [run for run in story.runs() if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in story.runs() if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert sorted((run.data.tags["method"], run.info.status) for run in children) == [
        ("base", "FINISHED"), ("full", "FINISHED"), ("grass", "FINISHED"), ("lora", "FAILED"),
    ]  # fmt: skip
    assert {run.info.run_name for run in children} == {
        f"{method}-tiny-generated-s0" for method in ("base", "full", "grass", "lora")
    }
    grass = next(run for run in children if run.data.tags["method"] == "grass")
    assert grass.data.params["method.sampler.period"] == "10"
    assert grass.data.metrics["eval/average"] == story.records()["grass"].metrics["eval/average"]


def test_every_step_is_in_mlflow_once_although_some_were_trained_twice(story: Story) -> None:
    for run in story.runs():
        if run.data.tags.get("method") in ("full", "grass"):
            history = story.client().get_metric_history(run.info.run_id, "train/loss")
            expected = story.records()[run.data.tags["method"]].series["train/loss"]
            assert sorted((metric.step, metric.value) for metric in history) == expected


def test_artifacts_are_on_each_run_and_on_the_sweep(story: Story) -> None:
    def artifacts(run: Any) -> set[str]:
        return {item.path for item in story.client().list_artifacts(run.info.run_id)}

    for run in story.runs():
        method = run.data.tags.get("method")
        if method is None:
            names = artifacts(run)
            assert {"leaderboard.md", "leaderboard.csv", "leaderboard.json"} <= names
            assert {"ranking.json", "ranking.png", "accuracy_memory.png"} <= names
            assert "4 of 4 trials have ended" in run.data.tags["mlflow.note.content"]
            assert "| grass" in run.data.tags["mlflow.note.content"]
            assert run.data.metrics["sweep/failed"] == 1
        elif method == "grass":
            assert {"config.yaml", "record.json", "examples.jsonl", "sampling.png", "loss.png"} <= artifacts(run)
            assert {"engagement.json", "engagement.txt"} <= artifacts(run)
        else:
            assert {"config.yaml", "record.json"} <= artifacts(run)


def test_the_leaderboard_has_every_trial_from_the_records_of_the_store(story: Story) -> None:
    rows = json.loads((story.folder / "summary" / "leaderboard.json").read_text())
    assert {row["method"]: row["status"] for row in rows} == {
        "base": "finished", "full": "finished", "grass": "finished", "lora": "failed",
    }  # fmt: skip
    stored = load_records(f"sqlite:///{story.storage}/mlflow.db", "mini")
    assert {record.run_id for record in stored} == {record.run_id for record in story.records().values()}


def test_resuming_a_complete_sweep_redoes_nothing_and_shows_the_leaderboard_again(story: Story) -> None:
    assert story.again.returncode == 1
    assert "every trial has ended already" in story.again.stdout
    assert "grass" in story.again.stdout
    assert written(story.storage) == story.after_resume
    assert len(story.runs()) == 5


def test_flags_that_would_make_other_trials_are_refused_on_resume(story: Story) -> None:
    other = subprocess.run(command(story.storage, "--resume", "--seeds", "1"), capture_output=True, text=True)
    assert other.returncode == 2
    assert "--seeds would make other trials" in other.stderr


def test_more_cpus_than_any_machine_has_is_refused_instead_of_waiting(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "--methods", "full", "--no-base", "--cpus-per-trial", "4096"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "no machine can hold a trial of 4096 CPUs" in done.stderr
