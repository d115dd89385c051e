"""``grass-ray train``, ``eval``, ``reproduce`` and ``sweep``: the flags of the verbs that carry out runs.

What they do is in modules that are imported when a verb runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from grass_ray.commands.flags import RESULTS, Settings, tracking_store
from grass_ray.commands.method_flags import MethodFlags, method_flags
from grass_ray.config import ConfigError
from grass_ray.experiment.flags import lm_eval_settings
from grass_ray.method_files import methods_with, read_rows
from grass_ray.methods import METHODS, Method
from grass_ray.overrides import assignment


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one run in this process, with the same loop as in a sweep. No cluster is needed.

    The settings of a method are flags, too; `grass-ray train METHOD --help` lists them.

    For example:
      grass-ray train grass --steps 50 --limit 100
      grass-ray train lora --model meta-llama/Llama-3.2-1B --task commonsense --data-dir DATA --lr 3e-4
      grass-ray train grass --sampler.temperature 0.2 --set data.max_length_tokens=128 --dry-run
    """

    method: Positional[str]
    """Name of a method; see `grass-ray ls methods`."""
    model: str | None = None
    """Built-in model, hub id or folder. Defaults to smollm2-135m."""
    task: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...")] = None
    """A suite, tasks of one suite, or the YAML file of a custom task."""
    data: str | None = None
    """A data set of your own: a file, a save_to_disk folder or a hub id."""
    data_dir: Path | None = None
    """Folder with dataset/<Name>/{train,test}.json. Defaults to the Hub."""
    steps: int | None = None
    """Number of optimizer steps, not counting the steps that only measure."""
    batch_size: int | None = None
    """Number of rows per optimizer step."""
    lr: float | None = None
    """Peak learning rate. Defaults to that of the method."""
    seed: int | None = None
    """Seed of data order, layer sampling and adapters. Defaults to 0."""
    limit: int | None = None
    """Maximum number of evaluated examples per task."""
    eval_tasks: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...")] = None
    """Tasks of lm-eval to evaluate, too: its names (mmlu,ifeval), folders (mine/) or YAML files."""
    num_fewshot: int | None = None
    """Number of examples before each question of --eval-tasks. Defaults to what each task says."""
    set: Settings = ()
    """Any other setting by its dotted key."""
    config: Path | None = None
    """Start from this config.yaml. Other flags take precedence."""
    method_file: Path | None = None
    """YAML file with methods of your own; its code is run."""
    output: Path | None = None
    """New or empty folder for all files of the run."""
    tracking_uri: str | None = None
    """MLflow store. Defaults to MLFLOW_TRACKING_URI, else mlflow.db."""
    gpu_memory: float | None = None
    """Memory in GiB that the run may take. Defaults to that of the device."""
    memory_check: bool = True
    """Do not refuse a run that is predicted not to fit into memory."""
    resume: bool = False
    """Resume from the checkpoint in the output folder."""
    dry_run: bool = False
    """Check everything, print the configuration and stop."""
    quiet: bool = False
    """Only print the final row, failures and errors."""
    method_settings: MethodFlags = field(default_factory=MethodFlags)

    def run(self) -> int:
        """Train the run and return the exit code."""
        from grass_ray.commands.train import build_config, train_locally

        given = {
            "training.steps": self.steps,
            "training.batch_size": self.batch_size,
            "method.optimizer.lr": self.lr,
            "evaluation.limit": self.limit,
            "seed": self.seed,
            **lm_eval_settings(self.eval_tasks, self.num_fewshot),
        }
        flags = [assignment(key, value) for key, value in given.items() if value is not None]
        config = build_config(
            self.method,
            base=self.config,
            model=self.model,
            tasks=self.task,
            data_dir=self.data_dir,
            dataset=self.data,
            assignments=[*flags, *self.method_settings.assignments(), *self.set],
            methods=methods_with(self.method_file),
        )
        return train_locally(
            config,
            output=self.output or RESULTS / "train" / config.folder,
            tracking_uri=self.tracking_uri,
            resume=self.resume,
            dry_run=self.dry_run,
            quiet=self.quiet,
            memory_check=self.memory_check,
            memory_gib=self.gpu_memory,
        )


def train_with_flags(words: Sequence[str]) -> type[Train]:
    """Return :class:`Train` with the settings of the method among ``words`` as flags of their own."""
    methods = {**METHODS, **{row.name: row for row in _rows_of(words)}}
    method = next((methods[word] for word in words if word in methods), None)
    if method is None:
        return Train
    flags = method_flags(method.config)
    settings = ("method_settings", flags, field(default_factory=flags))
    return make_dataclass("Train", [settings], bases=(Train,), frozen=True, kw_only=True)


def _rows_of(words: Sequence[str]) -> list[Method]:
    """The rows of the method file among ``words``; none if it has mistakes, which are told when the verb runs."""
    given = [word.partition("=")[2] or following for word, following in pairwise([*words, ""]) if _is_method_file(word)]
    try:
        return [row for path in given if path for row in read_rows(Path(path).expanduser())]
    except ConfigError:
        return []


