"""``grass-ray reproduce``: run a record again and compare its numbers. Needs no ray.

The original is only read. The rerun is written only if ``--output`` names a new folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from typing_extensions import override

from grass_ray.commands.output import check_new_folder
from grass_ray.config import ConfigError, RunConfig, installed_code, to_json
from grass_ray.execute import Action, Ending, Listener, RunContext, execute
from grass_ray.experiment.flags import lm_eval_settings
from grass_ray.paths import absolute, find_model, with_absolute_paths
from grass_ray.process import INTERRUPTED
from grass_ray.progress import RunProgress
from grass_ray.results.environment import compare_environments, environment_of
from grass_ray.results.provenance import write_examples
from grass_ray.results.record import RunRecord
from grass_ray.results.reproduction import Check, ExtractedAnswers, compare_records
from grass_ray.results.store import download, is_run_id
from grass_ray.tasks.dataset_rows import find_dataset
from grass_ray.tasks.scores import EvaluationResult
from grass_ray.training.report import VALIDATION, StepReport

if TYPE_CHECKING:
    from grass_ray.training.run import Run

RECORD = "record.json"
EXAMPLES = "examples.jsonl"
METHOD_FILE = "methods.yaml"


@dataclass(frozen=True, kw_only=True)
class Original:
    """What is run again.

    Attributes:
        record: of the original.
        where: it was read, in words.
        answers: extracted from its examples' outputs; None if they are not there any more.
    """

    record: RunRecord
    where: str
    answers: ExtractedAnswers | None


def find_original(run: str, tracking_uri: str) -> Original:
    """Read the record of a run.

    Args:
        run: a run's folder, a ``record.json``, or a run id of MLflow.
        tracking_uri: the MLflow store that knows the id.

    Raises:
        ConfigError: there is no such record.
    """
    path = Path(run)
    if path.is_dir():
        path = path / RECORD
        if not path.is_file():
            raise ConfigError(f"{run} has no {RECORD}; give the folder of a run that came to an end")
    if path.is_file():
        examples = path.with_name(EXAMPLES)
        answers = read_answers(examples) if examples.is_file() else None
        return Original(record=RunRecord.load(path), where=str(path), answers=answers)
    if not is_run_id(run):
        raise ConfigError(
            f"there is no run {run!r}: give a run's folder, a {RECORD}, or an MLflow run id (32 hexadecimal digits)"
        )
    with tempfile.TemporaryDirectory(prefix="grass_ray-original-") as folder:
        found = download(tracking_uri, run, (RECORD, EXAMPLES), Path(folder))
        if RECORD not in found:
            raise ConfigError(f"the MLflow run {run} has no {RECORD}; has it come to an end?")
        return Original(
            record=RunRecord.load(found[RECORD]),
            where=f"MLflow run {run}",
            answers=read_answers(found[EXAMPLES]) if EXAMPLES in found else None,
        )


def read_answers(path: Path) -> ExtractedAnswers:
    """Read what was extracted from every example's output, by task and example id."""
    answers: defaultdict[tuple[str, str], list[str | None]] = defaultdict(list)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            answers[row["task"], row["id"]].append(row["extracted"])
    return answers


def _answers(tasks: Mapping[str, EvaluationResult]) -> ExtractedAnswers:
    """The same of results that are in memory."""
    answers: defaultdict[tuple[str, str], list[str | None]] = defaultdict(list)
    for task, result in tasks.items():
        for example in result.examples:
            answers[task, example.id].append(example.extracted)
    return answers


