"""``--reuse``: what has run before is taken over, and nothing that could give other numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from harness_folder import write_harness_folder
from mlflow import MlflowClient
from own_methods import write_methods
from safetensors.torch import load_file, save_file
from small import REPOSITORY

from grass_ray.cluster.job import Job, SweepContext
from grass_ray.cluster.resources import TrialResources
from grass_ray.cluster.reuse import Reuse, TrialMachine
from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError, ModelConfig, RunConfig
from grass_ray.execute import execute
from grass_ray.experiment.flags import SweepOptions
from grass_ray.experiment.plan import SweepPlan
from grass_ray.method_files import methods_with
from grass_ray.results.connection import default_tracking_uri
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.provenance import hardware, versions
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render
from grass_ray.results.store import load_records, trial_tags
from grass_ray.results.tracker import Tracker
from grass_ray.tasks.conversations import SIMPLE
from grass_ray.training import inputs
from grass_ray.training.models import load_model

pytestmark = pytest.mark.long

MACHINE = TrialMachine(hardware=hardware("cpu"), versions=versions())


def chat(number: int, answer: str) -> str:
    question = {"role": "user", "content": f"What is {number} + 1?"}
    return json.dumps({"messages": [question, {"role": "assistant", "content": answer}]})


@dataclass(frozen=True, kw_only=True)
class Place:
    """Everything that a run names, in one folder, and one run that finished."""

    folder: Path
    config: RunConfig
    record: RunRecord

    @property
    def uri(self) -> str:
        return default_tracking_uri(self.folder)

    def plan(self, sweep_id: str, config: RunConfig) -> SweepPlan:
        return SweepPlan(name="later", sweep_id=sweep_id, question="?", tracking_uri=self.uri, trials=(config,))

    def take_over(
        self,
        storage: Path,
        config: RunConfig | None = None,
        *,
        machine: TrialMachine = MACHINE,
        resources: TrialResources | None = None,
        keep_checkpoints: bool = False,
    ) -> tuple[bool, str]:
        """Whether a later sweep takes the run over, and what it said."""
        config = config or self.config
        context = SweepContext(
            sweep="later",
            sweep_id="2",
            storage=str(storage),
            resources=resources or TrialResources(cpus=1, gpus=0),
            keep_checkpoints=keep_checkpoints,
        )
        said: list[str] = []
        reuse = Reuse(
            self.plan("2", config), Storage(str(storage)), context, machine, lambda key, text: said.append(text)
        )
        return bool(reuse.take_over([(config, None)])), "; ".join(said)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    (folder / "train.jsonl").write_text("".join(chat(n, f"It is {n + 1}.") + "\n" for n in range(12)))
    (folder / "test.jsonl").write_text("".join(chat(n, f"It is {n + 1}.") + "\n" for n in range(20, 24)))
    (folder / "chat.jinja").write_text(SIMPLE)
    (folder / "other.txt").write_text("The river runs to the south.\n\nThe market opens at six.\n")
    write_harness_folder(folder / "tasks", rows=4)
    tiny = load_model(ModelConfig(name="tiny"))
    tiny.model.save_pretrained(folder / "model")
    tiny.tokenizer.save_pretrained(folder / "model")
    methods = methods_with(write_methods(folder / "own"))
    source = {
        "kind": "dataset",
        "name": "chats",
        "path": str(folder / "train.jsonl"),
        "test": str(folder / "test.jsonl"),
    }
    config = RunConfig(method=methods["top-heavy"].config).override(
        {
            "model.name": str(folder / "model"),
            "data.suite": "chats",
            "data.tasks": ["chats"],
            "data.source": source | {"chat_template": str(folder / "chat.jinja")},
            "evaluation.scoring": "loss",
            "evaluation.forgetting": str(folder / "other.txt"),
            "evaluation.lm_eval.tasks": [str(folder / "tasks") + "/"],
            "training.steps": 2,
            "training.warmup_steps": 0,
            "training.batch_size": 2,
        }
    )
    context = SweepContext(
        sweep="first", sweep_id="1", storage=str(folder / "first"), resources=TrialResources(cpus=1, gpus=0)
    )
    result = execute(config, threads=1)
    record = result.record(Job.of(config, context).run_context)
    assert record.status == "finished", record.failure
    files = folder / "first" / config.folder
    files.mkdir(parents=True)
    config.save(files / "config.yaml")
    record.save(files / "record.json")
    result.write_files(files)
    tracker = Tracker(default_tracking_uri(folder), "first", folder / "artifacts")
    tracker.open()
    tags = trial_tags(config.to_dict(), sweep="first", stage="trial", folder=str(files))
    tracker.finish(tracker.start_trial("1", config.fingerprint, config.name, tags, config.flatten()), record, files)
    return Place(folder=folder, config=config, record=record)


def test_what_has_run_before_is_taken_over_with_its_files_and_says_so(place: Place, tmp_path: Path) -> None:
    assert place.take_over(tmp_path) == (True, "")
    folder = tmp_path / place.config.folder
    assert {path.name for path in folder.iterdir()} >= {
        *("config.yaml", "record.json", "examples.jsonl", "lm_eval_examples.jsonl", "engagement.json")
    }
    record = RunRecord.load(folder / "record.json")
    assert record.reused_from == place.record.run_id == f"1-{place.config.fingerprint}"
    assert (record.sweep, record.sweep_id, record.run_id) == ("later", "2", f"2-{place.config.fingerprint}")
    own = {"run_id", "sweep", "sweep_id", "reused_from"}
    assert record.model_dump_json(exclude=own) == place.record.model_dump_json(exclude=own)
    (table,) = build_leaderboard([record])
    assert f"taken over from earlier runs, not run again: top-heavy ({place.record.run_id})" in render([table])


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def other_weights(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


CHANGES = {
    "a training row": ("train.jsonl", edit("It is 3.", "It is 4."), "the training rows are others"),
    "a test row": ("test.jsonl", edit("It is 22.", "It is 3."), "the test rows of chats are others"),
    "weights": ("model/model.safetensors", other_weights, "the base model's weights are others"),
    "the tokenizer": ("model/tokenizer_config.json", edit("{", '{"note": 1, '), "the files of the model are others"),
    "the chat template": ("chat.jinja", edit("capitalize()", "upper()"), "the lines of the chat template are others"),
    "the unrelated text": ("other.txt", edit("six", "ten"), "the passages of evaluation.forgetting are others"),
    "a task's answer": ("tasks/rows.json", edit('"gold": 0', '"gold": 1'), "the tasks of lm-eval are others"),
    "a task's code": ("tasks/parts.py", edit("def odd", "N = 1\n\n\ndef odd"), "the tasks of lm-eval are others"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_behind_the_same_path_is_run_again(what: str, place: Place, tmp_path: Path) -> None:
    file, change, words = CHANGES[what]
    before = (place.folder / file).read_bytes()
    try:
        change(place.folder / file)
        taken, said = place.take_over(tmp_path)
    finally:
        (place.folder / file).write_bytes(before)
    assert not taken
    assert words in said
    assert said.startswith("has run before, and runs again: ")
    assert not (tmp_path / place.config.folder).exists()


def test_another_version_machine_or_number_of_threads_is_run_again(place: Place, tmp_path: Path) -> None:
    newer = replace(MACHINE, versions=MACHINE.versions | {"torch": "99.0"})
    assert f"torch was {MACHINE.versions['torch']}, is 99.0" in place.take_over(tmp_path, machine=newer)[1]
    other = replace(MACHINE, hardware="NVIDIA H100")
    assert "is NVIDIA H100" in place.take_over(tmp_path, machine=other)[1]
    two = TrialResources(cpus=2, gpus=0)
    assert "CPU threads were 1, are 2" in place.take_over(tmp_path, resources=two)[1]
    more = TrialResources(cpus=1, gpus=0, workers=2)
    assert "workers were 1, are 2" in place.take_over(tmp_path, resources=more)[1]
    assert list(tmp_path.iterdir()) == []


def test_other_code_is_run_again(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited = write_methods(tmp_path / "own", code=(place.folder / "own" / "top_heavy.py").read_text() + "# later\n")
    method = methods_with(edited)["top-heavy"].config
    config = place.config.model_copy(update={"method": method})
    assert place.take_over(tmp_path / "a", config) == (False, ""), (
        "another configuration, since it holds the code's hash"
    )
    monkeypatch.setattr(inputs, "package_sha256", lambda: "0" * 64)
    taken, said = place.take_over(tmp_path / "b")
    assert not taken
    assert "the files of grass_ray are others" in said


def test_what_was_trained_is_taken_over_only_if_it_was_kept(place: Place, tmp_path: Path) -> None:
    taken, said = place.take_over(tmp_path, keep_checkpoints=True)
    assert not taken
    assert "what it trained was not kept (--keep-checkpoints)" in said
    kept = place.folder / "first" / place.config.folder / "checkpoint"
    kept.mkdir()
    try:
        (kept / "weights.safetensors").write_bytes(b"weights")
        assert place.take_over(tmp_path, keep_checkpoints=True) == (True, "")
    finally:
        (kept / "weights.safetensors").unlink()
        kept.rmdir()
    assert (tmp_path / place.config.folder / "checkpoint" / "weights.safetensors").read_bytes() == b"weights"


def test_trials_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="those of --scheduler asha depend on each other"):
        SweepOptions(reuse=True, scheduler="asha").check()


def test_a_sweep_takes_over_what_has_run_and_runs_the_rest(tmp_path: Path) -> None:
    storage = tmp_path / "results"

    def sweep(*flags: str) -> str:
        command = [
            *(sys.executable, str(REPOSITORY / "tests" / "mini_sweep.py"), "--methods", "full", "--steps", "4"),
            *("--set", "training.checkpoint_every_steps=null", "--storage-path", str(storage), "--cpus-per-trial", "1"),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *flags], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = sweep()
    later = sweep("--reuse", "--seeds", "0", "1")
    base, full, new = "base-tiny-generated-s0", "full-tiny-generated-s0", "full-tiny-generated-s1"
    first_id, later_id = sorted(path.name for path in (storage / "mini").iterdir())
    for name in (base, full):
        assert name in first
        assert f"{name} " in later
        assert any(name in line and f"(taken over from {first_id}-" in line for line in later.splitlines())
    assert not any(f"] {name} " in line and "starting" in line for name in (base, full) for line in later.splitlines())
    assert any(f"] {new} " in line and "starting" in line for line in later.splitlines())
    assert "taken over from earlier runs, not run again" in later
    assert "3 of 3 done" in later
    records = {(record.sweep_id, record.name): record for record in load_records(f"sqlite:///{storage}/mlflow.db")}
    assert [records[later_id, name].reused_from is None for name in (base, full, new)] == [False, False, True]
    assert records[later_id, full].weights_sha256 == records[first_id, full].weights_sha256
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("mini").experiment_id], "tags.reused_from LIKE '%'")
    assert len(runs) == 2
    assert {run.info.status for run in runs} == {"FINISHED"}
    (trained,) = (run.info.run_id for run in runs if run.info.run_name == full)
    assert len(client.get_metric_history(trained, "train/loss")) == 4
