"""What the untrained model scores: every set that is there, in both ways, with Wilson intervals.

    python benchmarks/base_scores.py --data-dir DIR                 # DIR holds dataset/<Name>/test.json
    python benchmarks/base_scores.py --data-dir DIR --model tiny --choices 8 --texts 4 --agreement 8 --output /tmp/base

``loglikelihood`` picks the likeliest of the options' labels ("the correct answer is answer2"), ``generation`` reads the
answer out of greedily generated text. Below that, ARC-e, ARC-c, PIQA and OBQA by log-likelihood of the option texts:
the same rows are put back into the form of the original data sets, lm-eval's own tasks score them with lm-eval's own
model, and this project's scoring is asked the same. Needs neither ray nor mlflow.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import lm_eval
import recording
import torch
import tyro
import yaml
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from grass_ray.config import DataConfig, EvaluationConfig, FolderSource, ModelConfig
from grass_ray.results.statistics import wilson_interval
from grass_ray.tasks.evaluation import evaluate
from grass_ray.tasks.inference.harness import quiet, undisturbed
from grass_ray.tasks.inference.likelihood import Scorer, share_rows
from grass_ray.tasks.questions import ask, select_examples
from grass_ray.tasks.rows import Row
from grass_ray.tasks.sources import check_data, load_test_rows
from grass_ray.tasks.suites import SUITES, TASKS
from grass_ray.training.built_in import cache_folder
from grass_ray.training.metrics import default_device
from grass_ray.training.models import load_model

# lm-eval's task file, and the words that number the options of a row
OPTION_TEXTS = {
    "arc_easy": ("arc/arc_easy.yaml", "Answer"),
    "arc_challenge": ("arc/arc_challenge.yaml", "Answer"),
    "piqa": ("piqa/piqa.yaml", "Solution"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "Answer"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to score."""

    data_dir: Path
    model: str = "smollm2-135m"
    choices: Annotated[int, tyro.conf.arg(help="questions of every set by log-likelihood")] = 100
    texts: Annotated[int, tyro.conf.arg(help="questions of every set by generation")] = 24
    agreement: Annotated[int, tyro.conf.arg(help="questions of every set by option texts, both ways")] = 25
    threads: int = 1
    output: Annotated[Path, tyro.conf.arg(help="written with .json and .md")] = Path("benchmarks/results/base_scores")


def read_data(options: Options) -> dict[str, DataConfig]:
    """The sets that the folder holds."""
    source = FolderSource(path=str(options.data_dir))
    found = {}
    for task in TASKS.values():
        if (options.data_dir / "dataset" / task.folder / "test.json").is_file():
            found[task.key] = DataConfig(suite=task.suite, tasks=(task.key,), source=source)
            check_data(found[task.key], training=False)
    return found


def score_sets(loaded: Any, sets: dict[str, DataConfig], options: Options) -> list[dict[str, Any]]:
    """One row a set and way."""
    rows = []
    for key, data in sets.items():
        ways = ["generation"] if TASKS[key].answer == "number" else ["loglikelihood", "generation"]
        for way in ways:
            limit = options.choices if way == "loglikelihood" else options.texts
            config = EvaluationConfig(scoring=way, limit=limit)  # type: ignore[arg-type]
            result = evaluate(loaded.model, loaded.tokenizer, data, config, cache=cache_folder() / "tokens")[key]
            correct, count = sum(example.correct for example in result.examples), len(result.examples)
            low, high = wilson_interval(correct, count)
            rows.append(
                {
                    "task": key,
                    "scoring": way,
                    "questions": count,
                    "test_rows": result.protocol["test_rows"],
                    "accuracy": result.accuracy,
                    "low": low,
                    "high": high,
                    "chance": result.protocol["chance"],
                    "no_answer": sum(example.extracted is None for example in result.examples),
                    "seconds": result.workload.seconds,
                }
            )
            seconds = result.workload.seconds
            print(f"{key} by {way}: {100 * result.accuracy:.1f} % of {count}, {seconds:.0f} s", flush=True)
    return rows


# ------------------------------------------------------------------------------------------------ option texts


def original_form(row: Row, word: str) -> tuple[str, list[str], int]:
    """(question, option texts, place of the right one) of a row that lists its options in the instruction."""
    body = row.instruction.split("question:", 1)[1].rsplit("Answer format:", 1)[0]
    question, *texts = re.split(rf"\s*\b{word}\d+:\s*", body)
    return question.strip(), [text.strip() for text in texts], int(row.answer[-1]) - 1


def as_document(key: str, question: str, texts: Sequence[str], gold: int) -> dict[str, Any]:
    """A row of the original data set, as lm-eval's task reads it."""
    if key == "piqa":
        return {"goal": question, "sol1": texts[0], "sol2": texts[1], "label": gold}
    labels = list("ABCDE"[: len(texts)])
    name = "question_stem" if key == "openbookqa" else "question"
    return {name: question, "choices": {"text": list(texts), "label": labels}, "answerKey": labels[gold]}


def by_lm_eval(loaded: Any, key: str, documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's own task, scoring and model over ``documents``: its samples and aggregated numbers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
        settings = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / OPTION_TEXTS[key][0]),
            "task": f"original_{key}",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
        }
        (folder / "task.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        tasks = TaskManager(include_path=str(folder), include_defaults=False).load([f"original_{key}"])
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=8)
        outcome = lm_eval_evaluate(model, tasks, log_samples=True, bootstrap_iters=1)
    samples = sorted(outcome["samples"][f"original_{key}"], key=lambda sample: sample["doc_id"])
    return {"samples": samples} | outcome["results"][f"original_{key}"]


