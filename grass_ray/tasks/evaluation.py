"""Evaluation through lm-eval: accuracy and every example of every task of a run.

All tasks share two lm-eval task files (``yaml/``); rows of any source reach them as JSON lines in a temporary folder,
so one path serves all::

    check_evaluation(config.data, config.evaluation)            # before any model is loaded
    results = evaluate(model, tokenizer, config.data, config.evaluation)
    results["gsm8k"].accuracy, results["gsm8k"].examples[0].output

``generation`` reads the answer out of greedily (or beam-search) generated text; ``loglikelihood`` takes the option
whose whole response the model finds likeliest. Importing this module loads no torch; :func:`evaluate` does.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from grass_ray.config import ConfigError, DataConfig, EvaluationConfig
from grass_ray.tasks.custom import check_selection, find_task
from grass_ray.tasks.extraction import ANSWER_RULES, extract_answer, is_correct
from grass_ray.tasks.rows import Row, RowSet
from grass_ray.tasks.scores import EvaluationResult, Example
from grass_ray.tasks.shards import SHARD, split_by_cost
from grass_ray.tasks.shards import merge_shards as merge_shards
from grass_ray.tasks.sources import load_test_rows
from grass_ray.tasks.suites import TASKS, Task
from grass_ray.tasks.templates import render_answer, render_prompt

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from grass_ray.tasks.inference.harness import ObservedLM

LIMIT_SEED = 20_240_531  # which examples a limit keeps: the same in every run, and fewer are among more
YAML_FOLDER = Path(__file__).parent / "yaml"

OnProgress = Callable[[str, int, int], None]
OnOutcome = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A row as it is asked: its id, its text, and its place in the test file."""

    id: str
    text: str
    row: Row


def check_evaluation(data: DataConfig, evaluation: EvaluationConfig) -> None:
    """Raise :class:`ConfigError` where the tasks cannot be scored as asked."""
    check_selection(data)
    if evaluation.scoring != "loglikelihood":
        return
    mistakes = []
    if numbers := [key for key in data.tasks if find_task(key, data.source).answer == "number"]:
        mistakes.append(
            f"loglikelihood scoring compares fixed options, but {', '.join(numbers)} "
            f"{'asks' if len(numbers) == 1 else 'ask'} for numbers; use scoring: generation"
        )
    if evaluation.num_beams > 1:
        mistakes.append(f"num_beams: {evaluation.num_beams} has no effect on loglikelihood scoring; leave it at 1")
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
    """Score ``model`` on the tasks of ``data``; the model and tokenizer are left as they were.

    Args:
        model: a causal language model of transformers, possibly with peft adapters, on any one device.
        tokenizer: its tokenizer; the padding side and token do not matter.
        data: tasks, source and template.
        evaluation: scoring, extraction, limit, batch size and beams.
        shard: (index, count): evaluate only the examples of one of ``count`` shards, which take about equally long;
            :func:`merge_shards` puts the parts of all shards together.
        cache: a folder that keeps tokenised questions for the next run; any number of runs share it.
        on_progress: called with (task, finished requests, all requests) after each batch; a request is an example
            in generation and an option of an example in loglikelihood.
        on_outcome: called with lm-eval's own results of each task.

    Returns:
        One result a task, in the order of ``data.tasks``; its examples are in the order of the test file.
    """
    check_evaluation(data, evaluation)
    from grass_ray.tasks.inference.harness import ObservedLM, quiet, undisturbed

    results = {}
    with undisturbed(model, tokenizer), quiet():
        progress = _Progress(on_progress)
        lm = ObservedLM(model, tokenizer, batch_size=evaluation.batch_size, cache=cache, on_batch=progress.advance)
        for key in data.tasks:
            task = find_task(key, data.source)
            results[key] = _evaluate_task(lm, task, data, evaluation, progress, shard, on_outcome)
    return results


