"""python -m benchmarks: everything is listed, a planted slowdown is found, and equal code is quiet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small import REPOSITORY

from benchmarks import __main__ as command
from benchmarks.harness import Row
from benchmarks.registry import BENCHMARKS, Benchmark
from grass_ray.config import ConfigError

SCRIPT = '''
"""Counts what the package does."""
import json, sys, toy_package
output = sys.argv[sys.argv.index("--output") + 1]
counted = sum(1 for _ in toy_package.work())
measures = {"operations": {"unit": "operations", "values": [counted]}, "files": {"unit": "files", "values": [3]}}
open(output + ".json", "w").write(json.dumps({"measures": measures}))
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a package that does a hundred things, and a benchmark that counts them."""
    repository, script = tmp_path / "repository", tmp_path / "toy.py"
    (repository / "toy_package").mkdir(parents=True)
    write_package(repository, 100)
    script.write_text(SCRIPT)
    name = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-q", "-m", "A hundred things"]):
        subprocess.run(["git", "-C", str(repository), *words], check=True)
    monkeypatch.setattr(command, "BENCHMARKS", {"toy": Benchmark(script=script, quick=())})
    monkeypatch.setattr(command, "ROOT", repository)
    monkeypatch.setattr(command, "BASELINES", tmp_path / "baselines")
    return repository


def write_package(repository: Path, things: int) -> None:
    (repository / "toy_package" / "__init__.py").write_text(f"def work():\n    yield from range({things})\n")


def rows_of(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    return {row["measure"]: (row["before"], row["after"]) for row in rows}


def test_every_script_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = {path for path in (REPOSITORY / "benchmarks").glob("*.py") if "\nif __name__" in path.read_text()}
    listed = {one.script for one in BENCHMARKS.values()}
    assert listed == scripts - {Path(command.__file__)} | {REPOSITORY / "benchmarks" / "verdict" / "run.py"}
    assert command.List().run() == 0
    lines = capsys.readouterr().out
    assert all(name in lines and one.about in lines for name, one in BENCHMARKS.items())
    assert all(one.about.endswith((".", ":")) for one in BENCHMARKS.values()), "a line in the list is a sentence"


def test_a_slowdown_of_a_fifth_is_found_and_equal_code_is_quiet(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = command.Compare(against="HEAD", rounds=2, most_rounds=2, output=tmp_path / "found")
    assert compare.run() == 0
    assert "larger" not in capsys.readouterr().out
    write_package(toy, 120)
    assert compare.run() == 1
    found = rows_of(tmp_path / "found")
    assert found["operations"] == ([100.0, 100.0], [120.0, 120.0])
    assert "| toy | operations | 100 operations | 120 operations | 1.200 (1.200-1.200) | 2 | larger |" in (
        tmp_path / "found.md"
    ).read_text(encoding="utf-8")
    assert {"processor", "peak memory", "files"} < found.keys()
    assert (tmp_path / "found.png").is_file()
    worktrees = subprocess.run(["git", "-C", str(toy), "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(worktrees.stdout.splitlines()) == 1, "the other commit's working tree is removed"


def test_a_baseline_is_of_another_day_and_fails_nothing(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = command.Compare(against="baseline", rounds=1)
    with pytest.raises(ConfigError, match="there is no baseline of this machine at"):
        compare.run()
    assert command.All(rounds=2).run() == 0
    (baseline,) = (tmp_path / "baselines").glob("*.json")
    assert json.loads(baseline.read_text())["benchmarks"]["toy"]["operations"]["values"] == [100, 100]
    write_package(toy, 80)
    capsys.readouterr()
    assert compare.run() == 0
    said = capsys.readouterr().out
    assert "measured on another day" in said
    assert "| toy | operations | 100 operations | 80 operations | 0.800 (0.800-0.800) | 1 | smaller |" in said


def test_what_is_unknown_is_refused(toy: Path) -> None:
    with pytest.raises(ConfigError, match="no benchmark nothing here; available: toy"):
        command.Compare(names=("nothing",)).run()
    with pytest.raises(ConfigError, match="--against nowhere: git knows no such commit"):
        command.Compare(against="nowhere").run()


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.2] * 5, "more"),
        ([1.3, 1.2, 1.1, 1.25, 0.95], "not clear"),  # one of five may be chance
        ([1.3, 1.2, 1.1, 1.25, 0.95, 1.2, 1.2, 1.2], "more"),
        ([0.9, 0.8, 0.7, 0.9, 0.91], "less"),
        ([1.04, 1.03, 1.04, 1.05, 1.02], "same"),
        ([1.5, 0.7, 1.0, 1.01, 0.99], "same"),
        ([1.2, 1.3], "not clear"),
    ],
)
def test_a_verdict_needs_more_than_chance(ratios: list[float], verdict: str) -> None:
    before = [1.0, 2.0, *[1.0] * (len(ratios) - 2)]
    after = [ratio * old for ratio, old in zip(ratios, before, strict=True)]
    assert Row("b", "m", "s", before, after).verdict == verdict


@pytest.mark.long
def test_run_passes_flags_on_and_the_script_writes_its_results(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", *words], cwd=REPOSITORY, capture_output=True, text=True
        )

    done = run("run", "training_variance", "--tables", "2", "--output", str(tmp_path / "found"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["options"] == {"tables": "2"}
    assert {"hardware", "versions", "git_commit", "git_dirty", "measured_at"} < found.keys()
    assert (tmp_path / "found.md").read_text().startswith("# Level and power")
    wrong = run("run", "nothing")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: no benchmark nothing here; available: methods, offload")
