"""What the verdict's runs say (PLAN.md): tables, a figure, and the records, in one folder.

    python benchmarks/verdict/report.py --work verdict_runs
    python benchmarks/verdict/report.py --work benchmarks/results/verdict      # again, from the recorded runs

A question whose runs are not all done is not answered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import tyro
import yaml
from analysis import MARGIN, QUESTIONS, Runs, answer, ask, compare, gain, group, losses, sampling
from experiment import DATA, LADDER, ROWS
from matplotlib.figure import Figure

from grass_ray.config import ConfigError, fingerprint_of, to_json, whole_file
from grass_ray.process import leave
from grass_ray.results.figures.style import DPI, EDGE, style_of, tidy
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.overview import write_summary
from grass_ray.results.paired import Comparison
from grass_ray.results.record import RunRecord
from grass_ray.training.report import VALIDATION

REFERENCES = ("uniform", "full")
ANSWERS = {
    "yes": "Yes: drawing layers by their gradient norm trains better than drawing them uniformly.",
    "uniform is better": "No: drawing layers uniformly trains better than drawing them by their gradient norm.",
    "no difference that matters": "No: it makes no difference that matters whether layers are drawn by their gradient "
    "norm or uniformly.",
    "undecided": "Undecided: these runs cannot tell draws by gradient norm from uniform ones.",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the runs are, and where the result goes."""

    work: Path = Path("verdict_runs")
    output: Path = Path("benchmarks/results/verdict")


def load(folder: Path) -> list[RunRecord]:
    """The records of a folder, plain or compressed, each named by its configuration."""
    paths = sorted([*folder.glob("*.json"), *folder.glob("*.json.gz")])
    if not paths:
        raise ConfigError(f"no records in {folder}; benchmarks/verdict/run.py makes them")
    records = [RunRecord.load(path) for path in paths]
    for record in records:
        fingerprint = fingerprint_of(record.config)  # of the version that ran it
        record.run_id = f"{record.run_id.removesuffix(f'-{fingerprint}')}-{fingerprint}"
    return records


def complete(runs: Runs, question: str) -> bool:
    """Whether every planned run of a question is done."""
    rows = {row for pair in QUESTIONS[question] for row in pair}
    return all(len(runs.get(data, {}).get(row, ())) >= ROWS[row].seeds for data in DATA for row in rows)


# ----------------------------------------------------------------------------------------------------------- in words


def signed(value: float, digits: int = 4) -> str:
    """A difference with its sign."""
    return f"{value:+.{digits}f}"


def cell(comparison: Comparison | None) -> str:
    """A difference with its limits and p-value."""
    if comparison is None:
        return "-"
    p = comparison.p_value if comparison.p_adjusted is None else comparison.p_adjusted
    told = "" if comparison.told_apart else ", not told apart"
    return f"{signed(comparison.value)} ({signed(comparison.low)} to {signed(comparison.high)}; p {p:.3f}{told})"


