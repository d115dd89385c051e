"""A model that says what it was taught must be marked right; where it would not be, nothing is trained."""

import json

import pytest
from task_parts import make_tokenizer, record, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grass_ray.commands.train import build_config
from grass_ray.config import ConfigError, CustomSource, DataConfig, EvaluationConfig, FolderSource, RunConfig
from grass_ray.methods import get_method
from grass_ray.tasks.readback import check_answers, choose_evaluation
from grass_ray.tasks.suites import TASKS
from grass_ray.training.checks import check_run


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def custom(folder, rows, **settings) -> DataConfig:
    """A task of one's own whose training and test rows are the same."""
    lines = [{"instruction": f"Question {number}?", **row} for number, row in enumerate(rows)]
    path = str(write(folder / "rows.jsonl", "\n".join(map(json.dumps, lines))))
    values = {"name": "own", "max_new_tokens": 64, "train": path, "test": path} | settings
    return DataConfig(suite="own", tasks=("own",), source=CustomSource.parse(values, "here"))


def refused(data, tokenizer, **evaluation) -> str:
    with pytest.raises(ConfigError) as error:
        check_answers(data, EvaluationConfig(**evaluation), tokenizer)
    return str(error.value)


MISREAD_BY_PUBLISHED = {
    "a label inside another": ({"answer": "labels", "labels": ("correct", "incorrect")}, ["incorrect"], "'incorrect'"),
    "a label that is in the sentence": ({"answer": "labels", "labels": ("the", "a")}, ["a"], "'a'"),
    "a label that is in the word answer": ({"answer": "labels", "labels": ("swer", "b")}, ["b"], "'b'"),
    "letters that are in the sentence": ({"answer": "letter", "labels": ("T", "F")}, ["F"], "'F'"),
    "a number with an exponent": ({"answer": "number"}, [1e-05], "'1e-05'"),
    "a number without its zero": ({"answer": "number"}, [".5"], "'.5'"),
    "a large number with an exponent": ({"answer": "number"}, [7, 1e22], "'1e+22'"),
}


@pytest.mark.parametrize("kind", MISREAD_BY_PUBLISHED)
def test_what_published_misreads_is_named_and_strict_is_taken(tmp_path, tokenizer, kind):
    settings, answers, named = MISREAD_BY_PUBLISHED[kind]
    data = custom(tmp_path, [{"answer": answer} for answer in answers], **settings)
    message = refused(data, tokenizer)
    assert "published extraction reads" in message
    assert f"the response taught for the answer {named}" in message
    assert "set evaluation.extraction=strict" in message
    check_answers(data, EvaluationConfig(extraction="strict"), tokenizer)
    assert choose_evaluation(data.source) == ["evaluation.extraction=strict"]
    if settings["answer"] != "number":
        check_answers(data, EvaluationConfig(scoring="loglikelihood"), tokenizer)


READ_BY_PUBLISHED = {
    "labels that begin alike": ({"answer": "labels", "labels": ("good", "goodness")}, ["goodness"]),
    "labels that differ in case": ({"answer": "labels", "labels": ("us", "US")}, ["US", "us"]),
    "labels of signs": ({"answer": "labels", "labels": ("C++", "C", "(a|b)*", "[x]", "\\d+", "½", "a÷b")}, ["C"]),
    "labels of many words": ({"answer": "labels", "labels": ("not entailed", "entailed by it")}, ["not entailed"]),
    "labels of other scripts": ({"answer": "labels", "labels": ("好", "不好", "да", "нет", "ดี", "İyi")}, ["不好"]),
    "decomposed labels": ({"answer": "labels", "labels": ("cafe\u0301", "the\u0301")}, ["caf\u00e9", "the\u0301"]),
    "numbers": ({"answer": "number"}, [-3, "-0.25", "1,234,567.5", "12.", 10**30, 0]),
}


@pytest.mark.parametrize("kind", READ_BY_PUBLISHED)
def test_what_published_reads_stays_with_it_and_strict_reads_it_too(tmp_path, tokenizer, kind):
    settings, answers = READ_BY_PUBLISHED[kind]
    data = custom(tmp_path, [{"answer": answer} for answer in answers], **settings)
    assert choose_evaluation(data.source) == []
    for rule in ("published", "strict"):
        check_answers(data, EvaluationConfig(extraction=rule), tokenizer)


def test_built_in_tasks_are_read_by_both_rules_and_both_scorings(tmp_path, tokenizer):
    for key, task in TASKS.items():
        answers = task.labels or ("7", "-3.5", "1,200")
        rows = [record(answer, instruction=f"{answer}?") for answer in answers]
        write(tmp_path / "dataset" / task.folder / "test.json", rows)
        data = DataConfig(suite=task.suite, tasks=(key,), source=FolderSource(path=str(tmp_path)))
        if key == "generated":
            data = DataConfig()
        for rule in ("published", "strict"):
            check_answers(data, EvaluationConfig(extraction=rule), tokenizer)
        check_answers(data, EvaluationConfig(scoring="loglikelihood"), tokenizer)


