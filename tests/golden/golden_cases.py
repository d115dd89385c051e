"""Everything that a user reads or that another program parses, made from fixed records: ``CASES`` by name.

Each case returns file names and what belongs into them.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from plain import keys, page_text, rounded, shortened, unframed, without_measurements
from result_records import answers, asha, make_history, make_record, make_series, members
from small import REPOSITORY
from synthetic import synthetic_records

from grass_ray.config import PeftConfig, RunConfig, to_json
from grass_ray.export.card import render_card, write_card, write_delta_card
from grass_ray.methods import METHODS
from grass_ray.results.columns import overview_rows
from grass_ray.results.figures.registry import FIGURES, draw_kind
from grass_ray.results.leaderboard import LeaderboardTable, build_leaderboard
from grass_ray.results.overview import describe_sweep, write_summary
from grass_ray.results.page.answer import findings
from grass_ray.results.page.commands import reproduce_command
from grass_ray.results.paired import METRICS
from grass_ray.results.power_report import Wish, render_power, reports
from grass_ray.results.record import RunRecord
from grass_ray.results.recorded import read_records
from grass_ray.results.rendering import render, render_comparison
from grass_ray.results.reproduction import compare_records
from grass_ray.results.searches import best_settings, left_out, write_settings
from grass_ray.results.selection import Selection
from grass_ray.results.sweep_comparison import compare_sweeps

Files = dict[str, str]
Run = Callable[..., str]  # the words of a command line, or a script and its flags -> what it said, and its exit code

# ------------------------------------------------------------------------------------------------------------ records


def real_sweep() -> list[RunRecord]:
    """What a real sweep left."""
    return read_records(REPOSITORY / "benchmarks" / "results" / "example_sweep")


def small_sweep() -> list[RunRecord]:
    """Four methods, two seeds, two tasks, a second learning rate, a failure, and everything that a figure shows."""
    common: dict[str, Any] = {"suite": "commonsense"}
    records = []
    for method, right, gib in (("full", 12, 3.0), ("grass", 13, 1.5), ("lisa", 12, 1.5), ("lora", 9, 1.4)):
        for seed in (0, 1):
            metrics = {
                "memory/peak_allocated_gib": gib,
                "memory/peak_reserved_gib": 1.25 * gib,
                "memory/host_pinned_gib": 0.5 if method == "grass" else 0.0,
                "throughput/tokens_per_second": 900 / gib,
                "time/train_s": 60 * gib,
                "time/measure_s": 3.0 if method == "grass" else 0.0,
            }
            records.append(
                make_record(
                    method,
                    seed=seed,
                    correct={"boolq": answers(right + seed, 20), "piqa": answers(10, 20)},
                    metrics=metrics,
                    series=make_series(seed, gib, steps=40),
                    layers=make_history(6, steps=40, refreshed=method == "grass") if method in "grass lisa" else None,
                    **common,
                )
            )
    other = ["method.optimizer.lr=0.5"]
    records.append(make_record("lora", correct={"boolq": answers(5, 20), "piqa": answers(9, 20)}, overrides=other))
    records.append(make_record("misa", status="failed", failure="<b>loss</b> became nan | step 3", **common))
    for record in records:
        record.config["data"] |= {"suite": "commonsense", "tasks": ["boolq", "piqa"]}
        record.versions = {"python": "3.11.7", "torch": "2.13.0"}
    return records


def with_losses(seeds: int, *, alone: bool = False) -> list[RunRecord]:
    """Three methods and the untrained model on two tasks of sixty questions, with losses, or with nothing else."""
    records = []
    for method, skill in (("full", 1.0), ("grass", 1.5), ("lora", 0.2), ("base", -1.0)):
        for seed in range(1 if method == "base" else seeds):
            chance = random.Random(f"{method} {seed}")
            shift, ease = chance.gauss(skill, 0.1), random.Random(0)
            right = {
                task: [ease.gauss(0, 2) + chance.gauss(shift, 0.5) for _ in range(60)] for task in ("boolq", "piqa")
            }
            record = make_record(
                method,
                seed=seed,
                suite="commonsense",
                correct={task: [value > 0 and not alone for value in own] for task, own in right.items()},
                losses={task: [round(math.log1p(math.exp(-value)), 6) for value in own] for task, own in right.items()},
                overrides=[f"training.steps={0 if method == 'base' else 50}"] + ["evaluation.scoring=loss"] * alone,
            )
            for score in record.tasks.values() if alone else ():
                score.scoring, score.accuracy = "loss", math.nan
            records.append(record)
    return records


def every_format(name: str, records: Sequence[RunRecord], tables: Sequence[LeaderboardTable] | None = None) -> Files:
    tables = build_leaderboard(records) if tables is None else tables
    return {
        f"{name}.100.txt": render(tables, "table", width=100),
        f"{name}.60.txt": render(tables, "table", width=60),
        f"{name}.md": render(tables, "markdown"),
        f"{name}.csv": render(tables, "csv"),
        f"{name}.json": render(tables, "json"),
    }


# -------------------------------------------------------------------------------------------------------------- tables


def tables_of_a_real_sweep(folder: Path, run: Run) -> Files:
    return every_format("real", real_sweep())


def tables_of_made_up_sweeps(folder: Path, run: Run) -> Files:
    failures = render(build_leaderboard(synthetic_records(9, only_failures=True)), "table")
    return {
        **every_format("small", small_sweep()),
        **every_format("large", synthetic_records(46)),
        **every_format("none", []),
        "failures.txt": failures,
    }


def tables_with_losses(folder: Path, run: Run) -> Files:
    """Three seeds and one, by accuracy and by loss alone, and what they could have seen."""
    wish = Wish(difference=0.02, seeds=(3, 10))
    files: Files = {}
    for name, records in (("losses", with_losses(3)), ("once", with_losses(1)), ("alone", with_losses(2, alone=True))):
        tables = build_leaderboard(records)
        found = [report for table in tables for report in reports(table, METRICS, wish)]
        files |= every_format(name, records)
        files |= {f"{name}.power.txt": render_power(found), f"{name}.findings.txt": findings(tables[0])}
        files[f"{name}.mlflow.md"] = describe_sweep("Which is best?", tables, done=9, num_trials=10)
        files[f"{name}.power.json"] = render_power(found, "json")
    files = {name: rounded(text) if name.endswith(("csv", "json")) else text for name, text in files.items()}
    return files | {"by_hand.txt": run("power", "--question-sd", "0.2", "--seed-sd", "0.01", "--difference", "0.02")}


def tables_of_searches(folder: Path, run: Run) -> Files:
    files = {**every_format("asha", asha()), **every_format("pbt", members())}
    for name, records in (("asha", asha()), ("pbt", members())):
        write_settings(best_settings(records), folder / name)
        files[f"{name}.best.yaml"] = (folder / name).read_text()
        files[f"{name}.left_out.txt"] = "\n".join(left_out(records))
    return files


def selected_rows(folder: Path, run: Run) -> Files:
    selection = Selection(methods=("grass", "lora"), tasks=("boolq",), sort="peak_allocated_gib", reverse=True)
    records = selection.records(small_sweep())
    return every_format("selected", records, selection.tables(build_leaderboard(records)))


def sweeps_side_by_side(folder: Path, run: Run) -> Files:
    metrics = {"memory/peak_allocated_gib": 2.0, "throughput/tokens_per_second": 10.0}

    def trained(method: str, side: str, right: int, **more: Any) -> RunRecord:
        correct = {"generated": answers(right, 20)}
        return make_record(method, sweep_id=side, correct=correct, metrics=metrics, **more)

    records = [
        *(trained("grass", side, right) for side, right in (("old", 8), ("new", 18))),
        trained("lora", "old", 10),
        trained("lora", "new", 10, overrides=["training.steps=60"]),
        trained("full", "old", 10),
        make_record("lisa", sweep_id="new", status="failed", failure="no"),
    ]
    comparison = compare_sweeps(records, "old", "new")
    return {
        **{f"comparison.{width}.txt": render_comparison(comparison, "table", width=width) for width in (100, 60)},
        "comparison.md": render_comparison(comparison, "markdown"),
        "comparison.csv": render_comparison(comparison, "csv"),
        "comparison.json": render_comparison(comparison, "json"),
        "comparison.page.txt": page_text(render_comparison(comparison, "html")),
    }


# --------------------------------------------------------------------------------------- pages, figures and summaries


def pages(folder: Path, run: Run) -> Files:
    records = small_sweep()
    return {
        "small.page.txt": page_text(render(build_leaderboard(records), "html", records=records)),
        "real_tables.page.txt": page_text(render(build_leaderboard(real_sweep()), "html")),
        "none.page.txt": page_text(render([], "html")),
    }


def numbers_behind_figures(folder: Path, run: Run) -> Files:
    files, said = {}, []
    for name, records in (("small", small_sweep()), ("asha", asha()), ("pbt", members())):
        tables = build_leaderboard(records)
        for kind in FIGURES:
            for figure in draw_kind(kind, tables, records):
                files[f"{name}.{figure.name}.csv"] = shortened(rounded(figure.csv()))
                said.append(f"{name} {figure.name}: {figure.title}\n    {figure.description}")
    missing = [f"nothing to draw, {kind}: {FIGURES[kind].missing}" for kind in FIGURES]
    return {**files, "figures.txt": "\n".join([*said, *missing])}


def summaries(folder: Path, run: Run) -> Files:
    records = small_sweep()
    tables = build_leaderboard(records)
    for name, of in (("small", records), ("asha", asha()), ("pbt", members())):
        write_summary(of, build_leaderboard(of), folder / name)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    return {
        "files.txt": "\n".join(names),
        "mlflow_table.json": to_json(overview_rows(tables), indent=1),
        "mlflow_description.md": describe_sweep("Which is best?", tables, done=9, num_trials=10),
    }


def model_cards(folder: Path, run: Run) -> Files:
    record = make_record(
        "grass",
        correct={"gsm8k": answers(30, 100), "svamp": answers(50, 100)},
        suite="arithmetic",
        overrides=["model.name=smollm2-135m"],
        metrics={"memory/peak_allocated_gib": 1.5, "throughput/tokens_per_second": 178.4, "time/train_s": 90.0},
        layers=make_history(),
    )
    record.versions = {"python": "3.11.7", "torch": "2.13.0"}
    record.model_sha256 = "a" * 64
    record.data = {"train": {"rows": 90, "rows_available": 100, "description": "math_10k", "rows_sha256": "c" * 64}}
    config = RunConfig.parse(record.config)
    failed = make_record("lora", status="failed", failure="loss became nan")
    (folder / "delta").mkdir()
    (folder / "from-delta").mkdir()
    write_card(folder / "delta", "delta", config, record, written="0.1 of 0.8 MiB: decoder layer 2")
    write_delta_card(folder / "delta", folder / "from-delta")
    return {
        "model.md": render_card("my-model", "model", config, record),
        "adapter.md": render_card("my-adapter", "adapter", config, record),
        "delta.md": (folder / "delta" / "README.md").read_text(),
        "model_from_delta.md": (folder / "from-delta" / "README.md").read_text(),
        "without_record.md": render_card("my-model", "model", config, None),
        "failed.md": render_card("my-model", "model", RunConfig.parse(failed.config), failed),
    }


def reproductions(folder: Path, run: Run) -> Files:
    verdicts = {True: "agrees", False: "DIFFERS", None: "only shown"}
    recorded, rerun = (record for record in small_sweep() if record.config["method"]["name"] == "grass")
    checks = [
        f"{verdicts[check.agrees]}: {check.what}: {check.detail}"
        for other in (recorded, rerun)
        for check in compare_records(recorded, other)
    ]
    commands = [reproduce_command(record.config) or "-" for record in [*small_sweep(), *real_sweep()]]
    return {"checks.txt": "\n".join(checks), "commands.txt": "\n".join(dict.fromkeys(commands))}


# -------------------------------------------------------------------------------------------------------- command line

VERBS = (
    *("train", "sweep", "eval", "leaderboard", "power", "plot", "export", "reproduce", "verify", "sync"),
    *("plan", "ls"),
)


def help_texts(folder: Path, run: Run) -> Files:
    texts = {f"grass-ray {verb}".strip(): run(*([verb] if verb else []), "--help") for verb in ("", *VERBS)}
    for script in sorted((REPOSITORY / "sweeps").glob("*.py")):
        texts[f"sweeps/{script.stem}"] = run(script, "--help")
    return {f"{name.replace('/', '_').replace(' ', '_')}.txt": unframed(text) for name, text in texts.items()}


def listings(folder: Path, run: Run) -> Files:
    return {f"{what}.txt": run("ls", what) for what in ("methods", "tasks", "models")}


def sweep_plans(folder: Path, run: Run) -> Files:
    plans = {
        "quickstart.txt": ["quickstart.py"],
        "quickstart_smoke.txt": ["quickstart.py", "--smoke", "--seeds", "0", "1"],
        "ablation_smoke.txt": ["ablation.py", "--smoke"],
        "schedules_random.txt": ["schedules.py", "--smoke", "--search", "random", "--num-samples", "3"],
    }
    dry = ("--models", "tiny", "--dry-run")  # the default model is made of a package's file, which takes a minute
    return {name: run(REPOSITORY / "sweeps" / words[0], *words[1:], *dry) for name, words in plans.items()}


def memory_plans(folder: Path, run: Run) -> Files:
    """Shapes only: the bytes are judged elsewhere, against recorded runs, and follow torch's version."""
    arguments = ("plan", "--model", "tiny", "--device", "cpu", "--gpu-memory", "2", "--batch-size", "2")
    arguments += ("--seq-len", "64", "--methods", "full", "grass", "lora", "--format")

    def numberless(text: str) -> str:
        return re.sub(r" +", " ", re.sub(r"\d[\d.,]*", "N", text))

    report, _, code = run(*arguments, "json").rpartition("exit code")
    return {
        "plan.txt": numberless(run(*arguments, "table")),
        "plan.md": numberless(run(*arguments, "markdown")),
        "plan_keys.txt": "\n".join([*keys(json.loads(report)), f"exit code{code}"]),
    }


