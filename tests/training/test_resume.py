"""A run stopped after any step and gone on with in a new process is, bit for bit, a run that never stopped."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grass_ray.config import ConfigError, ModelConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.training.run import Run

STEPS = 9
SCHEDULE = ["method.sampler.period=2", "method.sampler.num_active_layers=2"]
OVERRIDES = {
    "full": [],
    "lora": [],
    "lisa": SCHEDULE,
    "grass": [*SCHEDULE, "method.sampler.probing_steps=2", "method.sampler.refresh_period=3"],
    "grass-static": [*SCHEDULE, "method.sampler.probing_steps=2"],
}


def make_config(method: str) -> RunConfig:
    config = RunConfig(method=METHODS[method].config, model=ModelConfig(name="tiny"))
    return config.override(
        [
            f"training.steps={STEPS}",
            "training.batch_size=4",
            "training.accumulation_steps=2",
            "training.warmup_steps=2",
            "data.source.train_rows=30",  # three epochs: the shuffling of later ones is covered too
            "data.source.test_rows=4",
            *OVERRIDES[method],
        ]
    )


def digest(run: Run) -> dict[str, object]:
    """Everything that must not depend on a stop: weights, states, sampler, schedule, engagement, losses."""
    sha = hashlib.sha256()
    for parameter in run.state.model.parameters():
        sha.update(parameter.detach().numpy().tobytes())
    for state in run.state.optimizer.state_dict()["state"].values():
        for name in sorted(state):
            sha.update(state[name].numpy().tobytes())
    return {
        "sha": sha.hexdigest(),
        "sampler": run.state.optimizer.sampler.state_dict(),
        "lr": run.state.optimizer.param_groups[0]["lr"],
        "engagement": run.state.engagement.state_dict()["engagement"],
        "losses": run.state.series["train/loss"],
    }


def resume_all(method: str, folder: str) -> list[dict[str, object]]:
    """Go on from every checkpoint in ``folder``; called in a new process."""
    torch.set_num_threads(1)
    digests = []
    for checkpoint in sorted(Path(folder).iterdir()):
        run = Run.prepare(make_config(method))
        run.restore(checkpoint)
        for _ in run.fit():
            pass
        digests.append(digest(run))
    return digests


@pytest.mark.parametrize("method", OVERRIDES)
def test_resume_at_every_step_in_a_new_process(method: str, tmp_path: Path) -> None:
    run = Run.prepare(make_config(method))
    run.save(tmp_path / "step-00")
    for report in run.fit():
        run.save(tmp_path / f"step-{report.step:02d}")
    expected = json.loads(json.dumps(digest(run)))
    assert run.state.trained == STEPS
    code = (
        "import json, sys; sys.path[:0] = sys.argv[1:3]; import test_resume as t\n"
        f"print('RESULT' + json.dumps(t.resume_all({method!r}, sys.argv[3])))"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *folders], check=True, capture_output=True, text=True)
    digests = json.loads(done.stdout.split("RESULT")[1])
    assert len(digests) == run.state.total_steps + 1
    for step, found in enumerate(digests):
        assert found == expected, f"resumed after step {step}"


def test_unreadable_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    run = Run.prepare(make_config("grass"))
    with pytest.raises(ConfigError, match="is not a readable checkpoint"):
        run.restore(tmp_path / "nowhere")
    run.save(tmp_path / "broken")
    (tmp_path / "broken" / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="is not a readable checkpoint"):
        run.restore(tmp_path / "broken")
    lora = Run.prepare(make_config("lora"))
    lora.save(tmp_path / "lora")
    with pytest.raises(ConfigError, match="belongs to another model or method"):
        run.restore(tmp_path / "lora")
