"""Whether run records agree with themselves: every number that follows from others in the record is computed again.

What was only measured (memory, seconds of a step, a loss) has nothing to be computed from; :func:`measured` names it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from grass_ray.config import fingerprint_of, read_text, slug
from grass_ray.results.record import RunRecord, TaskScore
from grass_ray.results.verification.check import Check
from grass_ray.tasks.extraction import extract_answer, is_correct
from grass_ray.tasks.lm_eval_scores import lm_eval_metrics
from grass_ray.tasks.scores import Workload, contaminated_tasks, describe_work, score_metrics
from grass_ray.tasks.suites import TASKS
from grass_ray.training.report import FORGETTING, GIB, MOST_UNITS_AS_SERIES, TOKENS, TRAIN_STEP, WARM_UP_STEPS, entropy

_FINGERPRINT = re.compile(r"-([0-9a-f]{12})$")
_SHA256, _COMMIT, _QUESTION = r"[0-9a-f]{64}", r"[0-9a-f]{7,64}", r"[0-9a-f]{16}"
# what a score's protocol repeats of the configuration, and where it stands there
_REPEATED = {"limit": "evaluation", "scoring": "evaluation", "num_beams": "evaluation", "template": "data"}
_QUESTIONS = ("test_sha256", "test_rows", "template", "limit", "limit_seed")  # decide which questions are asked
_PER_EXAMPLE = (
    "id",
    "correct",
    "answer_nats",
    "answer_tokens",
    "answer_bytes",
    "option_nats",
)  # of a line of examples.jsonl
_LOSS, _STEP_S = "train/loss", "time/step_s"
_OPTIONAL = ("eval/average_clean", "eval/average_normalised")  # earlier versions did not record them
_ROUNDING = 1e-4  # of log-likelihoods, in nats


@dataclass(frozen=True, kw_only=True)
class Found:
    """A record, the file that it was read from, and the file's name in messages."""

    name: str
    path: Path
    record: RunRecord


def check_records(found: Sequence[Found]) -> list[Check]:
    """Check every record against itself, and all against each other."""
    checks = []
    for what, look in _CHECKS.items():
        check = Check(what=what)
        for one in found:
            try:
                look(check, one)
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # a file that was damaged
                check.disagreements.append(f"{one.name}: cannot be read: {type(error).__name__}: {error}")
        checks.append(check)
    return [check for check in [*checks, _together(found)] if check.numbers or check.disagreements]


def measured(records: Sequence[RunRecord]) -> list[str]:
    """The names of metrics that no record has anything to compute them from."""
    names = {name for record in records for name in record.metrics}
    known = {name for record in records for name, _ in _metrics(record)}
    return sorted(name for name in names - known if not name.startswith("layers/"))


# ------------------------------------------------------------------------------------------------------------- answers


def _answers(check: Check, found: Found) -> None:
    record = found.record
    evaluated = record.status == "finished" and record.config["evaluation"].get("test", True)
    evaluated = evaluated and record.config["evaluation"].get("scoring") != "lm_eval"
    if evaluated or record.tasks:
        check.same(f"{found.name}, tasks", list(record.tasks), record.config["data"]["tasks"] if evaluated else [])
    for task, score in record.tasks.items():
        judged = score.correct and score.scoring != "loss"
        right = sum(score.correct) / len(score.correct) if judged else math.nan
        check.same(f"{found.name}, accuracy of {task}", score.accuracy, right)
        _losses(check, f"{found.name}, {task}", score)
        protocol = score.protocol
        if "test_rows" in protocol:
            rows, limit = protocol["test_rows"], protocol.get("limit")
            asked = rows if limit is None else min(limit, rows)
            check.same(f"{found.name}, number of questions of {task}", score.num_examples, asked)
        for key, part in _REPEATED.items():
            if key in protocol and key in record.config[part]:
                check.same(f"{found.name}, {key} of {task}", protocol[key], record.config[part][key])
        if (guessed := protocol.get("chance")) is not None:
            check.holds(f"{found.name}, chance of {task}", guessed, "at least 0 and at most 1", 0 <= guessed <= 1)
    for task, own in record.lm_eval.items():
        check.same(f"{found.name}, {own.metric} of {task}", own.value, own.metrics.get(own.metric))
        if own.values and not own.subtasks:  # groups may weigh their tasks alike
            check.same(f"{found.name}, mean of {task} over its examples", own.value, fmean(own.values))


