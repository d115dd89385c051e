"""``ui``, ``doctor``, ``chat``, uploads, and the notebook of the examples."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import REPOSITORY

from grass_ray.cli import main
from grass_ray.commands.chat import prompt_for
from grass_ray.commands.doctor import look
from grass_ray.config import ConfigError, DatasetSource, ModelConfig, RunConfig
from grass_ray.export.hub import check_upload, upload_folder
from grass_ray.methods import get_method
from grass_ray.results.connection import default_tracking_uri
from grass_ray.results.pages import find_page, run_page
from grass_ray.results.tracker import Tracker
from grass_ray.training.models import load_model

Said = tuple[int, str, str]
Command = Callable[..., Said]


@pytest.fixture
def grass_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def carry_out(*words: object, typed: str | None = None) -> Said:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
        if typed is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([*map(str, words)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(left.value.code or 0), said.out, said.err

    return carry_out


# ------------------------------------------------------------------------------------------------------------------ ui


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tracker, str]:
    """A store with two sweeps, the second of which is newer."""
    folder = tmp_path_factory.mktemp("store")
    uri = default_tracking_uri(folder)
    for name in ("first", "second"):
        tracker = Tracker(uri, name)
        tracker.open()
        run = tracker.start_sweep(f"{name}-1", {"sweep": name}, {})
        tracker.start_trial(f"{name}-1", "key", "trial", {}, {})
    return uri, tracker, run


def test_the_page_is_that_of_the_newest_sweep(store: tuple[str, Tracker, str]) -> None:
    uri, tracker, run = store
    assert find_page(uri, None) == find_page(uri, "second") == run_page(tracker, run)
    assert run in run_page(tracker, run)
    assert find_page(uri, "first") != find_page(uri, "second")
    with pytest.raises(ConfigError, match="unknown experiment 'third'; available: "):
        find_page(uri, "third")


def test_a_store_that_is_not_there_is_said(grass_ray: Command) -> None:
    code, _, err = grass_ray("ui", "--no-browser")
    assert code == 2
    assert "there is no MLflow store" in err


@pytest.mark.long
def test_ui_serves_the_page_until_it_is_interrupted(store: tuple[str, Tracker, str]) -> None:
    uri, tracker, run = store
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-c", "from grass_ray.cli import main; main()"]
    words = ["ui", "--tracking-uri", uri, "--port", str(port), "--no-browser"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([*start, *words], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == f"http://127.0.0.1:{port}/{run_page(tracker, run)}"
    finally:
        process.send_signal(2)
    assert process.wait(60) == 0


# -------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_looks_at_everything(grass_ray: Command, tmp_path: Path) -> None:
    code, out, _ = grass_ray("doctor")
    assert code == int("fails" in out)
    for what in ("python", "torch", "devices", "memory", "disk", "cache", "Ray", "MLflow"):
        assert f" {what} " in out
    assert not (tmp_path / "grass_ray_results").exists()  # it makes nothing


def test_doctor_says_what_would_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, grass_ray: Command) -> None:
    (tmp_path / "broken.db").write_text("no database")
    found = {finding.what: finding for finding in look(f"sqlite:///{tmp_path}/broken.db")}
    assert found["MLflow"].verdict == "fails"
    assert "cannot use the MLflow store" in found["MLflow"].detail
    monkeypatch.setenv("GRASS_RAY_CACHE", "/proc/no/cache")
    code, out, _ = grass_ray("doctor", "--quiet")
    assert code == 1
    assert all(line.startswith("fails ") for line in out.splitlines()[:-1])
    assert "set GRASS_RAY_CACHE to a folder that is" in out


# ---------------------------------------------------------------------------------------------------------------- chat


def test_a_conversation_is_rendered_as_in_training() -> None:
    tokenizer = load_model(ModelConfig(name="tiny")).tokenizer
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2 + 3?"},
    ]
    config = RunConfig(method=get_method("lora").config)
    assert prompt_for(config, tokenizer)(turns).endswith("### Instruction:\n2 + 3?\n\n### Response:\n")
    chats = DatasetSource(name="chats", path="chats.jsonl")
    trained = config.model_copy(update={"data": config.data.model_copy(update={"source": chats})})
    for own in (trained, None):
        text = prompt_for(own, tokenizer)(turns)
        assert text == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text.index("Hi") < text.index("Yes?") < text.index("2 + 3?")


def test_chat_answers_line_by_line(grass_ray: Command) -> None:
    code, out, err = grass_ray("chat", "tiny", "--max-new-tokens", 4, typed="Hello\n\n/new\nHello\n")
    assert code == 0, err
    answers = [line for line in out.split("\n") if line]
    assert len(answers) % 2 == 0
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]  # the second conversation began anew
    for words, message in (
        (("chat", "tiny", "--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
        (("chat", "./gone"), "there is no model folder './gone'"),
    ):
        code, _, err = grass_ray(*words, typed="")
        assert (code, message in err) == (2, True)


# ------------------------------------------------------------------------------------------------------------- uploads


def test_an_upload_is_checked_before_anything_is_exported(
    grass_ray: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, _, err = grass_ray("export", "gone", "--output", "out", "--push-to-hub", "a/b/c")
    assert code == 2
    assert "--push-to-hub a/b/c: " in err
    code, _, err = grass_ray("export", "gone", "--output", "out", "--push-to-hub", "a/b")
    assert (code, "the hub is switched off (HF_HUB_OFFLINE)" in err) == (2, True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="nobody is logged in; run `hf auth login`"):
        check_upload("a/b")


def test_a_hub_that_does_not_answer_leaves_a_complete_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    with pytest.raises(ConfigError, match=r"is written, but the hub did not take it: .*; later: hf upload a/b "):
        upload_folder(tmp_path, "a/b", private=True)


# ------------------------------------------------------------------------------------------------------------ notebook


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = json.loads((REPOSITORY / "examples" / "leaderboard.ipynb").read_text())["cells"]
    monkeypatch.chdir(REPOSITORY / "examples")
    names: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["figure"]._repr_png_().startswith(b"\x89PNG")
    assert "grass" in names["text"]