def _is_method_file(word: str) -> bool:
    return word.partition("=")[0] == "--method-file"


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """Run a sweep script. All flags after the file are passed to it.

    For example:
      grass-ray sweep sweeps/quickstart.py
      grass-ray sweep sweeps/commonsense.py --smoke --data-dir DATA
      grass-ray sweep sweeps/quickstart.py --resume
    """

    file: Positional[Path]
    """Python file, such as sweeps/quickstart.py, followed by its own flags."""

    def run(self, rest: Sequence[str]) -> int:
        """Run the script with the arguments in ``rest`` and return the exit code."""
        if not self.file.is_file():
            near = sorted(str(path) for path in Path("sweeps").glob("*.py"))
            raise ConfigError(f"there is no sweep file {self.file}; available: {', '.join(near) or 'none in ./sweeps'}")
        if self.file.suffix != ".py":
            raise ConfigError(f"{self.file} is not a Python file; a sweep file is one, such as sweeps/quickstart.py")
        sys.argv = [str(self.file), *rest]
        runpy.run_path(str(self.file), run_name="__main__")
        return 0


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the accuracy of a model without training it.

    For example:
      grass-ray eval --model grass_ray_results/train/RUN --task gsm8k --data-dir DATA
      grass-ray eval --model EXPORTED --task boolq arc_easy --data-dir DATA --scoring loglikelihood
      grass-ray eval --model EXPORTED --eval-tasks mmlu,ifeval --num-fewshot 5
    """

    model: str = "smollm2-135m"
    """Built-in model, hub id, folder of a model, or folder of a run."""
    task: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...")] = None
    """A suite, tasks of one suite, or the YAML file of a custom task."""
    data: str | None = None
    """A data set of your own: a file, a save_to_disk folder or a hub id."""
    data_dir: Path | None = None
    """Folder with dataset/<Name>/test.json. Defaults to the Hub."""
    limit: int | None = None
    """Maximum number of examples per task."""
    eval_tasks: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...")] = None
    """Tasks of lm-eval to evaluate: its names (mmlu,ifeval), folders (mine/) or YAML files."""
    num_fewshot: int | None = None
    """Number of examples before each question of --eval-tasks. Defaults to what each task says."""
    batch_size: int | Literal["auto"] = "auto"
    """Number of examples evaluated at a time. auto selects what fits. Does not change accuracy."""
    scoring: Literal["auto", "generation", "loglikelihood", "loss", "lm_eval"] = "auto"
    """Generate the answer, take the most likely of the possible answers, or only measure the loss. auto does what
    the run did, measures the loss on a data set of your own, and else generates; with --eval-tasks and
    no other task it evaluates these alone (lm_eval)."""
    set: Settings = ()
    """Any other setting by its dotted key."""
    output: Path | None = None
    """New or empty folder for the record, the examples and the files of lm-eval."""
    quiet: bool = False
    """Only print the final row and errors."""

    def run(self) -> int:
        """Evaluate the model and return the exit code."""
        from grass_ray.commands.eval import evaluate_locally
        from grass_ray.commands.train import build_config

        run_folder = Path(self.model) if (Path(self.model) / "checkpoint").is_dir() else None
        alone = self.eval_tasks and self.task is None and self.data is None
        scoring = "lm_eval" if alone and self.scoring == "auto" else self.scoring
        given = {
            "evaluation.limit": self.limit,
            "evaluation.batch_size": self.batch_size,
            **lm_eval_settings(self.eval_tasks, self.num_fewshot),
        } | ({} if scoring == "auto" else {"evaluation.scoring": scoring})
        config = build_config(
            "base" if run_folder is None else None,
            base=None if run_folder is None else run_folder / "config.yaml",
            model=self.model if run_folder is None else None,
            tasks=self.task,
            data_dir=self.data_dir,
            dataset=self.data,
            assignments=[*(assignment(key, value) for key, value in given.items()), *self.set],
        )
        return evaluate_locally(config, run_folder=run_folder, output=self.output, quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run a record again and check number by number whether it agrees. Exits with 0 if all do, else with 1.

    For example:
      grass-ray reproduce grass_ray_results/train/RUN
      grass-ray reproduce record.json --dry-run
      grass-ray reproduce MLFLOW_RUN_ID --tracking-uri http://127.0.0.1:5000 --output again
    """

    run_or_record: Annotated[Positional[str], arg(metavar="RUN")]
    """Folder of a run, a record.json, or an MLflow run id."""
    tracking_uri: str | None = None
    """MLflow store of the run id."""
    model: str | None = None
    """Where the base model is on this machine. Defaults to the recorded place."""
    data_dir: Path | None = None
    """Where the data folder is on this machine. Defaults to the recorded place."""
    data: str | None = None
    """Where the data set of your own is on this machine. Defaults to the recorded place."""
    eval_tasks: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...")] = None
    """The tasks of lm-eval with folders and files as they are on this machine. Defaults to those recorded."""
    method_file: Path | None = None
    """Method file with the code that the run was made with; the code is run."""
    write_code: Path | None = None
    """Write the code that the record keeps, with a method file, to this new folder, and stop."""
    output: Path | None = None
    """New or empty folder for the new run. By default nothing is written."""
    dry_run: bool = False
    """Print what would run and how this machine differs, and stop."""
    quiet: bool = False
    """Only print warnings, what differs, and the verdict."""

    def run(self) -> int:
        """Run the record again and return the exit code."""
        from grass_ray.commands.reproduce import find_original, reproduce, write_code

        original = find_original(self.run_or_record, tracking_store(self.tracking_uri))
        if self.write_code is not None:
            return write_code(original.record, self.write_code)
        methods_with(self.method_file)
        return reproduce(
            original,
            model=self.model,
            data_dir=self.data_dir,
            dataset=self.data,
            eval_tasks=self.eval_tasks,
            output=self.output,
            dry_run=self.dry_run,
            quiet=self.quiet,
        )
