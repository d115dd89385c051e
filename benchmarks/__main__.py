"""All benchmarks behind one command: what there is, one in full, all in short, and two commits side by side.

python -m benchmarks list
python -m benchmarks run methods --model tiny --rounds 1     # flags after the name are the script's own
python -m benchmarks all                                     # a baseline of this machine, in benchmarks/baselines/
python -m benchmarks compare --against main                  # what became slower or larger than in another commit
"""

from __future__ import annotations

import inspect
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from tyro.conf import Positional, arg

from benchmarks import harness, recording
from benchmarks.registry import BENCHMARKS, HERE, Benchmark
from grass_ray.config import ConfigError
from grass_ray.process import leave
from grass_ray.results.provenance import hardware

ROOT = HERE.parent
BASELINES = HERE / "baselines"
OTHER_DAY = (
    "The baseline was measured on another day. On a machine that does other things, too, and in one with a clock that "
    "changes, the same code differs by more than 5 % from day to day: a difference here is a reason to run "
    "`python -m benchmarks compare --against COMMIT`, which measures both in turn, and no more."
)


@dataclass(frozen=True, kw_only=True)
class List:
    """List the benchmarks."""

    def run(self) -> int:
        """Print one line per benchmark."""
        for name, one in BENCHMARKS.items():
            notes = [f"needs {one.needs}"] if one.needs else []
            notes += ["frozen: its plan is committed"] if one.frozen else []
            notes += [] if one.quick is None else ["in all"]
            print(f"{name:18} {one.about}\n{'':18} {'; '.join(notes)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run benchmarks in full, one after another, each in a process of its own; writes their results."""

    names: Positional[tuple[str, ...]]
    """Names of benchmarks. Flags after them are those of the script; see `run NAME --help`."""

    def run(self, rest: Sequence[str] = ()) -> int:
        """The first exit code that is not 0."""
        for name, one in chosen(self.names, dict(BENCHMARKS)).items():
            print(f"{name}: {' '.join(['python', str(one.script.relative_to(ROOT)), *rest])}", file=sys.stderr)
            code = subprocess.run([sys.executable, str(one.script), *rest], env=harness.environment(ROOT)).returncode
            if code:
                return code
        return 0


@dataclass(frozen=True, kw_only=True)
class All:
    """Run all benchmarks that have a short form, repeats interleaved, and write the baseline of this machine."""

    names: Positional[tuple[str, ...]] = ()
    """Names of benchmarks. Defaults to all with a short form."""
    rounds: int = 5
    """Number of repeats."""
    output: Annotated[Path | None, arg(metavar="PATH")] = None
    """Written with .json, .md and .png. Defaults to benchmarks/baselines/MACHINE."""

    def run(self) -> int:
        """Measure and write."""
        benchmarks = chosen(self.names, quick())
        found = harness.measure_rounds(benchmarks, (ROOT,), self.rounds, random.Random(0))
        sides = {name: side for name, (side,) in found.items()}
        facts = recording.facts() | {"rounds": self.rounds}
        cells = [
            [name, key, f"{one.median:.4g} {one.unit}", f"{min(one.values):.4g}-{max(one.values):.4g}"]
            for name, side in sides.items()
            for key, one in side.items()
        ]
        flags = "\n".join(f"- `{name}`: `{' '.join(one.quick or ())}`" for name, one in benchmarks.items())
        page = (
            f"# Baseline\n\n{recording.made_on()}; {self.rounds} interleaved rounds, each script in a process of its "
            f"own, seconds of the processor.\n\n"
            f"{recording.table(['benchmark', 'measure', 'median', 'range'], cells)}\n\nShort forms:\n\n{flags}"
        )
        values = {name: {key: vars(one) for key, one in side.items()} for name, side in sides.items()}
        spreads = {
            f"{name}: {key}": [value / one.median for value in one.values]
            for name, side in sides.items()
            for key, one in side.items()
            if one.median
        }
        recording.write(
            self.output or BASELINES / machine(),
            facts | {"benchmarks": values},
            page,
            draw=lambda path: draw(spreads, "repeats over their median", path),
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Say what became slower or larger by more than 5 %; exits with 1 if something did."""

    names: Positional[tuple[str, ...]] = ()
    """Names of benchmarks. Defaults to all with a short form."""
    against: str = "main"
    """A commit, measured in turn with this checkout; or `baseline`: the numbers of this machine from another day."""
    rounds: int = 5
    """Number of rounds."""
    most_rounds: int = 10
    """Number of rounds if something is not clear after the first."""
    output: Annotated[Path | None, arg(metavar="PATH")] = None
    """Written with .json, .md and .png. Defaults to the terminal."""

    def run(self) -> int:
        """Measure, print, and judge."""
        benchmarks = chosen(self.names, quick())
        if self.against == "baseline":
            rows, said = self._against_baseline(benchmarks), OTHER_DAY
        elif not harness.is_commit(self.against, ROOT):
            raise ConfigError(f"--against {self.against}: git knows no such commit; or give baseline")
        else:
            said = f"{self.against} and this checkout in turn, in a new order in every round."
            with harness.checkout_of(self.against, ROOT) as before:
                rows = harness.compare(benchmarks, before, ROOT, rounds=self.rounds, most_rounds=self.most_rounds)
        header = ["benchmark", "measure", "before", "after", "after / before", "rounds", ""]
        found = recording.table(header, harness.comparison_page(rows))
        page = f"# Against {self.against}\n\n{recording.made_on()}. {said}\n\n{found}"
        if self.output is None:
            print(page)
        else:
            values = recording.facts() | {"against": self.against, "rows": [vars(row) for row in rows]}
            ratios = {f"{row.benchmark}: {row.measure}": row.ratios for row in rows}
            recording.write(self.output, values, page, draw=lambda path: draw(ratios, f"after / {self.against}", path))
        return int(self.against != "baseline" and any(row.verdict == "more" for row in rows))

    def _against_baseline(self, benchmarks: dict[str, Benchmark]) -> list[harness.Row]:
        path = BASELINES / f"{machine()}.json"
        if not path.is_file():
            raise ConfigError(f"there is no baseline of this machine at {path}; `python -m benchmarks all` writes it")
        known = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        benchmarks = {name: one for name, one in benchmarks.items() if name in known}
        found = harness.measure_rounds(benchmarks, (ROOT,), self.rounds, random.Random(0))
        rows = []
        for name, (side,) in found.items():
            for key, one in side.items():
                if key in known[name]:  # no pairs: every repeat beside the median of the other day
                    before = [statistics.median(known[name][key]["values"])] * len(one.values)
                    rows.append(harness.Row(name, key, one.unit, before, one.values))
        return rows


def quick() -> dict[str, Benchmark]:
    """Those with a short form."""
    return {name: one for name, one in BENCHMARKS.items() if one.quick is not None}


def chosen(names: Sequence[str], among: dict[str, Benchmark]) -> dict[str, Benchmark]:
    """The benchmarks of these names, all if there are none."""
    if unknown := [name for name in names if name not in among]:
        raise ConfigError(f"no benchmark {', '.join(unknown)} here; available: {', '.join(among)}")
    return {name: among[name] for name in names} if names else among


def machine() -> str:
    """A file name made of the hardware."""
    return re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")


def draw(values: dict[str, list[float]], label: str, path: Path) -> None:
    """One line per measure: every repeat, and their median."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.25 * len(values)), layout="constrained")
    axes = figure.subplots()
    for place, own in enumerate(values.values()):
        axes.plot(own, [place] * len(own), "o", color="#0072B2", alpha=0.4, markersize=4)
        axes.plot([statistics.median(own)], [place], "|", color="black", markersize=10)
    axes.axvspan(1 - harness.LIMIT, 1 + harness.LIMIT, color="0.9", zorder=0)
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.savefig(path, dpi=130)


VERBS: dict[str, type] = {"list": List, "run": Run, "all": All, "compare": Compare}


def main(words: Sequence[str]) -> None:
    """Run a verb and exit with its code."""
    if words[:1] == ["run"] and len(words) > 1 and not words[1].startswith("-"):
        names = tuple(itertools.takewhile(lambda word: not word.startswith("-"), words[1:]))
        leave(lambda: Run(names=names).run(words[1 + len(names) :]))  # --help, too, is the script's
    verbs = [
        Annotated[verb, tyro.conf.subcommand(name, description=inspect.getdoc(verb))] for name, verb in VERBS.items()
    ]
    kind: Any = Union[tuple(verbs)]  # noqa: UP007 - made of a list
    settings = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    verb = tyro.cli(kind, prog="python -m benchmarks", description=__doc__, args=words, config=settings)
    leave(verb.run)


if __name__ == "__main__":
    main(sys.argv[1:])
