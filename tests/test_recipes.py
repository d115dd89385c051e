"""The recipes of examples/recipes/ are configurations that run, and their figures are the memory plan's of today."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from small import REPOSITORY

from grass_ray.commands.train import build_config
from grass_ray.training.shapes import SHAPES

RECIPES: dict[str, Any] = runpy.run_path(str(REPOSITORY / "benchmarks" / "recipes.py"))


def path_of(shape: str) -> Path:
    return REPOSITORY / "examples" / "recipes" / f"{shape}.yaml"


def test_every_shape_has_a_recipe_that_is_listed() -> None:
    assert set(RECIPES["MODELS"]) == set(SHAPES) == {path.stem for path in path_of("x").parent.glob("*.yaml")}
    page = (REPOSITORY / "examples" / "README.md").read_text(encoding="utf-8")
    for shape, hub_id in RECIPES["MODELS"].items():
        assert f"| [{shape}.yaml](recipes/{shape}.yaml) | `{hub_id}` |" in page


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recipe_is_a_run_of_grass(shape: str) -> None:
    config = build_config(
        "grass", base=path_of(shape), model=None, tasks=None, data_dir=None, assignments=["method.weights=streamed"]
    )
    assert config.model.name == RECIPES["MODELS"][shape]
    assert (config.method.name, config.method.offload, config.method.weights) == ("grass", "auto", "streamed")
    assert config.training.gradient_checkpointing == "auto"


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_the_figures_are_those_of_the_plan(shape: str) -> None:
    assert path_of(shape).read_text(encoding="utf-8") == RECIPES["text_of"](shape), "python -m benchmarks run recipes"
