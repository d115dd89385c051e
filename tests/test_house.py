"""The rooms: each imports only from rooms above it, no circles, heavy libraries where they belong, instant help."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from small import REPOSITORY

PACKAGE = REPOSITORY / "grass_ray"
ROOMS = [
    *(
        "errors",
        "reading",
        "overrides",
        "config",
        "paths",
        "process",
        "peft_methods",
        "methods",
        "method_files",
        "tasks",
        "layerwise",
        "optim",
    ),
    *("training", "memory", "results", "export", "experiment", "execute", "progress", "cluster", "contract"),
    *("commands", "cli"),
]
HOMES = {"ray": "cluster", "mlflow": "results"}
LOADED = "[name for name in ('torch', 'ray', 'mlflow', 'transformers') if name in sys.modules]"


def room_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_from_rooms_above(path: Path) -> None:
    room = ROOMS.index(room_of(path))
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] == "grass_ray" and len(parts) > 1:
            assert ROOMS.index(parts[1]) <= room, f"{path} imports {module}, a room below it"
        if parts[0] in HOMES:
            assert room_of(path) == HOMES[parts[0]], f"{path} imports {parts[0]}"


def uses_of(path: Path, modules: Collection[str]) -> Iterator[str]:
    """Which of the modules a file imports: at the top, in functions, for types."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:  # a module of a package, or a name in a module
                yield from [name for name in (f"{node.module}.{alias.name}", node.module) if name in modules][:1]


def circle_in(root: Path, package: Path) -> list[str] | None:
    """Modules that import each other in a circle; an import inside a function hides one and does not cut it."""
    paths = {".".join(path.relative_to(root).with_suffix("").parts): path for path in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    try:
        TopologicalSorter({name: set(uses_of(path, modules)) for name, path in modules.items()}).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return None


def test_no_modules_import_each_other_in_a_circle() -> None:
    circle = circle_in(REPOSITORY, PACKAGE)
    assert circle is None, " -> ".join(circle)


@pytest.mark.parametrize("inner", ["from made.one import name", "from made import one", "import made.one"])
def test_a_circle_is_found(inner: str, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "__init__.py").touch()
    (tmp_path / "made" / "one.py").write_text("from made.two import other\n")
    (tmp_path / "made" / "two.py").write_text(f"def late():\n    {inner}\n")
    assert set(circle_in(tmp_path, tmp_path / "made") or ()) == {"made.one", "made.two"}
    (tmp_path / "made" / "two.py").write_text("import json\n")
    assert circle_in(tmp_path, tmp_path / "made") is None


def test_every_file_of_the_package_is_named_by_another() -> None:
    paths = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    others = {path.name for path in paths if path.suffix != ".py"} - {"py.typed"}
    assert {name for name in others if f'"{name}"' not in text} == set()


def test_test_files_have_names_of_their_own() -> None:
    names = Counter(path.name for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert {name for name, count in names.items() if count > 1} == set(), "pytest imports them by their names alone"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_grows_too_long(path: Path) -> None:
    """Files of at most 350 lines, functions of 60 (the training loop: 70), classes of 20 methods."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < (70 if node.name == "fit" else 60), node.name
        elif isinstance(node, ast.ClassDef):
            assert sum(isinstance(part, ast.FunctionDef) for part in node.body) <= 20, node.name


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_the_core_trains_where_neither_ray_nor_mlflow_is_installed() -> None:
    done = run_python(
        "import sys\n"
        "for name in ('ray', 'mlflow'): sys.modules[name] = None  # importing it raises ImportError\n"
        "import pkgutil, importlib, grass_ray.layerwise, grass_ray.optim, grass_ray.training\n"
        "for room in (grass_ray.layerwise, grass_ray.optim, grass_ray.training):\n"
        "    for module in pkgutil.iter_modules(room.__path__, room.__name__ + '.'):\n"
        "        if not module.name.endswith('.triton_adamw'):  # triton comes with CUDA builds of torch\n"
        "            importlib.import_module(module.name)\n"
        "from grass_ray.config import ModelConfig, RunConfig\n"
        "from grass_ray.methods import METHODS\n"
        "from grass_ray.training.run import Run\n"
        "config = RunConfig(method=METHODS['grass'].config, model=ModelConfig(name='tiny'))\n"
        "config = config.override({'training.steps': 2, 'method.sampler.probing_steps': 1})\n"
        "print(len(list(Run.prepare(config).fit())))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "3"


@pytest.mark.long
@pytest.mark.parametrize(
    "verb",
    [
        "",
        "train",
        "sweep",
        "eval",
        "leaderboard",
        "power",
        "export",
        "reproduce",
        "verify",
        "plan",
        "ls",
        "check-method",
    ],
)
def test_help_loads_no_torch(verb: str) -> None:
    arguments = [*([verb] if verb else []), "--help"]
    done = run_python(
        f"import atexit, sys; atexit.register(lambda: print({LOADED}))\n"
        f"from grass_ray.cli import main; main({arguments!r})\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    if verb:
        assert done.stdout.count("\n  grass-ray ") + done.stdout.count("\n  python ") == 3, "three worked examples"


@pytest.mark.long
def test_sweep_help_loads_no_torch() -> None:
    for script in sorted((REPOSITORY / "sweeps").glob("*.py")):
        done = run_python(
            f"import atexit, sys, runpy; atexit.register(lambda: print({LOADED}))\n"
            f"sys.argv = [{str(script)!r}, '--help']; runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        assert done.returncode == 0, done.stderr
        assert "--dry-run" in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"