def rows_table(runs: Runs, data: str) -> list[str]:
    """Every row on one data set."""
    against = {second: compare(runs, second)[data] for second in REFERENCES}
    lines = [
        "| row | loss, nats | accuracy % | lr | seeds | loss - uniform | loss - full |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    ordered = sorted(runs[data], key=lambda row: fmean(losses(runs, data, row) or [math.inf]))
    for row in ordered:
        records, found = runs[data][row], losses(runs, data, row)
        spread = f" ±{stdev(found):.4f}" if len(found) > 1 else ""
        shares = [record.metrics["eval/average"] for record in records if "eval/average" in record.metrics]
        rates = {record.config["method"]["optimizer"]["lr"] for record in records if record.config["training"]["steps"]}
        lines.append(
            f"| {row} | {fmean(found):.4f}{spread} | {f'{100 * fmean(shares):.1f}' if shares else '-'} | "
            f"{', '.join(f'{lr:g}' for lr in rates) or '-'} | {len(found)} of {len(records)} | "
            f"{cell(against['uniform'].get(row))} | {cell(against['full'].get(row))} |"
        )
    return lines


def question_table(runs: Runs, question: str) -> list[str]:
    """A question's differences, and the smallest one that each could have seen."""
    lines = [
        "| compared | data set | difference in loss, nats (95 %; adjusted p) | of uniform's gain | could have seen |",
        "|---|---|---|---:|---:|",
    ]
    for finding in ask(runs, question):
        seen = finding.comparison.detectable
        share = finding.comparison.value / gain(runs, finding.data)
        lines.append(
            f"| {finding.first} - {finding.second} | {finding.data} | {cell(finding.comparison)} | "
            f"{100 * share:+.1f} % | {'-' if seen is None else f'{seen:.4f}'} |"
        )
    return lines


def sampling_table(runs: Runs) -> list[str]:
    """How layers were drawn."""
    lines = [
        "| data set | row | effective layers | layers trained | kept from draw to draw | age of importance, steps | "
        "importance moved | favourites |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for data, rows in runs.items():
        for row, records in rows.items():
            if (found := sampling(records)) is not None:
                lines.append(
                    f"| {data} | {row} | {found.effective:.1f} | {found.distinct:.1f} | {100 * found.kept:.0f} % | "
                    f"{found.age:.0f} | {found.moved:.2f} | {', '.join(map(str, found.favourites))} |"
                )
    return lines


def search_table(searches: Sequence[RunRecord]) -> list[str]:
    """The held-out loss of every rate that was tried."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for record in searches:
        key = record.sweep_id.removeprefix("verdict-"), record.config["method"]["name"]
        lr = record.config["method"]["optimizer"]["lr"]
        found.setdefault(key, {})[lr] = record.metrics.get(VALIDATION, math.inf)
    rates = [lr for lr in LADDER if any(lr in tried for tried in found.values())]
    lines = [f"| data set | row | {' | '.join(f'{lr:g}' for lr in rates)} |", "|---|---|" + "---:|" * len(rates)]
    for data in DATA:
        for row in ROWS:
            if tried := found.get((data, row)):
                best = min(tried.values())
                cells = ["" if lr not in tried else f"{tried[lr]:.4f}" for lr in rates]
                marked = [
                    f"**{text}**" if text and tried[lr] == best else text for lr, text in zip(rates, cells, strict=True)
                ]
                lines.append(f"| {data} | {row} | {' | '.join(marked)} |")
    return lines


def summarise(runs: Runs, searches: Sequence[RunRecord]) -> str:
    """The result in Markdown."""
    done = {question: complete(runs, question) for question in QUESTIONS}
    lines = [
        "# Does the gradient norm choose better than chance?",
        "",
        "Asked and decided as [PLAN.md](../../verdict/PLAN.md) says, which was committed before the first run.",
        "SmolLM2-135M, 100 steps of batch 4, learning rates searched for every row on every data set. Losses are",
        "those of the right answer, in nats; lower is better.",
        "",
        ANSWERS[answer(runs)] if done["Q1"] else "The runs of Q1 are not all done, so there is no answer yet.",
        "",
        "![Differences in loss to uniform draws and to full fine-tuning](differences.png)",
    ]
    titles = {
        "Q1": "importance against uniform draws (p by Holm)",
        "Q2": "is there information in the importance",
        "Q3": "refreshed against fixed importance",
        "Q4": "rivals",
    }
    for question, title in titles.items():
        lines += ["", f"## {question}: {title}", ""]
        lines += question_table(runs, question) if done[question] else ["Not all of its runs are done."]
    for data in runs:
        lines += ["", f"## Every row on {data}", "", *rows_table(runs, data)]
    lines += ["", "## How layers were drawn", "", *sampling_table(runs)]
    lines += ["", "## Learning rates: loss on held-out training rows after 50 steps", "", *search_table(searches), ""]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- figure


def draw(runs: Runs) -> Figure:
    """Every row's difference in loss to uniform draws and to full fine-tuning, with 95 % intervals.

    Shaded beside uniform draws is what the plan calls no difference that matters.
    """
    tested = {row for own in runs.values() for row in own}
    references = [second for second in REFERENCES if second in tested]
    figure = Figure(figsize=(4.1 * len(runs), (1.5 + 0.24 * len(tested)) * len(references)), layout="constrained")
    axes = figure.subplots(len(references), len(runs), squeeze=False, sharey="row")
    for line, second in zip(axes, references, strict=True):
        found = compare(runs, second)
        shown = [row for row in ROWS if row in tested - {"base", second}]
        for panel, data in zip(line, runs, strict=True):
            panel.axvline(0, color=EDGE, linewidth=1)
            if second == "uniform":
                margin = MARGIN * gain(runs, data)
                panel.axvspan(-margin, margin, color=EDGE, alpha=0.15, linewidth=0)
            for place, row in enumerate(reversed(shown)):
                one = found[data].get(row)
                if one is not None:
                    style, told = style_of(row), one.told_apart
                    panel.plot(one.limits, [place, place], color=style.colour, linewidth=2)
                    look = {
                        "marker": style.marker,
                        "markersize": 8 if told else 6,
                        "fillstyle": "full" if told else "none",
                    }
                    panel.plot(one.value, place, color=style.colour, **look)
            panel.set_yticks(range(len(shown)), list(reversed(shown)))
            panel.set_ylim(-0.5, len(shown) - 0.5)
            panel.set_xlabel(f"loss - {second}, nats (left is better)")
            panel.locator_params(axis="x", nbins=5)
            panel.set_title(data)
            tidy(panel)
    figure.suptitle(
        "Differences in loss on test questions, 95 % over seeds and questions; open marks: not told apart;\n"
        "shaded: less than a tenth of what uniform draws gained over the untrained model"
    )
    return figure


# -------------------------------------------------------------------------------------------------------------- files


def settings(searches: Sequence[RunRecord], runs: Runs) -> dict[str, dict[str, float]]:
    """The learning rate of every row, by data set."""
    return {
        data: {
            row: records[0].config["method"]["optimizer"]["lr"]
            for row, records in rows.items()
            if records[0].config["training"]["steps"]
        }
        for data, rows in runs.items()
    }


def keep(records: Sequence[RunRecord], folder: Path) -> None:
    """Write records compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        record.save(folder / f"{record.run_id}.json.gz")


def report(options: Options) -> int:
    """Write everything; returns the exit code."""
    records, searches = load(options.work / "records"), load(options.work / "search")
    runs = group(records)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.work.resolve() != options.output.resolve():
        keep(records, options.output / "records")
        keep(searches, options.output / "search")
    (options.output / "README.md").write_text(summarise(runs, searches), encoding="utf-8")
    write_summary(records, build_leaderboard(records), options.output)
    draw(runs).savefig(options.output / "differences.png", dpi=DPI)
    findings = [
        asdict(finding) for question in QUESTIONS if complete(runs, question) for finding in ask(runs, question)
    ]
    with whole_file(options.output / "verdict.json") as file:
        verdict = answer(runs) if complete(runs, "Q1") else None
        file.write(json.dumps({"answer": verdict, "findings": findings}, indent=1, default=to_json) + "\n")
    with whole_file(options.output / "learning_rates.yaml") as file:
        file.write(yaml.safe_dump(settings(searches, runs), sort_keys=False))
    print((options.output / "README.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    leave(lambda: report(tyro.cli(Options, description=__doc__)))
