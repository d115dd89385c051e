"""A sweep with a trial that cannot fit into memory: refused before it starts, recorded, and the others go on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import REPOSITORY

from grass_ray.results.record import RunRecord

SCRIPT = REPOSITORY / "tests" / "mini_sweep.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "rows", "there"),
    [([], 200_000, "this machine leaves it"), (["--gpu-memory", "0.51"], 64, "this machine leaves it 0.01 GiB")],
)
def test_a_trial_that_cannot_fit_is_refused_and_the_others_go_on(
    limit: list[str], rows: int, there: str, tmp_path: Path
) -> None:
    storage = tmp_path / "results"
    flags = ["--storage-path", str(storage), "--cpus-per-trial", "1", "--methods", "full", *limit]
    settings = [f"training.batch_size={rows}", "training.steps=1", "training.checkpoint_every_steps=null"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags, "--set", *settings],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    records = {
        record.config["method"]["name"]: record
        for record in (RunRecord.load(path) for path in storage.glob("mini/*/*/record.json"))
    }
    assert records["base"].status == "finished"
    assert records["full"].status == "failed"
    assert records["full"].failure is not None
    assert "full-tiny-generated-s0 cannot fit: predicted to need" in records["full"].failure
    assert there in records["full"].failure
    assert "cannot fit" in done.stdout
