"""benchmarks/gpu.py tried on a CPU: every part, without ray, mlflow and lm-eval, cut and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from small import REPOSITORY

from benchmarks import gpu

# as if these were not installed; not a plain function, which would become a method where others keep it
BLOCKED = """
from importlib.machinery import PathFinder

class FindSpec:
    found = staticmethod(PathFinder.find_spec)

    def __call__(self, name, *args, **options):
        return None if name.split(".")[0] in ("ray", "mlflow", "lm_eval") else self.found(name, *args, **options)

PathFinder.find_spec = FindSpec()
"""


def test_parts_come_in_order_of_value_and_each_has_a_file_of_its_own(tmp_path: Path) -> None:
    options = gpu.Options(device="cuda", out=tmp_path, data_dir=tmp_path)
    items = list(gpu.items(options))
    assert list(dict.fromkeys(item.part for item in items)) == list(gpu.PARTS)
    assert len({item.path(tmp_path) for item in items}) == len(items)
    assert all((REPOSITORY / item.values["file"]).is_file() for item in items if item.part == "tests")
    peaks = {item.name for item in items if item.part == "peaks"}
    assert {"llama2-7b-grass-1x1024-all-streamed", "gemma-2b-full-4x512-none", "tinyllama-1.1b-lora-4x512-all"} <= peaks
    assert not any(name.startswith("llama2-7b-full") and name.endswith("streamed") for name in peaks)


def test_the_report_has_what_was_measured_and_names_the_rest(tmp_path: Path) -> None:
    items = list(gpu.items(gpu.Options(device="cuda", out=tmp_path, models=("tinyllama-1.1b",))))
    results = {
        "tests": {"status": "done", "said": "12 passed in 3.21s"},
        "peaks": {"status": "done", "predicted": 3 * gpu.GIB, "measured": 4 * gpu.GIB, "host": gpu.GIB},
        "steps": {"status": "done", "step_s": {place: [0.1, 0.2, 0.4] for place in gpu.PLACES}, "tokens": 2048},
        "throughput": {"status": "done", "step_s": {"middle": [0.5, 0.5]}, "tokens": 2048},
    }
    full = {"status": "out of memory", "reason": "CUDA out of memory."}
    facts = {"hardware": "a card", "versions": {"torch": "2.13"}, "git_commit": "0123456789abcdef", "git_dirty": False}
    for item in items[:-1]:
        item.path(tmp_path).parent.mkdir(exist_ok=True)
        result = full if "full" in item.name else results[item.part]
        item.path(tmp_path).write_text(json.dumps(asdict(item) | facts | {"result": result}))
    gpu.report(tmp_path, items)
    text = (tmp_path / "gpu.md").read_text()
    assert "a card, torch 2.13, commit 0123456789" in text
    assert "| tests/optim/test_offload.py | done; 12 passed in 3.21s |" in text
    assert "| tinyllama-1.1b | grass | resident | 4 x 512 | 3.00 | 4.00 | 0.750 | 1.00 |" in text
    assert "| tinyllama-1.1b | full | none | 4 x 512 | out of memory |" in text
    assert "| tinyllama-1.1b | lazy | 200 (200) | 200 (200) | 200 (200) |" in text
    assert "| tinyllama-1.1b | grass | 4096 (4096) |" in text
    assert text.endswith(f"not measured: throughput/{items[-1].name}\n")


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    out = tmp_path / "gpu"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--device", "cpu", "--models", "tiny"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}

    def run(minutes: float, *parts: str) -> str:
        flags = ["--out", str(out), "--minutes", str(minutes), *(("--parts", *parts) if parts else ())]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True, env=environment)
        return done.stdout

    assert "measured" not in run(0)
    run(10, "tests")
    before = {path: path.stat().st_mtime for path in out.rglob("*.json")}
    run(10)
    assert all(path.stat().st_mtime == time for path, time in before.items() if path.parent != out)
    found = json.loads((out / "gpu.json").read_text())
    assert found["not_measured"] == []
    assert {one["part"] for one in found["results"]} == {"tests", "peaks", "steps", "throughput"}
    assert all(one["result"]["status"] == "done" for one in found["results"])
    peaks = [one["result"] for one in found["results"] if one["part"] == "peaks"]
    assert all(abs(peak["predicted"] / peak["measured"] - 1) < 0.05 for peak in peaks)
