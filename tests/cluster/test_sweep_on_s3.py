"""A sweep whose results, checkpoints and records live in an object store: real Ray, an S3 server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from small import REPOSITORY

from grass_ray.cluster.storage import Storage
from grass_ray.results.record import RunRecord

SCRIPT = REPOSITORY / "tests" / "mini_sweep.py"


@pytest.mark.slow
def test_a_sweep_keeps_everything_in_the_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    settings = {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="results")
    place = "s3://results/sweeps"
    command = [
        *(sys.executable, str(SCRIPT), "--storage-path", place, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"),
        *("--methods", "grass", "--cpus-per-trial", "1", "--set", "training.steps=120"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        sweeps = Storage.at(f"{place}/mini")
        (sweep_id,) = sweeps.folders()
        trials = [name for name in sweeps.join(sweep_id).folders() if sweeps.exists(sweep_id, name, "record.json")]
        records = {
            name: RunRecord.model_validate_json(sweeps.read_text(sweep_id, name, "record.json")) for name in trials
        }
        assert sorted(record.config["method"]["name"] for record in records.values()) == ["base", "grass"]
        assert {record.status for record in records.values()} == {"finished"}
        (grass,) = (name for name, record in records.items() if record.config["method"]["name"] == "grass")
        assert sweeps.exists(sweep_id, grass, "engagement.txt")
        assert sweeps.exists(sweep_id, "summary", "leaderboard.md")
        assert not sweeps.exists(sweep_id, "ray", f"train-{grass[-12:]}"), "nothing is left to continue"
    finally:
        server.stop()
