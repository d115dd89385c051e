import pytest
from task_parts import record

from grass_ray.tasks.questions import chance
from grass_ray.tasks.rows import row_from_record
from grass_ray.tasks.scores import EvaluationResult, Example, above_chance, contaminated_tasks, score_metrics
from grass_ray.tasks.suites import TASKS

MIXTURE = {"files": [{"name": "ft-training_set/math_10k.json"}]}
BUILT = {"files": [{"name": "dataset/gsm8k/train.json"}]}


def result(task: str, right: int, of: int, **protocol: object) -> EvaluationResult:
    examples = tuple(
        Example(id=str(n), prompt="", target="", output="", extracted=None, correct=n < right) for n in range(of)
    )
    return EvaluationResult(
        task=task, scoring="generation", extraction="published", examples=examples, protocol=protocol
    )


def test_three_averages():
    results = {
        "gsm8k": result("gsm8k", 1, 4, chance=0.0),
        "addsub": result("addsub", 4, 4, chance=0.0),
        "aqua": result("aqua", 2, 4, chance=0.2),
    }
    metrics = score_metrics(results, contaminated=("addsub", "singleeq"))
    assert metrics["eval/average"] == pytest.approx((0.25 + 1 + 0.5) / 3)
    assert metrics["eval/average_clean"] == pytest.approx((0.25 + 0.5) / 2)
    assert metrics["eval/average_normalised"] == pytest.approx((0.25 + 1 + (0.5 - 0.2) / 0.8) / 3)
    assert score_metrics(results)["eval/average_clean"] == metrics["eval/average"]


def test_averages_that_are_not_defined_are_absent():
    assert score_metrics({}) == {}
    metrics = score_metrics({"addsub": result("addsub", 1, 2)}, contaminated=("addsub",))
    assert metrics == {"eval/addsub/accuracy": 0.5, "eval/average": 0.5}


def test_only_the_mixture_that_was_trained_on_contaminates():
    mawps = ("multiarith", "addsub", "singleeq")
    assert contaminated_tasks("arithmetic", MIXTURE, training_steps=5) == mawps
    assert contaminated_tasks("arithmetic", MIXTURE, training_steps=0) == ()
    assert contaminated_tasks("arithmetic", BUILT, training_steps=5) == ()
    assert contaminated_tasks("arithmetic", {}, training_steps=5) == ()
    assert contaminated_tasks("commonsense", MIXTURE, training_steps=5) == ()


def test_chance_counts_the_options_of_each_question():
    arc = [
        row_from_record(record("answer1", instruction=f"Which?\n\nAnswer format: {form}"), TASKS["arc_easy"])
        for form in ("answer1/answer2/answer3", "answer1/answer2/answer3/answer4", "answer1/answer2/answer3/answer4")
    ]
    assert chance(TASKS["arc_easy"], arc) == pytest.approx((1 / 3 + 1 / 4 + 1 / 4) / 3)
    assert chance(TASKS["boolq"], [row_from_record(record(), TASKS["boolq"])]) == 0.5
    assert chance(TASKS["aqua"], [row_from_record(record("A"), TASKS["aqua"])]) == 0.2
    assert chance(TASKS["gsm8k"], [row_from_record(record("12"), TASKS["gsm8k"])]) == 0.0


def test_guessing_is_nothing_and_worse_than_guessing_is_negative():
    assert above_chance(0.25, 0.25) == 0
    assert above_chance(1.0, 0.25) == 1
    assert above_chance(0.0, 0.5) == -1
    with pytest.raises(ValueError, match="below 1"):
        above_chance(1.0, 1.0)
