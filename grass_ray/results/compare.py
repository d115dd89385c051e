"""Which runs may be compared with each other.

::

    for test, records in comparable_groups(records):      # one table each
        print(test.name, len(records))

What a run was asked for is in its configuration; what it was asked is in its scores: the questions, the file they came
from, and how answers were extracted and judged. A run that was not tested (failed, stopped, searched) stands with the
runs of its configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grass_ray.results.record import RunRecord, TaskScore

# What decides how answers are read, from the configuration.
EVALUATION = ("limit", "scoring", "extraction", "num_beams")
# What a source says of the test itself; where its files are is no matter, and their hashes are in the scores.
_OF_THE_TEST = ("seed", "test_rows", "instruction", "answer", "labels")
# What a score's protocol says that changes neither question nor verdict: places, counts, and what ids say already.
_SAME_TEST = frozenset(
    {"batch_size", "test_file", "test_rows", "test_rows_skipped", "broken_rows", "limit", "limit_seed"}
    | {"chance", "lm_eval"}
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a table's runs were tested on. ``name`` is equal for equal tests, whatever the model and the machine."""

    name: str
    facts: Mapping[str, str]


def table_key(record: RunRecord) -> list[Any]:
    """What must be equal in the configurations of two runs that are ranked together, as plain values."""
    config = record.config
    data = config["data"]
    source = {key: value for key, value in data.get("source", {}).items() if key in _OF_THE_TEST}
    protocol = [config["evaluation"].get(key) for key in EVALUATION]
    tasks = sorted(data["tasks"])
    place = [record.hardware, record.world_size]
    return [config["model"]["name"], data["suite"], *place, tasks, protocol, data.get("template"), source]


def same_test_key(record: RunRecord) -> list[Any]:
    """As :func:`table_key` without the machine, which changes no question."""
    model, suite, _, _, *rest = table_key(record)
    return [model, suite, *rest]


def comparable_groups(records: Iterable[RunRecord], key: Any = table_key) -> list[tuple[Asked, list[RunRecord]]]:
    """The records of each table in their order, by ``key`` and then by what they were actually tested on.

    Two runs share a table where nothing that both recorded differs: the questions and their file, the rules, the base
    model's weights.
    """
    tables: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        tables[json.dumps(key(record), sort_keys=True)].append(record)
    return [group for name in sorted(tables) for group in _split(tables[name])]


def _split(records: Sequence[RunRecord]) -> list[tuple[Asked, list[RunRecord]]]:
    """One group for each test. Records that say most come first; others join a group that they do not contradict."""
    groups: list[tuple[dict[str, str], list[int]]] = []
    said = [_facts(record) for record in records]
    for place in sorted(range(len(records)), key=lambda place: (-len(said[place]), place)):
        own, source = said[place], records[place].config["data"].get("source")
        fitting = [group for group in groups if _agree(group[0], own)]
        if not fitting:
            groups.append((dict(own), [place]))
            continue

        def likeness(group: tuple[dict[str, str], list[int]], source: Any = source) -> tuple[bool, int]:
            return any(records[other].config["data"].get("source") == source for other in group[1]), len(group[1])

        facts, members = max(fitting, key=likeness)
        facts |= {key: value for key, value in own.items() if key not in facts}
        members.append(place)
    wanted = same_test_key(records[0])[1:]
    return [
        (Asked(name=_name(wanted, facts), facts=facts), [records[place] for place in sorted(members)])
        for facts, members in sorted(groups, key=lambda group: min(group[1]))
    ]


def _agree(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Whether nothing differs. A missing fact is unknown; it is a difference if both recorded how they tested."""
    for key in first.keys() | second.keys():
        told = all(f"{key.split()[0]} test sha256" in facts for facts in (first, second))
        if first.get(key) != second.get(key) and (told or (key in first and key in second)):
            return False
    return True


def _facts(record: RunRecord) -> dict[str, str]:
    """Facts about a record's test, each a short text; of a run that was not tested only the base model's weights."""
    facts = {} if record.model_sha256 is None else {"base model": f"sha256 {record.model_sha256[:12]}"}
    for task, score in record.tasks.items():
        if not score.num_examples:
            continue
        facts |= {f"{task} questions": str(score.num_examples), f"{task} ids": _digest(sorted(score.example_ids))}
        facts |= {f"{task} {key.replace('_', ' ')}": value for key, value in _rules(score)}
    for task, own in record.lm_eval.items():
        name = f"lm_eval:{task}"
        facts |= {f"{name} questions": str(len(own.example_ids)), f"{name} ids": _digest(sorted(own.example_ids))}
        facts |= {f"{name} {key.replace('_', ' ')}": value for key, value in _in_words(own.protocol)}
        facts[f"{name} metric"] = own.metric
    return facts


def _rules(score: TaskScore) -> list[tuple[str, str]]:
    rules = {"scoring": score.scoring, "extraction": score.extraction}
    return _in_words(rules | score.protocol)


def _in_words(rules: Mapping[str, Any]) -> list[tuple[str, str]]:
    rules = {key: value for key, value in rules.items() if key not in _SAME_TEST and value is not None}
    return [(key, value[:12] if key.endswith("sha256") else json.dumps(value)) for key, value in rules.items()]


def _name(wanted: Sequence[Any], facts: Mapping[str, str]) -> str:
    return _digest([wanted, {key: value for key, value in facts.items() if key != "base model"}])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def differences(tests: Sequence[Asked]) -> list[str]:
    """What differs between tests, a few words each, in the order of the first test's facts."""
    keys = dict.fromkeys(key for test in tests for key in test.facts)
    found = []
    for key in keys:
        known = [test for test in tests if key in test.facts or f"{key.split()[0]} test sha256" in test.facts]
        values = list(dict.fromkeys(test.facts.get(key, "not recorded") for test in known))
        if len(values) > 1:
            found.append(f"{key.replace(' ids', ': other questions')} ({' / '.join(values)})")
    return found
