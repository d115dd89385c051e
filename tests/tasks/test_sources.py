import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from task_parts import record, write

from grass_ray.config import ConfigError, DataConfig, FolderSource, GeneratedSource, HubSource
from grass_ray.tasks.sources import check_data, load_test_rows, load_train_rows
from grass_ray.tasks.suites import SUITES, TASKS


def config(path, *tasks, **changes) -> DataConfig:
    return DataConfig(suite=TASKS[tasks[0]].suite, tasks=tasks, source=FolderSource(path=str(path)), **changes)


def put(folder, task, split, count=3, root="dataset", answer=None):
    answers = {"number": "7", "letter": "A", "labels": TASKS[task].labels[0] if TASKS[task].labels else ""}
    answer = answer or answers[TASKS[task].answer]
    rows = [record(answer, instruction=f"{task} {split} {n}?") for n in range(count)]
    return write(folder / root / TASKS[task].folder / f"{split}.json", rows)


def refused(data: DataConfig) -> str:
    with pytest.raises(ConfigError) as error:
        check_data(data)
    return str(error.value)


def test_generated_needs_nothing():
    data = DataConfig(source=GeneratedSource(train_rows=20, test_rows=10, seed=1))
    check_data(data)
    train, test = load_train_rows(data), load_test_rows("generated", data)
    assert (len(train.rows), len(test.rows)) == (20, 10)
    assert test.provenance["files"][0]["rows"] == 10
    assert load_train_rows(data) == train
    assert json.loads(json.dumps(train.provenance)) == train.provenance


def test_generated_source_refuses_other_tasks():
    message = refused(DataConfig(suite="arithmetic", tasks=("gsm8k",)))
    assert "makes only the task 'generated'" in message
    assert "--data-dir" in message


@pytest.mark.parametrize("root", ["dataset", ".", "llm-adapters/dataset"])
def test_a_folder_is_found_in_any_of_its_layouts(tmp_path, root):
    put(tmp_path, "boolq", "test", 2, root)
    put(tmp_path, "boolq", "train", 4, root)
    data = config(tmp_path, "boolq")
    check_data(data)
    assert len(load_test_rows("boolq", data).rows) == 2
    assert len(load_train_rows(data).rows) == 4


def test_the_mixture_is_taken_where_it_is_there(tmp_path):
    put(tmp_path, "gsm8k", "test")
    put(tmp_path, "gsm8k", "train")
    path = write(tmp_path / "ft-training_set/math_10k.json", [record("5"), record("A")])
    train = load_train_rows(config(tmp_path, "gsm8k"))
    assert len(train.rows) == 2
    assert train.provenance["description"] == "the mixture math_10k"
    assert train.provenance["files"][0]["name"] == "ft-training_set/math_10k.json"
    assert train.provenance["files"][0]["sha256"] == hash_of(path)


