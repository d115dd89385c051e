"""Wrong files, folders and flags of every verb that reads what users wrote: one message, before a model is loaded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_methods import ROW, write_methods
from small import REPOSITORY

from grass_ray.cli import VERBS, main

pytestmark = pytest.mark.long  # lm-eval's registry is read
Command = Callable[..., tuple[int, str, str]]


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


CHATS = lines(*({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
                for n in range(8)))  # fmt: skip
TASK = (
    "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: [a, b]\ndoc_to_target: 0\ntest_split: train\n"
)
FILES: dict[str, bytes | str] = {
    "chats.jsonl": CHATS,
    "bad.jsonl.gz": b"not packed",
    "cut.jsonl.gz": gzip.compress(CHATS * 50)[:-9],
    "bad.parquet": b"PAR1 nonsense",
    "void.parquet": b"",
    "void.jsonl": "",
    "hello.xyz": "hello",
    "zero.jsonl": b'{"text": "a\x00b"}\n',
    "copies.jsonl": lines(*[{"text": "always the same"}] * 9),
    "blank.jsonl": lines({"text": ""}, {"text": "  "}),
    "empty.jsonl": lines({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}),
    "alone.jsonl": lines({"messages": [{"role": "user", "content": "Who?"}]}),
    "list.jsonl": lines({"prompt": ["a"], "completion": "b"}),
    "mixed.jsonl": lines({"text": "a"}, {"prompt": "a", "completion": "b"}),
    "nothing/readme.txt": "no data",
    "broken/task.yaml": "task: [a\n",
    "fragment/task.yaml": "task: mine\ninclude: gone.yaml\n",
    "numbers/task.yaml": "- 1\n",
    "nameless/task.yaml": "output_type: generate_until\n",
    "sourceless/task.yaml": f"task: mine\n{TASK}",
    "dataless/task.yaml": f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: gone.json}}\n{TASK}",
    "poem/task.yaml": "task: mine\ndataset_path: json\noutput_type: poem\n",
    "codeless/task.yaml": "task: mine\ndataset_path: json\ndoc_to_text: !function nothing.at_all\n",
    "strangers/group.yaml": "group: mine\ntask: [arc_easy, nobody_knows]\n",
    "broken.yaml": "- {name: a\n  b: [",
    "latin.yaml": b"- name: caf\xe9\n",
    "sweep.txt": "print('hello')",
}
LORA = ("train", "lora", "--model", "tiny")
QUICK = ("sweep", str(REPOSITORY / "sweeps" / "quickstart.py"), "--dry-run")


def data(given: str, *settings: str) -> tuple[str, ...]:
    return (*LORA, "--data", given, *(word for setting in settings for word in ("--set", setting)))


def adapter(keys: str) -> tuple[str, ...]:
    return (*LORA, "--set", f"method.adapter={{kind: peft, {keys}}}")


WRONG: list[tuple[tuple[str, ...], str]] = [
    (data("bad.jsonl.gz"), "bad.jsonl.gz: it is not a whole gzip file"),
    (data("cut.jsonl.gz"), "cut.jsonl.gz: it is not a whole gzip file"),
    (data("bad.parquet"), "bad.parquet as Parquet: Parquet magic bytes not found"),
    (data("void.parquet"), "void.parquet as Parquet: Parquet file size is 0 bytes"),
    (data("void.jsonl"), "void.jsonl holds no rows that are objects"),
    (data("hello.xyz"), "hello.xyz is no data file that is known; give .json"),
    (data("zero.jsonl"), "zero.jsonl is no JSON in UTF-8"),
    (data("copies.jsonl"), "has 1 different row(s), of which none can be held out"),
    (data("blank.jsonl"), "all of 1 training rows are empty"),
    (data("empty.jsonl"), "row 1: message 1 (user) is empty"),
    (data("alone.jsonl"), "row 1: it has no message of the assistant, so there is nothing to learn"),
    (data("list.jsonl"), "row 1: 'prompt' is a list, not text"),
    (data("mixed.jsonl"), "row 1: no 'prompt'; it has 'text'"),
    (data("nothing"), "was not written by save_to_disk of datasets"),
    (data("gone/away.jsonl"), "there is no data set gone/away.jsonl"),
    (data("chats.jsonl", "data.source.columns.messages=turns"), "which are no shape that is known (messages: turns;"),
    (data("chats.jsonl", "data.source.shape=alpaca"), "row 1: no 'instruction'; it has 'messages'"),
    (data("chats.jsonl", "data.source.split=dev"), "data.source.split=dev has no effect on "),
    (data("chats.jsonl", "data.source.revision=v2"), "data.source.revision=v2 has no effect on "),
    (data("chats.jsonl", "data.source.test=gone.jsonl"), "there is no data set gone.jsonl"),
    (data("chats.jsonl", "data.validation_rows=7"), "data.validation_rows=7 of 7 different training rows"),
    (data("chats.jsonl", "data.source.name=gsm8k"), "the name 'gsm8k' is taken by a built-in task"),
    (("eval", "--model", "tiny", "--data", "void.jsonl"), "void.jsonl holds no rows that are objects"),
    ((*QUICK, "--data", "bad.parquet"), "bad.parquet as Parquet: Parquet magic bytes not found"),
    ((*LORA, "--eval-tasks", "broken/"), "broken/task.yaml cannot be read: while parsing a flow sequence"),
    ((*LORA, "--eval-tasks", "broken/task.yaml"), "broken/task.yaml cannot be loaded: while parsing a flow sequence"),
    ((*LORA, "--eval-tasks", "fragment/"), "fragment/task.yaml cannot be read: [Errno 2] No such file"),
    ((*LORA, "--eval-tasks", "numbers/"), "has no task of lm-eval: a YAML file (.yaml) with the key task"),
    ((*LORA, "--eval-tasks", "nameless/"), "has no task of lm-eval: a YAML file (.yaml) with the key task"),
    ((*LORA, "--eval-tasks", "nothing/"), "has no task of lm-eval: a YAML file (.yaml) with the key task"),
    ((*LORA, "--eval-tasks", "sourceless/"), "is a key missing, such as dataset_path?"),
    ((*LORA, "--eval-tasks", "dataless/"), "(paths in a task's file are relative to its folder)"),
    ((*LORA, "--eval-tasks", "poem/"), "Got invalid output_type 'poem'"),
    ((*LORA, "--eval-tasks", "codeless/"), "Cannot import module 'nothing'"),
    ((*LORA, "--eval-tasks", "strangers/"), "has tasks that are unknown: nobody_knows"),
    ((*LORA, "--eval-tasks", "mmluu,arc_easy"), "lm-eval has no task 'mmluu'; near names: mmlu,"),
    (("eval", "--model", "tiny", "--eval-tasks", "broken/"), "broken/task.yaml cannot be read"),
    ((*QUICK, "--eval-tasks", "gone/"), "there is no folder or file of tasks "),
    (adapter("r: 8"), "method.adapter.peft_type: Field required"),
    (adapter("peft_type: lore"), "has no adapter 'LORE'; available: "),
    (adapter("peft_type: vera, colour: red"), "peft's VERA has no key colour; available: bias"),
    (adapter("peft_type: vera, r: 0"), "peft cannot put VERA tuning on LlamaForCausalLM: "),
    (adapter("peft_type: vera, r: many"), "peft cannot put VERA tuning on LlamaForCausalLM: "),
    (adapter("peft_type: loha, r: -1"), "`r` should be a positive integer value but the value passed is -1"),
    (adapter("peft_type: vera, target_modules: [nothing]"), "peft cannot put VERA tuning on LlamaForCausalLM: "),
    (adapter("peft_type: xlora"), "XLORA cannot be trained here: it mixes adapters"),
    (adapter("peft_type: p_tuning"), "P_TUNING adds virtual tokens; use an adapter of kind prefix or prompt"),
    ((*LORA, "--method-file", "broken.yaml"), "the method file broken.yaml is not YAML: while parsing"),
    ((*QUICK, "--method-file", "latin.yaml"), "cannot read the method file latin.yaml: it is no text in UTF-8"),
    ((*QUICK, "--method-file", "clash.yaml"), "method grass: there is a built-in method"),
    (("check-method", "broken.yaml"), "the method file broken.yaml is not YAML: while parsing"),
    (("check-method", "nothing"), "cannot read the method file nothing: Is a directory"),
    (("check-method", "own/methods.yaml"), "there is no module absent beside the method file"),
    (("check-method", "clash.yaml", "--reuse"), "unknown arguments: --reuse; see grass-ray check-method --help"),
    (("sweep", "sweep.txt"), "sweep.txt is not a Python file"),
    ((*QUICK, "--settings", "broken.yaml"), "the file of settings broken.yaml is not YAML: while parsing"),
    ((*QUICK, "--reuse", "--scheduler", "asha"), "--reuse takes over whole trials"),
    (("train", "lora", "--reuse"), "unknown arguments: --reuse"),
    (("ui", "--port", "70000"), "--port 70000 is no port; give 1 to 65535"),
    (("ui", "--tracking-uri", "sqlite:///gone.db"), "there is no MLflow store sqlite:///gone.db yet"),
    (("ui", "--tracking-uri", "http://127.0.0.1:9"), "the MLflow server http://127.0.0.1:9 does not answer"),
    (("chat", "nothing"), "has no config.json; give a folder written by save_pretrained"),
    (("chat", "chats.jsonl"), "is a file; give a folder written by save_pretrained"),
    (("chat", "tiny", "--temperature", "-1"), "--max-new-tokens must be at least 1, and --temperature at least 0"),
    (("doctor", "everything"), "unknown arguments: everything; see grass-ray doctor --help"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wrong-input")
    for name, content in FILES.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_methods(made / "own", ROW | {"sampler": {"kind": "import", "target": "absent:Mine"}})
    (made / "clash.yaml").write_text(json.dumps([{"name": "grass", "summary": "mine"}]), encoding="utf-8")
    return made


@pytest.fixture
def grass_ray(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    def no_model(*_: Any) -> None:
        pytest.fail("a model was loaded")

    for module in ("training.run", "export.model"):
        monkeypatch.setattr(f"grass_ray.{module}.load_model", no_model)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")

    def carry_out(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["grass-ray", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main(words)
        said = capfd.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return carry_out


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[f"{words[0]}-{' '.join(words[-2:])}" for words, _ in WRONG])
def test_it_is_one_message_and_exit_code_2(words: tuple[str, ...], message: str, grass_ray: Command) -> None:
    code, out, err = grass_ray(*words)
    assert (code, out) == (2, ""), out + err
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ui", "--port", "x"), "Error parsing --port"),
        (("check-method", "a.yaml", "--steps", "x"), "Error parsing --steps"),
        (("chat",), "Missing from grass-ray chat"),
        ((*LORA, "--num-fewshot", "None"), "Error parsing --num-fewshot"),
        (("ls", "adapters"), "invalid choice 'adapters'"),
        (("trian",), "Expected one of {train, sweep,"),
    ],
)
def test_flags_of_another_kind_are_told_in_one_box(words: tuple[str, ...], message: str, grass_ray: Command) -> None:
    code, out, err = grass_ray(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [*((verb,) for verb in VERBS if verb != "sweep"), ("train", "grass"), QUICK])
def test_help_shows_the_type_that_a_flag_takes(words: tuple[str, ...], grass_ray: Command) -> None:
    code, out, err = grass_ray(*words, "--help")
    assert (code, err) == (0, "")
    assert "None|" not in out
    assert "{None" not in out
