"""Runs benchmarks in processes of their own, repeats interleaved, and judges what became slower or larger.

Two commits are compared by the scripts of this checkout, which take the package from one or the other
(``PYTHONPATH``), in turn and in a new order in every round. What the rest of the machine does then meets both alike,
and a ratio is of two neighbouring runs. Against numbers of another day nothing like it can be said.

Seconds are those of the processor (user and system, of a script and all below it), which waiting for other processes
does not lengthen; other processes still take caches and the processor's clock.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from typing import Literal

from benchmarks.recording import run_process
from benchmarks.registry import Benchmark

LIMIT = 0.05  # what is called slower or larger differs by more
LEVEL = 0.05  # and so often by chance at most, if neither side were larger
Verdict = Literal["more", "less", "same", "not clear"]
WORDS = {"s": ("slower", "faster"), "ms": ("slower", "faster")}


class BenchmarkError(RuntimeError):
    """A script failed; the message has the end of what it printed."""


@dataclass
class Repeats:
    """The values of one measure, one per round; less is better."""

    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.values)


@dataclass(frozen=True)
class Row:
    """One measure on both sides."""

    benchmark: str
    measure: str
    unit: str
    before: list[float]
    after: list[float]

    @property
    def ratios(self) -> list[float]:
        """After over before, of each round."""
        return [_ratio(new, old) for old, new in zip(self.before, self.after, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of :attr:`ratios`."""
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> Verdict:
        """Whether it became more or less by over 5 %, in so many rounds that chance seldom does it.

        Values that are the same in all rounds, such as bytes, need no more than one.
        """
        if abs(self.ratio - 1) <= LIMIT:
            return "same"
        larger = self.ratio > 1
        rounds, told = len(self.ratios), sum((ratio > 1) == larger and ratio != 1 for ratio in self.ratios)
        by_chance = sum(comb(rounds, count) for count in range(told, rounds + 1)) / 2**rounds
        steady = len(set(self.before)) == len(set(self.after)) == 1
        if not steady and by_chance > LEVEL:
            return "not clear"
        return "more" if larger else "less"

    @property
    def words(self) -> str:
        """The verdict as people read it."""
        more, less = WORDS.get(self.unit, ("larger", "smaller"))
        return {"more": more, "less": less}.get(self.verdict, self.verdict)


def _ratio(new: float, old: float) -> float:
    if old == 0:
        return 1.0 if new == 0 else float("inf")
    return new / old


# ------------------------------------------------------------------------------------------------------- measuring


def measure_once(benchmark: Benchmark, checkout: Path, flags: Sequence[str] | None = None) -> dict[str, Repeats]:
    """Run a script once with the package of ``checkout``; its own measures and what its processes took.

    Args:
        benchmark: whose script it is.
        checkout: folder that holds the package.
        flags: in place of the quick ones.

    Raises:
        BenchmarkError: the script failed.
    """
    with tempfile.TemporaryDirectory(prefix="grass_ray-benchmark-") as folder:
        output = Path(folder) / "result"
        words = [*(flags if flags is not None else benchmark.quick or ()), "--output", str(output)]
        with (Path(folder) / "said").open("w+b") as said:
            ended = run_process(
                [sys.executable, str(benchmark.script), *words],
                env=environment(checkout),
                cwd=Path(folder),
                stdout=said,
                stderr=said,
            )
            if ended.code:
                said.seek(0)
                end = said.read().decode(errors="replace").strip()[-1500:]
                raise BenchmarkError(f"{benchmark.script.name} with the package of {checkout} failed:\n{end}")
        result = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    found = {"processor": Repeats("s", [ended.processor_s]), "peak memory": Repeats("MiB", [ended.peak_mib])}
    for name, one in result.get("measures", {}).items():
        found[name] = Repeats(one["unit"], [statistics.median(one["values"])])
    return found


def environment(checkout: Path) -> dict[str, str]:
    """The environment in which a script takes the package from ``checkout``."""
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), *known])}


def measure_rounds(
    benchmarks: Mapping[str, Benchmark], checkouts: Sequence[Path], rounds: int, chance: random.Random
) -> dict[str, list[dict[str, Repeats]]]:
    """Of every benchmark the measures of every checkout, all in a new order in every round."""
    found: dict[str, list[dict[str, Repeats]]] = {name: [{} for _ in checkouts] for name in benchmarks}
    for number in range(rounds):
        for name in chance.sample(list(benchmarks), len(benchmarks)):
            for side in chance.sample(range(len(checkouts)), len(checkouts)):
                for key, one in measure_once(benchmarks[name], checkouts[side]).items():
                    found[name][side].setdefault(key, Repeats(one.unit)).values += one.values
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
    return found


def compare(
    benchmarks: Mapping[str, Benchmark], before: Path, after: Path, *, rounds: int, most_rounds: int
) -> list[Row]:
    """Compare two checkouts; what is not clear is measured again, up to ``most_rounds`` in all."""
    chance = random.Random(0)
    found = measure_rounds(benchmarks, (before, after), rounds, chance)
    done = rounds
    while done < most_rounds:
        again = {row.benchmark for row in rows_of(found) if row.verdict == "not clear"}
        if not again:
            break
        count = min(rounds, most_rounds - done)
        more = measure_rounds({name: benchmarks[name] for name in sorted(again)}, (before, after), count, chance)
        for name, sides in more.items():
            for own, new in zip(found[name], sides, strict=True):
                for key, one in new.items():
                    own[key].values += one.values
        done += count
    return rows_of(found)


def rows_of(found: Mapping[str, Sequence[Mapping[str, Repeats]]]) -> list[Row]:
    """The measures that both sides have."""
    return [
        Row(name, key, one.unit, one.values, after[key].values)
        for name, (before, after) in found.items()
        for key, one in before.items()
        if key in after
    ]


# ------------------------------------------------------------------------------------------------------- checkouts


@contextmanager
def checkout_of(commit: str, root: Path) -> Iterator[Path]:
    """A working tree of ``commit`` for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="grass_ray-checkout-") as folder:
        place = str(Path(folder) / "tree")
        subprocess.run(["git", "-C", str(root), "worktree", "add", "--quiet", "--detach", place, commit], check=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", place], check=True)


def is_commit(name: str, root: Path) -> bool:
    """Whether git knows the commit."""
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    return subprocess.run(command, capture_output=True).returncode == 0


# ------------------------------------------------------------------------------------------------------------ pages


def comparison_page(rows: Iterable[Row]) -> list[list[str]]:
    """The cells of a comparison's table."""
    return [
        [
            row.benchmark,
            row.measure,
            f"{statistics.median(row.before):.4g} {row.unit}",
            f"{statistics.median(row.after):.4g} {row.unit}",
            f"{row.ratio:.3f} ({min(row.ratios):.3f}-{max(row.ratios):.3f})",
            str(len(row.ratios)),
            row.words,
        ]
        for row in rows
    ]
