"""``grass-ray eval``: measure a model's accuracy without training it, and what a run forgot. Needs no ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grass_ray.commands.output import check_new_folder, describe_lost_test_rows, render_row
from grass_ray.config import RunConfig
from grass_ray.progress import RunProgress
from grass_ray.results.provenance import build_record, now, write_examples, write_lm_eval_examples
from grass_ray.results.record import RunRecord
from grass_ray.tasks.lm_eval_scores import lm_eval_metrics
from grass_ray.training.report import FORGETTING, RunOutcome

if TYPE_CHECKING:
    from grass_ray.tasks.lm_eval_results import HarnessResults
    from grass_ray.training.forgetting import Forgetting
    from grass_ray.training.models import LoadedModel


def evaluate_locally(config: RunConfig, *, run_folder: Path | None, output: Path | None, quiet: bool = False) -> int:
    """Evaluate a model and print a table; returns the exit code, 0.

    Args:
        config: model, data and evaluation; nothing is trained.
        run_folder: of a run whose trained model is evaluated; None takes the model of ``config``.
        output: new or empty folder for the record, the examples and lm-eval's own files; None writes nothing.
        quiet: print only the table.

    Raises:
        ConfigError: any mistake that shows before the model is loaded.
    """
    from grass_ray.export.model import load_trained_model
    from grass_ray.tasks.lm_eval_results import HarnessResults
    from grass_ray.training.metrics import default_device
    from grass_ray.training.models import load_model
    from grass_ray.training.weights import base_model_sha256

    _check(config)
    check_new_folder(output)
    started_at = now()
    collected = HarnessResults()
    forgetting = _before(config) if run_folder is not None else None
    loaded = load_model(config.model) if run_folder is None else load_trained_model(run_folder)
    loaded.model.to(default_device())
    with RunProgress(f"eval {config.name}", quiet=quiet) as progress:
        outcome = _measure(config, loaded, progress, collected, forgetting)
    record = build_record(
        run_id=f"eval-{config.fingerprint}",
        sweep="eval",
        sweep_id="eval",
        config=config,
        status="finished",
        failure=None,
        outcome=outcome,
        started_at=started_at,
        model_sha256=base_model_sha256(config.model),
    )
    print(render_row(record))
    for line in describe_lost_test_rows(record):
        print(line)
    if output is not None:
        _write(output, record, outcome, collected, config.model.name if run_folder is None else str(run_folder))
        if not quiet:
            print(f"wrote {output}/record.json, examples.jsonl and lm_eval/")
    return 0


def _measure(
    config: RunConfig,
    loaded: LoadedModel,
    progress: RunProgress,
    collected: HarnessResults,
    forgetting: Forgetting | None,
) -> RunOutcome:
    """The tasks of the data, those of lm-eval, and what was forgotten."""
    from grass_ray.tasks.evaluation import evaluate
    from grass_ray.tasks.lm_eval_run import evaluate_lm_eval
    from grass_ray.tasks.scores import score_metrics, workload_metrics
    from grass_ray.training.built_in import cache_folder

    model, tokenizer, told = loaded.model, loaded.tokenizer, progress.on_evaluation
    results = evaluate(
        model,
        tokenizer,
        config.data,
        config.evaluation,
        cache=cache_folder() / "tokens",
        on_progress=told,
        on_outcome=collected.add,
    )
    found = evaluate_lm_eval(model, tokenizer, config.evaluation, on_progress=told, on_outcome=collected.add) or {}
    metrics = score_metrics(results) | workload_metrics(results) | lm_eval_metrics(found)
    return RunOutcome(
        metrics=metrics if forgetting is None else metrics | forgetting.metrics(model),
        tasks=results,
        lm_eval=found,
        data={} if forgetting is None else {FORGETTING: forgetting.provenance},
        model_revision=loaded.revision,
    )


def _write(output: Path, record: RunRecord, outcome: RunOutcome, collected: HarnessResults, model: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    record.save(output / "record.json")
    write_examples(output / "examples.jsonl", outcome.tasks)
    write_lm_eval_examples(output / "lm_eval_examples.jsonl", outcome.lm_eval)
    collected.write(output / "lm_eval", model=model, evaluation=RunConfig.parse(record.config).evaluation)


def _before(config: RunConfig) -> Forgetting | None:
    """The loss of a run's base model on an unrelated text, if the run's configuration names one."""
    from grass_ray.training.forgetting import Forgetting
    from grass_ray.training.metrics import default_device
    from grass_ray.training.models import load_model

    if config.evaluation.forgetting is None:
        return None
    base = load_model(config.model)
    return Forgetting(config, base.model.to(default_device()), base.tokenizer)


def _check(config: RunConfig) -> None:
    """Find what cannot be evaluated before weights are loaded. Raises :class:`ConfigError`."""
    from grass_ray.tasks.evaluation import check_evaluation
    from grass_ray.tasks.lm_eval_tasks import check_lm_eval, load_lm_eval
    from grass_ray.tasks.readback import check_answers
    from grass_ray.tasks.sources import check_data
    from grass_ray.tasks.unrelated import load_unrelated
    from grass_ray.training.models import check_lengths, check_model, load_tokenizer

    check_model(config.model)
    check_lengths(config.model_copy(update={"training": config.training.model_copy(update={"steps": 0})}))
    if config.evaluation.scoring != "lm_eval":
        check_data(config.data, training=False)
    check_evaluation(config.data, config.evaluation)
    check_answers(config.data, config.evaluation, load_tokenizer(config.model), online=True)
    check_lm_eval(config.evaluation.lm_eval)
    if config.evaluation.forgetting is not None:
        load_unrelated(config.evaluation.forgetting)
    if config.evaluation.lm_eval.tasks:
        load_lm_eval(config.evaluation.lm_eval)