class _Progress:
    """Counts a task's finished requests and passes the count on."""

    def __init__(self, listener: OnProgress | None) -> None:
        self.listener = listener
        self.task, self.finished, self.total = "", 0, 0

    def start(self, task: str, total: int) -> None:
        self.task, self.finished, self.total = task, 0, total

    def advance(self, requests: int) -> None:
        self.finished = min(self.finished + requests, self.total)
        if self.listener:
            self.listener(self.task, self.finished, self.total)

    def finish(self) -> None:
        """Count the requests that lm-eval answered without a forward pass of their own (options of shared text)."""
        if self.finished < self.total:
            self.advance(self.total - self.finished)


def _evaluate_task(
    lm: ObservedLM,
    task: Task,
    data: DataConfig,
    evaluation: EvaluationConfig,
    progress: _Progress,
    shard: tuple[int, int] | None,
    on_outcome: OnOutcome | None,
) -> EvaluationResult:
    tests = load_test_rows(task.key, data)
    prompts = select_examples(ask(task, tests.rows, data.template), evaluation.limit)
    max_new_tokens = min(task.max_new_tokens, lm.max_length // 2)  # a short context must also hold the question
    generation = {
        "do_sample": False,
        "max_gen_toks": max_new_tokens,
        "num_beams": evaluation.num_beams,
        "until": list(task.stop),
    }
    choosing = evaluation.scoring == "loglikelihood"
    # over all examples: the protocol of every shard is the same
    protocol = _protocol(task, tests, prompts, data, evaluation, max_new_tokens)
    documents = [_document(task, prompt, evaluation, choosing) for prompt in prompts]
    if shard is not None:
        positions = split_by_cost([_cost(document, max_new_tokens) for document in documents], shard[1])[shard[0]]
        prompts, documents = [prompts[at] for at in positions], [documents[at] for at in positions]
        protocol[SHARD] = {"index": shard[0], "count": shard[1], "positions": positions}
    progress.start(task.key, sum(len(document.get("choices", (1,))) for document in documents))
    started = time.perf_counter()
    samples: list[dict[str, Any]] = []
    if documents:
        outcome = _run(lm, task, documents, generation, choosing)
        # rows reached lm-eval through a file that is gone
        outcome["configs"][task.key]["dataset_kwargs"] = {"data_files": {"test": protocol["test_file"]}}
        samples = sorted(outcome["samples"][task.key], key=lambda sample: sample["doc_id"])
        if on_outcome is not None:
            on_outcome(outcome)
    seconds = time.perf_counter() - started
    progress.finish()
    read = _read_choice if choosing else _read_text
    return EvaluationResult(
        task=task.key,
        scoring=evaluation.scoring,
        extraction=evaluation.extraction,
        examples=tuple(read(task, prompt, sample, evaluation) for prompt, sample in zip(prompts, samples, strict=True)),
        protocol=protocol,
        workload=dataclasses.replace(lm.take_workload(), seconds=seconds),
    )


def _protocol(
    task: Task,
    tests: RowSet,
    prompts: Sequence[_Prompt],
    data: DataConfig,
    evaluation: EvaluationConfig,
    max_new_tokens: int,
) -> dict[str, Any]:
    """How the task is asked and scored; ``prompts`` are all of its examples."""
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
        "chance": chance(task, [prompt.row for prompt in prompts]),
        "lm_eval": version("lm_eval"),
    }
    if evaluation.scoring == "loglikelihood":
        protocol |= {
            "options": render_answer(task, "{option}"),
            "extraction": None,
            "max_new_tokens": None,
            "stop": None,
        }
    return protocol


# ---------------------------------------------------------------------------------------------- rows become questions


def ask(task: Task, rows: Sequence[Row], template: Any) -> list[_Prompt]:
    """Each row's prompt and id: 16 hexadecimal digits of a hash of task and prompt (and repetition, if repeated)."""
    seen: dict[str, int] = {}
    prompts = []
    for row in rows:
        text = render_prompt(row, template)
        repetition = seen[text] = seen.get(text, 0) + 1
        name = f"{task.key}\n{text}" + (f"\n#{repetition}" if repetition > 1 else "")
        prompts.append(_Prompt(id=hashlib.sha256(name.encode()).hexdigest()[:16], text=text, row=row))
    return prompts


