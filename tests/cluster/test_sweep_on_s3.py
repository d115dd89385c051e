"""Sweeps whose results, checkpoints and records live in an object store: real Ray, an S3 server on this machine.

Behind a proxy that answers late, breaks requests, or is away for a while in the middle::

    python -m pytest --slow -s tests/cluster/test_sweep_on_s3.py
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from faulty_proxy import Proxy
from moto.server import ThreadedMotoServer
from small import REPOSITORY

from grass_ray.cluster.storage import Storage
from grass_ray.results.record import RunRecord

SCRIPT = REPOSITORY / "tests" / "mini_sweep.py"
PLACE = "s3://results/sweeps"
AWAY_S = 45.0
BREAKS = ("refused", "lost answer", "500", "503 object", "slow")
Chooser = Callable[[str], str | None]


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """In front of a store with an empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with Proxy(port).running() as found:
        settings = {
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": found.uri,
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        store = f"http://{host}:{port}"
        urllib.request.urlopen(f"{store}/moto-api/reset", data=b"").close()  # all servers of a process have one state
        boto3.client("s3", endpoint_url=store).create_bucket(Bucket="results")
        yield found
    server.stop()


def plain(path: str) -> str | None:
    return None


def slow(path: str) -> str | None:
    return "slow"


def one_of_five() -> Chooser:
    chance = random.Random(0)
    return lambda path: chance.choice(BREAKS) if chance.random() < 0.2 else None


def away_after(word: str) -> Chooser:
    """Nobody answers for a while once ``word`` was asked for."""
    until: list[float] = []

    def choose(path: str) -> str | None:
        if word in path and not until:
            until.append(time.monotonic() + AWAY_S)
        return "refused" if until and time.monotonic() < until[0] else None

    return choose


CASES: dict[str, Callable[[], Chooser]] = {
    "as it is": lambda: plain,
    "each request slow": lambda: slow,
    "a fifth of the requests broken": one_of_five,
    "away while a checkpoint is written": lambda: away_after("checkpoint_000001"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_sweep_keeps_everything_in_the_object_store(case: str, proxy: Proxy, tmp_path: Path) -> None:
    proxy.choose = CASES[case]()
    command = [
        *(sys.executable, str(SCRIPT), "--storage-path", PLACE, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"),
        *("--methods", "grass", "--cpus-per-trial", "1", "--set", "training.steps=120"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ, cwd=tmp_path)
    print(case, dict(Counter(proxy.done)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the worker failed" not in done.stdout
    proxy.choose = plain
    sweeps = Storage.at(f"{PLACE}/mini")
    (sweep_id,) = sweeps.folders()
    trials = [name for name in sweeps.join(sweep_id).folders() if sweeps.exists(sweep_id, name, "record.json")]
    records = {name: RunRecord.model_validate_json(sweeps.read_text(sweep_id, name, "record.json")) for name in trials}
    assert sorted(record.config["method"]["name"] for record in records.values()) == ["base", "grass"]
    assert {record.status for record in records.values()} == {"finished"}
    (grass,) = (name for name, record in records.items() if record.config["method"]["name"] == "grass")
    steps = [step for step, _ in records[grass].series["train/loss"]]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 120
    assert sweeps.exists(sweep_id, grass, "engagement.txt")
    assert sweeps.exists(sweep_id, "summary", "leaderboard.md")
    assert not sweeps.exists(sweep_id, "ray", f"train-{grass[-12:]}"), "nothing is left to continue"
