"""Every script in examples/ as a user runs it, where neither Ray nor MLflow can be imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer

from grass_ray.config import ModelConfig
from grass_ray.training.models import load_model

pytestmark = pytest.mark.long

EXAMPLES = REPOSITORY / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "word_problems.py")
PROBING, STEPS, PERIOD = 4, 26, 5
WITHOUT_RAY = (
    "import runpy, sys\n"
    "for name in ('ray', 'mlflow'): sys.modules[name] = None  # importing it raises ImportError\n"
    "sys.path[0] = {folder!r}\n"
    "sys.argv = {arguments!r}\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--main_process_port=0"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


def run(script: str, folder: Path, *options: str, launcher: list[str] | None = None) -> str:
    arguments = [str(EXAMPLES / script), "--steps", str(STEPS), *options]
    command = [sys.executable, "-c", WITHOUT_RAY.format(folder=str(EXAMPLES), arguments=arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if launcher is not None:
        command = [sys.executable, *launcher, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?<!train_)loss\W+(\d+\.\d+)", output)]


def layers_over_time(output: str) -> list[str]:
    """One text a step: a character a layer, from the last layer to the first."""
    rows = re.findall(r"^ +\d+  ([p#.]+)$", output, flags=re.MULTILINE)
    return ["".join(column) for column in zip(*rows, strict=True)]


def assert_trained_layer_by_layer(output: str) -> None:
    seen = losses(output)
    assert seen[-1] < seen[0] - 0.2
    steps = layers_over_time(output)
    assert len(steps) == PROBING + STEPS
    assert steps[:PROBING] == ["pppp"] * PROBING
    assert all(step.count("#") == 2 for step in steps[PROBING:])
    switches = [at for at in range(1, STEPS) if steps[PROBING + at] != steps[PROBING + at - 1]]
    assert switches, "the layers were switched"
    assert all(at % PERIOD == 0 for at in switches)


def test_the_readme_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+\.py)` \|", text, flags=re.MULTILINE)) == SCRIPTS
    assert len(SCRIPTS) == 5


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("plain_loop.py", []),
        ("plain_loop.py", ["--gradient-checkpointing"]),
        ("accelerate_loop.py", []),
        ("trl_sft.py", []),
        ("trl_sft.py", ["--bf16", "--gradient-checkpointing"]),
    ],
)
def test_example(script: str, options: list[str], tmp_path: Path) -> None:
    assert_trained_layer_by_layer(run(script, tmp_path, *options))


def test_accelerate_with_two_processes(tmp_path: Path) -> None:
    """The main one prints; the optimizer fails by itself where workers disagree about the active layers."""
    assert_trained_layer_by_layer(run("accelerate_loop.py", tmp_path, launcher=ACCELERATE))


def test_shards_over_two_processes(tmp_path: Path) -> None:
    """The model that is written is whole, and the last loss is its own."""
    output = run("fsdp2.py", tmp_path, "--output", "trained", launcher=TORCHRUN)
    assert_trained_layer_by_layer(output)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    shapes = {name: p.shape for name, p in load_model(ModelConfig(name="tiny")).model.named_parameters()}
    assert {name: p.shape for name, p in trained.named_parameters()} == shapes
    text = AutoTokenizer.from_pretrained(tmp_path / "trained")("Sara has 3 apples.", return_tensors="pt")
    assert trained(**text, labels=text["input_ids"]).loss.isfinite()


def test_trainers_resume_is_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    """Stopped in the middle of an interval, after 8 updates."""
    whole = run("transformers_trainer.py", tmp_path, "--output", "whole", "--save-steps", "12")
    assert_trained_layer_by_layer(whole)
    resumed = run("transformers_trainer.py", tmp_path, "--output", "resumed", "--resume", "whole/checkpoint-12")
    assert layers_over_time(resumed) == layers_over_time(whole)[12:]
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
