"""README and the pages of docs/: code blocks run, commands and settings exist, links lead somewhere.

The blocks of a page run one after another, as a reader would run them: Python in one namespace that has a small
``model`` and its ``loss``, ``grass-ray`` in an empty folder. What needs a cluster, the network or minutes has a comment
before it, such as ``<!-- not run: needs a cluster -->``; its commands must still parse.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from small import REPOSITORY, make_batch, make_llama

from grass_ray.cli import main
from grass_ray.config import ConfigError, DataConfig, DatasetSource, PeftConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import parse

GENERATED = runpy.run_path(str(REPOSITORY / "docs" / "generated.py"))
FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# blocks that are files of that name
FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
SITE = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
# their blocks have tests of their own, or need runs
OTHERS = [REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "benchmarks" / "RECORDS.md"]
OTHERS += sorted((REPOSITORY / "examples").glob("*.md"))
# programs of others, whose flags are not checked
FOREIGN = {"accelerate", "cd", "cp", "git", "kubectl", "mlflow", "pip", "ray", "torchrun"}


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks_of(page: Path) -> list[tuple[bool, str, str]]:
    """For each fenced block: whether it runs here, its language, its text."""
    return [(not mark, language, text) for mark, language, text in FENCE.findall(page.read_text(encoding="utf-8"))]


def commands_in(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            if words := shlex.split(command, comments=True):
                yield words


def run(words: list[str]) -> None:
    """Run a command of a page; a sweep's trials are only listed."""
    if words[:1] == ["python"]:
        assert "--dry-run" in words, f"{words} would take minutes: mark the block with <!-- not run: why -->"
        words = ["grass-ray", "sweep", str(REPOSITORY / words[1]), *words[2:]]
    assert words[0] == "grass-ray", f"cannot run {words}: mark the block with <!-- not run: why -->"
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    assert ended.value.code == 0, words