def _examples_of(path: Path) -> Path | None:
    """The file of a record's examples: beside a run's own record, else ``examples/NAME.jsonl`` beside the records."""
    own = path.name.startswith("record.json")
    place = path.with_name("examples") if own else path.parents[1] / "examples" / path.name.split(".json")[0]
    return next((file for end in (".jsonl", ".jsonl.gz") if (file := Path(f"{place}{end}")).is_file()), None)


def _losses(check: Check, at: str, score: TaskScore) -> None:
    """A negative log-likelihood is at least 0, and an option with more than half of the likelihood was chosen."""
    for name, values in (("answer_nats", score.answer_nats), ("option_nats", score.option_nats)):
        if values is not None:
            least = min(values, default=0.0)
            check.holds(f"{at}, {name}", least, "at least 0", least > -_ROUNDING)
    if score.scoring == "loglikelihood" and score.option_nats is not None:
        likely = [nats < math.log(2) - _ROUNDING for nats in score.option_nats]
        odd = [id for id, sure, right in zip(score.example_ids, likely, score.correct, strict=True) if sure > right]
        check.holds(f"{at}, wrong although likeliest", odd, "no question", not odd)


def _examples(check: Check, found: Found) -> None:
    """What a run's folder keeps of every example: the text, what was extracted from it, and whether it is right."""
    if (path := _examples_of(found.path)) is None:
        return
    record = found.record
    flags: dict[str, list[tuple[Any, ...]]] = {}
    for line in read_text(path).splitlines():
        row = json.loads(line)
        flags.setdefault(row["task"], []).append(tuple(row.get(name) for name in _PER_EXAMPLE))
        score, task = record.tasks.get(row["task"]), TASKS.get(row["task"])
        if score is not None and task is not None:
            where = f"{found.name}, {row['task']} {row['id']}"
            extracted = row["extracted"]
            if score.scoring == "generation":
                rule: Any = score.extraction
                extracted = extract_answer(row["output"], task, rule)
                check.same(f"{where}, answer in the text", row["extracted"], extracted)
                right = is_correct(extracted, row["target"], task)
            else:
                right = extracted == row["target"]
            check.same(f"{where}, right or wrong", row["correct"], right)
    for name, score in record.tasks.items():
        absent: list[Any] = [None] * score.num_examples
        columns = [score.example_ids, score.correct]
        columns += [getattr(score, column) or absent for column in _PER_EXAMPLE[2:]]
        for given, kept in zip_longest(zip(*columns, strict=True), flags.get(name, ())):
            check.same(f"{found.name}, {name}, example as in examples.jsonl", given, kept)


# ------------------------------------------------------------------------------------------------------------- metrics


def _metrics(record: RunRecord) -> Iterator[tuple[str, float]]:
    """Every metric that follows from others of the record, with its value."""
    train = record.data.get("train")
    steps = record.config["training"]["steps"]
    bad = contaminated_tasks(record.config["data"]["suite"], train or {}, training_steps=steps)
    yield from score_metrics(record.tasks, contaminated=bad).items()
    yield from lm_eval_metrics(record.lm_eval).items()
    works = [score.workload for score in record.tasks.values()]
    if all(works):
        known: list[dict[str, Any]] = [dict(work) for work in works]
        examples = sum(score.num_examples for score in record.tasks.values())
        timed = all("seconds" in work for work in works)
        for name, value in describe_work([Workload(**work) for work in known], examples).items():
            if timed or name not in ("evaluation/seconds", "evaluation/examples_per_second"):
                yield name, value
    before, after = (record.metrics.get(f"{FORGETTING}/loss_{when}") for when in ("before", "after"))
    if before is not None and after is not None:
        yield FORGETTING, after - before
    for name, points in record.series.items():
        if name.startswith(("train/", "memory/peak_allocated")) and points:
            yield name, points[-1][1]
    if shares := record.series.get("data/padding_share"):
        yield "data/padding_share", fmean(share for _, share in shares)
    seconds = dict(record.series.get(_STEP_S, ()))
    if seconds:
        yield "time/train_s", sum(seconds.values())
        yield "throughput/tokens_per_second", _speed(record, seconds)
    if (layers := record.layers) is not None:
        if len(layers.visits) <= MOST_UNITS_AS_SERIES:
            yield from ((f"layers/visits_{unit:02d}", visits) for unit, visits in enumerate(layers.visits))
        if record.status == "finished":  # a step that failed may have moved states
            yield "memory/host_pinned_gib", layers.host_state_bytes / GIB
            yield "memory/resident_state_gib", layers.resident_state_bytes / GIB


