"""Everything that is written as JSON can be read by strict readers, which know no bare NaN; old files still can."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from result_records import answers, make_history, make_record

from grass_ray.config import ConfigError, from_json, to_json
from grass_ray.results.columns import overview_rows
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render, render_comparison
from grass_ray.results.store import load_records
from grass_ray.results.sweep_comparison import compare_sweeps
from grass_ray.results.tracker import Tracker


def strict(text: str) -> Any:
    """What JavaScript and jq would read."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"bare {constant}")

    return json.loads(text, parse_constant=refuse)


def odd(method: str = "grass", **more: Any) -> RunRecord:
    """A run whose numbers are not numbers wherever they may not be."""
    layers = make_history(num_layers=3, steps=30)
    layers.refreshes = [(10, (math.nan, math.inf, 1.0), (0.2, 0.3, 0.5))]
    record = make_record(
        method,
        metrics={"memory/peak_allocated_gib": math.nan, "time/train_s": -math.inf},
        series={"train/loss": [(1, math.inf), (2, math.nan)], "time/step_s": [(1, 1.0), (2, math.nan)]},
        layers=layers,
        **more,
    )
    record.data["share"] = math.nan
    record.tasks["generated"].workload["seconds"] = math.inf
    return record


def test_a_record_is_strict_json_and_reads_back_the_same(tmp_path: Path) -> None:
    odd().save(tmp_path / "record.json")
    text = (tmp_path / "record.json").read_text()
    assert strict(text)["metrics"] == {"memory/peak_allocated_gib": "NaN", "time/train_s": "-Infinity"}
    again = RunRecord.load(tmp_path / "record.json")
    assert math.isnan(again.metrics["memory/peak_allocated_gib"])
    assert again.metrics["time/train_s"] == -math.inf
    assert again.series["train/loss"][0] == (1, math.inf)
    assert again.layers is not None
    assert again.layers.refreshes[0][1][1:] == (math.inf, 1.0)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == text


def test_an_old_record_with_bare_nan_is_still_read(tmp_path: Path) -> None:
    old = tmp_path / "record.json"
    text = odd().model_dump_json().replace('"NaN"', "NaN").replace('"-Infinity"', "-Infinity")
    old.write_text(text.replace('"Infinity"', "Infinity"))
    assert "NaN," in old.read_text()
    record = RunRecord.load(old)
    assert math.isnan(record.metrics["memory/peak_allocated_gib"])
    assert len(build_leaderboard([record])) == 1


def test_tables_and_pages_are_strict_json_too() -> None:
    records = [odd("grass", sweep_id="a"), odd("grass", sweep_id="b"), odd("full", sweep_id="b")]
    tables = build_leaderboard(records)
    assert strict(render(tables, "json"))[0]["peak_allocated_gib"] is None
    strict(render_comparison(compare_sweeps(records, "a", "b"), "json"))
    strict(to_json(overview_rows(tables)))


def test_what_mlflow_gets_is_strict_json(new_tracker: Any, folder: Path) -> None:
    tracker: Tracker = new_tracker()
    parent = tracker.start_sweep("s1", {}, {})
    run = tracker.start_trial("s1", "odd", "odd", {}, {})
    tracker.finish(run, odd(), folder)
    tracker.show_sweep(parent, note="", table=[{"a": math.nan, "b": 1.0}])
    assert tracker.close() == 0
    place = Path(str(tracker.tracking_uri).removeprefix("sqlite:///")).parent
    files = [path for path in place.rglob("*.json") if {parent, run} & set(path.parts)]  # the store is shared
    assert {path.name for path in files} >= {"record.json", "ranking.json"}
    for path in files:
        strict(path.read_text(encoding="utf-8"))
    assert any(
        math.isnan(r.metrics["memory/peak_allocated_gib"])
        for r in load_records(tracker.tracking_uri, tracker.experiment)
    )


def test_numbers_that_are_none_come_back_where_they_are_kept() -> None:
    values = {"a": [1.5, math.inf, -math.inf], "b": {"c": math.nan}, "d": "NaNa", "e": None, "f": True}
    kept = from_json(to_json(values, keep=True))
    assert math.isnan(kept["b"].pop("c"))
    assert kept == {"a": [1.5, math.inf, -math.inf], "b": {}, "d": "NaNa", "e": None, "f": True}
    assert math.isnan(from_json('{"loss": NaN}')["loss"]), "as versions before wrote it"
    assert strict(to_json(values, indent=1)) == {
        "a": [1.5, None, None],
        "b": {"c": None},
        "d": "NaNa",
        "e": None,
        "f": True,
    }


@pytest.mark.parametrize(
    "broken",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"num_examples":20', '"num_examples":19'),
        lambda text: text.replace('"question-0",', ""),
    ],
    ids=["truncated", "empty", "another count", "an id less"],
)
def test_a_record_that_is_broken_is_one_clear_error(broken: Any, tmp_path: Path) -> None:
    text = make_record(correct={"generated": answers(10, 20)}).model_dump_json()
    (tmp_path / "record.json").write_text(broken(text))
    with pytest.raises(ConfigError, match="is not a run record of schema 1"):
        RunRecord.load(tmp_path / "record.json")
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text"):
        RunRecord.load(tmp_path / "record.json")
