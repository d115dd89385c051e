"""A new figure is a function and one entry in ``FIGURES``: command line, page and files follow."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure as Drawing
from result_records import answers, asha, make_record, members
from synthetic import synthetic_records

from grass_ray.results.figures.figure import Figure, Runs
from grass_ray.results.figures.registry import FIGURES, FigureKind, Plot, write_run_plots, write_sweep_plots
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render


def draw_tries(of: Runs | RunRecord, *, width: float = 6) -> Figure | None:
    """Somebody's own figure, of a sweep and of a run."""
    names = [of.name] if isinstance(of, RunRecord) else [record.name for record in of.records]
    drawing = Drawing(figsize=(width, 3))
    drawing.subplots().bar(names, 1)
    return Figure(
        name="tries", title="Tries", description="One bar per run.", drawing=drawing, header=("run",),
        rows=[(name,) for name in names],
    )  # fmt: skip


TRIES = FigureKind(
    missing="no run",
    of_sweep=Plot(function=f"{__name__}:draw_tries", file="tries_of_the_sweep.png", numbers=True),
    of_run=Plot(function=f"{__name__}:draw_tries", file="tries.png"),
    heading="How often it was tried",
)


def test_a_new_entry_is_on_the_page_and_among_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIGURES, "tries", TRIES)
    records = [make_record("grass", correct={"generated": answers(5, 10)})]
    page = render(build_leaderboard(records), "html", records=records)
    assert "<h3>How often it was tried</h3>" in page
    assert 'aria-label="One bar per run."' in page
    names = {
        path.name for path in [*write_sweep_plots(Runs.of(records), tmp_path), *write_run_plots(records[0], tmp_path)]
    }
    assert {"tries_of_the_sweep.png", "tries_of_the_sweep.csv", "tries.png"} <= names


@pytest.mark.long
def test_a_new_entry_is_a_choice_of_the_command_line_and_choices_load_no_matplotlib() -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print('matplotlib' in sys.modules))\n"
        "from grass_ray.results.figures.registry import FIGURES\n"
        "FIGURES['tries'] = FIGURES['loss']\n"
        "from grass_ray.cli import main; main(['plot', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "tries" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("kind", FIGURES)
def test_the_functions_that_are_named_exist(kind: str) -> None:
    found = FIGURES[kind]
    plots = [plot for plot in (found.of_sweep, found.of_run) if plot is not None]
    assert plots
    for plot in plots:
        assert callable(pkgutil.resolve_name(plot.function))
    assert bool(found.heading) == (found.of_sweep is not None)


@pytest.mark.parametrize("kind", [kind for kind in FIGURES if FIGURES[kind].of_sweep is not None])
def test_figures_of_records_without_their_steps_load_the_whole_ones_of_few_rows(kind: str) -> None:
    records = [*synthetic_records(240), *asha(), *members()]
    draw, known, loaded = FIGURES[kind].of_sweep, {record.run_id: record for record in records}, []

    def whole(record: RunRecord) -> RunRecord:
        loaded.append(record.run_id)
        return known[record.run_id]

    questions: dict[str, str] = {}
    few = [record.without_steps(questions) for record in records]
    assert draw is not None
    expected, found = draw(Runs.of(records)), draw(Runs(build_leaderboard(few), few, whole))
    assert expected is not None
    assert found is not None
    assert found.csv() == expected.csv()
    assert len(loaded) < len(records) / 3


def test_figures_are_as_wide_as_asked() -> None:
    records = [make_record("grass", correct={"generated": answers(5, 10)})]
    for width in (4.8, 9.0):
        tasks = FIGURES["tasks"].of_sweep
        assert tasks is not None
        figure = tasks(Runs.of(records), width=width)
        assert figure is not None
        assert figure.drawing.get_figwidth() <= width
