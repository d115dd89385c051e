"""Where converted models are kept when there is no home, or none that can be written to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grass_ray.config import ConfigError, ModelConfig
from grass_ray.training import built_in
from grass_ray.training.models import describe_model

NOWHERE = f"{os.devnull}/home"  # root may write everywhere else


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("GRASS_RAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    built_in._temporary_cache.cache_clear()


@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME"])
def test_a_temporary_folder_of_ones_own_is_used_and_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, NOWHERE)
    folder = built_in.cache_folder()
    assert folder == built_in.cache_folder() == tmp_path / f"grass_ray-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    (message,) = [record.getMessage() for record in caplog.records]
    assert "GRASS_RAY_CACHE" in message


def test_nobody_elses_folder_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", NOWHERE)
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"grass_ray-{os.getuid()}").symlink_to(tmp_path / "theirs")
    assert built_in.cache_folder().resolve() != tmp_path / "theirs"


def test_a_home_is_used_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert built_in.cache_folder() == tmp_path / ".cache" / "grass_ray"


def test_a_cache_that_cannot_be_written_to_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRASS_RAY_CACHE", NOWHERE)
    with pytest.raises(ConfigError, match="set GRASS_RAY_CACHE to a folder"):
        describe_model(ModelConfig(name="smollm2-135m"))
