"""What commands of the command line take: seconds of the processor and memory of a whole process, imports included.

    python benchmarks/commands.py                                # five runs, 5,000 runs; minutes to fill the stores
    python benchmarks/commands.py --runs 200 --rounds 1 --output /tmp/commands

``plan`` plans every method on the shape of LLaMA2-7B for a GPU of 80 GiB, ``leaderboard`` writes the page of five runs
of 100 steps and 200 questions, ``ls runs`` lists a SQLite store of many runs. Commands take turns, each in a process of
its own.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import leaderboard
import recording
import tyro
from recording import Ended, Measure

from grass_ray.results.connection import default_tracking_uri

CLI = "import sys; from grass_ray.cli import main; main(sys.argv[1:])"
FEW = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    runs: Annotated[int, tyro.conf.arg(help="runs that ls lists")] = 5000
    rounds: int = 5
    store: Annotated[Path | None, tyro.conf.arg(help="folder to keep the stores in; default: a temporary one")] = None
    output: Path = Path("benchmarks/results/commands")


def commands(few: str, many: str, folder: Path) -> dict[str, list[str]]:
    """Words of the command line by name; ``few`` and ``many`` are stores."""
    page = str(folder / "page.html")
    return {
        "--help": ["--help"],
        "plan": ["plan", "--model", "llama2-7b", "--gpu-memory", "80"],
        "leaderboard": ["leaderboard", "--tracking-uri", few, "--format", "html", "--output", page],
        "ls runs": ["ls", "runs", "--tracking-uri", many],
    }


def measure(words: list[str], folder: Path) -> Ended:
    """Run a command once."""
    with (folder / "said").open("wb") as said:
        ended = recording.run_process([sys.executable, "-c", CLI, *words], cwd=folder, stdout=said, stderr=said)
    assert ended.code == 0, (folder / "said").read_text()
    return ended


def main(options: Options) -> None:
    place = tempfile.TemporaryDirectory() if options.store is None else nullcontext(str(options.store))
    with place as name, tempfile.TemporaryDirectory() as scratch:
        stores = {count: Path(name).absolute() / f"runs{count}" for count in (FEW, options.runs)}
        leaderboard.fill(stores[FEW], leaderboard.Options(records=FEW))
        leaderboard.fill(stores[options.runs], leaderboard.Options(records=options.runs, questions=3, steps=2))
        uris = {count: default_tracking_uri(store) for count, store in stores.items()}
        asked = commands(uris[FEW], uris[options.runs], Path(scratch))
        taken: dict[str, list[Ended]] = {what: [] for what in asked}
        for number in range(options.rounds):
            for what in random.Random(number).sample(list(asked), len(asked)):
                taken[what].append(measure(asked[what], Path(scratch)))
    seconds = {what: [one.processor_s for one in own] for what, own in taken.items()}
    peaks = {what: max(one.peak_mib for one in own) for what, own in taken.items()}
    rows = [
        (what, f"{statistics.median(own):.1f} ({min(own):.1f}-{max(own):.1f})", f"{peaks[what]:.0f}")
        for what, own in seconds.items()
    ]
    page = (
        f"# What commands take\n\n`leaderboard`: the page of {FEW} runs; `ls runs`: {options.runs:,} runs. "
        f"{options.rounds} interleaved rounds, seconds of the processor (user and system), median (range). "
        f"{recording.made_on()}.\n\n{recording.table(['command', 'processor s', 'peak MiB'], rows)}"
    )
    measures = [Measure(what, "s", own) for what, own in seconds.items()]
    measures += [Measure(f"{what} memory", "MiB", [peak]) for what, peak in peaks.items()]
    recording.write(
        options.output, recording.facts(options) | {"seconds": seconds, "peaks": peaks}, page, measures=measures
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