def hash_of(path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_the_larger_commonsense_mixture_comes_first(tmp_path):
    for name in ("commonsense_15k", "commonsense_170k"):
        write(tmp_path / f"ft-training_set/{name}.json", [record()])
    assert load_train_rows(config(tmp_path, "boolq")).provenance["description"] == "the mixture commonsense_170k"


@pytest.mark.parametrize(
    ("task", "name"), [("boolq", "commonsense_170k"), ("boolq", "commonsense_15k"), ("svamp", "math_10k")]
)
@pytest.mark.parametrize("root", ["ft-training_set", ".", "llm-adapters/ft-training_set"])
def test_every_mixture_is_read_from_its_file(tmp_path, task, name, root):
    answers = ["true", "option2"] if task == "boolq" else ["12.0", "B"]
    write(tmp_path / root / f"{name}.json", [record(answer) for answer in answers])
    provenance = load_train_rows(config(tmp_path, task)).provenance
    assert provenance["description"] == f"the mixture {name}"
    assert provenance["files"][0]["name"].endswith(f"{name}.json")
    assert provenance["rows"] == 2


def test_without_a_mixture_the_train_sets_are_put_together_and_shuffled(tmp_path):
    put(tmp_path, "boolq", "train", 30)
    put(tmp_path, "arc_easy", "train", 30)
    train = load_train_rows(config(tmp_path, "boolq", "arc_easy", "piqa"))
    first_words = [row.instruction.split()[0] for row in train.rows]
    assert Counter(first_words) == {"boolq": 30, "arc_easy": 30}
    assert len(set(first_words[:20])) == 2
    description = train.provenance["description"]
    assert "boolq (30), arc_easy (30)" in description
    assert "in place of commonsense_170k" in description
    assert "no train set of piqa" in description
    assert load_train_rows(config(tmp_path, "boolq", "arc_easy", "piqa")).rows == train.rows


def test_another_train_set_of_the_suite_stands_in(tmp_path):
    put(tmp_path, "svamp", "test")
    put(tmp_path, "gsm8k", "train")
    data = config(tmp_path, "svamp")
    check_data(data)
    provenance = load_train_rows(data).provenance
    assert "gsm8k (3)" in provenance["description"]
    assert "no train set of svamp" in provenance["description"]


@pytest.mark.parametrize("place", ["gsm8k", "../gsm8k", "dataset/gsm8k", "grade_school_math/data", "."])
def test_gsm8k_in_its_authors_form(tmp_path, place):
    line = json.dumps({"question": "How many?", "answer": "2+3 = <<2+3=5>>5\n#### 5"})
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / place / "train.jsonl", f"{line}\n{line}\n")
    write(folder / place / "test.jsonl", line)
    data = config(folder, "gsm8k")
    check_data(data)
    assert load_train_rows(data).rows[0].output == "2+3 = 5\nThe answer is 5."
    assert load_test_rows("gsm8k", data).provenance["files"][0]["name"] == f"{place}/test.jsonl".removeprefix("./")


def test_a_subset_is_random_and_the_same_every_time(tmp_path):
    put(tmp_path, "boolq", "train", 200)
    whole = load_train_rows(config(tmp_path, "boolq")).rows
    part = load_train_rows(config(tmp_path, "boolq", max_train_rows=40))
    assert part.rows == load_train_rows(config(tmp_path, "boolq", max_train_rows=40)).rows
    assert len(set(part.rows)) == 40
    assert set(part.rows) <= set(whole)
    assert part.rows != whole[:40]
    assert (part.provenance["rows"], part.provenance["rows_available"]) == (40, 200)
    assert part.provenance["rows_sha256"] != load_train_rows(config(tmp_path, "boolq")).provenance["rows_sha256"]


def test_missing_benchmarks_are_one_error_that_lists_what_is_there(tmp_path):
    put(tmp_path, "boolq", "test")
    put(tmp_path, "boolq", "train")
    message = refused(config(tmp_path, "boolq", "siqa", "hellaswag"))
    assert "no test set of siqa (dataset/social_i_qa/test.json), hellaswag" in message
    assert "It holds: test sets of boolq; train sets of boolq" in message


def test_nothing_to_train_on(tmp_path):
    put(tmp_path, "boolq", "test")
    message = refused(config(tmp_path, "boolq"))
    assert "nothing to train commonsense on" in message
    assert "commonsense_170k.json" in message


