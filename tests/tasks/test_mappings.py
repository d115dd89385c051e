import pytest
from task_parts import read_rows, write

from grass_ray.tasks.mappings import MAPPINGS
from grass_ray.tasks.rows import RowError, check_answer
from grass_ray.tasks.suites import TASKS

CHOICES = {"text": ["ice", "steam", "rain"], "label": ["A", "B", "C"]}
RECORDS = {
    "boolq": {"question": "is ice cold", "passage": "Ice is frozen water.", "answer": True},
    "piqa": {"goal": "open a jar", "sol1": "twist", "sol2": "shout", "label": 0},
    "siqa": {"context": "Ana ran.", "question": "And?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
    "hellaswag": {"activity_label": "Baking", "ctx": "She stirs and", "endings": ["a", "b", "c", "d"], "label": "1"},
    "winogrande": {"sentence": "The _ is big.", "option1": "cat", "option2": "cow", "answer": "2"},
    "arc_easy": {"id": "x", "question": "Frozen water?", "choices": CHOICES, "answerKey": "A"},
    "arc_challenge": {"question": "Wet?", "choices": CHOICES | {"label": ["1", "2", "3"]}, "answerKey": "3"},
    "openbookqa": {"id": "x", "question_stem": "Hot water is", "choices": CHOICES, "answerKey": "B"},
    "gsm8k": {"question": "How? ", "answer": "48/2 = <<48/2=24>>24.\n24+1200 = <<24+1200=1224>>1224\n#### 1,224"},
    "aqua": {"question": "2+2?", "options": ["A)3", "B)4", "C)5", "D)6", "E)7"], "rationale": "4", "correct": "B"},
}  # fmt: skip
ANSWERS = {
    "boolq": "true", "piqa": "solution1", "siqa": "answer3", "hellaswag": "ending2", "winogrande": "option2",
    "arc_easy": "answer1", "arc_challenge": "answer3", "openbookqa": "answer2", "gsm8k": "1224", "aqua": "B",
}  # fmt: skip


@pytest.mark.parametrize("task", RECORDS)
def test_an_original_record_becomes_a_valid_row(task, tmp_path):
    row = MAPPINGS[task](RECORDS[task])
    assert row.answer == ANSWERS[task]
    check_answer(row.answer, TASKS[task])
    assert read_rows(write(tmp_path / "rows.json", [vars(row)]), TASKS[task]) == (row,)


def test_every_mapping_has_a_test_and_a_hub_id():
    assert set(MAPPINGS) == set(RECORDS) == {key for key, task in TASKS.items() if task.hub_id}


def test_the_wording_is_the_published_one(real_data):
    """The first published rows, told again from their parts."""
    row = MAPPINGS["arc_easy"](RECORDS["arc_easy"])
    published = read_rows(real_data / "llm-adapters/dataset/ARC-Easy/test.json", TASKS["arc_easy"])[0]
    start = "Please choose the correct answer to the question: "
    assert published.instruction.startswith(start)
    assert row.instruction == start + (
        "Frozen water?\n\nAnswer1: ice Answer2: steam Answer3: rain\n\nAnswer format: answer1/answer2/answer3"
    )
    assert published.output.replace(published.answer, "X") == row.output.replace(row.answer, "X")
    question = "does ethanol take more energy make that produces"
    told = MAPPINGS["boolq"]({"question": question, "passage": "", "answer": False})
    assert told == read_rows(real_data / "llm-adapters/dataset/boolq/test.json", TASKS["boolq"])[0]


def test_gsm8k_loses_its_calculator_marks():
    row = MAPPINGS["gsm8k"](RECORDS["gsm8k"])
    assert row.output == "48/2 = 24.\n24+1200 = 1224\nThe answer is 1224."
    assert row.instruction == "How?"


def test_aqua_lists_its_options():
    row = MAPPINGS["aqua"](RECORDS["aqua"])
    assert row.instruction == "2+2? Answer Choices: (A) 3 (B) 4 (C) 5 (D) 6 (E) 7"
    assert row.output.endswith("The answer is (B).")


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("boolq", {"answer": "yes"}),
        ("boolq", {"question": None}),
        ("piqa", {"label": -1}),
        ("siqa", {"label": ""}),
        ("hellaswag", {"label": ""}),
        ("hellaswag", {"endings": None}),
        ("winogrande", {"answer": ""}),
        ("arc_easy", {"answerKey": "E"}),
        ("arc_easy", {"choices": None}),
        ("openbookqa", {"choices": {"text": ["a"], "label": ["A", "B"]}}),
        ("gsm8k", {"answer": "no mark"}),
        ("gsm8k", {"answer": "#### many"}),
        ("aqua", {"correct": "F"}),
        ("aqua", {"options": []}),
    ],
)
def test_a_record_that_does_not_fit_is_refused(task, change):
    with pytest.raises(RowError):
        MAPPINGS[task](RECORDS[task] | change)
