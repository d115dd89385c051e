"""Folders from anybody, with links, pipes, devices and names that lead elsewhere: refused at once, or harmless."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from result_records import make_record
from small import REPOSITORY, make_llama, short_run

from grass_ray.commands.reproduce import write_code
from grass_ray.config import ConfigError, ModelConfig
from grass_ray.experiment.plan import SweepPlan
from grass_ray.export.delta import apply_delta, save_delta
from grass_ray.results.record import RunRecord
from grass_ray.results.recorded import find_results, take_records
from grass_ray.results.verification.verify import verify
from grass_ray.results.writes import files_of
from grass_ray.training.run import Run

SECONDS = 60  # a reader that waits for a pipe waits for ever


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it reads without end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


ENDLESS: dict[str, Callable[[Path], None]] = {
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": lambda path: os.mkfifo(path),
    "loop": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_checkpoint_with_what_is_no_file(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    run = Run.prepare(short_run("lora"))
    run.save(folder)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        ENDLESS[kind](path)
        if kind != "loop" or path.name != "SHA256SUMS":  # a link to nothing is a checkpoint without sums
            with pytest.raises(ConfigError, match="is not a readable checkpoint"):
                run.restore(folder)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        path.write_bytes(content)
    run.restore(folder)


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_delta_with_what_is_no_file(kind: str, tmp_path: Path) -> None:
    base, trained, folder = make_llama(), make_llama(), tmp_path / "delta"
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight += 1
    save_delta(base, trained, folder, base_model=ModelConfig(name="some/llama"))
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        ENDLESS[kind](path)
        with pytest.raises(ConfigError, match="is not a readable delta"):
            apply_delta(base, folder)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        path.write_bytes(content)
    apply_delta(base, folder)


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_record_that_is_no_file(kind: str, tmp_path: Path) -> None:
    for name in ("record.json", "record.json.gz"):
        ENDLESS[kind](tmp_path / name)
        with pytest.raises(ConfigError, match=r"record"):
            RunRecord.load(tmp_path / name)
    if kind in ("device", "pipe"):
        with pytest.raises(ConfigError, match="is no ordinary file"):
            take_records(tmp_path, tmp_path / "kept")


def test_a_record_without_end(tmp_path: Path) -> None:
    """A file that takes no room on the disk and says that it has a terabyte."""
    with (tmp_path / "record.json").open("wb") as file:
        file.truncate(1024**4)
    with pytest.raises(ConfigError, match="more than 256 MiB"):
        RunRecord.load(tmp_path / "record.json")


def test_links_are_not_followed_out_of_a_folder_of_results(tmp_path: Path) -> None:
    """Neither are records of other folders taken for its own, nor is a circle of links walked for ever."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "results"
    (elsewhere / "records").mkdir(parents=True)
    make_record("full").save(elsewhere / "records" / "a.json")
    folder.mkdir()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    assert find_results(folder) == []
    with pytest.raises(ConfigError, match="no run records"):
        verify(folder)


def test_files_that_links_take_from_elsewhere_are_not_uploaded(tmp_path: Path) -> None:
    folder, secret = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    secret.mkdir()
    (secret / "key.png").write_text("secret")
    (folder / "examples.jsonl").symlink_to(secret / "key.png")
    (folder / "plots").symlink_to(secret)
    (folder / "config.yaml").write_text("mine")
    assert [path.name for path in files_of(folder)] == ["config.yaml"]
    (folder / "plots").unlink()
    (folder / "plots").mkdir()
    (folder / "plots" / "own.png").write_text("mine")
    (folder / "plots" / "key.png").symlink_to(secret / "key.png")
    assert sorted(path.name for path in files_of(folder)) == ["config.yaml", "own.png"]


def test_a_kept_record_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "record.json").symlink_to(target)
    make_record("full").save(tmp_path / "record.json")
    assert target.read_text() == "mine"
    assert not (tmp_path / "record.json").is_symlink()


def test_tables_and_pictures_are_written_anew_in_place_of_links(tmp_path: Path) -> None:
    folder, target = tmp_path / "example_sweep", tmp_path / "target"
    shutil.copytree(REPOSITORY / "benchmarks" / "results" / "example_sweep", folder)
    target.write_text("mine")
    written = [path for path in folder.rglob("*") if path.suffix in (".md", ".csv", ".png") and path.parent == folder]
    names = [path.name for path in written if path.name.startswith(("leaderboard", "ranking", "accuracy"))]
    for name in names:
        (folder / name).unlink()
        (folder / name).symlink_to(target)
    verify(folder, rewrite=True)
    assert target.read_text() == "mine"
    assert [name for name in names if (folder / name).is_symlink()] == []
    assert {"leaderboard.md", "leaderboard.csv"} <= set(names)


def test_a_checkpoint_in_place_of_a_link(tmp_path: Path) -> None:
    """The link goes, what it points to stays, and the next checkpoints are written as ever."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / "checkpoint").symlink_to(tmp_path / "elsewhere")
    run = Run.prepare(short_run("lora"))
    for _ in range(2):
        run.save(tmp_path / "checkpoint")
        run.restore(tmp_path / "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "elsewhere"]
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["../outside.py", "/tmp/outside.py", "a/../../outside.py"])
def test_code_of_a_record_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    record = make_record("full").model_copy(update={"code": {"good.py": "1\n", name: "2\n"}})
    with pytest.raises(ConfigError, match="not inside of"):
        write_code(record, tmp_path / "code")
    assert list(tmp_path.rglob("*.py")) == []


@pytest.mark.parametrize("sweep_id", ["../../elsewhere", "/tmp/elsewhere", "..", ""])
def test_a_plan_whose_id_leads_elsewhere(sweep_id: str) -> None:
    plan = SweepPlan(name="mini", sweep_id="1", question="?", tracking_uri="sqlite:///a", trials=(short_run("full"),))
    text = plan.to_yaml().replace("sweep_id: '1'", f"sweep_id: {json.dumps(sweep_id)}")
    with pytest.raises(ConfigError, match=r"is not a sweep's plan: .*sweep_id"):
        SweepPlan.from_yaml(text, "it")
