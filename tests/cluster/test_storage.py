"""A sweep's files, through a folder, through a URI, and in an object store behind a real HTTP server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server on this machine that has a bucket named results."""
    for name, value in {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    boto3.client("s3", endpoint_url=f"http://{address}").create_bucket(Bucket="results")
    yield address
    server.stop()


def go_and_come_back(storage: Storage, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_go_there_and_come_back(scheme: str, tmp_path: Path) -> None:
    storage = Storage.at(f"{scheme}{tmp_path}/results with space" if not scheme else f"{scheme}{tmp_path}/results")
    go_and_come_back(storage, tmp_path)


def test_files_go_to_an_object_store_and_come_back(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_and_come_back(Storage.at(f"s3://results/by-address?endpoint_override={s3}&scheme=http"), tmp_path / "one")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3}")
    storage = Storage.at("s3://results/by-environment/")
    assert storage.local_folder is None
    go_and_come_back(storage, tmp_path / "two")


def test_a_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage.at("results").uri == f"{tmp_path}/results"
    with pytest.raises(ConfigError, match="nonsense"):
        Storage.at("nonsense://bucket")