def _speed(record: RunRecord, seconds: Mapping[int, float]) -> float:
    tokens, done = record.step_tokens(), record.train_steps(seconds)
    timed = [step for step in seconds if done[step] > WARM_UP_STEPS and step in tokens]
    # a record of schema 1 has speeds in place of the whole numbers
    return sum(round(tokens[step]) for step in timed) / sum(seconds[step] for step in timed) if timed else math.nan


def _averages(check: Check, found: Found) -> None:
    recomputed = dict(_metrics(found.record))
    for name, value in found.record.metrics.items():
        if name in recomputed or name.startswith(("eval/", "lm_eval/")):
            check.same(f"{found.name}, {name}", value, recomputed.get(name))
    for name, value in recomputed.items():
        if name.startswith("eval/") and name not in found.record.metrics and name not in _OPTIONAL:
            check.same(f"{found.name}, {name}", None, value)


# --------------------------------------------------------------------------------------------------------------- steps


def _steps(check: Check, found: Found) -> None:
    record, config = found.record, found.record.config
    for name, points in record.series.items():
        steps = [step for step, _ in points]
        increasing = all(a < b for a, b in zip([0, *steps], steps, strict=False))
        check.holds(f"{found.name}, steps of {name}", steps, "increasing from 1 on", increasing)
    losses = record.series.get(_LOSS, [])
    finite = all(math.isfinite(loss) for _, loss in losses)
    check.holds(f"{found.name}, {_LOSS}", [loss for _, loss in losses], "finite", finite)
    trained = config["training"]["steps"]
    if record.status == "finished":
        probed = int(config["method"]["sampler"].get("probing_steps") or 0) if trained else 0
        check.same(f"{found.name}, number of steps", len(losses), trained + probed)
    if record.series.get(TRAIN_STEP):
        done = record.series[TRAIN_STEP][-1][1]
        check.holds(f"{found.name}, {TRAIN_STEP}", done, f"at most {trained}", done <= trained)
    if record.search is None or not record.search.lineage:  # members of a population change their learning rates
        peak, rates = config["method"]["optimizer"]["lr"], [rate for _, rate in record.series.get("train/lr", ())]
        highest = max(rates, default=0.0)
        check.holds(f"{found.name}, train/lr", highest, f"at most {peak}", highest <= peak * (1 + 1e-9))
    seconds, tokens = dict(record.series.get(_STEP_S, ())), dict(record.series.get(TOKENS, ()))
    for step, speed in record.series.get("throughput/tokens_per_second", ()):
        if step in tokens and seconds.get(step):
            check.same(f"{found.name}, tokens per second of step {step}", speed, tokens[step] / seconds[step])


def _layers(check: Check, found: Found) -> None:
    layers = found.record.layers
    if layers is None:
        return
    drawn = Counter(unit for _, active in layers.intervals for unit in active)
    check.same(f"{found.name}, visits", layers.visits, [drawn[unit] for unit in range(len(layers.visits))])
    share = layers.trainable_parameters / layers.total_parameters
    check.same(f"{found.name}, trainable share", layers.trainable_share, share)
    changed = layers.only_active_layers_changed
    check.holds(f"{found.name}, only the active layers changed", changed, "true", changed)
    series = {name: dict(points) for name, points in found.record.series.items() if name.startswith("layers/")}
    for step, importance, probabilities in layers.refreshes:
        total = sum(probabilities)
        check.holds(f"{found.name}, probabilities at step {step}", total, "1 in sum", abs(total - 1) < 1e-6)
        h = entropy(probabilities)
        values = {"entropy": h, "effective": math.exp(h)}
        values |= {f"p_{unit:02d}": p for unit, p in enumerate(probabilities)}
        values |= {f"mgn_{unit:02d}": norm for unit, norm in enumerate(importance)}
        for name, value in values.items():
            if (points := series.get(f"layers/{name}")) is not None:
                check.same(f"{found.name}, layers/{name} of step {step}", points.get(step), value)


