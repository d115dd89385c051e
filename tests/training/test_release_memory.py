"""A process that trains one run after another gives back the memory of the last one before it asks for more."""

import os
import subprocess
import sys

import pytest
from small import REPOSITORY

from grass_ray.cluster.session import CPU_ENVIRONMENT

PROGRAM = """
from pathlib import Path
import resource
import torch
from grass_ray.training.metrics import release_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

class Run:
    def __init__(self):
        self.weights = [torch.ones(2**18) for _ in range(300)]  # 300 MiB
        self.itself = self  # as hooks do, so that only the collector frees it

before = resident_mib()
Run()
held = resident_mib()
release_memory()
print(held - before, resident_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_an_earlier_run_is_given_back() -> None:
    environment = {**os.environ, **CPU_ENVIRONMENT}  # as a sweep's trials: freed memory is kept
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=True)
    held, left = map(float, done.stdout.split())
    assert held > 250
    assert left < 60
