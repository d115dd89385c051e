"""benchmarks/leaderboard.py: a few records through the same code as its five thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import leaderboard as benchmark

pytestmark = pytest.mark.long


def test_it_fills_a_store_once_and_reads_and_ranks_all_of_it(tmp_path: Path) -> None:
    options = benchmark.Options(records=30, questions=6, steps=4)
    assert benchmark.fill(tmp_path / "store", options) > 0
    assert benchmark.fill(tmp_path / "store", options) == 0
    rounds = [
        {kind: benchmark.work(kind, tmp_path / "store") for kind in ("import", "read", "build", "build-with-steps")}
    ]
    assert [rounds[0][kind]["records"] for kind in ("import", "read", "build")] == [0, 30, 30]
    text = benchmark.describe(benchmark.summarise(options, rounds, 1.0))
    assert text.startswith("# A leaderboard over 30 records")
    assert "times** the time of only reading" in text
