"""MLflow's server dies during a sweep and is away when the sweep ends: nothing that it was to be told is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import free_port, server
from small import REPOSITORY

from grass_ray.results.record import RunRecord

SWEEP = REPOSITORY / "tests" / "mini_sweep.py"
PATIENCE_S = 300


def wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def hear_interrupts() -> None:
    """As in a terminal: what a shell starts in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [True, False], ids=["comes back", "stays away"])
def test_a_server_that_is_away_when_the_sweep_ends_learns_everything(tmp_path: Path, comes_back: bool) -> None:
    port = free_port()
    uri, log = f"http://127.0.0.1:{port}", tmp_path / "sweep.log"
    flags = ["--methods", "full", "--no-base", "--cpus-per-trial", "1", "--storage-path", str(tmp_path / "results")]
    command = [sys.executable, str(SWEEP), *flags, "--tracking-uri", uri]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    with log.open("wb") as output:
        with server(tmp_path, port):
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, preexec_fn=hear_interrupts
            )
            # written by the trial's worker, before its first step
            wait_until(lambda: list(tmp_path.glob("results/mini/*/full-*/config.yaml")), process, log)
        wait_until(lambda: "waiting up to 5 minutes for MLflow" in log.read_text(), process, log)
        if comes_back:
            with server(tmp_path, port):
                assert process.wait(timeout=PATIENCE_S) == 0
        else:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0
            assert "messages of this sweep; all of it is in" in " ".join(log.read_text().split())
    with server(tmp_path, port):
        if not comes_back:
            subprocess.run([*command, "--resume"], check=True, env=environment, timeout=PATIENCE_S)
        client = MlflowClient(uri)
        runs = client.search_runs([client.get_experiment_by_name("mini").experiment_id])
        assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED"], "the sweep and its trial"
        (trial,) = (run for run in runs if "mlflow.parentRunId" in run.data.tags)
        (record,) = (RunRecord.load(path) for path in tmp_path.glob("results/mini/*/*/record.json"))
        history = client.get_metric_history(trial.info.run_id, "train/loss")
        assert sorted((metric.step, metric.value) for metric in history) == record.series["train/loss"]
        assert trial.data.metrics["eval/average"] == record.metrics["eval/average"]
