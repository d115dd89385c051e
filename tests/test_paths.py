"""Paths at the door: ``~`` is home in every option, and a folder is absolute before anything else sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import short_run

from grass_ray.commands.export import Export
from grass_ray.commands.flags import RunFilters
from grass_ray.commands.leaderboard import Leaderboard
from grass_ray.commands.runs import Train
from grass_ray.commands.train import build_config
from grass_ray.config import ConfigError
from grass_ray.experiment.flags import parse_options
from grass_ray.paths import at_home, find_model, model_label, with_absolute_paths


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_a_tilde_is_home_in_every_option(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    train = at_home(Train(method="full", model="~/m", output=Path("~/x"), task=("~/t.yaml",), set=("seed=1",)))
    assert (train.model, train.output, train.task) == (f"{home}/m", Path(f"{home}/x"), (f"{home}/t.yaml",))
    assert train.set == ("seed=1",)
    nested = at_home(Leaderboard(runs=RunFilters(model=("~/m", "tiny")), output=Path("~/page.html")))
    assert nested.runs.model == (f"{home}/m", "tiny")
    assert at_home(Export(run_or_delta="~/run", output=Path("~/x"))).run_or_delta == f"{home}/run"
    sweep = parse_options("s.py", "?", ["--models=~/m", "--tasks=~/t.yaml", "--settings=~/best.yaml"])
    assert (sweep.models, sweep.tasks, sweep.settings) == (
        (f"{home}/m",),
        (f"{home}/t.yaml",),
        Path(f"{home}/best.yaml"),
    )


@pytest.mark.parametrize("name", ["models/mine", "./models/mine", "../{here}/models/mine", "~/mine", "org/mine/"])
def test_a_folder_is_absolute_however_it_is_named(name: str, tmp_path: Path) -> None:
    for folder in ("models/mine", "org/mine", "home/mine"):
        (tmp_path / folder).mkdir(parents=True)
    found = find_model(name.format(here=tmp_path.name))
    assert Path(found).is_absolute()
    assert Path(found).is_dir()
    assert model_label(found) == "mine"


def test_built_in_names_and_hub_ids_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    for name in ("tiny", "smollm2-135m", "gpt2", "meta-llama/Llama-3.2-1B", "llama2-7b"):
        assert find_model(name) == name == model_label(name)


@pytest.mark.parametrize("name", ["./mine", "../mine", "/no/mine", "~/mine", "a/b/c", "org/mine/", ".."[:1] + "/x", ""])
def test_a_path_without_a_folder_never_becomes_a_hub_id(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no model folder"):
        find_model(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ConfigError, match="a GGUF file; give a folder"):
        find_model("m.gguf")


def test_a_configuration_given_by_flags_or_file_has_absolute_paths(tmp_path: Path) -> None:
    for folder in ("models/mine", "home/data"):
        (tmp_path / folder).mkdir(parents=True)
    here = str(tmp_path / "models" / "mine")
    given = {"tasks": None, "data_dir": None}
    assert build_config("full", base=None, model="models/mine", assignments=[], **given).model.name == here
    by_key = build_config("full", base=None, model=None, assignments=["model.name=./models/mine"], **given)
    assert by_key.model.name == here
    short_run("full", "model.name=models/mine").save("mine.yaml")
    assert build_config(None, base=Path("mine.yaml"), model=None, assignments=[], **given).model.name == here
    data = short_run("full", "data.source={kind: folder, path: ~/data}").override({})
    assert with_absolute_paths(data).data.source.path == str(tmp_path / "home" / "data")  # type: ignore[union-attr]
    source = "{kind: custom, name: own, answer: number, train: ~/a.json, test: b.json}"
    own = with_absolute_paths(short_run("full", f"data.source={source}")).data.source
    assert (own.train, own.test) == (str(tmp_path / "home" / "a.json"), str(tmp_path / "b.json"))  # type: ignore[union-attr]
