"""Whether a model that learnt everything would be marked right: asked before anything is trained.

What training teaches ("the correct answer is incorrect") must be read back as the answer it states, by the rule that
reads generated texts and by the tokenizer that writes them, and must fit into the tokens that a model may write.
Of options that are compared by likelihood none may begin another::

    check_answers(config.data, config.evaluation, tokenizer)       # ConfigError that names what would be misread
    choose_extraction(source)                                      # ["evaluation.extraction=strict"], or nothing
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from grass_ray.config import ConfigError, CustomSource, DataConfig, EvaluationConfig, HubSource, SourceConfig
from grass_ray.tasks.custom import find_task, read_custom
from grass_ray.tasks.encoding import encode_pair
from grass_ray.tasks.extraction import ExtractionName, extract_answer, is_correct
from grass_ray.tasks.rows import Row
from grass_ray.tasks.sources import load_test_rows
from grass_ray.tasks.suites import TASKS, Task
from grass_ray.tasks.templates import render_answer, render_prompt, render_response

MOST_RESPONSES = 1000  # responses of a user's own rows that are looked at, spread over the file
MOST_MISREAD = 0.1  # share of them that may be misread: responses that people wrote are never all of one form
SHOWN = 60


class _Response(NamedTuple):
    """What a model is taught to say, and the answer that must be read out of it."""

    text: str
    answer: str


def check_answers(data: DataConfig, evaluation: EvaluationConfig, tokenizer: Any, *, online: bool = False) -> None:
    """Raise :class:`ConfigError` where a model that says what it was taught would be marked wrong.

    Args:
        data: tasks and source.
        evaluation: scoring and extraction.
        tokenizer: of the model.
        online: whether rows may be loaded from the hub; else its tasks are checked as far as their labels say.
    """
    mistakes: list[str] = []
    prompt = render_prompt(Row(instruction="?", input="", output="", answer=""), data.template)
    for key in data.tasks:
        task = find_task(key, data.source)
        if evaluation.scoring == "loglikelihood":
            mistakes += _check_options(task, prompt, tokenizer)
            continue
        check = _Check(task, evaluation.extraction, prompt, tokenizer)
        mistakes += check.find_mistakes(_rendered(task, data, online=online), most=0) or check.find_mistakes(
            _own_responses(task, data), most=MOST_MISREAD
        )
    if mistakes:
        raise ConfigError("; ".join(mistakes))


def choose_extraction(source: SourceConfig) -> list[str]:
    """The setting that a task of the user's own needs: strict extraction where published misreads what is taught."""
    if not isinstance(source, CustomSource):
        return []
    task = find_task(source.name, source)
    data = DataConfig(suite=source.name, tasks=(source.name,), source=source, broken_rows="skip")
    try:
        rendered, own = _rendered(task, data, online=False), _own_responses(task, data)
    except ConfigError:  # of the data, and said when they are checked
        return []

    def misreads(rule: ExtractionName) -> bool:
        wrong = [sum(not _reads(text, answer, task, rule) for text, answer in part) for part in (rendered, own)]
        return wrong[0] > 0 or wrong[1] > MOST_MISREAD * len(own)

    return ["evaluation.extraction=strict"] if misreads("published") and not misreads("strict") else []


def _rendered(task: Task, data: DataConfig, *, online: bool) -> list[_Response]:
    """The responses that give the task's labels, or the answers of its test set."""
    if task.labels:
        answers: Iterable[str] = task.labels
    elif isinstance(data.source, HubSource) and not online:
        answers = ()
    else:
        answers = dict.fromkeys(row.answer for row in load_test_rows(task.key, data).rows)
    return [_Response(render_answer(task, answer), answer) for answer in answers]


def _own_responses(task: Task, data: DataConfig) -> list[_Response]:
    """Responses of a user's own rows that are not made from their answers."""
    source = data.source
    if not isinstance(source, CustomSource):
        return []
    splits: list[Literal["train", "test"]] = ["test"] if source.train is None else ["train", "test"]
    rows = [row for split in splits for row in read_custom(source, split, data.broken_rows)[0]]
    own = {_Response(render_response(row), row.answer): None for row in rows if not _is_rendered(row, task)}
    return list(own)[:: len(own) // MOST_RESPONSES + 1]


def _is_rendered(row: Row, task: Task) -> bool:
    return row.output == render_answer(task, row.answer)


def _reads(text: str, answer: str, task: Task, rule: ExtractionName) -> bool:
    return is_correct(extract_answer(text, task, rule), answer, task)


class _Check:
    """What becomes of responses of one task when a model with this tokenizer writes them."""

    def __init__(self, task: Task, rule: ExtractionName, prompt: str, tokenizer: Any) -> None:
        self.task = task
        self.rule = rule
        self._prompt = prompt
        self._tokenizer = tokenizer

    def find_mistakes(self, responses: Sequence[_Response], *, most: float) -> list[str]:
        """What is wrong with more than a share of ``most`` of the responses: in one sentence, or none."""
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
        """What is read in place of the answer; None where all is well."""
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
    """Options that no likelihood can tell apart: what begins another option is never less likely than that."""
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
    return repr(text if len(text) <= SHOWN else f"{text[:20]}...{text[-SHOWN + 20 :]}")
