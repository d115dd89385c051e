"""Evaluate a model with lm-eval: the accuracy of each task, and every example.

All tasks share two task files of lm-eval (``yaml/``), which read the rows of any source from JSON lines in a temporary
folder::

    check_evaluation(config.data, config.evaluation)            # before any model is loaded
    results = evaluate(model, tokenizer, config.data, config.evaluation)
    results["gsm8k"].accuracy, results["gsm8k"].examples[0].output

With ``generation`` the answer is extracted from text generated greedily or by beam search; with ``loglikelihood`` it
is the option whose response has the highest likelihood; with ``loss`` there are no answers. The loss of the right
answers (:mod:`grass_ray.tasks.losses`) is measured in any case. Importing this module loads no torch; :func:`evaluate`
does.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from grass_ray.config import ConfigError, DataConfig, EvaluationConfig
from grass_ray.tasks.custom import find_task
from grass_ray.tasks.extraction import ANSWER_RULES, extract_answer, is_correct
from grass_ray.tasks.held_out import OnProgress, Progress, measure_held_out
from grass_ray.tasks.losses import REFERENCE_RULES, AnswerLoss, loss_among, measure_losses, responses
from grass_ray.tasks.questions import (
    LIMIT_SEED,
    Question,
    ask,
    chance,
    estimate_cost,
    make_document,
    options_of,
    select_examples,
)
from grass_ray.tasks.rows import RowSet
from grass_ray.tasks.scores import EvaluationResult, Example, Workload
from grass_ray.tasks.shards import SHARD, split_by_cost
from grass_ray.tasks.shards import merge_shards as merge_shards
from grass_ray.tasks.sources import load_test_rows, open_source
from grass_ray.tasks.suites import Task
from grass_ray.tasks.templates import render_answer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from grass_ray.tasks.inference.harness import ObservedLM

YAML_FOLDER = Path(__file__).parent / "yaml"

OnOutcome = Callable[[dict[str, Any]], None]


def check_evaluation(data: DataConfig, evaluation: EvaluationConfig) -> None:
    """Raise :class:`ConfigError` if the tasks cannot be scored as configured."""
    if evaluation.scoring == "lm_eval":
        return
    open_source(data).check_names()
    mistakes = []
    texts = [key for key in data.tasks if find_task(key, data.source).answer == "text"]
    if texts and evaluation.scoring != "loss":
        mistakes.append(
            f"the rows of {', '.join(texts)} have no right answer, so {evaluation.scoring} scoring has nothing to "
            "compare; use evaluation.scoring=loss"
        )
    elif evaluation.scoring == "generation":
        return
    numbers = [key for key in data.tasks if find_task(key, data.source).answer == "number"]
    if numbers and evaluation.scoring == "loglikelihood":
        mistakes.append(
            f"loglikelihood scoring compares fixed options, but {', '.join(numbers)} "
            f"{'asks' if len(numbers) == 1 else 'ask'} for numbers; use scoring: generation, or loss"
        )
    if evaluation.num_beams > 1:
        mistakes.append(
            f"num_beams: {evaluation.num_beams} has no effect on {evaluation.scoring} scoring; leave it at 1"
        )
    if mistakes:
        raise ConfigError("; ".join(mistakes))


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    evaluation: EvaluationConfig,
    *,
    shard: tuple[int, int] | None = None,
    cache: Path | None = None,
    on_progress: OnProgress | None = None,
    on_outcome: OnOutcome | None = None,
) -> dict[str, EvaluationResult]:
    """Evaluate a model on the tasks of ``data``. The model and the tokenizer are left unchanged.

    Args:
        model: causal language model of transformers, possibly with peft adapters, on one device.
        tokenizer: its tokenizer. The padding side and token do not matter.
        data: tasks, source and template.
        evaluation: scoring, extraction, limit, batch size and beams.
        shard: (index, count) to evaluate only one of ``count`` shards of the examples, which take about equally long;
            :func:`merge_shards` merges their results.
        cache: folder that keeps tokenized prompts for later runs; any number of runs may share it.
        on_progress: called with (task, finished requests, all requests) after each batch. A request is a text to
            generate or a response whose log-likelihood is computed.
        on_outcome: called with the results of lm-eval for each task.

    Returns:
        One result per task, in the order of ``data.tasks``, with examples in the order of the test file; none with
        scoring ``lm_eval``, whose tasks :func:`grass_ray.tasks.lm_eval_run.evaluate_lm_eval` evaluates.
    """
    check_evaluation(data, evaluation)
    if evaluation.scoring == "lm_eval":
        return {}
    from grass_ray.tasks.inference.harness import ObservedLM, quiet, undisturbed

    results = {}
    with undisturbed(model, tokenizer), quiet():
        progress = Progress(on_progress)
        lm = ObservedLM(model, tokenizer, batch_size=evaluation.batch_size, cache=cache, on_batch=progress.advance)
        for key in data.tasks:
            task = find_task(key, data.source)
            if task.answer == "text":
                results[key] = measure_held_out(lm, task, data, evaluation, progress, shard)
            else:
                results[key] = _evaluate_task(lm, task, data, evaluation, progress, shard, on_outcome)
    return results


def _evaluate_task(
    lm: ObservedLM,
    task: Task,
    data: DataConfig,
    evaluation: EvaluationConfig,
    progress: Progress,
    shard: tuple[int, int] | None,
    on_outcome: OnOutcome | None,
) -> EvaluationResult:
    tests = load_test_rows(task.key, data)
    questions = select_examples(ask(task, tests.questions, data.template), evaluation.limit)
    max_new_tokens = min(task.max_new_tokens, lm.max_length // 2)  # a short context must also hold the question
    generation = {
        "do_sample": False,
        "max_gen_toks": max_new_tokens,
        "num_beams": evaluation.num_beams,
        "until": list(task.stop),
    }
    choosing = evaluation.scoring == "loglikelihood"
    # of all questions, so that it is the same for every shard
    protocol = _protocol(task, tests, questions, data, evaluation, max_new_tokens)
    documents = [make_document(task, question, evaluation) for question in questions]
    if shard is not None:
        costs = [estimate_cost(document, max_new_tokens) for document in documents]
        positions = split_by_cost(costs, shard[1])[shard[0]]
        questions, documents = [questions[at] for at in positions], [documents[at] for at in positions]
        protocol[SHARD] = {"index": shard[0], "count": shard[1], "positions": positions}
    measured = sum(len(responses(task, question)) for question in questions)
    progress.start(task.key, measured + (len(questions) if evaluation.scoring == "generation" else 0))
    started = time.perf_counter()
    samples: list[dict[str, Any]] = [{} for _ in documents]
    if documents and evaluation.scoring != "loss":
        outcome = _run(lm, task, documents, generation, choosing)
        # lm-eval read the rows from a temporary file
        outcome["configs"][task.key]["dataset_kwargs"] = {"data_files": {"test": protocol["test_file"]}}
        samples = sorted(outcome["samples"][task.key], key=lambda sample: sample["doc_id"])
        if on_outcome is not None:
            on_outcome(outcome)
    losses, workload = _losses(lm, task, questions, samples, choosing)
    seconds = time.perf_counter() - started
    progress.finish()
    examples = [
        dataclasses.replace(_READ[evaluation.scoring](task, question, sample, evaluation), **loss._asdict())
        for question, sample, loss in zip(questions, samples, losses, strict=True)
    ]
    return EvaluationResult(
        task=task.key,
        scoring=evaluation.scoring,
        extraction=evaluation.extraction,
        examples=tuple(examples),
        protocol=protocol,
        workload=dataclasses.replace(workload, seconds=seconds),
    )


def _losses(
    lm: ObservedLM, task: Task, questions: Sequence[Question], samples: Sequence[dict[str, Any]], choosing: bool
) -> tuple[list[AnswerLoss], Workload]:
    """The loss of the right answers, and all work since the task began."""
    answering = lm.take_workload()
    if choosing:
        likelihoods = [[value for value, _ in sample["filtered_resps"]] for sample in samples]
        return [loss_among(lm, task, *pair) for pair in zip(questions, likelihoods, strict=True)], answering
    losses = measure_losses(lm, task, questions)
    measuring = lm.take_workload()
    if answering.passes:  # the same prompts were cut when they were answered
        measuring = dataclasses.replace(measuring, prompts_cut=0)
    return losses, answering + measuring


def _protocol(
    task: Task,
    tests: RowSet,
    questions: Sequence[Question],
    data: DataConfig,
    evaluation: EvaluationConfig,
    max_new_tokens: int,
) -> dict[str, Any]:
    """How the task is asked and scored; ``questions`` are those of all shards."""
    protocol: dict[str, Any] = {
        "template": data.template,
        "scoring": evaluation.scoring,
        "extraction": evaluation.extraction,
        "answer_rules": ANSWER_RULES,
        "num_beams": evaluation.num_beams,
        "max_new_tokens": max_new_tokens,
        "stop": list(task.stop),
        "limit": evaluation.limit,
        "limit_seed": LIMIT_SEED,
        "batch_size": evaluation.batch_size,
        "test_file": tests.provenance["files"][0]["name"],
        "test_sha256": tests.provenance["files"][0]["sha256"],
        "test_rows": len(tests.rows),
        "test_rows_skipped": tests.provenance["rows_skipped"],
        "broken_rows": data.broken_rows,
        "chance": chance(task, [question.row for question in questions]),
        "lm_eval": version("lm_eval"),
    }
    if task.answer == "number":
        protocol["reference_rules"] = REFERENCE_RULES
    if evaluation.scoring == "loglikelihood":
        protocol |= {
            "options": render_answer(task, "{option}"),
            "extraction": None,
            "max_new_tokens": None,
            "stop": None,
        }
    if evaluation.scoring == "loss":
        protocol |= {"extraction": None, "max_new_tokens": None, "stop": None, "chance": None}
    return protocol


# ------------------------------------------------------------------------------------------------------ through lm-eval


def _run(
    lm: ObservedLM, task: Task, documents: Sequence[dict[str, Any]], generation: dict[str, Any], choosing: bool
) -> dict[str, Any]:
    """Run lm-eval on one task; return its results, with one sample per document."""
    from lm_eval.evaluator import evaluate as lm_eval_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory(prefix="grass-ray-eval-") as name:
        folder = Path(name)
        rows = folder / f"{task.key}.jsonl"
        rows.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        layers = ["generation.yaml", *(["loglikelihood.yaml"] if choosing else [])]
        settings: dict[str, Any] = {
            "include": [str(YAML_FOLDER / layer) for layer in layers],
            "task": task.key,
            # datasets takes the path as a pattern, and the temporary folder may have a "[" in its name
            "dataset_kwargs": {"data_files": {"test": glob.escape(str(rows))}, "cache_dir": str(folder / "cache")},
        }
        if not choosing:
            settings["generation_kwargs"] = generation
        (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        tasks = TaskManager(include_path=str(folder), include_defaults=False).load([task.key])
        # the standard error of a mean has a formula, so nothing is resampled
        outcome: dict[str, Any] = lm_eval_evaluate(lm, tasks, log_samples=True, bootstrap_iters=1)
    return outcome


def _read_text(task: Task, question: Question, sample: dict[str, Any], evaluation: EvaluationConfig) -> Example:
    output: str = sample["filtered_resps"][0]
    extracted = extract_answer(output, task, evaluation.extraction)
    correct = is_correct(extracted, question.row.answer, task)
    assert correct == bool(sample["acc"]), "lm-eval scored another text"
    return Example(
        id=question.id,
        prompt=question.text,
        target=question.row.answer,
        output=output,
        extracted=extracted,
        correct=correct,
    )


def _read_choice(task: Task, question: Question, sample: dict[str, Any], evaluation: EvaluationConfig) -> Example:
    scores = [likelihood for likelihood, _ in sample["filtered_resps"]]
    options = options_of(task, question.row)
    chosen = options[scores.index(max(scores))]
    assert (chosen == question.row.answer) == bool(sample["acc"]), "lm-eval chose another option"
    listing = ", ".join(f"{option} {score:.3f}" for option, score in zip(options, scores, strict=True))
    return Example(
        id=question.id,
        prompt=question.text,
        target=question.row.answer,
        output=listing,
        extracted=chosen,
        correct=chosen == question.row.answer,
    )


def _read_nothing(task: Task, question: Question, sample: dict[str, Any], evaluation: EvaluationConfig) -> Example:
    """With ``loss`` there is no answer that could be right or wrong."""
    return Example(
        id=question.id, prompt=question.text, target=question.row.answer, output="", extracted=None, correct=False
    )


_READ = {"generation": _read_text, "loglikelihood": _read_choice, "loss": _read_nothing}