def defaults(folder: Path, run: Run) -> Files:
    """The method of each row, and once what is beside it, which all rows share."""
    alike = {name: row.config for name, row in METHODS.items() if isinstance(row.config.adapter, PeftConfig)}
    adapters = {name: {"adapter": own.adapter.model_dump(), "lr": own.optimizer.lr} for name, own in alike.items()}
    whole = {name: RunConfig(method=row.config).to_dict() for name, row in METHODS.items() if name not in alike}
    files = {name: values["method"] for name, values in whole.items()} | {"peft": adapters}
    files["run"] = {key: value for key, value in whole["grass"].items() if key != "method"}
    assert all(values == {"method": values["method"], **files["run"]} for values in whole.values())
    return {f"{name}.yaml": yaml.safe_dump(values, sort_keys=False) for name, values in files.items()}


_ROW = {"instruction": "Is it?", "input": "", "output": "the correct answer is true", "answer": "true"}
_TINY = ("--model", "tiny")
WRONG: tuple[tuple[str, ...], ...] = (
    (),
    ("trian",),
    ("train",),
    ("train", "gras"),
    ("train", "grass", "--colour", "red"),
    ("train", "grass", *_TINY, "--steps", "many"),
    ("train", "grass", *_TINY, "--steps", "-1", "--lr", "0"),
    ("train", "grass", *_TINY, "--set", "training.step=1"),
    ("train", "grass", *_TINY, "--set", "steps"),
    ("train", "grass", *_TINY, "--set", "method.sampler.num_active_layers=9"),
    ("train", "grass", *_TINY, "--set", "method.sampler.temperature=cold"),
    ("train", "lisa", *_TINY, "--set", "method.sampler.temperature=1"),
    ("train", "grass", *_TINY, "--set", "training.batch_size=8", "training.accumulation_steps=3"),
    ("train", "grass", *_TINY, "--task", "boolqq"),
    ("train", "grass", *_TINY, "--task", "gsm8k", "boolq"),
    ("train", "grass", *_TINY, "--task", "boolq", "--data-dir", "missing"),
    ("train", "grass", *_TINY, "--task", "boolq", "--data-dir", "empty"),
    ("train", "grass", *_TINY, "--task", "boolq", "--data-dir", "broken"),
    ("train", "grass", *_TINY, "--task", "boolq", "--data-dir", "keyless"),
    ("train", "grass", "--model", "./mine"),
    ("train", "grass", *_TINY, "--resume", "--output", "nowhere"),
    ("train", "grass", *_TINY, "--output", "full"),
    ("train", "grass", "--config", "nowhere.yaml"),
    ("eval", "--model", "./mine"),
    ("eval", *_TINY, "--scoring", "guess"),
    ("sweep",),
    ("sweep", "sweeps/nowhere.py"),
    ("leaderboard", "--format", "pdf"),
    ("leaderboard", "--tracking-uri", "sqlite:///nowhere/mlflow.db"),
    ("leaderboard", "--status", "done"),
    ("leaderboard", "--reverse"),
    ("leaderboard", "--compare", "a", "b", "--sort", "rank"),
    ("power", "--question-sd", "0", "--power", "2", "--num-seeds", "1"),
    ("power", "--question-sd", "0.2"),
    ("power", "--tracking-uri", "sqlite:///nowhere/mlflow.db"),
    ("plot", "pie"),
    ("plot", "loss", "--output", "loss.csv"),
    ("plot", "loss", "--tracking-uri", "sqlite:///nowhere/mlflow.db"),
    ("export", "nowhere", "--output", "out"),
    ("export", "nowhere", "--output", "out", "--delta", "--adapter"),
    ("export", "nowhere", "--output", "out", "--log"),
    ("reproduce", "nowhere"),
    ("verify",),
    ("verify", "nowhere"),
    ("verify", "empty"),
    ("leaderboard", "--records", "empty"),
    ("plan", "--methods", "gras", *_TINY, "--device", "cpu"),
    ("plan", "--model", "./mine", "--device", "cpu"),
    ("ls", "cats"),
    ("ls", "runs", "--tracking-uri", "sqlite:///nowhere/mlflow.db"),
)


