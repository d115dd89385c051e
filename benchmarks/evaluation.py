"""How fast evaluation is: examples/s against plain batch-by-order evaluation and against lm-eval's defaults.

    python benchmarks/evaluation.py --data-dir DIR       # DIR holds dataset/<Name>/test.json
    python benchmarks/evaluation.py --data-dir DIR --model tiny --rounds 1 --output /tmp/evaluation

Questions of several sets, of mixed lengths and in random order, go through four engines in every round, in a new order:
``plain`` takes sixteen at a time as they come and pads them, one row an option; ``lm-eval`` is its Hugging Face model
as it comes (one at a time); ``lm-eval 16`` the same with batches of sixteen, which it sorts by length; ``grass_ray`` is
what a run uses. All must give the same answers. Training batches are built plain, bucketed and packed, and a forward
and backward pass is taken over some of them. On a CPU the seconds are those of the process, which other processes on
the machine do not touch; on a GPU those of the clock. Needs neither ray nor mlflow.
"""

from __future__ import annotations

import functools
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import recording
import torch
import tyro
from lm_eval.models.huggingface import HFLM
from recording import Measure

from grass_ray.config import DataConfig, FolderSource, ModelConfig
from grass_ray.tasks.inference.harness import ObservedLM, quiet, undisturbed
from grass_ray.tasks.questions import ask, options_of, select_examples
from grass_ray.tasks.sources import load_test_rows, load_train_rows
from grass_ray.tasks.suites import TASKS
from grass_ray.tasks.templates import render_answer
from grass_ray.training.batches import Batches
from grass_ray.training.loss import accumulate_gradients
from grass_ray.training.metrics import default_device
from grass_ray.training.models import load_model

CHOICE_SETS = ("boolq", "piqa", "arc_easy", "arc_challenge", "openbookqa", "aqua")
TEXT_SETS = ("boolq", "piqa", "arc_challenge", "gsm8k", "addsub", "multiarith")
TRAIN_SETS = ("boolq", "arc_easy", "arc_challenge", "openbookqa")
PLAIN = 16
ENGINES = ("plain", "lm-eval", "lm-eval 16", "grass_ray")
BATCHING = ("plain", "bucketed", "packed")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    data_dir: Path
    model: str = "smollm2-135m"
    choices: Annotated[int, tyro.conf.arg(help="questions of every set by log-likelihood")] = 3
    texts: Annotated[int, tyro.conf.arg(help="questions of every set by generation")] = 10
    new_tokens: Annotated[int, tyro.conf.arg(help="most tokens of a generated answer")] = 16
    rounds: Annotated[int, tyro.conf.arg(help="interleaved rounds")] = 2
    steps: Annotated[int, tyro.conf.arg(help="training steps of a round; 0 trains nothing")] = 2
    threads: int = 1
    output: Annotated[Path, tyro.conf.arg(help="written with .json and .md")] = Path("benchmarks/results/evaluation")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question: its prompt, and what may follow (nothing where an answer is generated)."""

    prompt: str
    options: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()


def read_questions(options: Options, sets: Sequence[str], count: int, *, choosing: bool) -> list[Question]:
    """As many questions of every set, in random order."""
    questions = []
    for key in sets:
        task = TASKS[key]
        source = FolderSource(path=str(options.data_dir))
        rows = load_test_rows(key, DataConfig(suite=task.suite, tasks=(key,), source=source)).rows
        for prompt in select_examples(ask(task, rows, "clean"), count):
            texts = tuple(render_answer(task, option) for option in options_of(task, prompt.row)) if choosing else ()
            questions.append(Question(prompt=prompt.text, options=texts, stop=task.stop))
    random.Random(0).shuffle(questions)
    return questions


class PlainEngine:
    """The simplest loop that is right: rows as they come, sixteen at a time, padded, with an attention mask."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Log-likelihood of every continuation."""
        scores = []
        for start in range(0, len(pairs), PLAIN):
            batch = pairs[start : start + PLAIN]
            contexts = [self._tokenizer(context.rstrip())["input_ids"] for context, _ in batch]
            whole = self._tokenizer(["".join(pair) for pair in batch], padding=True, padding_side="right")
            ids = torch.tensor(whole["input_ids"], device=self._model.device)
            mask = torch.tensor(whole["attention_mask"], device=self._model.device)
            logp = self._model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
            each = logp[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
            scores += [
                float(row[len(context) - 1 : int(own.sum()) - 1].sum())
                for row, context, own in zip(each, contexts, mask, strict=True)
            ]
        return scores

    @torch.no_grad()
    def write(self, questions: Sequence[Question], new_tokens: int) -> list[str]:
        """Greedy answers, cut at the first stop text."""
        answers = []
        for start in range(0, len(questions), PLAIN):
            batch = questions[start : start + PLAIN]
            prompts = self._tokenizer(
                [question.prompt for question in batch], padding=True, padding_side="left", return_tensors="pt"
            ).to(self._model.device)
            tokens = self._model.generate(**prompts, max_new_tokens=new_tokens, do_sample=False)
            texts = self._tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
            for text, question in zip(texts, batch, strict=True):
                for stop in question.stop:
                    text = text.split(stop)[0]
                answers.append(text)
        return answers


class HarnessEngine:
    """Any of lm-eval's models, asked as its tasks ask it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Log-likelihood of every continuation."""
        requests = [SimpleNamespace(args=pair, task_name="benchmark") for pair in pairs]
        return [score for score, _ in self._make().loglikelihood(requests, disable_tqdm=True)]

    def write(self, questions: Sequence[Question], new_tokens: int) -> list[str]:
        """Greedy answers, cut at the first stop text."""
        requests = [
            SimpleNamespace(
                args=(q.prompt, {"do_sample": False, "max_gen_toks": new_tokens, "until": list(q.stop)}),
                task_name="benchmark",
            )
            for q in questions
        ]
        answers: list[str] = self._make().generate_until(requests, disable_tqdm=True)
        return answers


def make_engines(model: Any, tokenizer: Any, cache: Path) -> dict[str, Any]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def own() -> ObservedLM:
        return ObservedLM(model, tokenizer, batch_size="auto", cache=cache, on_batch=lambda _: None)

    engines = {
        "plain": PlainEngine(model, tokenizer),
        "lm-eval": HarnessEngine(lambda: HFLM(pretrained=model, tokenizer=tokenizer)),
        "lm-eval 16": HarnessEngine(lambda: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=PLAIN)),
        "grass_ray": HarnessEngine(own),
    }
    assert tuple(engines) == ENGINES
    return engines


