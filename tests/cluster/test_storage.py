"""A sweep's files, through a folder and through a URI."""

from pathlib import Path

import pytest

from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_go_there_and_come_back(scheme: str, tmp_path: Path) -> None:
    storage = Storage.at(f"{scheme}{tmp_path}/results with space" if not scheme else f"{scheme}{tmp_path}/results")
    assert storage.folders() == []
    (tmp_path / "made" / "plots").mkdir(parents=True)
    (tmp_path / "made" / "plots" / "loss.png").write_bytes(b"\x89")
    storage.upload(tmp_path / "made", "sweep", "trial")
    storage.write_text("ü: 1\n", "sweep", "sweep.yaml")
    assert storage.join("sweep").folders() == ["trial"]
    assert storage.read_text("sweep", "sweep.yaml") == "ü: 1\n"
    (tmp_path / "back").mkdir()
    storage.download(tmp_path / "back", "sweep", "trial")
    assert (tmp_path / "back" / "plots" / "loss.png").read_bytes() == b"\x89"
    storage.remove("sweep", "trial")
    storage.remove("sweep", "never was")
    assert not storage.exists("sweep", "trial")


def test_a_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage.at("results").uri == f"{tmp_path}/results"
    with pytest.raises(ConfigError, match="nonsense"):
        Storage.at("nonsense://bucket")