def select_examples(prompts: Sequence[_Prompt], limit: int | None) -> list[_Prompt]:
    """``limit`` random examples in file order; the same in every run."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    order = list(range(len(prompts)))
    Random(LIMIT_SEED).shuffle(order)
    return [prompts[index] for index in sorted(order[:limit])]


def options_of(task: Task, row: Row) -> tuple[str, ...]:
    """The options of one question: those its "Answer format" line names, else all of the task's."""
    found = re.search(r"Answer format:\s*(\S+)\s*$", row.instruction)
    named = tuple(found.group(1).split("/")) if found else ()
    return named if row.answer in named and set(named) <= set(task.labels) else task.labels


def chance(task: Task, rows: Sequence[Row]) -> float:
    """The accuracy of guessing: the mean of 1/options over the questions, 0 for numbers."""
    return 0.0 if task.answer == "number" else fmean(1 / len(options_of(task, row)) for row in rows)


def _document(task: Task, prompt: _Prompt, evaluation: EvaluationConfig, choosing: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "task": task.key,
        "prompt": prompt.text,
        "answer": prompt.row.answer,
        "extraction": evaluation.extraction,
    }
    if task.key not in TASKS:
        document |= {"kind": task.answer, "labels": list(task.labels)}
    if choosing:
        options = options_of(task, prompt.row)
        document["choices"] = [render_answer(task, option) for option in options]
        document["gold"] = options.index(prompt.row.answer)
    return document


def _cost(document: dict[str, Any], max_new_tokens: int) -> int:
    """About how long a question takes, in characters that go through the model."""
    if "choices" in document:
        return sum(len(document["prompt"]) + len(choice) for choice in document["choices"])
    return len(document["prompt"]) + 4 * max_new_tokens  # a token is about four characters of English


# ------------------------------------------------------------------------------------------------------ through lm-eval


def _run(
    lm: ObservedLM, task: Task, documents: Sequence[dict[str, Any]], generation: dict[str, Any], choosing: bool
) -> dict[str, Any]:
    """lm-eval's results of one task, with a sample a document."""
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
            # what is given is a pattern to datasets, and the temporary folder may have a "[" in its name
            "dataset_kwargs": {"data_files": {"test": glob.escape(str(rows))}, "cache_dir": str(folder / "cache")},
        }
        if not choosing:
            settings["generation_kwargs"] = generation
        (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        tasks = TaskManager(include_path=str(folder), include_defaults=False).load([task.key])
        # the standard error of a mean has a formula; nothing is resampled
        outcome: dict[str, Any] = lm_eval_evaluate(lm, tasks, log_samples=True, bootstrap_iters=1)
    return outcome


def _read_text(task: Task, prompt: _Prompt, sample: dict[str, Any], evaluation: EvaluationConfig) -> Example:
    output: str = sample["filtered_resps"][0]
    extracted = extract_answer(output, task, evaluation.extraction)
    correct = is_correct(extracted, prompt.row.answer, task)
    assert correct == bool(sample["acc"]), "lm-eval scored another text"
    return Example(
        id=prompt.id,
        prompt=prompt.text,
        target=prompt.row.answer,
        output=output,
        extracted=extracted,
        correct=correct,
    )


def _read_choice(task: Task, prompt: _Prompt, sample: dict[str, Any], evaluation: EvaluationConfig) -> Example:
    scores = [likelihood for likelihood, _ in sample["filtered_resps"]]
    options = options_of(task, prompt.row)
    chosen = options[scores.index(max(scores))]
    assert (chosen == prompt.row.answer) == bool(sample["acc"]), "lm-eval chose another option"
    listing = ", ".join(f"{option} {score:.3f}" for option, score in zip(options, scores, strict=True))
    return Example(
        id=prompt.id,
        prompt=prompt.text,
        target=prompt.row.answer,
        output=listing,
        extracted=chosen,
        correct=chosen == prompt.row.answer,
    )