def timed(device: torch.device, block: Callable[[], Any]) -> tuple[Any, float]:
    """What ``block`` returns, and its seconds."""
    if device.type == "cpu":
        started = time.process_time()
        return block(), time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = block()
    torch.cuda.synchronize()
    return result, time.perf_counter() - started


def compare_engines(engines: dict[str, Any], options: Options, device: torch.device) -> dict[str, Any]:
    """Examples/s of every engine in both ways, and whether all gave the same answers."""
    choices = read_questions(options, CHOICE_SETS, options.choices, choosing=True)
    texts = read_questions(options, TEXT_SETS, options.texts, choosing=False)
    ways: dict[str, tuple[list[Question], Callable[[Any, list[Question]], Any]]] = {
        "loglikelihood": (choices, lambda engine, asked: score_options(engine, asked)),
        "generation": (texts, lambda engine, asked: engine.write(asked, options.new_tokens)),
    }
    found: dict[str, Any] = {}
    shuffler = random.Random(1)
    for way, (questions, answer) in ways.items():
        rates: dict[str, list[float]] = {name: [] for name in engines}
        answers: dict[str, Any] = {}
        for number in range(options.rounds):
            for name in shuffler.sample(list(engines), len(engines)):
                block = functools.partial(answer, engines[name], questions)
                answers[name], seconds = timed(device, block)
                rates[name].append(len(questions) / seconds)
                print(
                    f"{way}, round {number + 1}/{options.rounds}: {name} {rates[name][-1]:.3f} examples/s", flush=True
                )
        found[way] = {"questions": len(questions), "examples_per_second": rates} | _agreement(way, answers)
    return found


def score_options(engine: Any, questions: Sequence[Question]) -> list[list[float]]:
    """The log-likelihoods of every question's options."""
    scores = iter(engine.score([(question.prompt, option) for question in questions for option in question.options]))
    return [[next(scores) for _ in question.options] for question in questions]


def _agreement(way: str, answers: dict[str, list[Any]]) -> dict[str, Any]:
    """Whether every engine answered as ``plain`` did."""
    plain = answers["plain"]
    if way == "generation":
        return {"identical": all(own == plain for own in answers.values())}
    pairs = [pair for own in answers.values() for pair in zip(own, plain, strict=True)]
    return {
        "identical": all(a.index(max(a)) == b.index(max(b)) for a, b in pairs),
        "largest_difference_nats": max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)),
    }


