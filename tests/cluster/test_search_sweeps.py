"""Real searches of a tiny model: Optuna with ASHA, killed and resumed; and a population. Each takes minutes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from small import REPOSITORY

from grass_ray.results.record import RunRecord
from grass_ray.results.searches import rung_losses, searched, trial_loss, winner
from grass_ray.results.store import load_records

SCRIPT = REPOSITORY / "tests" / "mini_search.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(storage: Path, *flags: str) -> list[str]:
    fixed = ["--storage-path", str(storage), "--cpus-per-trial", "1", "--no-base"]
    return [sys.executable, str(SCRIPT), *fixed, *flags]


def run(storage: Path, *flags: str) -> str:
    done = subprocess.run(
        command(storage, *flags), capture_output=True, text=True, timeout=2400, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(storage: Path) -> list[RunRecord]:
    return [RunRecord.load(path) for path in sorted(storage.glob("mini-search/*/*/record.json"))]


def written(storage: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in storage.glob("mini-search/*/*/record.json")}


def chosen(storage: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(storage.glob("mini-search/*/search/grass/*.json"))]


def finals(storage: Path) -> list[RunRecord]:
    return [record for record in records(storage) if record.tasks]


def generations(storage: Path) -> dict[str, tuple[str, int]]:
    """What is kept of a population's generations, and when it was written."""
    return {p.name: (p.read_text(), p.stat().st_mtime_ns) for p in storage.glob("mini-search/*/generations/train-*")}


def lineage_of(record: RunRecord) -> list[dict[str, object]]:
    assert record.search is not None
    return [step.model_dump() for step in record.search.lineage]


def kill_after(storage: Path, flags: Sequence[str], condition: Callable[[], bool]) -> None:
    """Start a search, and kill its driver once the condition holds."""
    with storage.with_suffix(".log").open("w") as log:
        driver = subprocess.Popen(
            command(storage, *flags), stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=ENVIRONMENT
        )
        deadline = time.monotonic() + 900
        while not condition() and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


@pytest.fixture
def neighbour() -> Iterator[None]:
    """Another Ray on this machine: what a stopped trial held must be freed all the same."""
    script = (
        "import ray, sys; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False); print('up', flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{script}; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    yield
    process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.usefixtures("neighbour")
def test_a_search_by_optuna_with_asha_that_was_killed_comes_out_as_one_that_was_not(tmp_path: Path) -> None:
    flags = ("--search", "optuna", "--scheduler", "asha", "--num-samples", "4", "--max-concurrent-trials", "1")
    flags += ("--seeds", "1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    out = run(whole, *flags)
    kill_after(killed, flags, lambda: len(records(killed)) >= 2)
    before = written(killed)
    assert len(before) >= 2
    time.sleep(5)
    run(killed, *flags, "--resume")

    assert len(chosen(killed)) == 4
    assert chosen(killed) == chosen(whole)
    assert before.items() <= written(killed).items(), "what had ended is not run again"
    (own,) = searched(records(killed)).values()
    (other,) = searched(records(whole)).values()
    assert [(r.status, r.metrics["validation/loss"]) for r in own] == [
        (r.status, r.metrics["validation/loss"]) for r in other
    ]
    assert [rung_losses(record) for record in own] == [rung_losses(record) for record in other]
    assert {record.status for record in own} == {"finished", "stopped"}, "this search stops some early"
    assert not any(record.tasks for record in own), "the search meets no test question"

    # the winner was trained again, with the test, and came out the same
    best = winner(own)
    (final,) = finals(killed)
    assert best is not None
    assert final.search is not None
    assert best.search is not None
    assert (final.search.stage, final.search.number) == ("winner", best.search.number)
    assert final.weights_sha256 == best.weights_sha256
    assert final.metrics["validation/loss"] == trial_loss(best)
    (folder,) = (killed / "mini-search").iterdir()
    settings = yaml.safe_load((folder / "summary" / "best.yaml").read_text())
    assert f"method.optimizer.lr={best.config['method']['optimizer']['lr']:g}" in settings["methods"]["grass"]

    # the books
    client = MlflowClient(f"sqlite:///{killed}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("mini-search").experiment_id], "tags.stage = 'search'")
    stopped = sum(record.status == "stopped" for record in own)
    assert sorted(run.info.status for run in runs) == ["FINISHED"] * (4 - stopped) + ["KILLED"] * stopped
    assert all("stopped early at step" in (r.failure or "") for r in own if r.status == "stopped")
    assert {"search.png", "search.csv", "rungs.png", "rungs.csv"} <= {p.name for p in (folder / "summary").iterdir()}
    assert f"{stopped} stopped early" in out
    assert "a search of 4 trials of at most 36 steps" in out
    assert len(load_records(f"sqlite:///{killed}/mlflow.db", "mini-search")) == 5


@pytest.mark.slow
def test_a_population_changes_settings_in_mid_training_and_says_from_whom_it_took_what(tmp_path: Path) -> None:
    storage, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ("--scheduler", "pbt", "--num-samples", "4", "--max-concurrent-trials", "2")
    out = run(storage, *flags)
    (own,) = searched(records(storage)).values()
    assert [record.status for record in own] == ["finished"] * 4
    keys = {record.run_id[-12:] for record in own}
    taken = 0
    for record in own:
        assert record.search is not None
        lineage = record.search.lineage
        assert lineage[0].step == 0
        assert [step.step for step in lineage] == sorted(step.step for step in lineage)
        assert {step.weights_of for step in lineage} <= keys
        taken += len(lineage) - 1
        # what was logged at each step is what the lineage says (two steps only measured)
        rates = dict(record.series["hparam/lr"])
        for place, step in enumerate(lineage):
            end = lineage[place + 1].step if place + 1 < len(lineage) else 36
            expected = step.settings["method.optimizer.lr"]
            assert {rates[2 + update] for update in range(step.step + 1, end + 1)} == {expected}
        # 36 updates with a single history, measured between the generations
        assert [step for step, _ in record.series["train/loss"]] == list(range(1, 39))
        assert list(rung_losses(record)) == [9, 18, 27]
        assert record.config["method"]["optimizer"]["lr"] == lineage[-1].settings["method.optimizer.lr"]
    assert taken >= 1, "the worst took over at least at the end"

    # the winner is tested from its checkpoint, not trained again
    best = winner(own)
    assert best is not None
    (final,) = finals(storage)
    assert final.search is not None
    assert best.search is not None
    assert final.search.lineage == best.search.lineage
    assert final.weights_sha256 == best.weights_sha256
    assert final.metrics["validation/loss"] == trial_loss(best)
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("mini-search").experiment_id], "tags.stage = 'search'")
    assert len(runs) == 4
    assert all("hparam/lr" in run.data.metrics for run in runs)
    assert "4 trials of 36 steps by PBT over" in out

    # a driver killed in the second generation: what was trained is not trained again, and all comes out the same
    kill_after(killed, flags, lambda: len(generations(killed)) >= 5)
    before = generations(killed)
    run(killed, *flags, "--resume")
    assert before.items() <= generations(killed).items()
    (again,) = searched(records(killed)).values()
    assert [(r.weights_sha256, lineage_of(r)) for r in again] == [(r.weights_sha256, lineage_of(r)) for r in own]
    assert [r.series["train/loss"] for r in again] == [r.series["train/loss"] for r in own]
    assert [r.weights_sha256 for r in finals(killed)] == [final.weights_sha256]