def reproduce(
    original: Original,
    *,
    model: str | None = None,
    data_dir: Path | None = None,
    dataset: str | None = None,
    eval_tasks: Sequence[str] | None = None,
    output: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> int:
    """Run the original's configuration again and compare.

    Args:
        original: what to run again.
        model: where the base model is here; None takes the recorded place, as for the data.
        data_dir: where the data folder is here.
        dataset: where the user's own data set is here.
        eval_tasks: the tasks of lm-eval, with folders and files where they are here.
        output: new or empty folder for the rerun's record and the comparison; None writes nothing.
        dry_run: only print what would be run, and how this machine differs.
        quiet: print only the verdict and what differs.

    Returns:
        The exit code: 0 if everything agrees, 1 if not, 130 if interrupted.

    Raises:
        ConfigError: the record cannot be run here.
    """
    from grass_ray.training.checks import check_run

    record = original.record
    config = _config_here(record, model, data_dir, dataset, eval_tasks)
    check_run(config)
    check_new_folder(output)
    console = Console()
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    if not quiet:
        say(f"original  {record.name}, {record.status} on {record.started_at[:10]}, from {original.where}")
        say(f"runs      {_steps(record, config)}")
        say(f"writes    {output or 'nothing'}")
    warnings = compare_environments(record, environment_of(config))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not warnings and not quiet:
        say("same      versions, hardware, code, model and data as recorded")
    if dry_run:
        return 0
    try:
        listeners = [_Retrace(record), RunProgress(config.name, console=console, quiet=quiet)]
        result = execute(config, listeners=listeners, threads=record.threads)
    except KeyboardInterrupt:
        say("stopped; nothing was compared and nothing written")
        return INTERRUPTED
    rerun = result.record(RunContext(sweep="reproduce", sweep_id="reproduce", run_id=f"reproduce-{record.run_id}"))
    tasks = {} if result.outcome is None else result.outcome.tasks
    checks = compare_records(record, rerun, original.answers, _answers(tasks))
    if output is not None:
        _write(output, config, rerun, tasks, {"warnings": warnings, "checks": checks})
    return _report(checks, say, quiet=quiet)


def write_code(record: RunRecord, folder: Path) -> int:
    """Write the code that a record keeps, and a method file that names it, to a new or empty folder.

    Returns:
        The exit code.

    Raises:
        ConfigError: the record keeps no code, or the folder is not empty or cannot be written to.
    """
    if not record.code:
        raise ConfigError(f"{record.name} ran with a built-in method; its record keeps no code")
    check_new_folder(folder)
    outside = [path for path in record.code if not (folder / path).resolve().is_relative_to(folder.resolve())]
    if outside:
        raise ConfigError(f"the record names the file {outside[0]}, which is not inside of {folder}")
    for path, text in record.code.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    row = {"name": record.config["method"]["name"], "summary": f"method of {record.name}"} | record.config["method"]
    (folder / METHOD_FILE).write_text(yaml.safe_dump([row], sort_keys=False), encoding="utf-8")
    print(f"wrote {folder / METHOD_FILE} and {', '.join(record.code)}; read them before you run them:")
    print(f"  --method-file {folder / METHOD_FILE}")
    return 0


def _check_code(record: RunRecord, config: RunConfig) -> None:
    """Raise :class:`ConfigError` if the run was made with code that this process may not run, or has otherwise."""
    if {part.sha256 for part in config.method.imported_parts} <= {code.sha256 for code in installed_code()}:
        return
    here = {path: text for code in installed_code() for path, text in code.files.items()}
    changed = [path for path, text in record.code.items() if here.get(path, text) != text]
    missing = [path for path in record.code if path not in here]
    found = [f"{', '.join(changed)} differs from the record's"] if changed else []
    found += [f"{', '.join(missing)} is not here"] if missing else []
    raise ConfigError(
        f"{record.name} ran with code of a user's own: {'; '.join(found) or 'the record does not keep it'}. Give the "
        "method file with that code with --method-file; --write-code FOLDER writes what the record keeps, to be read "
        "first"
    )


def _write(
    output: Path,
    config: RunConfig,
    rerun: RunRecord,
    tasks: Mapping[str, EvaluationResult],
    comparison: Mapping[str, Any],
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    rerun.save(output / RECORD)
    write_examples(output / EXAMPLES, tasks)
    config.save(output / "config.yaml")
    (output / "reproduction.json").write_text(to_json(comparison, indent=1) + "\n", encoding="utf-8")


def _config_here(
    record: RunRecord,
    model: str | None,
    data_dir: Path | None,
    dataset: str | None,
    eval_tasks: Sequence[str] | None = None,
) -> RunConfig:
    """The recorded configuration, with model and data where they are on this machine.

    Raises:
        ConfigError: the record cannot be run in one process, or not with these flags.
    """
    if record.world_size != 1:
        raise ConfigError(f"{record.name} ran on {record.world_size} workers; reproduce runs in one process")
    if record.search is not None and record.search.lineage:
        raise ConfigError(
            f"{record.name} is a member of a population: it went on from others' weights and changed its settings on "
            "the way, as its record's lineage says; run the search again instead (--scheduler pbt with the same flags)"
        )
    config = RunConfig.parse(record.config)
    name = config.model.name
    changes: dict[str, Any] = {} if model is None else {"model.name": find_model(model)}
    if model is None and record.model_revision is not None and find_model(name) != name:
        raise ConfigError(
            f"the model {name} came from the hub, and this directory has a folder of that name; run this from another "
            "directory, or give --model"
        )
    if dataset is not None:
        if config.data.source.kind != "dataset":
            raise ConfigError(
                f"--data {dataset} has no effect: the original's data come from '{config.data.source.kind}'"
            )
        changes["data.source.path"] = find_dataset(dataset).map_paths(absolute).path
    if data_dir is not None:
        if config.data.source.kind != "folder":
            raise ConfigError(
                f"--data-dir {data_dir} has no effect: the original's data come from '{config.data.source.kind}'"
            )
        changes["data.source.path"] = str(data_dir.resolve())
    if eval_tasks is not None:
        if not config.evaluation.lm_eval.tasks:
            raise ConfigError(f"--eval-tasks {' '.join(eval_tasks)} has no effect: the original evaluated none")
        few = config.evaluation.lm_eval.num_fewshot
        config = with_absolute_paths(config.override(lm_eval_settings(eval_tasks, few)))
    config = config.override(changes)
    _check_code(record, config)
    return config


def _steps(record: RunRecord, config: RunConfig) -> str:
    what = f"{config.method.name} on {config.model.name}, seed {config.seed}"
    if not config.training.steps:
        return f"{what}: no training, {len(config.data.tasks)} task(s)"
    then = "" if record.status == "stopped" else ", then evaluates"
    return f"{what}: {_last_step(record) or config.training.steps} steps{then}"


def _last_step(record: RunRecord) -> int:
    return max((points[-1][0] for points in record.series.values() if points), default=0)


class _Retrace(Listener):
    """Validates a rerun at the steps at which the original was validated, and stops it where that was stopped."""

    def __init__(self, record: RunRecord) -> None:
        self._measured = {step for step, _ in record.series.get(VALIDATION, ())}  # held-out rows, in a search
        self._failed = record.status == "failed"
        self._stop_after = _last_step(record) if record.status == "stopped" else None

    @override
    def on_step(self, run: Run, report: StepReport) -> Action:
        if report.step in self._measured:
            run.validate()
        return Action.STOP if report.step == self._stop_after else Action.GO

    @override
    def on_error(self, error: BaseException) -> Ending | None:
        return ("failed", str(error)) if isinstance(error, ConfigError) and self._failed else None


def _report(checks: list[Check], say: Callable[[str], None], *, quiet: bool) -> int:
    words = {True: "agrees", False: "DIFFERS", None: "-"}
    width = max(len(check.what) for check in checks)
    for check in checks:
        if check.agrees is False or not quiet:
            say(f"{words[check.agrees]:8} {check.what:{width}}  {check.detail}")
    differing = sum(check.agrees is False for check in checks)
    decided = sum(check.agrees is not None for check in checks)
    if differing:
        say(f"not reproduced: {differing} of {decided} numbers differ")
        return 1
    say(f"reproduced: all {decided} numbers agree in every bit")
    return 0
