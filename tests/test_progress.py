"""What the terminal shows of a run and of a sweep."""

import io
from typing import Any

from rich.console import Console

from grass_ray.progress import RunProgress, SweepProgress, describe_layers, describe_seconds, step_summary
from grass_ray.training.report import StepReport

RUN: Any = None  # progress looks at the reports alone


def report(step: int = 5, total: int = 20) -> StepReport:
    return StepReport(
        step=step, total_steps=total, phase="train", loss=1.25, lr=1e-4, grad_norm=1.0, active_layers=(1, 3),
        probabilities=None, importance=None, visits=(3, 2), refreshed=False, switched=False, tokens=300, step_s=0.5,
        measure_s=0.0, peak_allocated_gib=2.0, host_pinned_gib=0.0,
    )  # fmt: skip


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_without_a_terminal_prints_whole_lines_now_and_then() -> None:
    console = plain()
    with RunProgress("grass-tiny", console=console, every_s=3600) as progress:
        for step in range(1, 21):
            progress.on_step(RUN, report(step))
        progress.on_evaluation("generated", 4, 4)
    lines = text(console).splitlines()
    assert len(lines) == 3, "the first step, the last step, the evaluation"
    assert lines[0].startswith("grass-tiny  step 1/20  loss 1.250  600 tok/s  peak 2.00 GiB  layers 1 3  ETA 10 s")
    assert lines[2] == "grass-tiny  evaluating generated 4/4"


def test_a_sweep_counts_done_running_and_failed_and_names_the_best() -> None:
    console = plain()
    with SweepProgress("mini", [("a", "full"), ("b", "lora"), ("c", "grass")], console=console, every_s=0) as progress:
        progress.start("a")
        progress.update("a", "training", step_summary(report()))
        progress.end("a", "finished", accuracy=0.25, failure=None)
        progress.start("b")
        progress.end("b", "failed", accuracy=None, failure="loss became nan at step 3")
        progress.start("c")
    assert progress.summary().startswith("2 of 3 done, 1 running, 1 failed, best full 25.0 %, ETA ")
    assert "full a  training  step 5/20  loss 1.250" in text(console)
    assert "lora b  failed: loss became nan at step 3" in text(console)


def test_the_live_display_has_a_line_a_trial_and_the_summary() -> None:
    progress = SweepProgress("mini", [("a", "full"), ("b", "lora")])
    progress.start("a")
    progress.update("a", "evaluating", {"task": "generated", "done": 3, "total": 8})
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    console.print(progress.render())
    assert "0 of 2 done, 1 running" in text(console)
    assert "evaluating generated 3/8" in text(console)
    assert "waiting" in text(console)


def test_layers_and_durations_are_short() -> None:
    assert describe_layers(()) == "none"
    assert describe_layers(tuple(range(30))) == "0-29"
    assert describe_layers((2, 7, 11)) == "2 7 11"
    assert describe_layers((0, 2, 4, 6, 8, 10, 12)) == "0 2 4 6 8 10 +1"
    assert [describe_seconds(value) for value in (42, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 05 min"]


def test_quiet_shows_nothing_and_still_counts() -> None:
    console = plain()
    with RunProgress("grass-tiny", console=console, every_s=0, quiet=True) as progress:
        progress.on_step(RUN, report())
    with SweepProgress("mini", [("a", "full")], console=console, every_s=0, quiet=True) as sweep:
        sweep.start("a")
        sweep.note("a", "goes on")
        sweep.end("a", "finished", accuracy=0.25, failure=None)
    assert text(console) == ""
    assert sweep.summary().startswith("1 of 1 done, 0 running, 0 failed, best full 25.0 %")
