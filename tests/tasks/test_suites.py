import subprocess
import sys

import pytest

from grass_ray.config import ConfigError
from grass_ray.tasks.suites import SUITES, TASKS, check_tasks, resolve_tasks


def test_the_three_suites_and_fifteen_tasks():
    assert list(SUITES) == ["commonsense", "arithmetic", "generated"]
    assert SUITES["commonsense"].tasks == (
        "boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    )  # fmt: skip
    assert SUITES["arithmetic"].tasks == ("multiarith", "gsm8k", "addsub", "aqua", "singleeq", "svamp")
    assert SUITES["generated"].tasks == ("generated",)
    assert len(TASKS) == 15
    assert all(key == task.key and key in SUITES[task.suite].tasks for key, task in TASKS.items())


def test_clean_average_leaves_out_what_mawps_contains():
    assert SUITES["arithmetic"].clean_tasks == ("gsm8k", "aqua", "svamp")
    assert SUITES["commonsense"].clean_tasks == SUITES["commonsense"].tasks


def test_only_number_tasks_have_no_labels():
    for task in TASKS.values():
        assert (task.answer == "number") == (not task.labels), task.key


@pytest.mark.parametrize(
    ("names", "suite", "tasks"),
    [
        (["arithmetic"], "arithmetic", SUITES["arithmetic"].tasks),
        (["generated"], "generated", ("generated",)),
        (["boolq"], "commonsense", ("boolq",)),
        (["svamp", "gsm8k"], "arithmetic", ("svamp", "gsm8k")),
        (["gsm8k", "gsm8k"], "arithmetic", ("gsm8k",)),
    ],
)
def test_resolve(names, suite, tasks):
    assert resolve_tasks(names) == (suite, tasks)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], ["no task given", "commonsense", "svamp"]),
        (["gsm8"], ["unknown task or suite 'gsm8'", "available", "Did you mean 'gsm8k'?"]),
        (["boolq", "nope", "nada"], ["'nope'", "'nada'"]),
        (["boolq", "gsm8k"], ["2 suites", "commonsense", "arithmetic"]),
        (["arithmetic", "gsm8k"], ["arithmetic is a whole suite"]),
    ],
)
def test_resolve_refuses(names, words):
    with pytest.raises(ConfigError) as error:
        resolve_tasks(names)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_task_of_another_suite_is_refused():
    with pytest.raises(ConfigError, match="unknown arithmetic task 'boolq'"):
        check_tasks("arithmetic", ("boolq",))


def test_importing_suites_and_sources_loads_no_torch_and_no_datasets():
    code = (
        "import sys, grass_ray.tasks.suites, grass_ray.tasks.sources, grass_ray.tasks.evaluation;"
        "print([name for name in ('torch', 'datasets', 'transformers', 'lm_eval') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
