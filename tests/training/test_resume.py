"""Checkpoints that cannot be read, or belong elsewhere, are refused; tests/contract covers that resuming is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import short_run

from grass_ray.config import ConfigError
from grass_ray.training.run import Run


def test_unreadable_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    run = Run.prepare(short_run("grass"))
    with pytest.raises(ConfigError, match="is not a readable checkpoint"):
        run.restore(tmp_path / "nowhere")
    run.save(tmp_path / "broken")
    (tmp_path / "broken" / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="is not a readable checkpoint"):
        run.restore(tmp_path / "broken")
    lora = Run.prepare(short_run("lora"))
    lora.save(tmp_path / "lora")
    with pytest.raises(ConfigError, match="belongs to another model or method"):
        run.restore(tmp_path / "lora")
