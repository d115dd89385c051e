from pathlib import Path

import pytest
import yaml

from grass_ray.tasks.extraction import extract_answer, is_correct, process_results
from grass_ray.tasks.suites import TASKS

_FILE = Path(__file__).parent / "extraction_cases.yaml"
CASES = [(task, *case) for task, cases in yaml.safe_load(_FILE.read_text(encoding="utf-8")).items() for case in cases]


def test_every_kind_of_answer_has_cases():
    assert {TASKS[task].answer for task, *_ in CASES} == {"number", "letter", "labels"}
    assert len({(task, text) for task, text, *_ in CASES}) == len(CASES) >= 300


@pytest.mark.parametrize(("task", "text", "published", "strict"), CASES)
def test_what_is_read_from_a_text(task, text, published, strict):
    assert extract_answer(text, TASKS[task], "published") == published
    assert extract_answer(text, TASKS[task], "strict") == strict


@pytest.mark.parametrize(
    ("task", "extracted", "answer", "right"),
    [
        ("gsm8k", "12", "12.0", True),
        ("gsm8k", "12.0009", "12", True),
        ("gsm8k", "12.002", "12", False),
        ("gsm8k", "1234", "1,234", True),
        ("gsm8k", "-12", "12", False),
        ("gsm8k", None, "12", False),
        ("gsm8k", "9" * 400, "12", False),
        ("aqua", "D", "D", True),
        ("aqua", "A", "D", False),
        ("boolq", "true", "true", True),
        ("boolq", "false", "true", False),
        ("boolq", None, "true", False),
    ],
)
def test_what_counts_as_right(task, extracted, answer, right):
    assert is_correct(extracted, answer, TASKS[task]) is right


def test_the_hook_for_lm_eval_uses_the_rule_of_the_document():
    document = {"task": "aqua", "answer": "D", "extraction": "published"}
    assert process_results(document, ["Answer: D"]) == {"acc": 0.0}
    assert process_results(document | {"extraction": "strict"}, ["Answer: D"]) == {"acc": 1.0}
