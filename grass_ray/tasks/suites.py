"""The tasks and their suites, as data: one row per task.

The two large suites follow the LLM-Adapters protocol (arXiv 2304.01933): train on one mixture, evaluate on every task::

    suite, tasks = resolve_tasks(["gsm8k", "svamp"])      # ("arithmetic", ("gsm8k", "svamp"))
    TASKS["boolq"].labels                                  # ("true", "false")
    SUITES["arithmetic"].clean_tasks                       # tasks whose test questions are not in the training mixture

Importing this module loads neither torch nor datasets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from grass_ray.config import ConfigError
from grass_ray.methods import unknown

STOP = ("### Instruction:", "### Response:")  # another question, or another answer to this one
ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark.

    Attributes:
        key: name on the command line, in records and in MLflow.
        title: name in tables.
        suite: key of its suite.
        folder: name in the published layout (``dataset/<folder>/test.json``).
        answer: kind of answer; ``text`` if there is no right answer, so that only the loss is measured.
        max_new_tokens: maximum number of tokens to generate.
        test_rows: size of the published test set, if there is one.
        labels: possible answers; empty for numbers.
        stop: texts that end a generated answer.
        hub_id: dataset on the Hugging Face Hub; None if the hub source does not have the task.
        hub_config: configuration of that dataset.
        hub_test_split: its split to test on.
        contaminated: whether its test questions are part of the suite's training mixture.
    """

    key: str
    title: str
    suite: str
    folder: str
    answer: Literal["number", "letter", "labels", "text"]
    max_new_tokens: int
    test_rows: int | None
    labels: tuple[str, ...] = ()
    stop: tuple[str, ...] = STOP
    hub_id: str | None = None
    hub_config: str | None = None
    hub_test_split: str = "test"
    contaminated: bool = False

    @classmethod
    def custom(
        cls,
        name: str,
        answer: Literal["number", "letter", "labels", "text"],
        labels: Sequence[str],
        max_new_tokens: int,
    ) -> Task:
        """Make a custom task, which is its own suite."""
        return cls(
            key=name,
            title=name,
            suite=name,
            folder=name,
            answer=answer,
            labels=tuple(labels),
            max_new_tokens=max_new_tokens,
            test_rows=None,
        )


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that share a training mixture, whose published file names are ``mixtures``, in order of preference."""

    key: str
    title: str
    tasks: tuple[str, ...]
    mixtures: tuple[str, ...] = ()

    @property
    def clean_tasks(self) -> tuple[str, ...]:
        """The tasks whose test questions are not in the training mixture."""
        return tuple(key for key in self.tasks if not TASKS[key].contaminated)


def _choice(
    key: str,
    title: str,
    folder: str,
    labels: tuple[str, ...],
    test_rows: int,
    hub_id: str,
    hub_config: str | None = None,
    hub_test_split: str = "validation",
) -> Task:
    return Task(
        key=key,
        title=title,
        suite="commonsense",
        folder=folder,
        answer="labels",
        labels=labels,
        max_new_tokens=32,
        test_rows=test_rows,
        hub_id=hub_id,
        hub_config=hub_config,
        hub_test_split=hub_test_split,
    )


def _number(key: str, folder: str, test_rows: int, *, contaminated: bool = False, hub_id: str | None = None) -> Task:
    return Task(
        key=key,
        title=folder if folder != "gsm8k" else "GSM8K",
        suite="arithmetic",
        folder=folder,
        answer="number",
        max_new_tokens=256,
        test_rows=test_rows,
        contaminated=contaminated,
        hub_id=hub_id,
        hub_config="main" if hub_id else None,
    )


_TASKS = (
    _choice("boolq", "BoolQ", "boolq", ("true", "false"), 3270, "google/boolq"),
    _choice("piqa", "PIQA", "piqa", ("solution1", "solution2"), 1838, "baber/piqa"),
    _choice("siqa", "SIQA", "social_i_qa", ANSWERS, 1954, "lighteval/siqa"),
    _choice(
        "hellaswag", "HellaSwag", "hellaswag", ("ending1", "ending2", "ending3", "ending4"), 10042, "Rowan/hellaswag"
    ),
    _choice(
        "winogrande", "WinoGrande", "winogrande", ("option1", "option2"), 1267, "allenai/winogrande", "winogrande_xl"
    ),
    _choice("arc_easy", "ARC-e", "ARC-Easy", ANSWERS, 2376, "allenai/ai2_arc", "ARC-Easy", "test"),
    _choice("arc_challenge", "ARC-c", "ARC-Challenge", ANSWERS, 1172, "allenai/ai2_arc", "ARC-Challenge", "test"),
    _choice("openbookqa", "OBQA", "openbookqa", ANSWERS, 500, "allenai/openbookqa", "main", "test"),
    _number("multiarith", "MultiArith", 600, contaminated=True),
    _number("gsm8k", "gsm8k", 1319, hub_id="openai/gsm8k"),
    _number("addsub", "AddSub", 395, contaminated=True),
    Task(
        key="aqua",
        title="AQuA",
        suite="arithmetic",
        folder="AQuA",
        answer="letter",
        labels=("A", "B", "C", "D", "E"),
        max_new_tokens=256,
        test_rows=254,
        hub_id="deepmind/aqua_rat",
        hub_config="raw",
    ),
    _number("singleeq", "SingleEq", 508, contaminated=True),
    _number("svamp", "SVAMP", 1000),
    Task(
        key="generated",
        title="Generated",
        suite="generated",
        folder="generated",
        answer="number",
        max_new_tokens=40,
        test_rows=None,
        stop=("\n", *STOP),
    ),
)

TASKS: Mapping[str, Task] = {task.key: task for task in _TASKS}


def _suite(key: str, title: str, *mixtures: str) -> Suite:
    return Suite(
        key=key, title=title, tasks=tuple(task.key for task in _TASKS if task.suite == key), mixtures=tuple(mixtures)
    )


SUITES: Mapping[str, Suite] = {
    suite.key: suite
    for suite in (
        _suite("commonsense", "Commonsense reasoning", "commonsense_170k", "commonsense_15k"),
        _suite("arithmetic", "Arithmetic reasoning", "math_10k"),
        _suite("generated", "Generated word problems"),
    )
}


def resolve_tasks(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the suite and the tasks with the given names: one suite, or one or more tasks of one suite.

    Raises:
        ConfigError: there is no name, an unknown name, or tasks of several suites.
    """
    if not names:
        raise ConfigError(f"no task given; name a suite ({', '.join(SUITES)}) or tasks ({', '.join(TASKS)})")
    if len(names) == 1 and names[0] in SUITES:
        return names[0], SUITES[names[0]].tasks
    mistakes = [
        unknown("task or suite", name, list({**SUITES, **TASKS}))
        for name in names
        if name not in TASKS and name not in SUITES
    ]
    if mistakes:
        raise ConfigError("; ".join(mistakes))
    if whole := [name for name in names if name not in TASKS]:
        raise ConfigError(
            f"{', '.join(whole)} is a whole suite; give it alone, or name tasks of one suite, got: {list(names)}"
        )
    suites = list(dict.fromkeys(TASKS[name].suite for name in names))
    if len(suites) > 1:
        listing = "; ".join(f"{key}: {', '.join(SUITES[key].tasks)}" for key in suites)
        raise ConfigError(f"the tasks {', '.join(names)} are of {len(suites)} suites; a run takes one. {listing}")
    return suites[0], tuple(dict.fromkeys(names))


def check_tasks(suite: str, tasks: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless ``suite`` exists and has all ``tasks``, of which there is at least one."""
    if suite not in SUITES:
        raise ConfigError(unknown("suite", suite, SUITES))
    if not tasks:
        raise ConfigError(f"no task given; the suite {suite} has {', '.join(SUITES[suite].tasks)}")
    strangers = [name for name in tasks if name not in SUITES[suite].tasks]
    if strangers:
        raise ConfigError("; ".join(unknown(f"{suite} task", name, list(SUITES[suite].tasks)) for name in strangers))
    if len(set(tasks)) != len(tasks):
        raise ConfigError(f"a task is named twice: {', '.join(tasks)}")
