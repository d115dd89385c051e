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
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, arg, subcommand
from tyro.extras import literal_type_from_choices

from grass_ray.config import ConfigError
from grass_ray.paths import at_home
from grass_ray.results.figures.registry import FIGURES

if TYPE_CHECKING:
    from grass_ray.results.record import RunRecord
    from grass_ray.results.selection import Selection

    FigureName = str
else:
    FigureName = literal_type_from_choices(FIGURES)

RESULTS = Path("grass_ray_results")


def _examples(summary: str, *lines: str) -> str:
    return summary + "\n\nexamples:\n" + "\n".join(f"  {line}" for line in lines)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one run in this process."""

    method: Positional[Annotated[str, arg(help="a name of `grass-ray ls methods`")]]
    model: Annotated[str | None, arg(help="built-in name, hub id or folder; default: smollm2-135m")] = None
    task: Annotated[tuple[str, ...] | None, arg(help="a suite, tasks of one suite, or your own task's YAML")] = None
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
    memory_check: Annotated[bool, arg(help="do not refuse a run that is predicted not to fit into memory")] = True
    resume: Annotated[bool, arg(help="go on from the checkpoint in the output folder")] = False
    dry_run: Annotated[bool, arg(help="check everything, print the configuration and stop")] = False
    quiet: Annotated[bool, arg(help="only the final row, failures and errors")] = False

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.commands.train import build_config, train_locally

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
            config,
            output=output,
            tracking_uri=self.tracking_uri,
            resume=self.resume,
            dry_run=self.dry_run,
            quiet=self.quiet,
            memory_check=self.memory_check,
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
    task: Annotated[tuple[str, ...] | None, arg(help="a suite, tasks of one suite, or your own task's YAML")] = None
    data_dir: Annotated[Path | None, arg(help="folder with dataset/<Name>/test.json; default: the hub")] = None
    limit: Annotated[int | None, arg(help="examples a task")] = None
    batch_size: Annotated[
        int | Literal["auto"], arg(help="examples at a time; auto: what fits. Does not change accuracy")
    ] = "auto"
    scoring: Annotated[Literal["generation", "loglikelihood"], arg(help="how an answer is read")] = "generation"
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help="any other setting by its dotted key")] = ()
    output: Annotated[Path | None, arg(help="new or empty folder: record, examples, lm-eval's own files")] = None
    quiet: Annotated[bool, arg(help="only the final row and errors")] = False

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.commands.eval import evaluate_locally
        from grass_ray.commands.train import build_config

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
        return evaluate_locally(config, run_folder=run_folder, output=self.output, quiet=self.quiet)


Stores = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    arg(metavar="URI", help="MLflow store, once or several times; default: MLFLOW_TRACKING_URI, else mlflow.db"),
]
Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which runs: the flags that the leaderboard and its pictures share."""

    experiment: Annotated[str | None, arg(help="a sweep's name; default: every experiment")] = None
    tracking_uri: Stores = ()
    method: Annotated[Names, arg(metavar="NAME ...", help="show these methods' rows; nothing is computed anew")] = ()
    model: Annotated[Names, arg(metavar="NAME ...", help="only runs of these models")] = ()
    suite: Annotated[Names, arg(metavar="NAME ...", help="only runs on these suites")] = ()
    task: Annotated[Names, arg(metavar="NAME ...", help="average over these tasks alone")] = ()
    seed: Annotated[tuple[int, ...], arg(metavar="N ...", help="only runs of these seeds")] = ()
    status: Annotated[
        Names, arg(metavar="NAME ...", help="show rows that ended so: finished partial failed out_of_memory stopped")
    ] = ()

    def selection(self, sort: str | None = None, reverse: bool = False) -> Selection:
        """The filters. Raises :class:`ConfigError` on names that do not exist."""
        from grass_ray.results.selection import Selection

        return Selection(
            methods=self.method,
            models=self.model,
            suites=self.suite,
            tasks=self.task,
            seeds=self.seed,
            statuses=self.status,
            sort=sort,
            reverse=reverse,
        )

    def load(self, *, series: bool = True) -> list[RunRecord]:
        """The records of all stores named, each run once; without ``series`` a tenth of the memory."""
        from grass_ray.results.selection import merge_records
        from grass_ray.results.store import load_records

        if len(self.tracking_uri) < 2:
            return load_records(_tracking_uri("".join(self.tracking_uri)), self.experiment, series=series)
        records = merge_records(load_records(uri, series=series) for uri in self.tracking_uri)
        chosen = [record for record in records if self.experiment in (None, record.sweep)]
        if records and not chosen:
            known = ", ".join(sorted({record.sweep for record in records}))
            raise ConfigError(f"unknown experiment {self.experiment!r} in these stores; available: {known}")
        return chosen


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Rank the runs of a tracking store."""

    chosen: Chosen
    sort: Annotated[str | None, arg(metavar="COLUMN", help="a key of the json format, or a task; best first")] = None
    reverse: Annotated[bool, arg(help="turn the order of --sort around")] = False
    compare: Annotated[
        tuple[str, str] | None, arg(metavar="A B", help="two sweep ids or experiments, question by question")
    ] = None
    format: Annotated[Literal["table", "markdown", "csv", "json", "html"], arg(help="how to write it")] = "table"
    output: Annotated[Path | None, arg(help="file to write; default: the terminal")] = None

    def run(self) -> int:
        """Carry it out."""
        import shutil

        from grass_ray.results.leaderboard import build_leaderboard
        from grass_ray.results.rendering import render, render_comparison
        from grass_ray.results.sweep_comparison import compare_sweeps

        selection = self.chosen.selection(self.sort, self.reverse)
        if self.compare is not None and (self.sort or self.chosen.method or self.chosen.status):
            raise ConfigError("--compare shows all rows of two sweeps; leave --sort, --method and --status out")
        records = selection.records(self.chosen.load(series=self.format == "html"))
        width = max(100, shutil.get_terminal_size().columns)
        if self.compare is not None:
            text = render_comparison(compare_sweeps(records, *self.compare), self.format, width=width)
        else:
            text = render(selection.tables(build_leaderboard(records)), self.format, width=width, records=records)
        if self.output is None:
            print(text)
        else:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(text, encoding="utf-8")
            print(f"wrote {self.output}: {len(records)} runs")
        return 0


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw a picture of the runs of a tracking store, with its numbers as CSV beside it."""

    kind: Positional[Annotated[FigureName, arg(help="what to draw")]]
    chosen: Chosen
    output: Annotated[Path | None, arg(help="picture to write: .png, .svg or .pdf; default: KIND.png")] = None

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.results.figures.figure import check_suffix
        from grass_ray.results.figures.registry import draw_kind
        from grass_ray.results.leaderboard import build_leaderboard

        output = self.output or Path(f"{self.kind}.png")
        check_suffix(output)
        selection = self.chosen.selection()
        records = selection.records(self.chosen.load())
        figures = draw_kind(self.kind, selection.tables(build_leaderboard(records)), records)
        if not figures:
            raise ConfigError(f"there is nothing to draw: {FIGURES[self.kind].missing}")
        for figure in figures:
            suffix = figure.name.removeprefix(self.kind) if len(figures) > 1 else ""
            written = figure.save(output.with_stem(output.stem + suffix))
            print(f"wrote {' and '.join(map(str, written))}: {figure.description}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained run, or a delta and its base model, as a model folder that transformers loads."""

    run_or_delta: Positional[
        Annotated[str, arg(help="a run's folder or MLflow run id, or a folder of --delta", metavar="RUN|DELTA")]
    ]
    output: Annotated[Path, arg(help="new or empty folder for what is written")]
    delta: Annotated[bool, arg(help="write only the tensors that differ from the base model")] = False
    adapter: Annotated[bool, arg(help="write only the adapter, in peft's own format")] = False
    model: Annotated[str | None, arg(help="base model of a delta; default: the one it names")] = None
    log: Annotated[bool, arg(help="also log what is written to the MLflow run, which must be given by its id")] = False
    tracking_uri: Annotated[str | None, arg(help="MLflow store of a run id")] = None

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.export.card import Kind, write_delta_card
        from grass_ray.export.delta import export_delta, export_from_delta, is_delta
        from grass_ray.export.model import export_adapter, export_run

        folder = self._folder()
        kind: Kind = "delta" if self.delta else "adapter" if self.adapter else "model"
        self._check_flags(is_delta(folder))
        if self.delta:
            said = export_delta(folder, self.output).describe()
            self._write_card(folder, kind, said)
            print(f"wrote {self.output}: {said}")
        elif is_delta(folder):
            delta = export_from_delta(folder, self.output, base_model=self.model)
            write_delta_card(folder, self.output)
            print(f"wrote {self.output}; reloaded with transformers, the same in every bit; {delta.describe()}")
        else:
            export = (export_adapter if self.adapter else export_run)(folder, self.output)
            self._write_card(folder, kind)
            print(
                f"wrote {export.folder}; reloaded with {'peft' if self.adapter else 'transformers'}, "
                f"largest logit difference {export.difference:.1e} (allowed: {export.tolerance:.0e})"
            )
        if self.log:
            from grass_ray.results.store import upload

            upload(_tracking_uri(self.tracking_uri), self.run_or_delta, self.output, kind)
            print(f"logged to the MLflow run {self.run_or_delta} as {kind}/")
        return 0

    def _folder(self) -> Path:
        """The folder that was given, or that the run with the given id says it is in."""
        from grass_ray.results.store import is_run_id, run_folder

        by_id = is_run_id(self.run_or_delta) and not Path(self.run_or_delta).exists()
        if self.log and not by_id:
            raise ConfigError(f"--log needs an MLflow run id to log to, not the folder {self.run_or_delta}")
        if not by_id:
            return Path(self.run_or_delta)
        found = run_folder(_tracking_uri(self.tracking_uri), self.run_or_delta)
        if not Path(found).is_dir():
            raise ConfigError(
                f"the files of the MLflow run {self.run_or_delta} are in {found}, which is no folder on this machine; "
                "copy it here and give the copy"
            )
        return Path(found)

    def _write_card(self, folder: Path, kind: Literal["model", "adapter", "delta"], said: str | None = None) -> None:
        from grass_ray.config import RunConfig
        from grass_ray.export.card import find_record, write_card

        write_card(self.output, kind, RunConfig.from_yaml(folder / "config.yaml"), find_record(folder), written=said)

    def _check_flags(self, of_delta: bool) -> None:
        if self.delta and self.adapter:
            raise ConfigError("--delta and --adapter exclude each other; give one of them, or none for the whole model")
        if of_delta and (self.delta or self.adapter):
            raise ConfigError(
                f"{self.run_or_delta} is a delta already; leave out --{'delta' if self.delta else 'adapter'}"
            )
        if self.model is not None and not of_delta:
            raise ConfigError(
                f"--model names the base model of a delta, and {self.run_or_delta} is no folder with a delta"
            )


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run a record again and say whether its numbers agree."""

    run_or_record: Positional[
        Annotated[str, arg(help="a run's folder, a record.json, or an MLflow run id", metavar="RUN")]
    ]
    tracking_uri: Annotated[str | None, arg(help="MLflow store of a run id")] = None
    model: Annotated[str | None, arg(help="where the base model is here; default: as recorded")] = None
    data_dir: Annotated[Path | None, arg(help="where the data folder is here; default: as recorded")] = None
    output: Annotated[Path | None, arg(help="new or empty folder for the rerun; default: nothing is written")] = None
    dry_run: Annotated[bool, arg(help="say what would run and how this machine differs, and stop")] = False
    quiet: Annotated[bool, arg(help="only warnings, what differs and the verdict")] = False

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.commands.reproduce import find_original, reproduce

        return reproduce(
            find_original(self.run_or_record, _tracking_uri(self.tracking_uri)),
            model=self.model,
            data_dir=self.data_dir,
            output=self.output,
            dry_run=self.dry_run,
            quiet=self.quiet,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict peak memory, method by method, without loading weights."""

    model: Annotated[
        str, arg(help="hub id, folder, smollm2-135m, tiny, or a shape: tinyllama-1.1b, gemma-2b, llama2-7b")
    ] = "smollm2-135m"
    gpu_memory: Annotated[float | None, arg(help="GiB of the device; default: what this machine has")] = None
    batch_size: Annotated[int, arg(help="rows an update")] = 4
    seq_len: Annotated[int, arg(help="tokens of the longest row")] = 1024
    labelled: Annotated[int | None, arg(help="positions with a label; default: every one")] = None
    accumulation_steps: Annotated[int, arg(help="micro-batches an update")] = 1
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], arg(help="of the weights")] = "bfloat16"
    methods: Annotated[tuple[str, ...] | None, arg(help="default: every method", metavar="NAME ...")] = None
    gradient_checkpointing: Annotated[bool, arg(help="plan with it on")] = False
    device: Annotated[Literal["cpu", "cuda"] | None, arg(help="default: cuda, or what this machine has")] = None
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help="settings for methods that have the key")] = ()
    format: Annotated[Literal["table", "json", "markdown"], arg(help="how to write it")] = "table"

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.memory.report import make_report, make_request, render_report

        request = make_request(
            model=self.model,
            dtype=self.dtype,
            memory_gib=self.gpu_memory,
            device=self.device,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            labelled=self.labelled,
            accumulation_steps=self.accumulation_steps,
            checkpointing=self.gradient_checkpointing,
            methods=self.methods,
            settings=self.set,
        )

        def show(name: str) -> None:
            if sys.stderr.isatty():
                print(f"\rplanning {name:20}", end="", file=sys.stderr, flush=True)

        report = make_report(request, show)
        show("")
        print(render_report(report, self.format))
        return 0