def compare_batches(model: Any, tokenizer: Any, options: Options, device: torch.device) -> dict[str, Any]:
    """Padding, batches built a second, and tokens trained a second, for the three kinds of training batches."""
    source = FolderSource(path=str(options.data_dir))
    data = DataConfig(suite="commonsense", tasks=TRAIN_SETS, source=source, max_train_rows=2000)
    rows = load_train_rows(data).rows
    kinds = {
        kind: Batches(
            rows,
            tokenizer,
            data.model_copy(update={"batching": kind}),
            batch_size=8,
            accumulation_steps=1,
            seed=0,
        )
        for kind in BATCHING
    }
    found: dict[str, Any] = {kind: {"trained": []} for kind in BATCHING}
    for kind, batches in kinds.items():
        taken, seconds = timed(torch.device("cpu"), lambda batches=batches: [batches[n] for n in range(200)])  # type: ignore[misc]
        held = [batch for micro_batches in taken for batch in micro_batches]
        share = 1 - sum(batch.tokens for batch in held) / sum(batch.input_ids.numel() for batch in held)
        found[kind] |= {"padding_share": share, "batches_per_second": len(taken) / seconds}
    model.train()
    shuffler = random.Random(2)
    for number in range(options.rounds if options.steps else 0):
        for kind in shuffler.sample(BATCHING, len(BATCHING)):
            steps = [kinds[kind][number * options.steps + step] for step in range(options.steps)]

            def train(steps: list[Any] = steps) -> None:
                for micro_batches in steps:
                    accumulate_gradients(model, micro_batches, device)
                    model.zero_grad()

            _, seconds = timed(device, train)
            tokens = sum(batch.tokens for micro_batches in steps for batch in micro_batches)
            found[kind]["trained"].append((tokens, seconds))
            print(f"training, round {number + 1}/{options.rounds}: {kind} {tokens / seconds:.0f} tokens/s", flush=True)
    return found


def table(found: dict[str, Any], batches: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        "| scoring | engine | examples/s: median (min-max) | times plain | times lm-eval |",
        "|---|---|---|---|---|",
    ]
    for way in ("loglikelihood", "generation"):
        rates = found[way]["examples_per_second"]
        for name, own in rates.items():
            ratios = [
                statistics.median(mine / other for mine, other in zip(own, rates[base], strict=True))
                for base in ("plain", "lm-eval")
            ]
            lines.append(
                f"| {way} | {name} | {statistics.median(own):.3f} ({min(own):.3f}-{max(own):.3f}) | {ratios[0]:.2f} "
                f"| {ratios[1]:.2f} |"
            )
    apart = found["loglikelihood"]["largest_difference_nats"]
    same = {way: "the same" if found[way]["identical"] else "NOT THE SAME" for way in found}
    lines += [
        "",
        f"Chosen options of all four: {same['loglikelihood']} (log-likelihoods at most {apart:.1e} nats apart). "
        f"Generated texts of all four: {same['generation']}.",
        "",
        "| training batches | padding % | batches built/s | tokens trained/s, median | times plain |",
        "|---|---|---|---|---|",
    ]
    speeds = {kind: [tokens / seconds for tokens, seconds in batches[kind]["trained"]] for kind in BATCHING}
    for kind in BATCHING:
        ratio = [mine / other for mine, other in zip(speeds[kind], speeds["plain"], strict=True)]
        trained = f"{statistics.median(speeds[kind]):.0f} | {statistics.median(ratio):.2f}" if ratio else "- | -"
        lines.append(
            f"| {kind} | {100 * batches[kind]['padding_share']:.1f} | {batches[kind]['batches_per_second']:.0f} "
            f"| {trained} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    device = default_device()
    loaded = load_model(ModelConfig(name=options.model))
    model = loaded.model.to(device)
    with tempfile.TemporaryDirectory() as cache, undisturbed(model, loaded.tokenizer), quiet():
        found = compare_engines(make_engines(model, loaded.tokenizer, Path(cache)), options, device)
    batches = compare_batches(model, loaded.tokenizer, options, device)
    clock = "seconds of the process" if device.type == "cpu" else "seconds of the clock"
    heading = (
        f"# How fast evaluation is\n\n{options.model}, float32, {options.choices} questions of each of "
        f"{len(CHOICE_SETS)} sets by option log-likelihood ({', '.join(CHOICE_SETS)}) and {options.texts} of each of "
        f"{len(TEXT_SETS)} sets by generation of up to {options.new_tokens} tokens ({', '.join(TEXT_SETS)}), in random "
        f"order; {options.rounds} interleaved rounds, {clock}, {torch.get_num_threads()} threads on "
        f"{recording.made_on()}.\n"
        f"`plain`: {PLAIN} at a time as they come, one row an option; `lm-eval`: its defaults, one at a time; "
        f"`lm-eval 16`: batches of {PLAIN}, sorted by length; `grass_ray`: batch size `auto`. Training batches: 8 rows "
        f"of {', '.join(TRAIN_SETS)}; tokens trained: forward and backward of all weights, padding not counted.\n\n"
    )
    values = recording.facts(options) | {"engines": found, "batches": batches}
    own = {way: found[way]["examples_per_second"]["grass_ray"] for way in found}
    measures = [Measure(f"{way} of a question", "s", [1 / rate for rate in rates]) for way, rates in own.items()]
    recording.write(options.output, values, heading + table(found, batches), measures=measures)


if __name__ == "__main__":
    main()