# ------------------------------------------------------------------------------------------------- names, hashes, times


def _configuration(check: Check, found: Found) -> None:
    record, config, path = found.record, found.record.config, found.path
    name = f"{config['method']['name']}-{slug(config['model']['name'])}-{slug(config['data']['suite'])}"
    check.same(f"{found.name}, name", record.name, f"{name}-s{config['seed']}")
    in_own_folder = path.name.startswith("record.json")
    file = path.parent.name if in_own_folder else path.name.split(".json")[0]
    own = fingerprint_of(config)
    member = record.search is not None and bool(record.search.lineage)  # has the settings of its last generation
    for text in () if member or record.run_id.startswith("reproduce-") else (record.run_id, file):
        if (known := _FINGERPRINT.search(text)) is not None:
            check.same(f"{found.name}, fingerprint of the configuration in {text}", known[1], own)
    if not in_own_folder:
        names = [record.run_id, record.name, f"{record.name}-{own}"]
        check.holds(f"{found.name}, name of the file", file, " or ".join(names), file in names)
    elif (written := path.with_name("config.yaml")).is_file():
        saved = yaml.safe_load(written.read_text(encoding="utf-8"))
        check.same(f"{found.name}, configuration in config.yaml", fingerprint_of(saved), own)
    began, ended = map(datetime.fromisoformat, (record.started_at, record.finished_at))
    check.holds(f"{found.name}, finished", record.finished_at, f"after {record.started_at}", began <= ended)
    told = record.failure is None if record.status == "finished" else bool(record.failure) or record.status == "stopped"
    check.holds(f"{found.name}, failure", record.failure, f"one of a run that is {record.status}", told)


def _hashes(check: Check, found: Found) -> None:
    record = found.record
    train = record.data.get("train") or {}
    for what, text, form in (
        ("commit", record.git_commit, _COMMIT),
        ("model_sha256", record.model_sha256, _SHA256),
        ("weights_sha256", record.weights_sha256, _SHA256),
        ("hash of the training rows", train.get("rows_sha256"), _SHA256),
        *((f"hash of {file.get('name')}", file.get("sha256"), _SHA256) for file in train.get("files", ())),
        *((f"hash of the test rows of {t}", s.protocol.get("test_sha256"), _SHA256) for t, s in record.tasks.items()),
    ):
        if text is not None:
            check.holds(f"{found.name}, {what}", text, "a hash in hexadecimal", bool(re.fullmatch(form, text)))
    for task, score in record.tasks.items():
        odd = [text for text in score.example_ids if not re.fullmatch(_QUESTION, text)]
        check.holds(f"{found.name}, ids of {task}", odd[:3], "16 hexadecimal digits each", not odd)
    for task, own in record.lm_eval.items():
        odd = [text for text in own.example_ids if not re.fullmatch(_QUESTION, text)]
        check.holds(f"{found.name}, ids of {task} of lm-eval", odd[:3], "16 hexadecimal digits each", not odd)


_CHECKS: Mapping[str, Callable[[Check, Found], None]] = {
    "answers": _answers,
    "examples": _examples,
    "averages": _averages,
    "steps": _steps,
    "layers": _layers,
    "configurations": _configuration,
    "hashes": _hashes,
}


def _together(found: Sequence[Found]) -> Check:
    """What only several records can say: run ids are unique, and who was asked the same test got the same questions."""
    check = Check(what="questions")
    runs: dict[str, str] = {}
    asked: dict[str, tuple[str, list[str]]] = {}
    for one in found:
        first_with_id = runs.setdefault(one.record.run_id, one.name)
        check.holds(
            f"{one.name}, run id", one.record.run_id, f"its own, {first_with_id} has it", first_with_id == one.name
        )
        for task, score in one.record.tasks.items():
            if "test_sha256" not in score.protocol:
                continue
            key = json.dumps([task, [score.protocol.get(name) for name in _QUESTIONS]])
            first, ids = asked.setdefault(key, (one.name, score.example_ids))
            check.holds(f"{one.name}, questions of {task}", "others", f"those of {first}", score.example_ids == ids)
    return check
