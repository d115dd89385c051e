from __future__ import annotations

import csv
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib.image
import pytest
from result_records import answers, asha, make_history, make_record, make_series, members

from grass_ray.config import ConfigError
from grass_ray.results.figures.breakdown import draw_sensitivity, draw_step_time, spent_time
from grass_ray.results.figures.figure import Figure, Runs
from grass_ray.results.figures.registry import FIGURES, draw_kind, write_run_plots, write_sweep_plots
from grass_ray.results.figures.run import draw_importance, draw_loss, draw_sampling
from grass_ray.results.figures.style import smooth
from grass_ray.results.figures.sweep import draw_accuracy_memory, draw_loss_comparison, draw_tasks
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.training.report import LayerTrace


def drawn(path: Path) -> bool:
    """Whether the file is an image with something in it."""
    figure = matplotlib.image.imread(path)
    return bool(figure.shape[0] > 300 and figure.shape[1] > 600 and figure.std() > 0.02)


def numbers(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def sweep() -> list[RunRecord]:
    records = [
        make_record(
            method,
            seed=seed,
            correct={"boolq": answers(right, 20), "piqa": answers(10, 20)},
            suite="commonsense",
            metrics={"memory/peak_allocated_gib": gib},
            series=make_series(seed, right / 10, steps=40),
            layers=make_history(steps=40) if method == "grass" else None,
        )
        for method, right, gib in (("full", 12, 3.0), ("grass", 13, 1.5), ("lisa", 12, 1.5), ("lora", 13, 1.5))
        for seed in (0, 1)
    ]
    other = make_record(
        "lora",
        correct={"boolq": answers(2, 20), "piqa": answers(3, 20)},
        suite="commonsense",
        overrides=[LR],
        series=make_series(5, 3.0, steps=40),
    )
    base = make_record("base", correct={"boolq": answers(1, 20), "piqa": answers(2, 20)}, suite="commonsense")
    failed = make_record("grass-static", status="out_of_memory", failure="no room", suite="commonsense")
    failed.config["data"]["tasks"] = ["boolq", "piqa"]
    return [*records, other, base, failed]


LR = "method.optimizer.lr=0.5"


# --------------------------------------------------------------------------------------------------------- of one run


def test_figures_of_a_run(tmp_path: Path) -> None:
    record = make_record("grass", layers=make_history(), series=make_series(0, 1.0))
    paths = write_run_plots(record, tmp_path / "new")
    assert [path.name for path in paths] == ["loss.png", "sampling.png", "importance.png", "ages.png"]
    assert all(drawn(path) for path in paths)


def test_uniform_draws_have_a_heatmap_and_no_importance(tmp_path: Path) -> None:
    record = make_record("lisa", layers=make_history(refreshed=False), series=make_series(0, 1.0))
    assert [path.name for path in write_run_plots(record, tmp_path)] == ["loss.png", "sampling.png"]
    assert drawn(tmp_path / "sampling.png")


@pytest.mark.parametrize("method", ["full", "lora", "base"])
def test_methods_that_draw_no_layers_have_no_heatmap(method: str) -> None:
    everything = make_history(refreshed=False).model_copy(update={"intervals": [(1, tuple(range(30)))]})
    for layers in (None, everything):
        record = make_record(method, layers=layers)
        assert draw_sampling(record) is draw_loss(record) is draw_importance(record) is None


def test_numbers_gone_bad_and_layers_not_measured_are_drawn(tmp_path: Path) -> None:
    history = make_history(num_layers=3, steps=20)
    history.refreshes = [(10, (math.nan, 1.0, 200.0), (0.2, 0.2, 0.6))]
    history.ages = [(10, (math.nan, 0.0, 7.0))]
    series = {"train/loss": [(1, 2.0), (2, math.nan), (3, math.inf)]}
    assert len(write_run_plots(make_record(layers=history, series=series), tmp_path)) == 4


def test_methods_that_take_turns_show_no_probability() -> None:
    figure = draw_sampling(make_record("badam", layers=make_history(refreshed=False)))
    assert figure is not None
    assert "probability" not in figure.description
    assert {row[1] for row in figure.rows} == {"active"}


def test_the_numbers_of_a_heatmap() -> None:
    history = make_history(num_layers=3, steps=20)
    history.intervals = [(11, (0, 2)), (14, (0,)), (17, (1,))]
    history.refreshes = [(10, (1.0, 2.0, 3.0), (0.2, 0.3, 0.5))]
    figure = draw_sampling(make_record(layers=history, series={"train/loss": [(20, 1.0)]}))
    assert figure is not None
    active = {row[2:5] for row in figure.rows if row[1] == "active"}
    assert active == {(11, 16, "layer 0"), (11, 13, "layer 2"), (17, 20, "layer 1")}, "draws that go on are one"
    assert ("grass-smollm2_135m-generated-s0", "probability", 11, 20, "layer 2", 0.5) in figure.rows


def matrices(num_layers: int = 30, steps: int = 60) -> LayerTrace:
    kinds = [f"self_attn.{name}_proj.weight" for name in "qkvo"] + [
        f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    ]
    units = [f"layer_{layer:02d}.{kind}" for layer in range(num_layers) for kind in kinds]
    history = make_history(num_layers=len(units), steps=steps)
    return history.model_copy(update={"units": units, "num_layers": num_layers})


def test_weight_matrices_stand_in_blocks_of_their_kind(tmp_path: Path) -> None:
    record = make_record("misa", layers=matrices(), series=make_series(0, 1.0, steps=60))
    figure = draw_sampling(record)
    assert figure is not None
    axes = figure.drawing.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    height = figure.drawing.get_figheight()
    assert height <= 11, "210 rows fit on a page"
    assert "210 weight matrices" in figure.description
    # matrix 7 is the second layer's first: right above the first layer's
    places = list(dict.fromkeys(row[4] for row in figure.rows if row[1] == "probability"))
    assert places[:2] == ["layer 0 q_proj", "layer 1 q_proj"]
    importance = draw_importance(record)
    assert importance is not None
    for name, shown in (("s.png", figure), ("i.png", importance)):
        shown.save(tmp_path / name)
        assert drawn(tmp_path / name)


def test_both_ends_of_a_model_are_named() -> None:
    units = ["embeddings", *(f"layer_{layer:02d}" for layer in range(4)), "norm", "head"]
    history = make_history(num_layers=7, steps=20).model_copy(update={"units": units})
    figure = draw_sampling(make_record("hift", layers=history))
    assert figure is not None
    labels = [label.get_text() for label in figure.drawing.axes[0].get_yticklabels()]
    assert labels[0] == "embeddings"
    assert labels[-1] == "head"


# -------------------------------------------------------------------------------------------------------- of a sweep


def test_figures_of_a_sweep(tmp_path: Path) -> None:
    paths = write_sweep_plots(Runs.of(sweep()), tmp_path / "new")
    assert [path.name for path in paths] == [
        *("accuracy_memory.png", "loss_comparison.png", "tasks.png", "step_time.png", "sensitivity.png")
    ]
    assert all(drawn(path) for path in paths)


def test_nothing_to_compare_draws_nothing(tmp_path: Path) -> None:
    nothing = [make_record("base", status="failed", failure="no")]
    assert write_sweep_plots(Runs.of(nothing), tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    for kind in FIGURES:
        assert draw_kind(kind, build_leaderboard(nothing), nothing) == []
        assert draw_kind(kind, [], []) == []


@pytest.mark.parametrize("kind", list(FIGURES))
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_every_kind_is_written_with_its_numbers(kind: str, suffix: str, tmp_path: Path) -> None:
    records = {"search": asha, "rungs": asha, "population": members}.get(kind, sweep)()
    figures = draw_kind(kind, build_leaderboard(records), records)
    assert len(figures) == 1
    path, table = figures[0].save(tmp_path / f"new/figure{suffix}")
    assert table == path.with_suffix(".csv")
    rows = numbers(table)
    assert rows
    assert set(rows[0]) == set(figures[0].header)
    if suffix == ".svg":
        words = [element.text or "" for element in ET.parse(path).iter() if element.tag.endswith("text")]
        assert len(words) > 5, "text stays text"
    else:
        assert drawn(path)


def test_a_figure_of_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    figure = draw_accuracy_memory(Runs.of(sweep()))
    assert figure is not None
    with pytest.raises(ConfigError, match=r"must end in \.png, \.svg, \.pdf"):
        figure.save(tmp_path / "figure.csv")


def column(figure: Figure | None, name: str) -> list[object]:
    assert figure is not None
    return [row[figure.header.index(name)] for row in figure.rows]


def test_the_numbers_of_a_sweep() -> None:
    runs = Runs.of(sweep())
    pareto = draw_accuracy_memory(runs)
    assert column(pareto, "peak_allocated_gib") == [row.peak_allocated_gib for row in runs.tables[0].rows]
    assert column(pareto, "accuracy")[0] == pytest.approx((13 + 10) / 40)
    tasks = draw_tasks(runs)
    assert tasks is not None
    assert ("boolq", 0.65) in {(row[2], row[3]) for row in tasks.rows}
    loss = draw_loss_comparison(runs)
    assert set(column(loss, "row")) == {"full", "grass", "lisa", "lora (lr=0.001)"}, "a line a method, its best"
    lows, means, highs = (column(loss, name) for name in ("loss_min", "loss_mean", "loss_max"))
    assert all(low <= mean <= high for low, mean, high in zip(lows, means, highs, strict=True))  # type: ignore[operator]
    assert any(low < high for low, high in zip(lows, highs, strict=True))  # type: ignore[operator]
    sensitivity = draw_sensitivity(runs)
    assert sensitivity is not None
    assert {(row[1], row[2], row[3]) for row in sensitivity.rows} == {
        ("method.optimizer.lr", "0.001", "lora"),
        ("method.optimizer.lr", "0.5", "lora"),
    }


def test_where_step_time_goes() -> None:
    history = make_history(num_layers=4, steps=20)
    history.intervals = [(3, (0,)), (5, (1,)), (7, (1,)), (9, (2,))]
    record = make_record(
        layers=history,
        metrics={"time/measure_s": 10.0},
        series={
            "time/step_s": [(step, 4.0 if step < 3 else 3.0 if step in (4, 8) else 1.0) for step in range(1, 11)],
            "train/lr": [(step, 0.0 if step < 3 else 0.1) for step in range(1, 11)],
        },
    )
    spent = spent_time(record)
    # two probing steps of 4 s; the 2 s left of measuring come evenly off eight training steps
    assert spent["measuring"] == [4.0, 4.0, pytest.approx(2.0)]
    assert spent["steps that end in a switch"] == pytest.approx([2.75, 2.75]), "the draw at step 7 switched nothing"
    assert spent["other steps"] == pytest.approx([0.75] * 6)
    assert sum(map(sum, spent.values())) == pytest.approx(20.0)
    assert draw_step_time(Runs.of([record])) is not None


def test_time_for_moving_states_is_taken_off_its_steps() -> None:
    """The total starts anew after a resume (at step 5)."""
    record = make_record(
        layers=None,
        metrics={},
        series={
            "time/step_s": [(step, 2.0) for step in range(1, 7)],
            "train/lr": [(step, 0.1) for step in range(1, 7)],
            "offload/exposed_s": [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.5), (5, 0.5), (6, 1.0)],
        },
    )
    spent = spent_time(record)
    assert spent["moving states"] == pytest.approx([0.5, 0.5, 0.5, 1.0, 0.5, 0.5])
    assert spent["other steps"] == pytest.approx([1.5, 1.5, 1.5, 1.0, 1.5, 1.5])
    assert draw_step_time(Runs.of([record])) is not None


def test_smoothing_leaves_bad_numbers_out() -> None:
    assert smooth([1.0, 3.0, math.nan, 5.0], 2) == [1.0, 2.0, 3.0, 5.0]
    assert math.isnan(smooth([math.nan], 2)[0])
