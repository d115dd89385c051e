"""Methods of a user's own: a file of rows, whose parts are classes found by their import path."""

from __future__ import annotations

import re
import sys
from datetime import date
from pathlib import Path

import pytest
import torch
import yaml
from own_methods import ROW, TOP_HEAVY, write_methods

from grass_ray.config import ConfigError, RunConfig, find_code
from grass_ray.method_files import code_of, methods_with, read_rows
from grass_ray.methods import METHODS


def with_sampler(**changes: object) -> dict[str, object]:
    return ROW | {"sampler": ROW["sampler"] | changes}  # type: ignore[operator]


def test_a_method_of_the_file_is_one_of_the_methods(tmp_path: Path) -> None:
    methods = methods_with(write_methods(tmp_path))
    assert list(methods) == [*METHODS, "top-heavy"]
    method = methods["top-heavy"]
    assert (method.summary, method.source, method.trains) == ("later layers are drawn more often", "-", True)
    sampler = method.config.sampler.build(seed=7, train_steps=10)
    sampler.start([1] * 4)
    assert (sampler.seed, sampler.period) == (7, 2)
    assert sampler.probabilities() == (0.1, 0.2, 0.3, 0.4)
    assert code_of(method.config) == {"top_heavy.py": TOP_HEAVY}


def test_the_configuration_reads_back_and_its_fingerprint_has_the_code(tmp_path: Path) -> None:
    first = RunConfig(method=methods_with(write_methods(tmp_path))["top-heavy"].config)
    (tmp_path / "run.yaml").write_text(first.to_yaml(), encoding="utf-8")
    assert RunConfig.from_yaml(tmp_path / "run.yaml") == first
    edited = TOP_HEAVY.replace("layer + 1", "layer + 2")
    second = RunConfig(method=methods_with(write_methods(tmp_path, code=edited))["top-heavy"].config)
    assert second.fingerprint != first.fingerprint
    sampler = second.method.sampler.build(seed=0, train_steps=1)
    sampler.start([1] * 2)
    assert sampler.probabilities() == (2 / 3, 1.0), "the edited code runs"
    with pytest.raises(ConfigError, match=r"the code of top_heavy:TopHeavySampler is not the code of this config"):
        first.method.sampler.build(seed=0, train_steps=1)


def test_what_was_read_is_what_runs(tmp_path: Path) -> None:
    """A file that is edited, or gone, after the methods were read changes nothing."""
    config = methods_with(write_methods(tmp_path))["top-heavy"].config
    (tmp_path / "top_heavy.py").unlink()
    sys.modules.pop("top_heavy")
    assert config.sampler.build(seed=0, train_steps=1).period == 2


def test_reading_the_rows_alone_imports_nothing(tmp_path: Path) -> None:
    path = write_methods(tmp_path, code="raise SystemExit('imported')")
    (row,) = read_rows(path)
    assert row.config.sampler.sha256 is None


