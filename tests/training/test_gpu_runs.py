"""Every method on a GPU: it resumes there bit for bit, in the middle of whatever it measures."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from small import short_run
from torch.nn.attention import SDPBackend, sdpa_kernel

from grass_ray.methods import METHODS
from grass_ray.training.run import Run

STEPS = 9


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_gpu_resume_is_bitwise(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while probing, and in an open measuring window; moments in every placement the method uses."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda")
    config = short_run(method, steps=STEPS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention adds up in any order
            whole = Run.prepare(config, device)
            for report in whole.fit():
                if report.step in (1, 5):
                    whole.save(tmp_path / str(report.step))
            for stop in (1, 5):
                resumed = Run.prepare(config, device)
                resumed.restore(tmp_path / str(stop))
                reports = list(resumed.fit())
                assert len(reports) == whole.state.total_steps - stop
                pairs = itertools.zip_longest(whole.state.model.named_parameters(), resumed.state.model.parameters())
                assert not [name for (name, a), b in pairs if not torch.equal(a, b)]
                assert resumed.state.optimizer.sampler.importance() == pytest.approx(
                    whole.state.optimizer.sampler.importance(), nan_ok=True, rel=0
                )
    finally:
        torch.use_deterministic_algorithms(False)