RUNNABLE = [page for page in SITE if any(here and language != "text" for here, language, _ in blocks_of(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    for name, text in FILE.findall(page.read_text(encoding="utf-8")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    names: dict[str, object] = {"model": (model := make_llama())}
    for here, language, text in blocks_of(page):
        assert language in ("python", "bash", "text", "yaml"), f"{page} has a block of {language}, which nobody checks"
        if here and language == "python":
            batch = make_batch(0)
            names["loss"] = model(input_ids=batch, labels=batch).loss
            exec(compile(text, str(page), "exec"), names)
        elif here and language == "bash":
            for words in commands_in(text):
                run(words)


help_of = cache(GENERATED["help_of"])


def check_command(words: list[str]) -> None:
    """Verb, files and flags exist, those of a sweep behind ``ray submit`` as well."""
    scripts = [at for at, word in enumerate(words) if re.fullmatch(r"(sweeps|examples|benchmarks)(/\w+)+\.py", word)]
    for word in words:
        if re.fullmatch(r"[\w/.]*\b(cluster[\w.]*\.yaml|\w+\.py)", word):
            assert (REPOSITORY / word).is_file(), f"{words}: there is no file {word}"
    if scripts and words[scripts[0]].startswith("sweeps/"):
        check_flags(words, words[scripts[0] + 1 :], help_of("python", words[scripts[0]]))
    elif words[0] == "grass-ray":
        # the settings of a method are flags, too
        method = [word for word in words[2:3] if words[1] == "train" and word in METHODS]
        said = help_of("grass-ray", words[1], *method)
        # so are the arguments of a class of the user's own, which no other help lists
        check_flags(words, [word for word in words[2:] if ".args." not in word], said)
        for named in words[2:3]:
            if words[1] in ("plot", "ls"):
                assert named in re.findall(r"[\w-]+", said), f"{words}: {named} is not in its help"
            if words[1] == "train":
                known = named in METHODS or "--method-file" in words or named.isupper()
                assert known, f"{words}: there is no method {named}"
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (REPOSITORY / "Makefile").read_text(encoding="utf-8"), words
    else:
        assert scripts or words[0] in FOREIGN, f"{words}: unknown program"


def check_flags(words: list[str], arguments: list[str], said: str) -> None:
    for word in arguments:
        if word.startswith("--") and word != "--":
            assert re.search(rf"{re.escape(word)}(?![\w-])", said), f"{words}: its help does not have {word}"
    own = DataConfig(source=DatasetSource(name="own", path="own.jsonl")) if "--data" in arguments else DataConfig()
    check_settings([word for word in arguments if re.match(r"[a-z_]+(\.[a-z_]+)+=|seed=", word)], own)


def check_settings(assignments: list[str], data: DataConfig) -> None:
    """They can be set together in at least one method."""
    refusals = []
    for row in METHODS.values():
        try:
            RunConfig(method=row.config, data=data).override(parse(assignments))
            return
        except ConfigError as error:
            refusals.append(str(error))
    pytest.fail(f"no method takes {assignments}: {refusals[0]}")


@pytest.mark.parametrize("page", SITE + OTHERS, ids=name_of)
def test_commands_and_settings_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shell = [block for _, language, block in blocks_of(page) if language == "bash"]
    prose = FENCE.sub("", text).replace("\n", " ")
    inline = re.findall(r"`((?:grass-ray [a-z]|python sweeps/(?!yours)|make )[^`]+)`", prose)
    for words in commands_in("\n".join([*shell, *inline])):
        check_command(words)
    for settings in re.findall(r"`--set ([^`]+)`", prose):
        if "key=value" not in settings.lower():
            check_settings(shlex.split(settings), DataConfig())


@pytest.mark.parametrize("page", SITE + OTHERS, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not link.startswith("https://"):
            target = page.parent / link
            built_for_the_site = target.name == "leaderboard.html" and (target.parent / "records").is_dir()
            assert target.exists() or built_for_the_site, f"{page}: {link}"


def test_the_reference_has_every_key_of_every_method() -> None:
    page = GENERATED["configuration"]()
    for row in METHODS.values():
        foreign = row.config.adapter.settings if isinstance(row.config.adapter, PeftConfig) else {}
        for key in RunConfig(method=row.config).flatten():
            if not key.endswith(".kind") and key.removeprefix("method.adapter.") not in foreign:
                assert f"`{key}`" in page


def test_the_predictions_of_memory_are_the_recorded_ones() -> None:
    table = GENERATED["memory_predictions"]()
    rows = json.loads((REPOSITORY / "benchmarks" / "results" / "memory_plan.json").read_text(encoding="utf-8"))["rows"]
    ratios = [row["ratio"] for row in rows]
    assert f"| all | {len(rows)} | {min(ratios):.3f} to {max(ratios):.3f} |" in table
    assert all(abs(row["ratio"] - 1) <= (0.035 if row["method"] in ("c3a", "fourierft") else 0.018) for row in rows), (
        "the guide says so"
    )
    for setting in ("gradient_checkpointing all", "states lazy", "weights streamed", "bfloat16", "precision int8"):
        assert f"| {setting} |" in table


def test_the_front_page_has_the_recorded_memory() -> None:
    assert GENERATED["memory_table"]() in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "| full | 1.00 |" in GENERATED["method_costs"]()


def test_the_front_page_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_versions_that_are_asked_for_are_those_of_the_package() -> None:
    package = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    asked = {name: rule for name, _, rule in (re.split(r"(\[.*\])?(?=[<>=]|$)", line, maxsplit=1) for line in package)}
    page = (REPOSITORY / "docs" / "limits.md").read_text("utf-8")
    table = dict(re.findall(r"^\| ([\w-]+) \| `(.+)` \|", page, re.MULTILINE))
    assert table == {name: rule for name, rule in asked.items() if "<" in rule or "==" in rule}
