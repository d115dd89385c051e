"""What users and programs read stays as it is: everything is made again and compared with the files in ``files/``.

After an intended change, ``python -m pytest tests/golden --refresh-golden`` writes them anew; read their diff.
"""

from __future__ import annotations

import difflib
import runpy
import shutil
from pathlib import Path

import pytest
from golden_cases import CASES, Run
from plain import rounded, without_blank_ends
from small import REPOSITORY

from grass_ray.cli import main

FILES = Path(__file__).parent / "files"
_SHOWN_LINES = 60


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb or a sweep's script in this process, in a folder and a terminal that are the same everywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def carried_out(*arguments: object) -> str:
        words = [str(argument) for argument in arguments]
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", words)
        script = bool(words) and words[0].endswith(".py")
        with pytest.raises(SystemExit) as left:
            runpy.run_path(words[0], run_name="__main__") if script else main(words)
        said = capsys.readouterr()
        text = f"{said.out.rstrip()}\n{said.err.rstrip()}".strip() + f"\nexit code {left.value.code or 0}"
        return text.replace(str(tmp_path), "FOLDER").replace(str(REPOSITORY), "REPOSITORY")

    return carried_out


def difference(name: str, kept: str, made: str) -> list[str]:
    names = (f"golden {name}", f"now {name}")
    lines = difflib.unified_diff(kept.splitlines(), made.splitlines(), *names, lineterm="", n=1)
    return [line if len(line) <= 240 else f"{line[:240]}..." for line in lines]


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, tmp_path: Path, run: Run, request: pytest.FixtureRequest) -> None:
    made = {file: without_blank_ends(rounded(text)) for file, text in CASES[name](tmp_path, run).items()}
    folder = FILES / name
    if request.config.getoption("--refresh-golden"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file, text in made.items():
            (folder / file).write_text(text, encoding="utf-8")
    kept = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*"))}
    assert kept.keys() == made.keys(), f"other files than in {folder}"
    differences = [line for file in sorted(made) for line in difference(f"{name}/{file}", kept[file], made[file])]
    if differences:
        more = len(differences) - _SHOWN_LINES
        shown = "\n".join(differences[:_SHOWN_LINES]) + (f"\n... {more} more lines" if more > 0 else "")
        pytest.fail(f"{shown}\n\nif this is meant: python -m pytest tests/golden --refresh-golden", pytrace=False)


def test_every_golden_file_is_made_by_a_case() -> None:
    assert {path.name for path in FILES.iterdir()} == set(CASES)


def test_golden_files_are_small_and_name_no_place_or_machine() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in FILES.rglob("*.*")}
    assert sum(len(text.encode()) for text in texts.values()) < 600 * 1024
    for path, text in texts.items():
        for word in ("\x1b", str(REPOSITORY), str(Path.home()) + "/", "/tmp/"):
            assert word not in text, f"{path} has {word!r}"
