"""Check, before training, that a model which learned every response would be scored as correct.

The extraction rule must extract from each response to learn ("the correct answer is incorrect") the answer that it
states, after the tokenizer has encoded and decoded it, and the response must fit into ``max_new_tokens``. If options
are compared by likelihood, none may be a prefix of another::

    check_answers(config.data, config.evaluation, tokenizer)       # ConfigError with the responses that are misread
    choose_evaluation(source)                                      # ["evaluation.extraction=strict"], or nothing
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from grass_ray.config import ConfigError, CustomSource, DataConfig, DatasetSource, EvaluationConfig, SourceConfig
from grass_ray.tasks.custom import find_task
from grass_ray.tasks.encoding import encode_pair
from grass_ray.tasks.extraction import ExtractionName, extract_answer, is_correct
from grass_ray.tasks.rows import Row
from grass_ray.tasks.sources import load_test_rows, open_source
from grass_ray.tasks.suites import TASKS, Task
from grass_ray.tasks.templates import render_answer, render_prompt, render_response

# number of responses written by the user that are checked, spread over the file
MAX_RESPONSES = 1000
# share of them that may be misread, since people do not write all responses in the same form
MAX_MISREAD = 0.1
MAX_SHOWN_CHARACTERS = 60


class _Response(NamedTuple):
    """A response to learn, and the answer that must be extracted from it."""

    text: str
    answer: str


def check_answers(data: DataConfig, evaluation: EvaluationConfig, tokenizer: Any, *, online: bool = False) -> None:
    """Check that a model which learned every response would be scored as correct.

    Args:
        data: tasks and source.
        evaluation: scoring and extraction.
        tokenizer: tokenizer of the model.
        online: whether rows may be downloaded. Otherwise tasks of the hub are only checked if they have labels.

    Raises:
        ConfigError: a response would be scored as wrong.
    """
    if evaluation.scoring == "lm_eval":
        return
    mistakes: list[str] = []
    prompt = render_prompt(Row(instruction="?", input="", output="", answer=""), data.template)
    for key in data.tasks:
        task = find_task(key, data.source)
        if task.answer == "text":
            continue
        if evaluation.scoring == "loglikelihood":
            mistakes += _check_options(task, prompt, tokenizer)
            continue
        check = _Check(task, evaluation.extraction, prompt, tokenizer)
        mistakes += check.find_mistakes(_rendered(task, data, online=online), most=0) or check.find_mistakes(
            _written_responses(data), most=MAX_MISREAD
        )
    if mistakes:
        raise ConfigError("; ".join(mistakes))


def choose_evaluation(source: SourceConfig) -> list[str]:
    """Return the setting that a source needs, if any.

    A custom task needs strict extraction if the published rule misreads its responses, and a data set without right
    answers is scored by its loss.
    """
    if isinstance(source, DatasetSource):
        return ["evaluation.scoring=loss"]
    if not isinstance(source, CustomSource):
        return []
    task = find_task(source.name, source)
    data = DataConfig(suite=task.key, tasks=(task.key,), source=source, broken_rows="skip")
    try:
        rendered, written = _rendered(task, data, online=False), _written_responses(data)
    except ConfigError:  # a mistake in the data, which is reported when they are checked
        return []

    def misreads(rule: ExtractionName) -> bool:
        wrong = [sum(not _reads(text, answer, task, rule) for text, answer in part) for part in (rendered, written)]
        return wrong[0] > 0 or wrong[1] > MAX_MISREAD * len(written)

    return ["evaluation.extraction=strict"] if misreads("published") and not misreads("strict") else []


def _rendered(task: Task, data: DataConfig, *, online: bool) -> list[_Response]:
    """Responses made from the task's labels, or from the answers of its test set."""
    if task.labels:
        answers: Iterable[str] = task.labels
    elif data.source.downloads and not online:
        answers = ()
    else:
        answers = dict.fromkeys(row.answer for row in load_test_rows(task.key, data).questions)
    return [_Response(render_answer(task, answer), answer) for answer in answers]


