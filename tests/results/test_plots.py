from __future__ import annotations

import math
from pathlib import Path

import matplotlib.image
import pytest
from result_records import answers, make_history, make_record, make_series

from grass_ray.methods import METHODS
from grass_ray.results.colours import colour_of, smooth
from grass_ray.results.plots import (
    plot_accuracy_memory,
    plot_importance,
    plot_loss,
    plot_sampling_heatmap,
    write_run_plots,
    write_sweep_plots,
)


def drawn(path: Path) -> bool:
    """Whether the file is a picture with something in it."""
    picture = matplotlib.image.imread(path)
    return bool(picture.shape[0] > 300 and picture.shape[1] > 600 and picture.std() > 0.02)


def test_pictures_of_a_run(tmp_path: Path) -> None:
    record = make_record("grass", layers=make_history(), series=make_series(0, 1.0))
    paths = write_run_plots(record, tmp_path / "new")
    assert [path.name for path in paths] == ["sampling.png", "loss.png", "importance.png"]
    assert all(drawn(path) for path in paths)


def test_uniform_draws_have_a_heatmap_and_no_importance(tmp_path: Path) -> None:
    record = make_record("lisa", layers=make_history(refreshed=False), series=make_series(0, 1.0))
    assert [path.name for path in write_run_plots(record, tmp_path)] == ["sampling.png", "loss.png"]
    assert drawn(tmp_path / "sampling.png")


@pytest.mark.parametrize("method", ["full", "lora", "base"])
def test_methods_that_draw_no_layers_have_no_heatmap(tmp_path: Path, method: str) -> None:
    everything = make_history(refreshed=False).model_copy(update={"intervals": [(1, tuple(range(30)))]})
    for layers in (None, everything):
        record = make_record(method, layers=layers)
        assert not plot_sampling_heatmap(record, tmp_path / "x.png")
        assert not plot_loss(record, tmp_path / "x.png")
        assert not plot_importance(record, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_numbers_gone_bad_and_layers_not_measured_are_drawn(tmp_path: Path) -> None:
    history = make_history(num_layers=3, steps=20)
    history.refreshes = [(10, (math.nan, 1.0, 200.0), (0.2, 0.2, 0.6))]
    series = {"train/loss": [(1, 2.0), (2, math.nan), (3, math.inf)]}
    assert len(write_run_plots(make_record(layers=history, series=series), tmp_path)) == 3


def test_pictures_of_a_sweep(tmp_path: Path) -> None:
    records = [
        make_record(
            method,
            seed=seed,
            correct={"generated": answers(right, 20)},
            metrics={"memory/peak_allocated_gib": gib},
            series=make_series(seed, right / 10),
        )
        for method, right, gib in (("full", 12, 3.0), ("grass", 13, 1.5), ("lisa", 12, 1.5), ("lora", 13, 1.5))
        for seed in (0, 1)
    ]
    records += [make_record("base"), make_record("grass-static", status="out_of_memory", failure="no room")]
    paths = write_sweep_plots(records, tmp_path / "new")
    assert [path.name for path in paths] == ["accuracy_memory.png", "loss_comparison.png"]
    assert all(drawn(path) for path in paths)


def test_nothing_to_compare_draws_nothing(tmp_path: Path) -> None:
    assert write_sweep_plots([make_record("base")], tmp_path) == []
    assert not plot_accuracy_memory([], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_every_method_has_its_own_colour() -> None:
    assert len({colour_of(method) for method in METHODS}) == len(METHODS)


def test_smoothing_leaves_bad_numbers_out() -> None:
    assert smooth([1.0, 3.0, math.nan, 5.0], 2) == [1.0, 2.0, 3.0, 5.0]
    assert math.isnan(smooth([math.nan], 2)[0])