def test_modules_that_the_code_imports_come_with_it_and_installed_ones_do_not(tmp_path: Path, monkeypatch) -> None:
    elsewhere, beside = tmp_path / "elsewhere", tmp_path / "beside"
    package = elsewhere / "own_package"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "deep" / "weights.py").write_text("from . import constants\nONE = constants.ONE\n", encoding="utf-8")
    (package / "deep" / "constants.py").write_text("ONE = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(elsewhere))
    code = TOP_HEAVY.replace(
        "import torch\n", "import torch, yaml, scipy.stats\nfrom own_package.deep import weights\n"
    )
    config = methods_with(write_methods(beside, code=code.replace("layer + 1", "layer + weights.ONE")))["top-heavy"]
    assert sorted(code_of(config.config)) == [
        *("own_package/__init__.py", "own_package/deep/constants.py", "own_package/deep/weights.py", "top_heavy.py"),
    ]
    sampler = config.config.sampler.build(seed=0, train_steps=1)
    sampler.start([1] * 4)
    assert sampler.probabilities() == (0.1, 0.2, 0.3, 0.4)


def test_arguments_may_be_schedules(tmp_path: Path) -> None:
    args = {"num_active_layers": {"kind": "linear", "start": 3, "end": 1}, "period": 2}
    config = methods_with(write_methods(tmp_path, with_sampler(args=args)))["top-heavy"].config
    sampler = config.sampler.build(seed=0, train_steps=10)
    sampler.start([1] * 4)
    assert sampler.now_active == 3
    assert sampler.num_active_layers.steps == 10


def test_a_projection_of_ones_own_updates_the_matrices(tmp_path: Path) -> None:
    code = """
from dataclasses import dataclass
import torch

@dataclass
class SignDescent:
    factor: float = 1.0
    def start(self, parameter):
        return {"step": torch.zeros(())}
    def update(self, parameter, state, group, *, key):
        state["step"] += 1
        parameter.sub_(parameter.grad.sign(), alpha=group["lr"] * self.factor)
"""
    projection = {"kind": "import", "target": "signs:SignDescent", "args": {"factor": 0.5}}
    row = {"name": "signs", "summary": "sign descent", "optimizer": {"lr": 1e-3, "projection": projection}}
    config = methods_with(write_methods(tmp_path, row, code=code, module="signs"))["signs"].config
    rule = config.optimizer.projection.build()
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
    with torch.no_grad():
        rule.update(weight, rule.start(weight), {"lr": 1.0}, key=0)
    assert weight.tolist() == [[-0.5, 0.5], [-0.5, 0.5]]


UNFIT = "class Mine:\n    pass\n"
MISTAKES: dict[str, tuple[list[object], str, str]] = {
    "no list": ([], "", r"must be a list of methods"),
    "no mapping": (["grass"], "", r"method 1: .*valid dictionary"),
    "a name that there is": ([ROW | {"name": "grass"}], TOP_HEAVY, r"method grass: there is a built-in method"),
    "one name twice": ([ROW, ROW], TOP_HEAVY, r"method top-heavy: the file has two methods of this name"),
    "a name that is none": ([ROW | {"name": "../x"}], TOP_HEAVY, r"method \.\./x: name: .*pattern"),
    "no summary": ([{"name": "mine"}], "", r"method mine: summary: Field required"),
    "an unknown key": ([ROW | {"sampler": {"kind": "uniform", "perod": 2}}], "", r"sampler.perod: Extra inputs"),
    "an unknown kind": ([ROW | {"sampler": {"kind": "mine"}}], "", r"sampler: .*'import'"),
    "a path": ([with_sampler(target="../top_heavy.py:TopHeavySampler")], TOP_HEAVY, r"sampler.target: .*pattern"),
    "no such module": ([with_sampler(target="absent:Mine")], "", r"there is no module absent beside the method file"),
    "a name of Python's": ([with_sampler(target="random:Mine")], "", r"random is a module of Python's"),
    "no such class": ([with_sampler(target="top_heavy:Topheavy")], TOP_HEAVY, r"available: TopHeavySampler"),
    "not a class": ([with_sampler(target="top_heavy:torch")], TOP_HEAVY, r"torch is not a class"),
    "another base": ([with_sampler(target="top_heavy:Mine")], UNFIT, r"Mine is not a sampler: derive it from"),
    "unfinished": (
        [with_sampler(target="top_heavy:Mine", args={})],
        "from grass_ray.layerwise.sampler import Sampler\nclass Mine(Sampler): pass\n",
        r"top_heavy:Mine lacks due, sample, largest_active_sets",
    ),
    "without a draw": (
        [with_sampler(target="top_heavy:Mine", args={})],
        "from grass_ray.layerwise.periodic import PeriodicSampler\nclass Mine(PeriodicSampler): pass\n",
        r"top_heavy:Mine lacks pick",
    ),
    "unknown arguments": (
        [with_sampler(args={"perod": 2})],
        TOP_HEAVY,
        r"args do not fit: .*'perod'; it takes num_act",
    ),
    "arguments out of range": ([with_sampler(args={"period": 0})], TOP_HEAVY, r"period is 0; it must be at least 1"),
    "arguments of another type": (
        [with_sampler(args={"period": "often"})],
        TOP_HEAVY,
        r"constructor raises AttributeError",
    ),
    "a schedule that is none": (
        [with_sampler(args={"period": {"kind": "linear", "start": 0, "end": 1}})],
        TOP_HEAVY,
        r"sampler.args.*greater than 0",
    ),
    "a date": ([with_sampler(args={"period": date(2026, 1, 1)})], TOP_HEAVY, r"sampler.args: .*give numbers, texts"),
    "not Python": ([ROW], "class Top:\nHeavy", r"top_heavy.py is not Python: "),
    "cannot be imported": ([ROW], "import not_installed_anywhere\n", r"cannot import top_heavy: ModuleNotFoundError"),
    "raises": ([ROW], "1 / 0\n", r"cannot import top_heavy: ZeroDivisionError"),
    "another hash": (
        [with_sampler(sha256="abc")],
        TOP_HEAVY,
        r"the sha256 of top_heavy:TopHeavySampler is .* says abc",
    ),
    "too large": ([ROW], "#" * 2**20 + "\n#", r"more than 1 MiB of Python files"),
    "a projection without update": (
        [ROW | {"optimizer": {"projection": {"kind": "import", "target": "top_heavy:Mine"}}}],
        TOP_HEAVY + UNFIT,
        r"top_heavy:Mine lacks start, update",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    rows, code, message = MISTAKES[name]
    path = write_methods(tmp_path, code=code)
    path.write_text(yaml.safe_dump(rows), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        methods_with(path)


def test_all_mistakes_are_told_at_once_with_the_file(tmp_path: Path) -> None:
    path = write_methods(
        tmp_path, with_sampler(args={"period": 0}), ROW | with_sampler(target="absent:A") | {"name": "b"}
    )
    with pytest.raises(
        ConfigError, match=rf"{re.escape(str(path))}: top-heavy: .*period is 0.*; b: there is no module"
    ):
        methods_with(path)


@pytest.mark.parametrize("text", ["- {", "\xff"])
def test_a_file_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "methods.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"method file .*methods.yaml"):
        methods_with(path)
    with pytest.raises(ConfigError, match=r"cannot read the method file .*absent.yaml"):
        methods_with(tmp_path / "absent.yaml")


def test_a_module_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text(TOP_HEAVY, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the module name yaml is taken by .*yaml/__init__.py"):
        find_code("yaml", tmp_path).install()


def test_nothing_runs_that_only_a_configuration_names(tmp_path: Path) -> None:
    config = RunConfig(method=METHODS["grass"].config).override(
        {"method.sampler": {"kind": "import", "target": "test_method_files:Anything", "sha256": "0" * 64}}
    )
    with pytest.raises(ConfigError, match=r"code of a user's own; give the method file .* with --method-file"):
        config.method.sampler.build(seed=0, train_steps=1)