@dataclass(frozen=True, kw_only=True)
class Ls:
    """List what there is."""

    what: Positional[Annotated[Literal["methods", "tasks", "models", "runs"], arg(help="what to list")]]
    tracking_uri: Annotated[str | None, arg(help="MLflow store, for runs")] = None

    def run(self) -> int:
        """Carry it out."""
        from grass_ray.commands.ls import list_methods, list_models, list_tasks

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
                "grass-ray leaderboard --experiment quickstart --format html --output page.html",
                "grass-ray leaderboard --method full grass lora --sort peak_allocated_gib",
                "grass-ray leaderboard --compare SWEEP_ID_A SWEEP_ID_B --tracking-uri STORE_A --tracking-uri STORE_B",
            ),
        ),
    ]
    | Annotated[
        Plot,
        subcommand(
            "plot",
            description=_examples(
                "Draw a picture of the runs of a tracking store, with its numbers as CSV beside it.",
                "grass-ray plot pareto --experiment quickstart",
                "grass-ray plot loss --method full grass --output loss.svg",
                "grass-ray plot sampling --model smollm2-135m --output sampling.png",
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
                "grass-ray export my-delta --output my-model",
                "grass-ray export MLFLOW_RUN_ID --delta --log --output my-delta",
            ),
        ),
    ]
    | Annotated[
        Reproduce,
        subcommand(
            "reproduce",
            description=_examples(
                "Run a record again and say number by number whether it agrees: exit code 0 when all do, 1 when not.",
                "grass-ray reproduce grass_ray_results/train/RUN",
                "grass-ray reproduce record.json --dry-run",
                "grass-ray reproduce MLFLOW_RUN_ID --tracking-uri http://127.0.0.1:5000 --output again",
            ),
        ),
    ]
    | Annotated[
        Plan,
        subcommand(
            "plan",
            description=_examples(
                "Predict peak memory part by part for every method and offload mode, without weights; say what fits.",
                "grass-ray plan --model llama2-7b --gpu-memory 24 --batch-size 4 --seq-len 1024",
                "grass-ray plan --model meta-llama/Llama-3.2-1B --gpu-memory 16 --methods grass lisa --format markdown",
                "grass-ray plan --model smollm2-135m --dtype float32 --device cpu --seq-len 256",
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
    from grass_ray.process import leave, prepare_output

    prepare_output()
    verb, rest = tyro.cli(
        Verb,
        prog="grass-ray",
        description="Fair experiments on memory-efficient LLM fine-tuning (GRASS, arXiv 2604.07808).",
        args=sys.argv[1:] if argv is None else argv,
        return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    from grass_ray.progress import quiet_libraries

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    leave(lambda: _carry_out(at_home(verb), rest))


def _carry_out(verb: Verb, rest: Sequence[str]) -> int:
    if isinstance(verb, SweepFile):
        return verb.run(rest)
    if rest:
        raise ConfigError(f"unknown arguments: {' '.join(rest)}; see grass-ray {type(verb).__name__.lower()} --help")
    return verb.run()


def _tracking_uri(given: str | None) -> str:
    """The store asked for by flag or environment, else the database under ``./grass_ray_results``."""
    from grass_ray.results.connection import default_tracking_uri

    return given or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(RESULTS)
