"""A real MLflow store in a temporary SQLite file, made once: migrations take seconds."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from grass_ray.results.connection import default_tracking_uri
from grass_ray.results.tracker import Tracker


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("a store") / "not there yet"
    uri = default_tracking_uri(folder)
    Tracker(uri, "first", folder / "artifacts").open()
    return uri


@pytest.fixture
def new_tracker(store: str) -> Callable[[], Tracker]:
    """Opens trackers of one fresh experiment; each is what another process would hold."""
    experiment = f"sweep-{uuid.uuid4().hex[:8]}"

    def opened() -> Tracker:
        tracker = Tracker(store, experiment)
        tracker.open()
        return tracker

    return opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trial's folder with everything that is uploaded, and something that is not."""
    place = tmp_path / "trial"
    place.mkdir()
    (place / "config.yaml").write_text("seed: 0\n")
    (place / "examples.jsonl").write_text('{"task": "generated"}\n')
    (place / "loss.png").write_bytes(b"picture")
    (place / "checkpoint.bin").write_bytes(b"large")
    return place