def _written_responses(data: DataConfig) -> list[_Response]:
    """A sample of the responses that the user has written."""
    rows = open_source(data).written_rows()
    written = list(dict.fromkeys(_Response(render_response(row), row.answer) for row in rows))
    return written[:: len(written) // MAX_RESPONSES + 1]


def _reads(text: str, answer: str, task: Task, rule: ExtractionName) -> bool:
    return is_correct(extract_answer(text, task, rule), answer, task)


class _Check:
    """Checks responses of one task, as a model with this tokenizer would generate them."""

    def __init__(self, task: Task, rule: ExtractionName, prompt: str, tokenizer: Any) -> None:
        self.task = task
        self.rule = rule
        self._prompt = prompt
        self._tokenizer = tokenizer

    def find_mistakes(self, responses: Sequence[_Response], *, most: float) -> list[str]:
        """Return one sentence about what is wrong with more than a share of ``most`` of the responses, or none."""
        limit = self.task.max_new_tokens
        tokens = {response: encode_pair(self._tokenizer, self._prompt, response.text)[1] for response in responses}
        long = [response for response, ids in tokens.items() if len(ids) > limit]
        if len(long) > most * len(responses):
            longest = max(long, key=lambda response: len(tokens[response]))
            own = self.task.key not in TASKS
            advice = (
                f"set max_new_tokens: {len(tokens[longest])} or more in the task file"
                if own
                else "take a model with another tokenizer, or evaluation.scoring=loglikelihood where it applies"
            )
            return [
                f"{self.task.key}: max_new_tokens is {limit}, and the whole answer {_shorten(longest.text)} needs "
                f"{len(tokens[longest])} tokens with this model's tokenizer{self._count(long, responses)}; {advice}"
            ]
        misread = {response: said for response in responses if (said := self._misread(tokens[response], response))}
        if len(misread) <= most * len(responses):
            return []
        first = next(iter(misread.values()))
        count = self._count(list(misread), responses)
        return [f"{self.task.key}: {first}{count}; {self._advice(list(misread))}"]

    def _misread(self, ids: list[int], response: _Response) -> str | None:
        """Say what is extracted in place of the answer; None if the answer is extracted."""
        end = self._tokenizer.eos_token_id
        written = self._tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)
        for stop in self.task.stop:
            written = written.split(stop)[0]
        if _reads(written, response.answer, self.task, self.rule):
            return None
        read = extract_answer(written, self.task, self.rule)
        through = "" if written.strip() == response.text else f" (which this model's tokenizer writes as {written!r})"
        what = "no answer" if read is None else repr(read)
        return (
            f"{self.rule} extraction reads {what} out of {_shorten(response.text)}{through}, the response taught for "
            f"the answer {response.answer!r}, and would count it as wrong"
        )

    def _advice(self, misread: Sequence[_Response]) -> str:
        other: ExtractionName = "strict" if self.rule == "published" else "published"
        if all(_reads(response.text, response.answer, self.task, other) for response in misread):
            return f"set evaluation.extraction={other}, which reads it"
        scoring = "" if self.task.answer == "number" else ", or set evaluation.scoring=loglikelihood"
        return f"{other} extraction does not read it either: write the answers in another way{scoring}"

    def _count(self, some: Sequence[_Response], responses: Sequence[_Response]) -> str:
        return f" ({len(some)} of {len(responses)} responses are like that)" if len(some) > 1 else ""


def _check_options(task: Task, prompt: str, tokenizer: Any) -> list[str]:
    """Find options that likelihood cannot tell apart: a prefix of another option is never less likely than it."""
    options = sorted((encode_pair(tokenizer, prompt, render_answer(task, label))[1], label) for label in task.labels)
    for (ids, label), (longer, other) in itertools.pairwise(options):
        if longer[: len(ids)] == ids:
            how = "with the same tokens as" if longer == ids else "with the first tokens of"
            return [
                f"{task.key}: this model's tokenizer writes the label {label!r} {how} {other!r}, so that likelihood "
                f"cannot tell them apart; use evaluation.scoring=generation, or other labels"
            ]
    return []


def _shorten(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:20]}...{text[20 - MAX_SHOWN_CHARACTERS :]}")
