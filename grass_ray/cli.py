"""The command line: ``grass-ray`` and its verbs. Heavy imports happen inside the verbs, so that help is instant.

Exit codes: 0 done, 1 a run failed, 2 bad input (one readable message on stderr).
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from grass_ray.config import ConfigError

RESULTS = Path("grass_ray_results")


def _examples(summary: str, *lines: str) -> str:
    return summary + "\n\nexamples:\n" + "\n".join(f"  {line}" for line in lines)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one run in this process."""

    method: Positional[Annotated[str, arg(help="a name of `grass-ray ls methods`")]]
    model: Annotated[str | None, arg(help="built-in name, hub id or folder; default: smollm2-135m")] = None
    task: Annotated[tuple[str, ...] | None, arg(help="a suite, or tasks of one suite; default: generated")] = None
    data_dir: Annotated[Path | None, arg(help="folder with dataset/<Name>/{train,test}.json; default: the hub")] = None
    steps: Annotated[int | None, arg(help="optimizer updates; probing steps come on top")] = None
    batch_size: Annotated[int | None, arg(help="rows an update")] = None
    lr: Annotated[float | None, arg(help="learning rate; default: the method's")] = None
    seed: Annotated[int | None, arg(help="of shuffling, draws and adapters; default: 0")] = None
    limit: Annotated[int | None, arg(help="evaluated examples a task")] = None
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help="any other setting by its dotted key")] = ()
    config: Annotated[Path | None, arg(help="start from this config.yaml; the flags given come on top")] = None
    output: Annotated[Path | None, arg(help="new or empty folder for everything the run writes")] = None
    tracking_uri: Annotated[str | None, arg(help="MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db")] = None
    resume: Annotated[bool, arg(help="go on from the checkpoint in the output folder")] = False
    dry_run: Annotated[bool, arg(help="check everything, print the configuration and stop")] = False

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.cluster.local import build_config, train_locally

        config = build_config(
            self.method,
            base=self.config,
            model=self.model,
            tasks=self.task,
            data_dir=self.data_dir,
            assignments=[*self._assignments(), *self.set],
        )
        output = self.output or RESULTS / "train" / f"{config.name}-{config.fingerprint}"
        return train_locally(
            config, output=output, tracking_uri=self.tracking_uri, resume=self.resume, dry_run=self.dry_run
        )

    def _assignments(self) -> list[str]:
        given = {
            "training.steps": self.steps,
            "training.batch_size": self.batch_size,
            "method.optimizer.lr": self.lr,
            "evaluation.limit": self.limit,
            "seed": self.seed,
        }
        return [f"{key}={value}" for key, value in given.items() if value is not None]


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """Run a sweep's file; everything behind the file's name goes to it."""

    file: Positional[Annotated[Path, arg(help="such as sweeps/quickstart.py; its own flags follow")]]

    def run(self, rest: Sequence[str] = ()) -> int:
        """Carry it out."""
        if not self.file.is_file():
            near = sorted(str(path) for path in Path("sweeps").glob("*.py"))
            raise ConfigError(f"there is no sweep file {self.file}; available: {', '.join(near) or 'none in ./sweeps'}")
        sys.argv = [str(self.file), *rest]
        runpy.run_path(str(self.file), run_name="__main__")
        return 0


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a model's accuracy without training it."""

    model: Annotated[str, arg(help="built-in name, hub id, folder, or a run's folder")] = "smollm2-135m"
    task: Annotated[tuple[str, ...] | None, arg(help="a suite, or tasks of one suite; default: generated")] = None
    data_dir: Annotated[Path | None, arg(help="folder with dataset/<Name>/test.json; default: the hub")] = None
    limit: Annotated[int | None, arg(help="examples a task")] = None
    batch_size: Annotated[int, arg(help="examples at a time; does not change accuracy")] = 16
    scoring: Annotated[Literal["generation", "loglikelihood"], arg(help="how an answer is read")] = "generation"
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help="any other setting by its dotted key")] = ()
    output: Annotated[Path | None, arg(help="new or empty folder for examples.jsonl and record.json")] = None

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.cluster.local import build_config, evaluate_locally

        run_folder = Path(self.model) if (Path(self.model) / "checkpoint").is_dir() else None
        given = {
            "evaluation.limit": "null" if self.limit is None else self.limit,
            "evaluation.batch_size": self.batch_size,
            "evaluation.scoring": self.scoring,
        }
        config = build_config(
            "base" if run_folder is None else None,
            base=None if run_folder is None else run_folder / "config.yaml",
            model=self.model if run_folder is None else None,
            tasks=self.task,
            data_dir=self.data_dir,
            assignments=[*(f"{key}={value}" for key, value in given.items()), *self.set],
        )
        return evaluate_locally(config, run_folder=run_folder, output=self.output)


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Rank the runs of a tracking store."""

    experiment: Annotated[str | None, arg(help="a sweep's name; default: every experiment")] = None
    tracking_uri: Annotated[str | None, arg(help="MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db")] = None
    format: Annotated[Literal["table", "markdown", "csv", "json", "html"], arg(help="how to write it")] = "table"
    output: Annotated[Path | None, arg(help="file to write; default: the terminal")] = None

    def run(self) -> int:
        """Carry it out."""
        import shutil

        from grass_ray.results.leaderboard import build_leaderboard
        from grass_ray.results.rendering import render
        from grass_ray.results.store import load_records

        records = load_records(_tracking_uri(self.tracking_uri), self.experiment)
        width = max(100, shutil.get_terminal_size().columns)
        text = render(build_leaderboard(records), self.format, width=width)
        if self.output is None:
            print(text)
        else:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(text, encoding="utf-8")
            print(f"wrote {self.output}: {len(records)} runs")
        return 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained run, or a delta and its base model, as a model folder that transformers loads."""

    folder: Positional[
        Annotated[Path, arg(help="output folder of `grass-ray train`, or of --delta", metavar="RUN|DELTA")]
    ]
    output: Annotated[Path, arg(help="new or empty folder for what is written")]
    delta: Annotated[bool, arg(help="write only the tensors that differ from the base model")] = False
    adapter: Annotated[bool, arg(help="write only the adapter, in peft's own format")] = False
    model: Annotated[str | None, arg(help="base model of a delta; default: the one it names")] = None

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.training.delta import export_delta, export_from_delta, is_delta
        from grass_ray.training.export import export_adapter, export_run

        self._check_flags(is_delta(self.folder))
        if self.delta:
            print(f"wrote {self.output}: {export_delta(self.folder, self.output).describe()}")
        elif is_delta(self.folder):
            delta = export_from_delta(self.folder, self.output, base_model=self.model)
            print(f"wrote {self.output}; reloaded with transformers, the same in every bit; {delta.describe()}")
        else:
            export = (export_adapter if self.adapter else export_run)(self.folder, self.output)
            print(
                f"wrote {export.folder}; reloaded with {'peft' if self.adapter else 'transformers'}, "
                f"largest logit difference {export.difference:.1e} (allowed: {export.tolerance:.0e})"
            )
        return 0

    def _check_flags(self, of_delta: bool) -> None:
        if self.delta and self.adapter:
            raise ConfigError("--delta and --adapter exclude each other; give one of them, or none for the whole model")
        if of_delta and (self.delta or self.adapter):
            raise ConfigError(f"{self.folder} is a delta already; leave out --{'delta' if self.delta else 'adapter'}")
        if self.model is not None and not of_delta:
            raise ConfigError(f"--model names the base model of a delta, and {self.folder} is no folder with a delta")


