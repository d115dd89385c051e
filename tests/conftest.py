"""Shared by all tests: quiet threads, slow and GPU marks, and where the real benchmark data may lie."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from small import REPOSITORY

# the same few examples in every ordinary run; `make reliability` takes long, thousands of new ones
_ANY = {"deadline": None, "database": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("short", max_examples=25, derandomize=True, **_ANY)
hypothesis.settings.register_profile("long", max_examples=500, print_blob=True, **_ANY)
hypothesis.settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny models; several threads only wait for each other


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real benchmark data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("GRASS_RAY_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "llm-adapters" / "dataset").is_dir():
        pytest.skip(f"no real benchmark data at {folder}; set GRASS_RAY_DATA to a folder that holds llm-adapters/")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--refresh-golden", action="store_true", help="write the files of tests/golden anew")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        # files with long tests first, so that no process has one left when the others are done
        files_with_long = {item.path for item in items if item.get_closest_marker("long")}
        items.sort(key=lambda item: item.path not in files_with_long)
