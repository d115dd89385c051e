import pytest

from grass_ray.tasks.extraction import extract_answer, is_correct, process_results
from grass_ray.tasks.suites import TASKS

# (task, text, what the published rule reads, what the strict rule reads)
CASES = [
    ("gsm8k", "The answer is 12.", "12", "12"),
    ("gsm8k", "12", "12", "12"),
    ("gsm8k", " 12.\n", "12", "12"),
    ("gsm8k", "", None, None),
    ("gsm8k", "I cannot say.", None, None),
    ("gsm8k", "3 + 4 = 7. The answer is 7.", "7", "7"),
    ("gsm8k", "3 + 4 = 7", "7", None),
    ("gsm8k", "The answer is 7. Check: 7 - 4 = 3", "3", "7"),
    ("gsm8k", "The answer is 1,234,567.", "1234567", "1234567"),
    ("gsm8k", "The answer is $1,250.50.", "1250.50", "1250.50"),
    ("gsm8k", "The answer is -5.", "-5", "-5"),
    ("gsm8k", "The answer is -$5", "5", "-5"),
    ("gsm8k", "Temperatures 10-15", "-15", None),
    ("gsm8k", "The answer is 0.5", "0.5", "0.5"),
    ("gsm8k", "The answer is: 42", "42", "42"),
    ("gsm8k", "Answer: 42", "42", "42"),
    ("gsm8k", "THE ANSWER IS 42", "42", "42"),
    ("gsm8k", "The answer is **42**", "42", "42"),
    ("gsm8k", "The answer is 42 apples in 2 days", "2", "42"),
    ("gsm8k", "The answer is forty 2", "2", None),
    ("gsm8k", "The answer is 5.\n\nThe answer is 9.", "9", "5"),
    ("gsm8k", "The answer is 12, 13", "13", "12"),
    ("gsm8k", "A: 24.0", "24.0", None),
    ("aqua", "The answer is (D).", "D", "D"),
    ("aqua", "Answer: D", "A", "D"),
    ("aqua", "answer: D", "D", "D"),
    ("aqua", "D", "D", "D"),
    ("aqua", "(D)", "D", "D"),
    ("aqua", "Because B is wrong, the answer is C", "B", "C"),
    ("aqua", "The answer is Done", "D", None),
    ("aqua", "the answer is d", None, None),
    ("aqua", "nothing here", None, None),
    ("aqua", "Each costs 5. The answer is E.", "E", "E"),
    ("aqua", "The answer is F", None, None),
    ("boolq", "the correct answer is true", "true", "true"),
    ("boolq", "the correct answer is false", "false", "false"),
    ("boolq", "True", None, "true"),
    ("boolq", "true", "true", "true"),
    ("boolq", "It is not true: the correct answer is false", "true", "false"),
    ("boolq", "untrue", "true", None),
    ("boolq", "yes", None, None),
    ("boolq", "The answer is falsehood", "false", None),
    ("piqa", "the correct answer is solution2", "solution2", "solution2"),
    ("piqa", "solution 2", None, None),
    ("piqa", "Solution1 is bad, the correct answer is solution2", "solution2", "solution2"),
    ("siqa", "the correct answer is answer3", "answer3", "answer3"),
    ("arc_easy", "the correct answer is answer5", "answer5", "answer5"),
    ("arc_easy", "answer12", "answer1", None),
    ("arc_challenge", "answer1/answer2, the correct answer is answer4", "answer1", "answer4"),
    ("openbookqa", "The correct answer is Answer2.", None, "answer2"),
    ("openbookqa", "answer6", None, None),
    ("hellaswag", "the correct answer is ending4", "ending4", "ending4"),
    ("hellaswag", "ending5", None, None),
    ("winogrande", "the correct answer is option1", "option1", "option1"),
    ("winogrande", '"option2"', "option2", "option2"),
    ("winogrande", "the option is clear", None, None),
]


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