WRONG_SWEEPS: tuple[tuple[str, ...], ...] = (
    ("--method", "gras"),
    ("--methods", "gras", "--dry-run"),
    ("--search", "optuna", "--dry-run"),
    ("--scheduler", "asha", "--dry-run"),
)


def wrong_inputs(folder: Path, run: Run) -> Files:
    for name, text in (("broken", "[{"), ("keyless", json.dumps([_ROW, _ROW | {"answer": None}]))):
        for split in ("train", "test"):
            path = folder / name / "dataset" / "boolq" / f"{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").touch()
    said = [f"$ {' '.join(['grass-ray', *words])}\n{unframed(run(*words))}" for words in WRONG]
    quickstart = REPOSITORY / "sweeps" / "quickstart.py"
    said += [f"$ quickstart.py {' '.join(words)}\n{unframed(run(quickstart, *words))}" for words in WRONG_SWEEPS]
    return {"wrong.txt": "\n\n".join(said)}


# ------------------------------------------------------------------------------------------------- what a run leaves


def tiny_runs(folder: Path, run: Run) -> Files:
    """Keys of a record and of an MLflow run, and the reports of a run whose draws follow from its seed alone."""
    if torch.cuda.is_available():
        pytest.skip("keys of a run on the CPU")
    small = ("--model=tiny", "--steps=6", "--limit=4", "--set", "data.source.train_rows=40", "data.source.test_rows=8")
    short = ("method.sampler.period=2", "method.sampler.probing_steps=2", "method.sampler.refresh_period=3")
    store = f"sqlite:///{folder}/mlflow.db"
    held_out = ("data.validation_rows=8",)
    said = [run("train", "grass", *small, *short, *held_out, "--output", "grass", "--tracking-uri", store)]
    said.append(run("train", "lisa", *small, *short[:1], "--output", "lisa", "--tracking-uri", store, "--quiet"))
    said.append(run("ls", "runs", "--tracking-uri", store))
    record = json.loads((folder / "grass" / "record.json").read_text())
    example = json.loads((folder / "grass" / "examples.jsonl").read_text().splitlines()[0])
    written = (path.relative_to(folder) for name in ("grass", "lisa") for path in (folder / name).rglob("*.*"))
    heads = [text.partition("tiny on generated, ")[0] for text in said]  # the leaderboard's width is the hardware's
    return {
        "record_keys.txt": "\n".join(keys(record)),
        "example_keys.txt": "\n".join(keys(example)),
        "files.txt": "\n".join(sorted(map(str, written))),
        "mlflow.txt": _in_mlflow(store),
        "engagement.txt": (folder / "lisa" / "engagement.txt").read_text(),
        "engagement.json": (folder / "lisa" / "engagement.json").read_text(),
        "printed.txt": without_measurements("\n\n".join(heads), record["hardware"]),
    }


def _in_mlflow(store: str) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    lines = []
    for experiment in sorted(client.search_experiments(), key=lambda item: str(item.name)):
        for run in sorted(client.search_runs([experiment.experiment_id]), key=lambda run: str(run.info.run_name)):
            lines.append(f"{experiment.name}: {run.info.run_name} {run.info.status}")
            lines += [f"  tag {key}" for key in sorted(run.data.tags)]
            lines += [f"  param {key} = {value}" for key, value in sorted(run.data.params.items())]
            lines += [f"  metric {key}" for key in sorted(run.data.metrics)]
            lines += [f"  artifact {item.path}" for item in client.list_artifacts(run.info.run_id)]
    return "\n".join(lines)


CASES: dict[str, Callable[[Path, Run], Files]] = {
    case.__name__: case
    for case in (
        tables_of_a_real_sweep,
        tables_of_made_up_sweeps,
        tables_with_losses,
        tables_of_searches,
        selected_rows,
        sweeps_side_by_side,
        pages,
        numbers_behind_figures,
        summaries,
        model_cards,
        reproductions,
        help_texts,
        listings,
        sweep_plans,
        memory_plans,
        defaults,
        wrong_inputs,
        tiny_runs,
    )
}