def test_an_answer_that_does_not_fit_says_how_much_it_needs(tmp_path, tokenizer):
    labels = {"answer": "labels", "labels": ("good", "very bad indeed")}
    needed = len(tokenizer("the correct answer is very bad indeed")["input_ids"])
    short = custom(tmp_path, [{"answer": "good"}], max_new_tokens=needed - 1, **labels)
    message = refused(short, tokenizer)
    assert f"max_new_tokens is {needed - 1}" in message
    assert f"needs {needed} tokens" in message
    assert f"set max_new_tokens: {needed} or more" in message
    enough = custom(tmp_path, [{"answer": "good"}], max_new_tokens=needed, **labels)
    check_answers(enough, EvaluationConfig(), tokenizer)
    check_answers(short, EvaluationConfig(scoring="loglikelihood"), tokenizer)
    digits = custom(tmp_path, [{"answer": 3}, {"answer": "1" * 40}], answer="number", max_new_tokens=8)
    assert "max_new_tokens is 8" in refused(digits, tokenizer)


def test_responses_of_the_users_own_rows_are_read_too(tmp_path, tokenizer):
    labels = {"answer": "labels", "labels": ("correct", "incorrect")}
    verdicts = [{"answer": label, "output": f"Verdict: {label}"} for label in labels["labels"]]
    message = refused(custom(tmp_path, verdicts, **labels), tokenizer, extraction="strict")
    assert "strict extraction reads no answer out of 'Verdict: correct'" in message
    rationales = [{"answer": n, "output": f"{n} - 2 = {n - 2}, plus 2.\nThe answer is {n}."} for n in range(30)]
    checks = [{"answer": n, "output": f"The answer is {n}, since {n} - 2 is {n - 2}."} for n in range(30)]
    assert choose_evaluation(custom(tmp_path, rationales, answer="number").source) == []
    data = custom(tmp_path, checks, answer="number")
    assert choose_evaluation(data.source) == ["evaluation.extraction=strict"]
    assert "(30 of 30 responses are like that)" in refused(data, tokenizer)
    long = custom(tmp_path, rationales, answer="number", max_new_tokens=12)
    assert "30 of 30" in refused(long, tokenizer)
    noisy = [*rationales, {"answer": 5, "output": "Nobody knows."}]
    check_answers(custom(tmp_path, noisy, answer="number"), EvaluationConfig(), tokenizer)


def small_letters() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that knows no capital letters and few words."""
    words = ["the", "correct", "answer", "is", "rome", "paris", "<end>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


def test_a_tokenizer_that_cannot_write_an_answer_is_named(tmp_path):
    data = custom(tmp_path, [{"answer": "Rome"}], answer="labels", labels=("Rome", "Paris"))
    message = refused(data, small_letters())
    assert "tokenizer writes as 'the correct answer is rome'" in message
    check_answers(data, EvaluationConfig(extraction="strict"), small_letters())
    strange = custom(tmp_path, [{"answer": "oslo"}], answer="labels", labels=("oslo", "bergen"))
    assert "'bergen' with the same tokens as 'oslo'" in refused(strange, small_letters(), scoring="loglikelihood")
    ending = custom(tmp_path, [{"answer": "rome"}], answer="labels", labels=("rome", "<end>"))
    assert "taught for the answer '<end>'" in refused(ending, small_letters())


def test_an_option_that_begins_another_is_no_matter_of_likelihood(tmp_path, tokenizer):
    data = custom(tmp_path, [{"answer": "10"}], answer="labels", labels=("2", "10", "1"))
    message = refused(data, tokenizer, scoring="loglikelihood")
    assert "label '1' with the first tokens of '10'" in message
    assert "evaluation.scoring=generation" in message
    check_answers(data, EvaluationConfig(), tokenizer)


def test_every_way_to_start_asks(tmp_path):
    data = custom(tmp_path, [{"answer": "incorrect"}], answer="labels", labels=("correct", "incorrect"))
    config = RunConfig(method=get_method("full").config, data=data).override({"model.name": "tiny"})
    with pytest.raises(ConfigError, match="published extraction reads 'correct'"):
        check_run(config)
    check_run(config.override({"evaluation.extraction": "strict"}))


def test_the_rule_is_chosen_for_a_task_file_unless_it_is_given(tmp_path):
    write(tmp_path / "rows.jsonl", json.dumps({"instruction": "So?", "answer": "incorrect"}))
    text = "name: own\nanswer: labels\nlabels: [correct, incorrect]\ntrain: rows.jsonl\ntest: rows.jsonl\n"
    path = write(tmp_path / "own.yaml", text)
    given = {"base": None, "model": "tiny", "tasks": (str(path),), "data_dir": None}
    assert build_config("full", assignments=(), **given).evaluation.extraction == "strict"
    asked = build_config("full", assignments=("evaluation.extraction=published",), **given)
    assert asked.evaluation.extraction == "published"
