"""lm-eval's own files, read with lm-eval's own utilities."""

import json

import datasets
import pytest
from lm_eval.utils import (
    get_file_task_name,
    get_latest_filename,
    get_results_filenames,
    get_sample_results_filenames,
    make_table,
)
from task_parts import make_model, make_tokenizer, record, write

from grass_ray.cli import main
from grass_ray.config import DataConfig, EvaluationConfig, FolderSource
from grass_ray.tasks.evaluation import evaluate
from grass_ray.tasks.lm_eval_results import HarnessResults


@pytest.fixture
def data(tmp_path) -> DataConfig:
    boolq = [record("true" if n % 3 else "false", instruction=f"is {n} so?") for n in range(9)]
    arc = [record(f"answer{1 + n % 3}", instruction=f"Choose {n * n}") for n in range(7)]
    write(tmp_path / "data/dataset/boolq/test.json", boolq)
    write(tmp_path / "data/dataset/ARC-Easy/test.json", arc)
    source = FolderSource(path=str(tmp_path / "data"))
    return DataConfig(suite="commonsense", tasks=("boolq", "arc_easy"), source=source)


@pytest.mark.parametrize("scoring", ["generation", "loglikelihood"])
def test_lm_evals_own_utilities_read_the_files(tmp_path, data, scoring):
    tokenizer = make_tokenizer()
    config = EvaluationConfig(scoring=scoring, limit=6)
    collected = HarnessResults()
    found = evaluate(make_model(tokenizer), tokenizer, data, config, on_outcome=collected.add)
    files = list(map(str, collected.write(tmp_path / "out", model="some/model", evaluation=config)))
    (results_file,) = get_results_filenames(files)
    results = json.loads((tmp_path / results_file).read_text())
    assert results["config"]["model_args"] == {"pretrained": "some/model"}
    assert results["model_name"] == "some/model"
    assert results["n-samples"] == {task: {"original": 6, "effective": 6} for task in data.tasks}
    assert results["configs"]["boolq"]["dataset_kwargs"] == {"data_files": {"test": "dataset/boolq/test.json"}}
    table = make_table(results)
    sample_files = get_sample_results_filenames(files)
    assert {get_file_task_name(file.rsplit("/", 1)[1]) for file in sample_files} == set(data.tasks)
    for task in data.tasks:
        accuracy = found[task].accuracy
        assert results["results"][task]["acc,none"] == pytest.approx(accuracy)
        error = (accuracy * (1 - accuracy) / 5) ** 0.5
        assert results["results"][task]["acc_stderr,none"] == pytest.approx(error)
        assert results["versions"][task] == 1.0
        assert f"|{task}" in table.replace(" ", "")
        own = get_latest_filename([file for file in sample_files if f"/samples_{task}_" in file])
        # as lm-eval's data card does
        samples = datasets.load_dataset("json", data_files=own, split="train", cache_dir=str(tmp_path / "cache"))
        assert [bool(sample["acc"]) for sample in samples] == [example.correct for example in found[task].examples]
        assert [sample["doc"]["prompt"] for sample in samples] == [example.prompt for example in found[task].examples]
        if scoring == "generation":
            assert [s["filtered_resps"][0] for s in samples] == [e.output for e in found[task].examples]


def test_files_that_cannot_be_written_are_an_error(tmp_path, data):
    tokenizer = make_tokenizer()
    collected = HarnessResults()
    config = EvaluationConfig(limit=1)
    evaluate(make_model(tokenizer), tokenizer, data, config, on_outcome=collected.add)
    (tmp_path / "out").write_text("a file in the way")
    with pytest.raises(OSError, match="lm-eval could not write"):
        collected.write(tmp_path / "out", model="m", evaluation=config)


def test_the_command_line_writes_them_too(tmp_path, data, capsys):
    output = tmp_path / "out"
    arguments = ["eval", "--model", "tiny", "--task", "boolq", "--data-dir", str(tmp_path / "data"), "--limit", "3"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--scoring", "loglikelihood", "--output", str(output), "--batch-size", "auto"])
    assert done.value.code == 0
    assert "lm_eval/" in capsys.readouterr().out
    written = [path.relative_to(output / "lm_eval") for path in (output / "lm_eval").rglob("*.json*")]
    assert {path.parts[0] for path in written} == {"tiny"}
    assert sorted(path.name.split("_")[0] for path in written) == ["results", "samples"]
    own = json.loads((output / "record.json").read_text())
    assert own["tasks"]["boolq"]["workload"]["tokens"] > 0
    assert own["metrics"]["evaluation/tokens"] == own["tasks"]["boolq"]["workload"]["tokens"]
