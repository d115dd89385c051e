"""One way to carry out a run: when its listeners are asked, what ends it, and what its record says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import short_run

from grass_ray.config import ConfigError
from grass_ray.execute import Action, Ending, Listener, RunContext, execute
from grass_ray.results.record import RunRecord
from grass_ray.training.report import STALL_S, TOKENS, TRAIN_STEP, StepReport
from grass_ray.training.run import Run

CONTEXT = RunContext(sweep="sweep", sweep_id="id", run_id="id-run")


class Notes(Listener):
    """Writes down what it is told, and wants something after one step."""

    def __init__(self, wish: Action = Action.GO, after: int = 2) -> None:
        self.said: list[str] = []
        self._wish, self._after = wish, after

    def on_start(self, run: Run) -> None:
        self.said.append("start")

    def on_step(self, run: Run, report: StepReport) -> Action:
        self.said.append(f"step {report.step}")
        return self._wish if report.step == self._after else Action.GO

    def after_step(self, run: Run, report: StepReport, action: Action) -> None:
        self.said.append(action.name)

    def on_trained(self, run: Run) -> None:
        self.said.append("trained")

    def on_evaluation(self, task: str, done: int, total: int) -> None:
        self.said.append(task)

    def on_end(self) -> None:
        self.said.append("end")


def test_listeners_hear_of_everything_in_order_and_the_record_survives_the_file(tmp_path: Path) -> None:
    notes, other = Notes(Action.SAVE), Notes()
    config = short_run("full", "evaluation.limit=2", steps=3)
    result = execute(config, listeners=[notes, other])
    assert notes.said == other.said
    assert notes.said[:8] == ["start", "step 1", "GO", "step 2", "SAVE", "step 3", "GO", "trained"]
    assert set(notes.said[8:-1]) == {"generated"}
    assert notes.said[-1] == "end"
    record = result.record(CONTEXT)
    assert (record.status, record.failure, record.threads) == ("finished", None, torch.get_num_threads())
    assert result.run is not None
    assert record.weights_sha256 == result.run.weights_sha256()
    record.save(tmp_path / "record.json")
    assert RunRecord.load(tmp_path / "record.json").model_dump_json() == record.model_dump_json()
    result.write_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "record.json", "examples.jsonl", "engagement.json", "engagement.txt",
    }  # fmt: skip


def test_a_checkpoint_is_due_at_every_so_many_steps_and_at_the_last() -> None:
    notes = Notes()
    execute(short_run("full", "training.checkpoint_every_steps=2", "evaluation.limit=1", steps=3), listeners=[notes])
    assert [word for word in notes.said if word in Action.__members__] == ["GO", "SAVE", "SAVE"]


@pytest.mark.parametrize("until", [None, 2])
def test_a_run_that_is_stopped_is_not_evaluated(until: int | None) -> None:
    notes = Notes(Action.GO if until else Action.STOP)
    result = execute(short_run("full", steps=3), listeners=[notes], until=until)
    assert notes.said == ["start", "step 1", "GO", "step 2", "GO" if until else "STOP", "trained", "end"]
    record = result.record(CONTEXT)
    assert (record.status, record.tasks, record.weights_sha256) == ("stopped", {}, None)
    assert [step for step, _ in record.series["train/loss"]] == [1, 2]


def test_a_failure_of_training_is_an_outcome_and_any_other_error_only_where_a_listener_says_so() -> None:
    failed = execute(short_run("full", "method.optimizer.lr=1e30")).record(CONTEXT)
    assert failed.status == "failed"
    assert "became" in (failed.failure or "")

    class Forgiving(Notes):
        def on_error(self, error: BaseException) -> Ending | None:
            return ("failed", f"no run: {error}") if isinstance(error, ConfigError) else None

    def refuse() -> Run:
        raise ConfigError("no data")

    notes, threads = Notes(), torch.get_num_threads()
    with pytest.raises(ConfigError, match="no data"):
        execute(short_run("full"), prepare=refuse, listeners=[notes], threads=threads + 1)
    assert notes.said == ["end"]
    assert torch.get_num_threads() == threads
    result = execute(short_run("full"), prepare=refuse, listeners=[Forgiving()])
    assert (result.run, result.record(CONTEXT).failure) == (None, "no run: no data")


def test_a_record_has_the_raw_facts_of_each_step() -> None:
    result = execute(short_run("grass", "evaluation.limit=1", steps=4))
    record = result.record(CONTEXT)
    assert result.run is not None
    probing = result.run.state.probed
    assert probing > 0
    steps = list(range(1, probing + 5))
    assert record.probing_steps() == set(range(1, probing + 1))
    assert record.train_steps(steps) == {step: max(0, step - probing) for step in steps}
    assert [step for step, _ in record.series[TRAIN_STEP]] == steps
    speeds, seconds = dict(record.series["throughput/tokens_per_second"]), dict(record.series["time/step_s"])
    for step, tokens in record.series[TOKENS]:
        assert tokens == int(tokens) == pytest.approx(speeds[step] * seconds[step])
    assert sum(record.step_stalls().values()) == pytest.approx(record.series["offload/exposed_s"][-1][1])
    assert STALL_S in record.series
