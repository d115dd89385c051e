"""Crafted files run no code, secrets appear nowhere, names are no paths, and the page's texts are only texts."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from mlflow_server import free_port
from result_records import make_record
from small import REPOSITORY, make_llama, short_run

from grass_ray.cluster.storage import Storage
from grass_ray.commands.sweep import resume_command
from grass_ray.config import ConfigError, DatasetSource, ModelConfig, RunConfig
from grass_ray.errors import redact
from grass_ray.experiment.plan import SweepPlan
from grass_ray.methods import METHODS
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.page.page import render_page
from grass_ray.results.record import RunRecord
from grass_ray.tasks.conversations import encode_chat, find_template
from grass_ray.tasks.dataset_files import read_dataset
from grass_ray.tasks.dataset_rows import find_dataset
from grass_ray.tasks.inference.token_cache import TokenCache
from grass_ray.tasks.rows import ChatRow, RowError
from grass_ray.training.checks import check_run, tokenizer_to_check
from grass_ray.training.models import load_model
from grass_ray.training.run import Run

PACKAGE = REPOSITORY / "grass_ray"


class Payload:
    """Whoever unpickles it creates the file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.mark,))


# ------------------------------------------------------------------------------------------------------- nothing is run


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_the_package_has_nothing_that_executes_data() -> None:
    """No unpickling, no evaluation of text, no YAML loader that makes objects, anywhere in the package."""
    banned = (
        r"\bpickle\.loads?\(|\bcloudpickle|\byaml\.(?:unsafe_|full_)?load\("
        r"|(?<![.\w])eval\(|(?<![.\w])exec\(|os\.system\(|shell=True"
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(banned, line) or ("torch.load(" in line and "weights_only=True" not in line)
    ]
    assert found == []


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_checkpoint_is_not_unpickled(kind: str, tmp_path: Path) -> None:
    run = Run.prepare(short_run("grass"))
    folder, mark = tmp_path / "checkpoint", tmp_path / "mark"
    run.save(folder)
    (folder / "SHA256SUMS").unlink()  # whoever makes the file can make its hash, too
    if kind == "torch":
        torch.save({"optimizer": Payload(mark), "random": {}}, folder / "optimizer.pt")
    else:
        (folder / "optimizer.pt").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ConfigError, match="is not a readable checkpoint"):
        run.restore(folder)
    for name in ("weights.safetensors", "state.json"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
        with pytest.raises(ConfigError, match="is not a readable checkpoint"):
            run.restore(folder)
    assert not mark.exists()


def test_a_models_weights_are_not_unpickled(tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    make_llama(vocabulary=512).save_pretrained(folder)
    tokenizer_to_check(ModelConfig(name="tiny")).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(mark)}, folder / "pytorch_model.bin")
    with pytest.raises((ConfigError, pickle.UnpicklingError)):
        load_model(ModelConfig(name=str(folder)))
    assert not mark.exists()


def test_code_beside_the_weights_runs_only_by_the_flag(tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    make_llama(vocabulary=512).save_pretrained(folder)
    tokenizer_to_check(ModelConfig(name="tiny")).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    )
    config = short_run("grass", f"model.name={folder}")
    assert config.model.trust_remote_code is False
    with pytest.raises(ConfigError, match="trust_remote_code"):
        check_run(config)
    assert not mark.exists()
    assert config.override({"model.trust_remote_code": True}).to_dict()["model"]["trust_remote_code"] is True


def test_a_cache_is_not_unpickled(tmp_path: Path) -> None:
    tokenizer = tokenizer_to_check(ModelConfig(name="tiny"))
    texts = [f"What is {number} + 3?" for number in range(12)]
    expected = TokenCache(tokenizer, tmp_path / "cache").encode(texts)
    (path,) = (tmp_path / "cache").iterdir()
    odd = numpy.array([Payload(tmp_path / "mark")], dtype=object)
    numpy.savez(path, ids=odd, lengths=odd, allow_pickle=True)
    assert TokenCache(tokenizer, tmp_path / "cache").encode(texts) == expected
    assert not (tmp_path / "mark").exists()


