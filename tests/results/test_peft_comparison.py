"""peft's method comparison: records in its form, and its published results as reference rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from result_records import answers, make_record, make_series

from grass_ray.cli import main
from grass_ray.config import ConfigError
from grass_ray.results.peft_comparison import read_peft_results, render_reference, to_peft_result, write_peft_results
from grass_ray.results.record import RunRecord
from grass_ray.training.report import LayerTrace

MEASURED = {
    "memory/peak_reserved_gib": 2.0,
    "memory/mean_reserved_gib": 1.5,
    "memory/p99_reserved_gib": 1.75,
    "checkpoint/mib": 35.0,
    "time/train_s": 90.0,
    "forgetting": 0.25,
}
# what its table reads of each result, and the types that it converts to
READ = {
    ("run_info", "experiment_name"): str,
    ("run_info", "total_time"): float,
    ("run_info", "peft_branch"): str,
    ("train_info", "accelerator_memory_reserved_avg"): int,
    ("train_info", "accelerator_memory_max"): int,
    ("train_info", "accelerator_memory_reserved_99th"): int,
    ("train_info", "train_time"): float,
    ("train_info", "file_size"): int,
}
OF_THE_LAST = {"test accuracy": float, "train loss": float, "train samples": int, "train total tokens": int}


def trained(method: str, **metrics: float) -> RunRecord:
    layers = LayerTrace(num_layers=6, total_parameters=1000, trainable_parameters=70)
    series = {**make_series(0, 1.0, steps=50), "step/tokens": [(step, 100.0) for step in range(1, 51)]}
    correct = {"generated": answers(5, 20)}
    return make_record(method, correct=correct, metrics=MEASURED | metrics, series=series, layers=layers)


@pytest.mark.parametrize(("method", "kind"), [("lora", "LORA"), ("grass", "GRASS"), ("full", None)])
def test_a_record_has_everything_that_pefts_table_reads(method: str, kind: str | None) -> None:
    values = to_peft_result(trained(method))
    for (part, name), wanted in READ.items():
        assert type(values[part][name]) is wanted, name
    last = values["train_info"]["metrics"][-1]
    for name, wanted in OF_THE_LAST.items():
        assert type(last[name]) is wanted, name
    assert values["train_info"]["status"] == "success"
    config = values["run_info"]["peft_config"]
    assert (config and config["peft_type"]) == kind
    assert last["test accuracy"] == 0.25
    assert last["train samples"] == 50 * 8
    assert last["train total tokens"] == 5000
    assert last["forgetting"] == 0.25
    assert values["train_info"]["accelerator_memory_max"] == 2 * 1024**3
    assert values["train_info"]["file_size"] == 35 * 1024**2
    packages = values["meta_info"]["package_info"]
    assert {f"{name}-version" for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes")} <= set(
        packages
    )
    assert pandas.to_datetime(values["run_info"]["created_at"]).year == 2026
    assert {"model_id", "max_steps", "batch_size"} <= set(values["run_info"]["train_config"])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    records = [trained("lora"), trained("grass"), make_record("base", overrides=["training.steps=0"])]
    files, left_out = write_peft_results(records, tmp_path)
    assert len(files) == 2
    assert left_out == [f"{records[2].name} is left out: it was not trained to its end"]
    found = read_peft_results(tmp_path)
    assert {result.kind for result in found} == {"LORA", "GRASS"}
    assert {(result.peak_gib, result.checkpoint_mib, result.forgetting) for result in found} == {(2.0, 35.0, 0.25)}


def test_a_record_without_what_the_form_needs_is_not_made_up(tmp_path: Path) -> None:
    record = trained("lora")
    del record.metrics["memory/mean_reserved_gib"]
    with pytest.raises(ConfigError, match="its record does not know the memory after each step"):
        write_peft_results([record], tmp_path)


def published(name: str, device: str, **last: float) -> dict[str, Any]:
    """A result as peft publishes them, the keys of which changed from cuda to accelerator."""
    return {
        "run_info": {
            "experiment_name": f"lora/{name}",
            "peft_config": {"peft_type": "LORA", "r": 32},
            "train_config": {"model_id": "meta-llama/Llama-3.2-3B"},
        },
        "train_info": {
            f"{device}_memory_max": 22 * 1024**3,
            f"{device}_memory_reserved_avg": 11 * 1024**3,
            f"{device}_memory_reserved_99th": 17 * 1024**3,
            "train_time": 1796.2,
            "file_size": 36715216,
            "status": "success",
            "metrics": [{"step": 250, "valid accuracy": 0.1}, {"test accuracy": 0.48, "train loss": 0.6, **last}],
        },
        "meta_info": {"system_info": {"gpu" if device == "cuda" else "accelerator": "NVIDIA L40S"}},
    }


def test_published_results_of_both_versions_are_reference_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, records = tmp_path / "published", tmp_path / "own" / "records"
    folder.mkdir()
    records.mkdir(parents=True)
    (folder / "old.json").write_text(json.dumps(published("old", "cuda")))
    (folder / "new.json").write_text(json.dumps(published("new", "accelerator", forgetting=0.01)))
    failed = published("failed", "cuda")
    failed["train_info"]["status"] = "canceled"
    (folder / "failed.json").write_text(json.dumps(failed))
    found = read_peft_results(folder)
    assert [result.name for result in found] == ["lora/new", "lora/old"]
    text = render_reference(found, width=120)
    assert "NVIDIA L40S (published by peft)" in text
    assert "other hardware" in text
    assert "+0.010" in text
    own = trained("lora")
    own.save(records / f"{own.run_id}.json")
    for words, expected in (
        (("--peft", folder), "lora/new"),
        (("--format", "peft", "--output", tmp_path / "written"), "1 run"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(["leaderboard", "--records", str(records.parent), *map(str, words)])
        assert left.value.code == 0
        assert expected in capsys.readouterr().out
    assert len(list((tmp_path / "written").glob("lora--*.json"))) == 1
    for words, expected in (
        (("--peft", tmp_path / "gone"), "there are no results in"),
        (("--peft", folder, "--format", "json"), "--peft is shown in the formats table and markdown"),
        (("--format", "peft"), "--format peft writes a file per run; give a folder with --output"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["leaderboard", "--records", str(records.parent), *map(str, words)])
        assert left.value.code == 2
        assert expected in capsys.readouterr().err


def test_another_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"odd\.json is no result of peft's method comparison: KeyError: 'run_info'"):
        read_peft_results(tmp_path)
