r"""The example sweep's leaderboard, recomputed from the records beside it: table, Markdown, and the page.

    python benchmarks/example_sweep.py                                   # from benchmarks/results/example_sweep/records
    python benchmarks/example_sweep.py --from-sweep grass_ray_results/quickstart/SWEEP_ID     # takes a sweep's records

The sweep itself, 37 trials of SmolLM2-135M, two trials at once on two cores::

    python sweeps/quickstart.py --seeds 1 2 --steps 15 --cpus-per-trial 1 --max-concurrent-trials 2 \
        --methods full lora dora prefix prompt lisa lisa-keep ows ows-galore ist lift hift badam misa galore apollo \
        grass grass-static --settings benchmarks/results/comparison/settings.yaml --set evaluation.limit=40 \
        method.sampler.period=3 method.sampler.probing_steps=2 method.sampler.refresh_period=6

Fifteen steps, forty questions, rates searched alike but on other data (benchmarks/comparison.py), where GRASS's best
was ten times its default, far too much here: it shows what a sweep leaves behind and what each method costs; which
method is better it cannot tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from grass_ray.config import ConfigError
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.overview import write_summary
from grass_ray.results.record import RunRecord
from grass_ray.results.recorded import RECORDS, read_records
from grass_ray.results.rendering import render


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the records are."""

    folder: Path = Path("benchmarks/results/example_sweep")
    from_sweep: Annotated[Path | None, tyro.conf.arg(help="a sweep's folder to take the records of first")] = None


def main(options: Options) -> None:
    places = options.folder / RECORDS
    if options.from_sweep is not None:
        places.mkdir(parents=True, exist_ok=True)
        for path in sorted(options.from_sweep.glob("*/record.json")):
            record = RunRecord.load(path)
            (places / f"{record.name}.json").write_text(record.model_dump_json() + "\n", encoding="utf-8")
    records = read_records(options.folder)
    if not records:
        raise ConfigError(f"there are no records in {places}")
    tables = build_leaderboard(records)
    write_summary(records, tables, options.folder)
    page = render(tables, "html", records=records)
    (options.folder / "leaderboard.html").write_text(page, encoding="utf-8")
    print(render(tables, "table", width=140))
    print(f"\n{len(records)} records, page of {len(page) / 1024:.0f} KiB: {options.folder / 'leaderboard.html'}")


if __name__ == "__main__":
    main(tyro.cli(Options))