def test_a_data_set_with_a_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("mine.py", "dataset_infos.json"):
        (tmp_path / "mine" / name).write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    for given in (tmp_path / "mine", tmp_path / "mine" / "mine.py"):
        with pytest.raises(ConfigError):
            read_dataset(find_dataset(str(given)).path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch mark') }}",
        "{% for number in range(10 ** 12) %}x{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ 'x' * 10 ** 14 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
    ],
    ids=range(9),
)
def test_a_hostile_chat_template_runs_in_the_sandbox(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text(template)
    tokenizer = tokenizer_to_check(ModelConfig(name="tiny"))
    source = DatasetSource(name="a", path="a.jsonl", chat_template=str(tmp_path / "own.jinja"))
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    with pytest.raises((RowError, ConfigError)) as refused:
        encode_chat(tokenizer, ChatRow(messages=json.dumps(messages)), find_template(source, tokenizer))
    assert "root:" not in str(refused.value)
    assert not (tmp_path / "mark").exists()


# ------------------------------------------------------------------------------------------------------ names and paths


@pytest.mark.parametrize("name", ["../../mine", "/etc/mine", "a/b", "..", ".hidden", ""])
def test_names_are_no_paths(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.name"):
        RunConfig(method=METHODS["grass"].config).override({"method.name": name})
    record = json.loads(make_record("grass").model_dump_json()) | {"name": name}
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"is not a run record .* in name"):
        RunRecord.load(tmp_path / "record.json")
    for source in ("custom", "dataset"):
        values = {"kind": source, "name": name, "answer": "number", "test": "a", "path": "a.json"}
        with pytest.raises(ConfigError, match="name"):
            RunConfig(method=METHODS["grass"].config).override({"data.source": values})


# -------------------------------------------------------------------------------------------------------------- secrets

PASSWORD, TOKEN = "planted-pa55word", "planted-t0ken-of-the-environment"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:{PASSWORD}@host:5000/x", "http://***@host:5000/x"),
        (f"http://me:{PASSWORD}@more@host", "http://***@host"),
        (f"s3://AKEY:{PASSWORD}@bucket/a?region=b", "s3://***@bucket/a?region=b"),
        (f"postgresql://me@host/db?password={PASSWORD}&sslmode=require", None),
        (f"https://host/a?X-Amz-Signature={PASSWORD}&x=1", None),
        (f"it said: Bearer {PASSWORD}", "it said: Bearer ***"),
        ("hf_abcdefghijklmnop", "***"),
        (f"login with {TOKEN} failed", "login with *** failed"),
        ("sqlite:////tmp/mlflow.db and a@b.c, http://host/a@b", "sqlite:////tmp/mlflow.db and a@b.c, http://host/a@b"),
    ],
    ids=range(9),
)
def test_secrets_are_masked(text: str, shown: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", TOKEN)
    masked = redact(text)
    assert PASSWORD not in masked
    assert TOKEN not in masked
    assert shown in (None, masked)
    assert redact(masked) == masked


def test_a_plan_and_the_commands_that_are_printed_hold_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://me:{PASSWORD}@127.0.0.1:5000"
    plan = SweepPlan(name="mini", sweep_id="1", question="?", tracking_uri=uri, trials=(short_run("full"),))
    assert PASSWORD not in plan.to_yaml()
    assert SweepPlan.from_yaml(plan.to_yaml(), "it").tracking_uri == "http://***@127.0.0.1:5000"
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--tracking-uri", uri])
    assert PASSWORD not in resume_command()
    assert PASSWORD not in Storage(f"s3://KEY:{PASSWORD}@bucket/a").shown


@pytest.mark.long
def test_planted_secrets_are_found_nowhere(tmp_path: Path) -> None:
    """A run and a mistake of the command line, with secrets in the environment and in the store's address."""
    environment = {**os.environ, "HF_TOKEN": TOKEN, "MLFLOW_TRACKING_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": TOKEN}
    words = "train grass --model tiny --task generated --steps 2 --set data.source.train_rows=8 data.source.test_rows=4"
    words += " training.batch_size=4 method.sampler.probing_steps=1 --output out"
    store = f"sqlite:///{tmp_path}/mlflow.db"
    nobody = f"http://me:{PASSWORD}@127.0.0.1:{free_port()}"
    said = ""
    for given, code in ((["--tracking-uri", store], 0), (["--tracking-uri", nobody, "--output", "b"], 2)):
        command = [sys.executable, "-m", "grass_ray.cli", *shlex.split(words), *given]
        command[2:3] = ["from grass_ray.cli import main; main()"]
        command[1] = "-c"
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        said += done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "record.json" for path in files)
    assert any(path.name == "mlflow.db" for path in files)
    for secret in (PASSWORD, TOKEN):
        assert secret not in said
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


# ------------------------------------------------------------------------------------------------------------- the page

ODD = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def test_the_page_escapes_everything_and_allows_only_its_own_script() -> None:
    records = [
        make_record("grass", hardware=ODD, suite="x"),
        make_record("full", status="failed", failure=ODD, hardware=ODD),
        make_record("lora", overrides=[f"model.name={json.dumps('/a/' + ODD.replace('/', ''))}"]),
    ]
    page = render_page(build_leaderboard(records), records)
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert page.count("<script") == 1
    assert not re.search(r"\son\w+=\"", page.replace(html.escape(ODD), ""))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy).split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
