"""Configurations, overrides, method files, task files, settings, plans and words of the command line, broken at random.

Every outcome is a valid value or one :class:`ConfigError`; ``make reliability`` runs this with many more examples.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from broken import JUNK, TEXT, changed, outcome, yaml_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small import short_run

from grass_ray.cli import main
from grass_ray.commands.train import build_config
from grass_ray.config import ConfigError, RunConfig
from grass_ray.experiment.flags import SweepOptions
from grass_ray.experiment.plan import SweepPlan, plan_trials
from grass_ray.experiment.space import LogUniform
from grass_ray.experiment.sweep import Sweep
from grass_ray.method_files import methods_with
from grass_ray.methods import METHODS
from grass_ray.overrides import as_yaml, flatten
from grass_ray.paths import with_absolute_paths
from grass_ray.results.searches import read_settings
from grass_ray.tasks.custom import read_task_file
from grass_ray.training.checks import check_run

NAMES = st.sampled_from(list(METHODS))
PLAIN = {name: RunConfig(method=row.config).to_dict() for name, row in METHODS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def agrees_with_itself(config: RunConfig) -> None:
    """What was accepted is written, read back equal, and has a name and a fingerprint."""
    again = RunConfig.parse(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.fingerprint == config.fingerprint
    assert "/" not in config.folder
    assert config.folder not in (".", "..")
    assert all(isinstance(text, str) for text in config.flatten().values())


@given(NAMES.flatmap(lambda name: yaml_of(PLAIN[name])))
def test_a_configuration(folder: Path, content: bytes) -> None:
    (folder / "config.yaml").write_bytes(content)
    config = outcome(lambda: RunConfig.from_yaml(folder / "config.yaml"))
    if config is not None:
        agrees_with_itself(config)
        outcome(lambda: with_absolute_paths(config))


KEYS = {name: list(flatten(values)) for name, values in PLAIN.items()}


@st.composite
def assignments(draw: st.DrawFn, name: str) -> list[str]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.one_of(st.sampled_from(KEYS[name]), st.sampled_from(KEYS[name]), TEXT))
        value = draw(st.one_of(JUNK.map(_yaml), JUNK.map(_yaml), TEXT))
        found.append(f"{key}{draw(st.sampled_from(['=', '=', '=', '', '==', ':']))}{value}")
    return found


def _yaml(value: Any) -> str:
    return as_yaml(value)


@given(NAMES.flatmap(lambda name: st.tuples(st.just(name), assignments(name))))
def test_overrides(folder: Path, given: tuple[str, list[str]]) -> None:
    name, words = given
    options: dict[str, Any] = {"base": None, "model": "tiny", "tasks": None, "data_dir": None}
    config = outcome(lambda: build_config(name, assignments=words, **options))
    if config is not None:
        agrees_with_itself(config)


@given(NAMES.flatmap(lambda name: st.tuples(st.just(name), assignments(name))))
def test_overrides_of_a_run_up_to_its_weights(folder: Path, given: tuple[str, list[str]]) -> None:
    """All checks of a run, which end where weights would be loaded."""
    name, words = given
    kept = [word for word in words if not word.startswith(("model.name", "data.source.train", "data.source.test"))]

    def check() -> None:
        check_run(short_run(name, *kept))

    outcome(check)


ROWS = [{"name": "mine", "summary": "one of mine", **PLAIN["grass"]["method"]}]
ROWS[0]["name"] = "mine"


@given(yaml_of([*ROWS, {"name": "other", "summary": "x", "sampler": {"kind": "import", "target": "own_methods:Top"}}]))
def test_a_method_file(folder: Path, content: bytes) -> None:
    (folder / "methods.yaml").write_bytes(content)
    methods = outcome(lambda: methods_with(folder / "methods.yaml"))
    if methods is not None:
        assert methods.keys() >= METHODS.keys()


TASK = {
    "name": "mine",
    "answer": "labels",
    "labels": ["yes", "no"],
    "max_new_tokens": 4,
    "instruction": "Is it?",
    "train": "train.jsonl",
    "test": "test.jsonl",
    "fields": {"input": "text", "answer": "label"},
}


@given(yaml_of(TASK))
def test_a_task_file(folder: Path, content: bytes) -> None:
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text('{"text": "It is.", "label": "yes"}\n')
    (folder / "task.yaml").write_bytes(content)
    source = outcome(lambda: read_task_file(folder / "task.yaml"))
    if source is not None:
        assert Path(source.test).is_file()


@given(yaml_of({"methods": {"grass": ["method.optimizer.lr=0.001", "method.sampler.period=2"], "full": []}}))
def test_the_settings_of_a_search(folder: Path, content: bytes) -> None:
    (folder / "best.yaml").write_bytes(content)
    settings = outcome(lambda: read_settings(folder / "best.yaml"))
    if settings is not None:
        options: dict[str, Any] = {"base": None, "model": "tiny", "tasks": None, "data_dir": None}
        for method, own in settings.items():
            outcome(lambda method=method, own=own: build_config(method, assignments=own, **options))


def _plans() -> list[dict[str, Any]]:
    sweep = Sweep(
        name="mini",
        question="Which?",
        models=("tiny",),
        methods=("full", "grass"),
        tasks=("generated",),
        settings={"data.validation_rows": 8},
        space={"method.sampler.period": LogUniform(low=1, high=9, whole=True)},
    )
    asked = (SweepOptions(seeds=(0, 1)), SweepOptions(search="random", num_samples=2, seeds=(0,)))
    found = []
    for options in asked:
        trials, search = plan_trials(sweep, options)
        plan = SweepPlan(
            name="mini", sweep_id="1", question="?", tracking_uri="sqlite:///a", trials=trials, search=search
        )
        found.append(yaml.safe_load(plan.to_yaml()))
    return found


@given(st.sampled_from(_plans()).flatmap(yaml_of))
def test_a_sweeps_plan(content: bytes) -> None:
    text = content.decode("utf-8", errors="replace")
    plan = outcome(lambda: SweepPlan.from_yaml(text, "sweep.yaml"))
    if plan is not None:
        outcome(lambda: plan.search and plan.search.check())
        outcome(lambda: (plan.num_trials, plan.configs, plan.search and plan.search.describe()))
        assert SweepPlan.from_yaml(plan.to_yaml(), "again").to_yaml() == plan.to_yaml()


WORDS = st.sampled_from(
    [
        *(
            "ls",
            "methods",
            "tasks",
            "models",
            "train",
            "grass",
            "full",
            "lora",
            "plan",
            "verify",
            "reproduce",
            "export",
        ),
        *("leaderboard", "check-method", "power", "--set", "--model", "tiny", "--dry-run", "--task", "generated"),
        *("--steps", "2", "--lr", "0", "-1", "nan", "--seq-len", "8", "--methods", "--config", "--output", "--format"),
        *("json", "--help", "--tracking-uri", "sqlite:///nowhere.db", "method.sampler.period=2", "training.steps=1"),
    ]
)


@given(st.lists(st.one_of(WORDS, WORDS, WORDS, TEXT), max_size=6))
def test_words_of_the_command_line(folder: Path, words: list[str]) -> None:
    """Words of every kind end with exit code 0 or 2, and mistakes with one message."""
    place = folder / "elsewhere"
    place.mkdir(exist_ok=True)
    if words[:1] in (["doctor"], ["ui"], ["chat"], ["eval"]) or (words[:1] == ["train"] and "--dry-run" not in words):
        words = ["ls", *words[1:]]
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        for context in (contextlib.chdir(place), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said)):
            stack.enter_context(context)
        ended = stack.enter_context(pytest.raises(SystemExit))
        main(words)
    assert ended.value.code in (0, 1, 2), said.getvalue()
    assert "Traceback" not in said.getvalue()


def test_the_property_finds_an_error_of_another_kind() -> None:
    with pytest.raises(ZeroDivisionError):
        outcome(lambda: 1 // 0)
    with pytest.raises(AssertionError, match="without words"):
        outcome(lambda: (_ for _ in ()).throw(ConfigError("")))


def test_changes_reach_every_depth() -> None:
    """The places that are changed are spread over the whole value, so that no key is out of reach."""
    seen: set[str] = set()

    @settings(max_examples=100)
    @given(changed(PLAIN["grass"], most=1))
    def look(value: Any) -> None:
        if isinstance(value, dict):
            flat = flatten(value)
            seen.update(key for key, was in flatten(PLAIN["grass"]).items() if repr(flat.get(key, ...)) != repr(was))

    look()
    assert len({key.count(".") for key in seen}) >= 3