@dataclass(frozen=True, kw_only=True)
class Ls:
    """List what there is."""

    what: Positional[Annotated[Literal["methods", "tasks", "models", "runs"], arg(help="what to list")]]
    tracking_uri: Annotated[str | None, arg(help="MLflow store, for runs")] = None

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.listing import list_methods, list_models, list_tasks

        if self.what == "runs":
            from grass_ray.results.store import load_records

            for record in load_records(_tracking_uri(self.tracking_uri)):
                average = record.metrics.get("eval/average")
                accuracy = "-" if average is None else f"{100 * average:.1f} %"
                print(f"{record.name}  {record.run_id}  {record.status}  accuracy {accuracy}  {record.started_at}")
        else:
            print({"methods": list_methods, "tasks": list_tasks, "models": list_models}[self.what]())
        return 0


Verb = (
    Annotated[
        Train,
        subcommand(
            "train",
            description=_examples(
                "Train one run in this process: no cluster, the same loop as in a sweep.",
                "grass-ray train grass --steps 50 --limit 100",
                "grass-ray train lora --model meta-llama/Llama-3.2-1B --task commonsense --data-dir DATA --lr 3e-4",
                "grass-ray train grass --set method.sampler.temperature=0.2 method.sampler.period=10 --dry-run",
            ),
        ),
    ]
    | Annotated[
        SweepFile,
        subcommand(
            "sweep",
            description=_examples(
                "Run a sweep's file; everything behind the file's name goes to it.",
                "grass-ray sweep sweeps/quickstart.py",
                "grass-ray sweep sweeps/commonsense.py --smoke --data-dir DATA",
                "grass-ray sweep sweeps/quickstart.py --resume",
            ),
        ),
    ]
    | Annotated[
        Eval,
        subcommand(
            "eval",
            description=_examples(
                "Measure a model's accuracy without training it.",
                "grass-ray eval --limit 100",
                "grass-ray eval --model grass_ray_results/train/RUN --task gsm8k --data-dir DATA",
                "grass-ray eval --model EXPORTED --task boolq arc_easy --data-dir DATA --scoring loglikelihood",
            ),
        ),
    ]
    | Annotated[
        Leaderboard,
        subcommand(
            "leaderboard",
            description=_examples(
                "Rank the runs of a tracking store by accuracy, with memory and speed.",
                "grass-ray leaderboard",
                "grass-ray leaderboard --experiment quickstart --format markdown",
                "grass-ray leaderboard --tracking-uri http://127.0.0.1:5000 --format json --output board.json",
            ),
        ),
    ]
    | Annotated[
        Export,
        subcommand(
            "export",
            description=_examples(
                "Write a trained run as a model folder that transformers loads, or only the layers that changed.",
                "grass-ray export grass_ray_results/train/RUN --output my-model",
                "grass-ray export grass_ray_results/train/RUN --delta --output my-delta",
                "grass-ray export my-delta --output my-model",
            ),
        ),
    ]
    | Annotated[
        Ls,
        subcommand(
            "ls",
            description=_examples(
                "List methods, tasks, built-in models or tracked runs.",
                "grass-ray ls methods",
                "grass-ray ls tasks",
                "grass-ray ls runs --tracking-uri sqlite:///grass_ray_results/mlflow.db",
            ),
        ),
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and exit with its code."""
    verb, rest = tyro.cli(
        Verb,
        prog="grass-ray",
        description="Fair experiments on memory-efficient LLM fine-tuning (GRASS, arXiv 2604.07808).",
        args=sys.argv[1:] if argv is None else argv,
        return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if isinstance(verb, SweepFile):
            code = verb.run(rest)
        elif rest:
            raise ConfigError(
                f"unknown arguments: {' '.join(rest)}; see grass-ray {type(verb).__name__.lower()} --help"
            )
        else:
            code = verb.run()
    except ConfigError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _tracking_uri(given: str | None) -> str:
    """The store asked for by flag or environment, else the database under ``./grass_ray_results``."""
    from grass_ray.results.store import default_tracking_uri

    return given or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(RESULTS)
