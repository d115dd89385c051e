"""A sampler of a user's own in a sweep that is killed and resumed: the workers run the text that the driver read."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from own_methods import write_methods
from small import REPOSITORY

from grass_ray.config import RunConfig
from grass_ray.execute import execute
from grass_ray.method_files import methods_with
from grass_ray.results.record import RunRecord

pytestmark = pytest.mark.long


def test_a_sweep_with_a_sampler_of_ones_own_is_killed_and_resumed(tmp_path: Path) -> None:
    methods, storage = write_methods(tmp_path / "own"), tmp_path / "results"
    command = [
        *(sys.executable, str(REPOSITORY / "tests" / "mini_sweep.py"), "--methods", "top-heavy", "--no-base"),
        *("--method-file", str(methods), "--storage-path", str(storage), "--cpus-per-trial", "1"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "killed.log").open("w") as log:
        driver = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment, cwd=tmp_path
        )
        deadline = time.monotonic() + 600
        while not list(storage.glob("mini/*/ray/train-*/checkpoint_2*")) and time.monotonic() < deadline:
            assert driver.poll() is None, (tmp_path / "killed.log").read_text()
            time.sleep(0.1)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not list(storage.glob("mini/*/*/record.json")), "the trial ended before it was killed"

    edited = write_methods(tmp_path / "edited", code=(tmp_path / "own" / "top_heavy.py").read_text() + "# later\n")
    refused = [str(edited) if word == str(methods) else word for word in command]
    done = subprocess.run([*refused, "--resume"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "the code of top_heavy:TopHeavySampler is not the code of this configuration" in done.stderr

    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env=environment, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = storage.glob("mini/*/*/record.json")
    record = RunRecord.load(path)
    assert record.status == "finished"
    assert record.code == {"top_heavy.py": (tmp_path / "own" / "top_heavy.py").read_text()}

    methods_with(methods)
    whole = execute(RunConfig.parse(record.config), threads=1)
    assert whole.weights_sha256 == record.weights_sha256
    assert whole.outcome is not None
    assert record.layers is not None
    assert whole.outcome.layers.intervals == record.layers.intervals
