"""Bad input to a sweep: one readable message, exit code 2, no traceback, nothing started and nothing written."""

import json
import subprocess
import sys
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import pytest
from mini_sweep import SWEEP
from small import REPOSITORY

from grass_ray.cli import main as command_line
from grass_ray.commands.sweep import main
from grass_ray.config import ConfigError, EvaluationConfig, RunConfig, TrainingConfig
from grass_ray.experiment.flags import SweepOptions, TrialFlags
from grass_ray.experiment.plan import plan_trials
from grass_ray.experiment.sweep import Preset, Sweep
from grass_ray.training import checks

SCRIPT = REPOSITORY / "tests" / "mini_sweep.py"
ROWS = [{"instruction": "Is it so?", "input": "", "output": "the correct answer is true", "answer": "true"}]


def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, *flags: str, sweep: Sweep = SWEEP) -> str:
    with pytest.raises(SystemExit) as stop:
        main(sweep, ["--storage-path", str(tmp_path / "results"), *flags])
    assert stop.value.code == 2
    assert not (tmp_path / "results" / sweep.name).exists()
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "gras"], "unknown method 'gras'; available: base, full"),
        (["--models", "tinny"], "tinny"),
        (["--tasks", "boolk"], "boolk"),
        (["--tasks", "boolq", "gsm8k"], "arithmetic"),
        (["--set", "method.sampler.num_active_layers=0"], "greater than or equal to 1"),
        (["--set", "method.sampler.num_active_layers=5"], "4"),
        (["--set", "method.sampler.perod=5"], "no method of this sweep has the key"),
        (["--set", "training.steps"], "write it as dotted.key=value"),
        (["--num-samples", "0"], "--num-samples 0: give 1 or more"),
        (["--machines", "0"], "--machines 0: give 1 or more"),
        (["--gpu-memory", "0.5"], "--gpu-memory 0.5: give more than the 0.5 GiB of a process"),
        (["--parallel", "shard"], "--parallel shard needs --workers-per-trial 2 or more"),
        (["--parallel", "shard", "--workers-per-trial", "2", "--methods", "galore"], "galore updates whole matrices"),
        (["--min-workers-per-trial", "0"], "--min-workers-per-trial 0: give 1 or more"),
        (["--min-workers-per-trial", "2"], "--min-workers-per-trial 2: give at most --workers-per-trial, which is 1"),
        (
            ["--parallel", "shard", "--workers-per-trial", "2", "--min-workers-per-trial", "1"],
            "--parallel shard needs --min-workers-per-trial 2 or more",
        ),
        (
            ["--workers-per-trial", "4", "--min-workers-per-trial", "2", "--set", "training.accumulation_steps=4"],
            "2 to 4 workers share the micro-batches of every step, so training.accumulation_steps must be a multiple "
            "of 12, not 4",
        ),
        (
            [
                "--workers-per-trial",
                "2",
                "--min-workers-per-trial",
                "1",
                "--set",
                "training.accumulation_steps=2",
                "training.checkpoint_every_steps=null",
            ],
            "set training.checkpoint_every_steps=50",
        ),
        (["--max-failures", "-1"], "--max-failures -1: give 0 or more"),
        (["--search", "random"], "--search random needs --num-samples"),
        (["--data-dir", "/nowhere"], "has no effect"),
        (["--tasks", "boolq", "--data-dir", "/nowhere"], "--data-dir /nowhere is not a folder"),
        (["--storage-path", "nonsense://x"], "cannot use the storage path"),
        (["--resume"], "nothing to resume"),
        (["--tracking-uri", "http://127.0.0.1:9"], "does not answer"),
    ],
)
def test_a_mistake_is_one_message(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = fails(capsys, tmp_path, *flags)
    assert text.startswith("error: ")
    assert message in text


def test_a_resumed_sweep_carries_its_trials_out_as_before_unless_flags_say_otherwise() -> None:
    given = SweepOptions(workers_per_trial=4, min_workers_per_trial=2, parallel="shard", keep_checkpoints=True)
    saved = TrialFlags(**given.trial_flags)
    assert SweepOptions().resuming(saved) == given
    fewer = SweepOptions(workers_per_trial=2, memory_check=False).resuming(saved)
    assert (fewer.workers, fewer.min_workers, fewer.parallelism) == (2, 2, "shard")
    assert fewer.keep_checkpoints
    assert not fewer.memory_check
    with pytest.raises(ConfigError, match="--min-workers-per-trial 2: give at most --workers-per-trial, which is 1"):
        SweepOptions(workers_per_trial=1).resuming(saved)
    one = SweepOptions(workers_per_trial=1, min_workers_per_trial=1, parallel="replicate").resuming(saved)
    assert (one.workers, one.min_workers, one.parallelism) == (1, 1, "replicate")


def test_a_data_folder_without_the_task_and_a_broken_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "data" / "dataset" / "boolq"
    folder.mkdir(parents=True)
    (folder / "test.json").write_text(json.dumps(ROWS))
    (folder / "train.json").write_text("[{")
    data = ["--data-dir", str(tmp_path / "data")]
    sweep = replace(SWEEP, data=None)
    assert "piqa" in fails(capsys, tmp_path, "--tasks", "piqa", *data, sweep=sweep)
    assert "train.json" in fails(capsys, tmp_path, "--tasks", "boolq", *data, sweep=sweep)
    (folder / "train.json").write_text(json.dumps([{key: ROWS[0][key] for key in ("instruction", "input", "output")}]))
    assert "answer" in fails(capsys, tmp_path, "--tasks", "boolq", *data, sweep=sweep)


@pytest.mark.long
def test_an_unknown_flag_and_a_value_that_is_no_number_end_with_2_and_no_traceback() -> None:
    for flags in (["--seed", "0"], ["--seeds", "one"], ["--scheduler", "asha"]):
        done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
        assert done.returncode == 2
        assert flags[0] in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.long
def test_the_help_shows_three_examples_and_loads_no_torch() -> None:
    script = f"import sys, runpy; sys.argv = [{str(SCRIPT)!r}, '--help']\n"
    script += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    script += "except SystemExit as stop: print('code', stop.code, 'torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.count("mini_sweep.py --") == 3
    assert "code 0 False False" in done.stdout


@pytest.mark.long
def test_a_sweeps_own_process_loads_torch_only_to_start_ray() -> None:
    script = "import sys, grass_ray.cluster.runner; print(*({'torch', 'transformers', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split() == []


def test_trials_that_differ_in_seed_and_learning_rate_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr(checks, "_check_model", lambda config: looked_at.append(config.method.name))
    rates = {"method.optimizer.lr": (1e-4, 1e-3)}
    checked: set[Hashable] = set()
    for config in plan_trials(replace(SWEEP, methods=("full", "grass"), grid=rates), SweepOptions(seeds=(0, 1)))[0]:
        checks.check_run(config, checked=checked)
    assert looked_at == ["base", "full", "grass"]


def test_the_verb_shows_the_help_of_the_file_that_it_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [])
    with pytest.raises(SystemExit) as stop:
        command_line(["sweep", str(SCRIPT), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "Does a sweep run from end to end?" in said
    assert "--dry-run" in said


def test_a_dry_run_prints_every_trial_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(SWEEP, ["--dry-run", "--seeds", "0", "1", "--steps", "3", "--storage-path", str(tmp_path / "results")])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in ("base-tiny-generated-s0", "full-tiny-generated-s0", "grass-tiny-generated-s1"):
        assert name in out
    assert "mini: 7 trials" in out
    assert not (tmp_path / "results").exists()


def test_settings_from_a_search_reach_their_method_and_the_user_has_the_last_word(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "best.yaml"
    file.write_text("methods: {grass: [method.optimizer.lr=0.00042, method.sampler.temperature=0.7]}")
    found = plan_trials(SWEEP, SweepOptions(settings=file, seeds=(0,)))[0]
    by_method = {config.method.name: config for config in found}
    assert by_method["grass"].method.optimizer.lr == 0.00042
    assert by_method["full"].method.optimizer.lr != 0.00042
    found = plan_trials(SWEEP, SweepOptions(settings=file, set=("method.optimizer.lr=0.1",)))[0]
    assert {config.method.optimizer.lr for config in found if config.training.steps} == {0.1}
    file.write_text("methods: {grass: [method.optimizer.learning_rate=1]}")
    assert "learning_rate" in fails(capsys, tmp_path, "--settings", str(file))


def test_a_preset_goes_on_top_of_the_sweep_key_by_key() -> None:
    sweep = Sweep(
        name="s",
        question="?",
        models=("a",),
        tasks=("t",),
        training=TrainingConfig(steps=9, batch_size=4),
        settings={"seed": 1, "training.steps": 8},
        method_settings={"lisa": {"p": 1, "r": 1}, "full": {"q": 1}},
        smoke=Preset(
            tasks=("u",),
            training=TrainingConfig(steps=2),
            evaluation=EvaluationConfig(limit=None),
            method_settings={"lisa": {"p": 2}},
        ),
    )
    small = sweep.small()
    assert (small.name, small.models, small.tasks) == ("s", ("a",), ("u",))
    assert sweep.changes == {"training.batch_size": 4, "seed": 1, "training.steps": 8}
    assert small.changes == {"training.batch_size": 4, "seed": 1, "training.steps": 2, "evaluation.limit": None}
    assert small.method_settings == {"lisa": {"r": 1, "p": 2}, "full": {"q": 1}}


def test_only_the_fields_that_a_sweep_gives_change_a_method() -> None:
    sweep = Sweep(
        name="s",
        question="?",
        models=("tiny",),
        methods=("full",),
        tasks=("generated",),
        seeds=(0,),
        training=TrainingConfig(steps=7, checkpoint_every_steps=None),
        evaluation=EvaluationConfig(),
    )
    assert sweep.changes == {"training.steps": 7, "training.checkpoint_every_steps": None}
    (config,) = plan_trials(sweep, SweepOptions(base=False))[0]
    assert config.training == RunConfig(method=config.method).training.model_copy(update={"steps": 7})