def by_option_text(loaded: Any, key: str, asked: Sequence[tuple[str, list[str], int]]) -> list[list[float]]:
    """This project's log-likelihood of every option text, in the same words."""
    tokenizer, requests = loaded.tokenizer, []
    for question, texts, _ in asked:
        prompt = question if key == "openbookqa" else f"Question: {question}\nAnswer:"
        context = tokenizer(prompt)["input_ids"]
        for text in texts:
            requests.append((context, tokenizer(f"{prompt} {text}")["input_ids"][len(context) :]))
    rows = share_rows(requests, loaded.model.config.max_position_embeddings)
    scorer = Scorer(loaded.model, rows)
    scores: dict[int, float] = {}
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        scores |= {
            number: score for (number, _), (score, _) in zip(row.continuations, scorer.score([row])[0], strict=True)
        }
    listed = iter(scores[number] for number in range(len(requests)))
    return [[next(listed) for _ in texts] for _, texts, _ in asked]


def compare_with_lm_eval(loaded: Any, sets: dict[str, DataConfig], options: Options) -> list[dict[str, Any]]:
    """Both scorings of the same questions, for every set whose rows list option texts."""
    found = []
    for key in [key for key in OPTION_TEXTS if key in sets]:
        prompts = select_examples(ask(TASKS[key], load_test_rows(key, sets[key]).rows, "clean"), options.agreement)
        asked = [original_form(prompt.row, OPTION_TEXTS[key][1]) for prompt in prompts]
        theirs = by_lm_eval(loaded, key, [as_document(key, *question) for question in asked])
        own = by_option_text(loaded, key, asked)
        plain = [scores.index(max(scores)) for scores in own]
        lengths = [[len(text) for text in texts] for _, texts, _ in asked]
        by_length = [[s / n for s, n in zip(scores, ns, strict=True)] for scores, ns in zip(own, lengths, strict=True)]
        normalised = [scores.index(max(scores)) for scores in by_length]
        gold = [place for _, _, place in asked]
        their_scores = [[score for score, _ in sample["filtered_resps"]] for sample in theirs["samples"]]
        their_correct = [bool(sample["acc"]) for sample in theirs["samples"]]
        found.append(
            {
                "task": key,
                "questions": len(asked),
                "own_acc": sum(a == b for a, b in zip(plain, gold, strict=True)) / len(gold),
                "lm_eval_acc": theirs["acc,none"],
                "own_acc_norm": sum(a == b for a, b in zip(normalised, gold, strict=True)) / len(gold),
                "lm_eval_acc_norm": theirs["acc_norm,none"],
                "lm_eval_stderr": theirs["acc_stderr,none"],
                "same_per_question": [a == b for a, b in zip(plain, gold, strict=True)] == their_correct,
                "largest_difference_nats": max(
                    abs(a - b) for x, y in zip(own, their_scores, strict=True) for a, b in zip(x, y, strict=True)
                ),
            }
        )
        print(f"{key} by option texts: {found[-1]}", flush=True)
    return found


def table(scores: Sequence[dict[str, Any]], agreement: Sequence[dict[str, Any]]) -> str:
    """The result in Markdown."""
    lines = [
        "| set | scoring | accuracy % (95 % Wilson) | chance % | questions of test rows | no answer found |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(scores, key=lambda row: row["scoring"], reverse=True):
        lines.append(
            f"| {TASKS[row['task']].title} | {row['scoring']} | {100 * row['accuracy']:.1f} ({100 * row['low']:.1f}-"
            f"{100 * row['high']:.1f}) | {100 * row['chance']:.1f} | {row['questions']} of {row['test_rows']} "
            f"| {row['no_answer']} |"
        )
    lines += [
        "",
        "| option texts | own acc % | lm-eval acc % (its standard error) | own acc_norm % | lm-eval acc_norm % "
        "| same on every question | largest difference, nats | questions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in agreement:
        lines.append(
            f"| {TASKS[row['task']].title} | {100 * row['own_acc']:.1f} | {100 * row['lm_eval_acc']:.1f} "
            f"({100 * row['lm_eval_stderr']:.1f}) | {100 * row['own_acc_norm']:.1f} "
            f"| {100 * row['lm_eval_acc_norm']:.1f} | {'yes' if row['same_per_question'] else 'NO'} "
            f"| {row['largest_difference_nats']:.1e} | {row['questions']} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    loaded = load_model(ModelConfig(name=options.model))
    loaded.model.to(default_device())
    sets = read_data(options)
    with undisturbed(loaded.model, loaded.tokenizer), quiet():
        agreement = compare_with_lm_eval(loaded, sets, options)
    scores = score_sets(loaded, sets, options)
    facts = recording.facts(options) | {"seconds": time.perf_counter() - started}
    absent = [task for suite in ("commonsense", "arithmetic") for task in SUITES[suite].tasks if task not in sets]
    heading = (
        f"# What the untrained model scores\n\n{options.model}, float32, clean template, published extraction, greedy; "
        f"random questions of each test file, the same in every run; {recording.made_on()}, lm-eval "
        f"{version('lm-eval')}. Not there: "
        f'{", ".join(absent) or "nothing"}.\n`loglikelihood` compares the labels the rows name (such as "the correct '
        f'answer is answer2"); numbers have no options and are only generated. `option texts`: the rows in the form of '
        f"the original data sets, scored by lm-eval's own tasks and model, and by this project in the same words; "
        f"`acc_norm` divides by the text's characters in both. It is another question than `loglikelihood` asks: the "
        f"options are not listed, and their texts compete instead of their labels.\n\n"
    )
    values = facts | {"scores": scores, "option_texts": agreement}
    recording.write(options.output, values, heading + table(scores, agreement))


if __name__ == "__main__":
    main()
