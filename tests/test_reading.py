"""Files from anywhere: plain values, or one message; little time and memory whatever they say."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest

from grass_ray import reading
from grass_ray.config import ConfigError, RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.reading import parse_json, parse_yaml, read_file, unpack
from grass_ray.results.record import RunRecord

# each level ten times the one below: ten to the ninth values in 300 bytes
LAUGHS = "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))])
_MERGED = (f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 10))
MERGES = "\n".join(["m0: &m0 {a: 1}", *_MERGED])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is not YAML: while parsing"),
        ("a: 2024-13-45", "is not YAML: month must be in 1..12"),
        ("a: !!timestamp x", "is not YAML"),
        ("a: !!int ''", "is not YAML"),
        ("a: !!bool x", "is not YAML"),
        ("? [1]\n: 2", "is not YAML"),
        ("--- 1\n--- 2", "is not YAML: expected a single document"),
        ("a: !!python/object/apply:os.system [id]", "the tag '!!python/object/apply:os.system' is not read"),
        ("a: !!set {b, c}", "the tag '!!set' is not read"),
        ("a: !own 1", "the tag '!own' is not read"),
        ("&a [*a]", "a value contains itself"),
        ("a: 0x" + "f" * 5000, "a whole number has more than 300 digits"),
        ('a: "b\\0c"', "a text has a zero byte"),
        ('a: "\\ud800"', "half a character"),
        ("[" * 3000, "nested too deeply"),
        ("{a: " * 3000, "nested too deeply"),
        (LAUGHS, "with its aliases it has more than 1,000,000 values"),
        (MERGES, "with its aliases it has more than 1,000,000 values"),
    ],
    ids=range(18),
)
def test_what_is_no_plain_yaml_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_yaml(text, "the file x")
    assert str(refused.value).startswith("the file x is not YAML")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError):
        RunConfig.from_yaml(tmp_path / "config.yaml")


def test_plain_yaml_is_read_as_ever() -> None:
    text = "base: &b {a: 1, c: [1.5, null, true, 2024-01-02, x]}\nown: {<<: *b, a: 2}\nagain: *b\n"
    values = parse_yaml(text, "x")
    assert values["own"] == {**values["base"], "a": 2}
    assert values["again"] == values["base"]
    assert parse_yaml("", "x") is None
    assert parse_yaml("10_000", "x") == 10_000


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 5000, b"\xff", ""])
def test_what_is_no_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"^x is not JSON"):
        parse_json(text, "x")


def test_a_small_file_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reading, "_UNPACKED_BYTES", 1024**2)
    bomb = gzip.compress(bytes(8 * 1024**2), mtime=0)
    with pytest.raises(ValueError, match="it unpacks to more than 1,048,576 bytes"):
        unpack(bomb)
    (tmp_path / "record.json.gz").write_bytes(bomb)
    with pytest.raises(ConfigError, match="is not a run record: it unpacks to more"):
        RunRecord.load(tmp_path / "record.json.gz")
    two = gzip.compress(b"one ") + gzip.compress(b"two") + bytes(7)  # members, and padding
    assert unpack(two) == gzip.GzipFile(fileobj=io.BytesIO(two)).read() == b"one two"
    for broken in (two[:-16], b"", b"plain", two + b"more"):
        with pytest.raises(ValueError, match="not compressed by gzip, or cut short"):
            unpack(broken)


def test_a_file_is_text_and_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(reading, "MOST_BYTES", 1000)
    for path, words in (
        (tmp_path / "a", "it is no text in UTF-8"),
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "it has more than"),
        (Path("a\0b"), "null byte"),
    ):
        with pytest.raises(ConfigError, match=f"cannot read the list .*{words}"):
            read_file(path, "the list")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method.optimizer.lr=.inf", "finite number"),
        ("method.sampler.temperature=.nan", "finite number"),
        ("seed=99999999999999999999", "less than or equal to 9223372036854775807"),
        ("training.steps=99999999999999999999", "less than or equal to 9223372036854775807"),
        ("training.steps=" + "[" + "a, " * 5000 + "]", r"given: \['a', .*\.\.\.\)$"),
    ],
    ids=range(5),
)
def test_numbers_that_no_run_could_take_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        RunConfig(method=METHODS["grass"].config).override(parse([text]))
    assert len(str(refused.value)) < 1000
