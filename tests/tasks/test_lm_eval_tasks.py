"""lm-eval's own tasks: the numbers are those of its plain model; folders of one's own; mistakes; several workers."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness_folder import write_harness_folder
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from task_parts import make_model, make_tokenizer

from grass_ray.config import ConfigError, DataConfig, EvaluationConfig, LmEvalConfig
from grass_ray.tasks.evaluation import check_evaluation, evaluate
from grass_ray.tasks.lm_eval_run import evaluate_lm_eval
from grass_ray.tasks.lm_eval_scores import LmEvalResult, average, lm_eval_metrics
from grass_ray.tasks.lm_eval_tasks import check_lm_eval, load_lm_eval

NAMES = ("sums", "digits", "prose")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_harness_folder(tmp_path_factory.mktemp("tasks") / "mine")


def evaluation(*tasks: object, **settings: Any) -> EvaluationConfig:
    few = {name: settings.pop(name) for name in ("num_fewshot", "apply_chat_template") if name in settings}
    return EvaluationConfig(lm_eval=LmEvalConfig(tasks=tuple(map(str, tasks)), **few), **settings)


def measure(config: EvaluationConfig, *, bos: str | None = None, **more: Any) -> dict[str, LmEvalResult]:
    tokenizer = make_tokenizer(bos_token=bos)
    found = evaluate_lm_eval(make_model(tokenizer), tokenizer, config, **more)
    assert found is not None
    return found


def of_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch, *, bos: str | None = None, **settings: Any) -> Any:
    """What lm-eval says of the same model, with its own model class and nothing of ours."""
    monkeypatch.chdir(folder)
    tokenizer = make_tokenizer(bos_token=bos)
    tokenizer.pad_token = tokenizer.eos_token
    lm = HFLM(pretrained=make_model(tokenizer).eval(), tokenizer=tokenizer, batch_size=1)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(lm, tasks=list(NAMES), task_manager=manager, bootstrap_iters=1000, **settings)


@pytest.mark.parametrize(
    ("settings", "bos"), [({}, None), ({"num_fewshot": 2}, None), ({"limit": 3}, None), ({"num_fewshot": 1}, "<start>")]
)
def test_numbers_are_those_of_lm_eval_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], bos: str | None
) -> None:
    theirs = of_lm_eval(folder, monkeypatch, bos=bos, **settings)
    monkeypatch.chdir("/")
    found = measure(evaluation(folder, **settings), bos=bos)
    assert set(found) == set(NAMES)  # the group's members are parts of it
    for name, result in found.items():
        own = theirs["results"][name]
        numbers = {key.removesuffix(",none"): value for key, value in own.items() if "," in key and value != "N/A"}
        assert result.metrics == pytest.approx(numbers, rel=1e-4)
        assert result.value == result.metrics[result.metric]
    assert [found[name].metric for name in NAMES] == ["acc", "exact_match", "word_perplexity"]
    assert found["prose"].values is None  # no mean over examples
    assert not found["prose"].higher_is_better
    for name in ("sums", "digits"):
        assert found[name].value == pytest.approx(fmean(found[name].values or ()))
        assert found[name].protocol["num_fewshot"] == [settings.get("num_fewshot", 0)]
    assert found["sums"].subtasks == {task: theirs["results"][task]["acc,none"] for task in ("sums_odd", "sums_even")}
    assert len(set(found["sums"].example_ids)) == len(found["sums"].example_ids) == 2 * settings.get("limit", 7)
    shots = settings.get("num_fewshot", 0)
    assert all(example["prompt"].count("Question:") == shots + 1 for example in found["digits"].examples)
    assert average(found) == pytest.approx(fmean((found["sums"].value, found["digits"].value)))
    metrics = lm_eval_metrics(found)
    assert metrics["lm_eval/sums/acc"] == found["sums"].value
    assert metrics["lm_eval/sums/acc_stderr"] == found["sums"].stderr


def test_scoring_lm_eval_leaves_the_tasks_of_the_data_out(folder: Path) -> None:
    config = evaluation(folder, scoring="lm_eval")
    check_evaluation(DataConfig(), config)
    tokenizer = make_tokenizer()
    assert evaluate(make_model(tokenizer), tokenizer, DataConfig(), config) == {}


def test_the_protocol_names_what_is_asked_wherever_the_folder_is(folder: Path, tmp_path: Path) -> None:
    config = evaluation(folder / "digits.yaml")
    first = measure(config)["digits"]
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    again = measure(evaluation(moved))["digits"]
    assert (first.protocol, first.example_ids) == (again.protocol, again.example_ids)
    text = (moved / "digits.yaml").read_text().replace("ignore_punctuation", "ignore_case")
    (moved / "digits.yaml").write_text(text)
    assert measure(evaluation(moved))["digits"].protocol != first.protocol


def test_progress_is_told(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    measure(evaluation(folder / "digits.yaml", batch_size=5), on_progress=lambda *step: told.append(step))
    assert told == [("lm-eval", done, 14) for done in (5, 10, 14)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no task of lm-eval: a YAML file"),
        ({"a.yaml": "task: a\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.json}}\n"}, "gone.json"),
        ({"a.yaml": "task: a\noutput_type: poem\ndataset_path: json\n"}, "the task a in "),
        ({"a.yaml": "task: a\nprocess_docs: !function gone.part\n"}, "gone"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_message(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as raised:
        check_lm_eval(LmEvalConfig(tasks=(f"{tmp_path}/",)))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.long
def test_names_of_the_registry_are_found_and_unknown_ones_are_named_with_near_ones(tmp_path: Path) -> None:
    check_lm_eval(LmEvalConfig(tasks=("mmlu", "ifeval", "arc_*")))
    own = write_harness_folder(tmp_path / "own")
    (own / "more.yaml").write_text("group: more\ntask: [digits, {task: no_such_task_anywhere}]\n")
    with pytest.raises(ConfigError, match=r"the task more in .*own cannot be loaded"):
        check_lm_eval(LmEvalConfig(tasks=(str(own),)))
    with pytest.raises(ConfigError) as raised:
        check_lm_eval(LmEvalConfig(tasks=("mmlo", str(tmp_path / "gone.yaml"))))
    assert "lm-eval has no task 'mmlo'; near names: mmlu" in str(raised.value)
    assert f"there is no folder or file of tasks {tmp_path}/gone.yaml" in str(raised.value)


def test_tasks_that_run_code_are_refused(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    with (own / "digits.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    with pytest.raises(ConfigError, match="the task digits of lm-eval runs code that the model writes"):
        load_lm_eval(LmEvalConfig(tasks=(str(own / "digits.yaml"),)))


# ------------------------------------------------------------------------------------------------------ several workers


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    tokenizer = make_tokenizer()
    found = evaluate_lm_eval(make_model(tokenizer), tokenizer, evaluation(f"{folder}/mine"), shard=(rank, 2))
    torch.save(found, f"{folder}/worker-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_workers_share_the_examples_and_the_first_has_the_results(tmp_path: Path) -> None:
    write_harness_folder(tmp_path / "mine", rows=13)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    first, second = (torch.load(tmp_path / f"worker-{rank}.pt", weights_only=False) for rank in range(2))
    assert second is None
    alone = measure(evaluation(tmp_path / "mine"))
    for name in NAMES:
        assert first[name].protocol == alone[name].protocol  # of another process
        assert first[name].example_ids == alone[name].example_ids
        assert first[name].values == alone[name].values
        assert first[name].metrics == pytest.approx(alone[name].metrics, rel=1e-4)
