"""A chat file of one's own through every verb: shown, trained on, evaluated, reproduced, swept, ranked by loss."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from grass_ray.cli import main
from grass_ray.config import ModelConfig, RunConfig
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.page.commands import reproduce_command
from grass_ray.results.record import RunRecord
from grass_ray.tasks.conversations import SIMPLE
from grass_ray.training.models import load_model

pytestmark = pytest.mark.long

Said = tuple[int, str, str]
Command = Callable[..., Said]


def write_chats(folder: Path, *, name: str = "chats.jsonl", rows: int = 20) -> Path:
    turns = [
        [{"role": "user", "content": f"Colour of fox {n}?"}, {"role": "assistant", "content": f"Red, number {n}."}]
        for n in range(rows)
    ]
    path = folder / name
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own-data")
    write_chats(made)
    return made


@pytest.fixture
def grass_ray(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def carry_out(*words: object) -> Said:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
        monkeypatch.setattr("sys.argv", ["grass-ray", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([*map(str, words)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(left.value.code or 0), said.out, said.err

    return carry_out


TRAIN = ("train", "lora", "--model", "tiny", "--steps", "4", "--batch-size", "4", "--data", "chats.jsonl")


@pytest.fixture
def run(folder: Path, grass_ray: Command) -> Path:
    if not (folder / "run").exists():
        code, out, err = grass_ray(*TRAIN, "--output", "run")
        assert code == 0, out + err
        assert "data      18 rows of shape messages of" in out
        assert "{+Red, number" in out
    return folder / "run"


def test_a_dry_run_shows_three_examples_lengths_and_what_is_learned(folder: Path, grass_ray: Command) -> None:
    code, out, err = grass_ray(*TRAIN, "--dry-run")
    assert code == 0
    config = RunConfig.parse(yaml.safe_load(out))
    assert (config.evaluation.scoring, config.data.suite, config.data.tasks) == ("loss", "chats", ("chats",))
    assert config.data.source.path == str(folder / "chats.jsonl")  # type: ignore[union-attr]
    assert len(re.findall(r"^example ", err, re.MULTILINE)) == 3
    assert re.search(r"\{\+Red, number \d+\.<\|end\|>\+\}", err)
    counts = [int(count) for count in re.findall(r"^ +\d+-\d+ \S* (\d+)", err, re.MULTILINE)]
    assert sum(counts) == 18
    assert not (folder / "grass_ray_results").exists()


def test_a_run_is_evaluated_and_reproduced_and_its_command_is_complete(
    folder: Path, run: Path, grass_ray: Command
) -> None:
    record = RunRecord.load(run / "record.json")
    code, out, _ = grass_ray("eval", "--model", run, "--output", "evaluated")
    assert code == 0
    again = RunRecord.load(folder / "evaluated" / "record.json")
    assert again.tasks["chats"].answer_nats == record.tasks["chats"].answer_nats
    code, out, _ = grass_ray("reproduce", run)
    assert code == 0, out
    assert "agrees   chats: loss of the right answer, every question" in out
    (folder / "elsewhere").mkdir(exist_ok=True)
    write_chats(folder / "elsewhere")
    code, out, err = grass_ray("reproduce", run, "--data", "elsewhere/chats.jsonl", "--dry-run")
    assert code == 0
    assert "the training rows" not in err  # the same rows, in another place
    code, _, err = grass_ray("reproduce", run, "--data", "gone.jsonl")
    assert code == 2
    assert "there is no data set gone.jsonl in " in err
    words = reproduce_command(record.config)
    assert words is not None
    assert "data.source=" in words


def test_an_exported_model_has_its_losses_on_its_card_and_the_template_it_was_trained_with(
    folder: Path, grass_ray: Command
) -> None:
    (folder / "own.jinja").write_text(SIMPLE.replace("Assistant", "Fox").replace("### ", "## "))
    own = ("--set", "data.source.chat_template=own.jinja", "evaluation.forgetting=generated")
    code, _, err = grass_ray(*TRAIN, *own, "--output", "templated")
    assert code == 0, err
    code, _, err = grass_ray("export", "templated", "--output", "exported")
    assert code == 0, err
    assert AutoTokenizer.from_pretrained(folder / "exported").chat_template == (folder / "own.jinja").read_text()
    card = (folder / "exported" / "README.md").read_text()
    loss = RunRecord.load(folder / "templated" / "record.json").metrics["eval/chats/loss"]
    assert f"| chats | {loss:.3f} |" in card
    assert "| nan" not in card
    assert "rise of the loss on a text that has nothing to do with the task" in card


def test_base_and_trained_rows_are_ranked_by_loss(folder: Path, run: Path, grass_ray: Command) -> None:
    code, _, _ = grass_ray("train", "base", "--model", "tiny", "--data", "chats.jsonl", "--output", "base")
    assert code == 0
    records = [RunRecord.load(folder / name / "record.json") for name in ("base", "run")]
    (table,) = build_leaderboard(records)
    assert table.metric == "loss"
    assert [(row.method, row.rank) for row in table.rows] == [("lora", 1), ("base", 2)]
    assert table.rows[0].loss is not None
    assert table.rows[1].loss is not None
    assert table.rows[0].loss < table.rows[1].loss


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "gone.jsonl"), "there is no data set gone.jsonl in "),
        (("--data", "notes.txt"), "notes.txt is no data file that is known"),
        (
            ("--data", "chats.jsonl", "--task", "boolq"),
            "--task boolq has no effect: --data chats.jsonl is a task of its",
        ),
        (("--data", "chats.jsonl", "--data-dir", "."), "--data-dir . has no effect on the data set chats.jsonl"),
        (("--data", "chats.jsonl", "--set", "evaluation.scoring=generation"), "have no right answer"),
        (("--data", "chats.jsonl", "--set", "data.source.shape=poem"), "data.source.shape: Input should be 'messages'"),
        (
            ("--data", "chats.jsonl", "--set", "data.source.test_share=1"),
            "data.source.test_share: Input should be",
        ),
        (
            ("--data", "chats.jsonl", "--set", "data.source.columns.mesages=a"),
            "data.source.columns has no key 'mesages'",
        ),
        (("--data", "chats.jsonl", "--set", "data.max_length_tokens=8"), "has an answer within 8 tokens"),
        (("--data", "bad.jsonl"), "bad.jsonl: 1 of 3 rows cannot be used: row 2: message 1 has the role 'robot'"),
    ],
)
def test_wrong_input_is_one_message_before_anything_is_loaded(
    folder: Path, grass_ray: Command, words: tuple[str, ...], message: str
) -> None:
    good, bad = ({"messages": [{"role": role, "content": "?"}, {"role": "assistant", "content": "!"}]} for role in
                 ("user", "robot"))  # fmt: skip
    (folder / "notes.txt").write_text("hello")
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good)))
    code, out, err = grass_ray("train", "lora", "--model", "tiny", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_model_without_a_chat_template_is_said_in_one_sentence(folder: Path, grass_ray: Command) -> None:
    loaded = load_model(ModelConfig(name="tiny"))
    loaded.tokenizer.chat_template = None
    loaded.model.save_pretrained(folder / "bare")
    loaded.tokenizer.save_pretrained(folder / "bare")
    words = ("train", "lora", "--model", "bare", "--data", "chats.jsonl", "--dry-run")
    code, _, err = grass_ray(*words)
    assert code == 2
    assert "has no chat template, which conversations are rendered with; take a model that was tuned for chats" in err
    code, _, err = grass_ray(*words, "--set", "data.source.chat_template=simple")
    assert code == 0
    assert "rendered  chat template: simple; the assistant's turns are learned (marked by the template)" in err