def test_an_empty_folder_an_absent_one_and_a_file(tmp_path):
    assert "It holds: no benchmark files" in refused(config(tmp_path, "boolq"))
    assert "does not exist" in refused(config(tmp_path / "absent", "boolq"))
    assert "is a file" in refused(config(write(tmp_path / "file", "x"), "boolq"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_row_is_found_before_any_model_is_loaded(tmp_path, split):
    put(tmp_path, "boolq", "test")
    put(tmp_path, "boolq", "train")
    put(tmp_path, "boolq", split, answer="perhaps")
    message = refused(config(tmp_path, "boolq"))
    assert f"{split}.json: 3 of 3 rows" in message
    assert "unknown label 'perhaps'" in message


@pytest.mark.parametrize(
    ("suite", "tasks", "words"),
    [
        ("commonsens", ("boolq",), "Did you mean 'commonsense'"),
        ("arithmetic", ("boolq",), "unknown arithmetic task 'boolq'"),
        ("arithmetic", (), "no task given"),
        ("arithmetic", ("gsm8k", "gsm8k"), "named twice"),
    ],
)
def test_suites_and_tasks_are_checked(suite, tasks, words, tmp_path):
    assert words in refused(DataConfig(suite=suite, tasks=tasks, source=FolderSource(path=str(tmp_path))))


def test_the_hub_says_at_once_what_it_does_not_serve():
    message = refused(DataConfig(suite="arithmetic", tasks=("svamp", "gsm8k"), source=HubSource()))
    assert "does not serve svamp" in message
    assert "--data-dir" in message
    check_data(DataConfig(suite="arithmetic", tasks=("gsm8k", "aqua"), source=HubSource()))


def test_a_hub_that_cannot_be_reached_is_a_clear_error(tmp_path):
    code = (
        "from grass_ray.config import *; from grass_ray.tasks.sources import load_test_rows\n"
        "try: load_test_rows('boolq', DataConfig(suite='commonsense', tasks=('boolq',), source=HubSource()))\n"
        "except ConfigError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "cannot load google/boolq for boolq" in done.stdout
    assert "--data-dir" in done.stdout


def test_every_published_file_at_hand_is_valid(real_data):
    from grass_ray.tasks.folder import DataFolder

    folder = DataFolder(str(real_data))
    found = {key for key, task in TASKS.items() if folder.find_task_file(task, "test")}
    assert {"boolq", "arc_easy", "gsm8k", "aqua"} <= found
    for suite in ("commonsense", "arithmetic"):
        tasks = [key for key in SUITES[suite].tasks if key in found]
        data = config(real_data, *tasks)
        check_data(data)
        for key in tasks:
            assert len(load_test_rows(key, data).rows) == TASKS[key].test_rows, key


def test_arithmetic_works_with_only_gsm8k_to_train_on(real_data):
    for path in (real_data, real_data / "llm-adapters"):
        train = load_train_rows(config(path, "gsm8k", "aqua", max_train_rows=100))
        assert train.provenance["rows_available"] == 7473
        assert "gsm8k (7473)" in train.provenance["description"]
        assert not any("<<" in row.output for row in train.rows)


def test_skipped_rows_are_in_the_provenance(tmp_path):
    rows = [record("true", instruction=f"{n}?") for n in range(9)] + [record("perhaps"), {}]
    for split in ("train", "test"):
        write(tmp_path / f"dataset/boolq/{split}.json", rows)
    refused(config(tmp_path, "boolq"))
    data = config(tmp_path, "boolq", broken_rows="skip")
    check_data(data)
    for loaded in (load_train_rows(data), load_test_rows("boolq", data)):
        assert len(loaded.rows) == 9
        assert (loaded.provenance["broken_rows"], loaded.provenance["rows_skipped"]) == ("skip", 2)
        (entry,) = loaded.provenance["files"]
        assert (entry["rows"], entry["rows_skipped"]) == (9, 2)
        assert entry["mistakes"][0].startswith("row 10: unknown label 'perhaps'")


def test_every_real_train_row_loads_and_both_forms_of_gsm8k_agree(real_data):
    from grass_ray.tasks.folder import DataFolder

    sizes = {"boolq": 9427, "arc_easy": 2251, "arc_challenge": 1119, "openbookqa": 4957}
    train = load_train_rows(config(real_data, *sizes))
    assert train.provenance["rows"] == sum(sizes.values())
    assert train.provenance["rows_skipped"] == 0
    assert all(f"{key} ({rows})" in train.provenance["description"] for key, rows in sizes.items())
    folder, task = DataFolder(str(real_data)), TASKS["gsm8k"]
    published = folder.read(real_data / "llm-adapters/dataset/gsm8k/test.json", task).rows
    original = folder.read(real_data / "gsm8k/test.jsonl", task).rows
    told, wanted = (
        {" ".join(row.instruction.split()): float(row.answer.replace(",", "")) for row in rows}
        for rows in (published, original)
    )
    assert len(told) == 1319
    assert told == wanted
