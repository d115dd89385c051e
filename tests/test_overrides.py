"""Dotted keys of nested configurations: look up, change, compare, and changes written as text."""

from __future__ import annotations

from typing import Any

import pytest

from grass_ray.config import ConfigError, RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import apply, assignment, diff, flatten, has, merge, parse

VALUES: dict[str, Any] = {"a": 1, "b": {"c": None, "d": {"kind": "linear", "end": 2.5}}, "e": [1, "x"]}


def test_flatten_gives_each_value_its_dotted_key() -> None:
    assert flatten(VALUES) == {"a": 1, "b.c": None, "b.d.kind": "linear", "b.d.end": 2.5, "e": [1, "x"]}
    whole = flatten(VALUES, is_leaf=lambda part: "kind" in part)
    assert whole == {"a": 1, "b.c": None, "b.d": {"kind": "linear", "end": 2.5}, "e": [1, "x"]}


def test_has_finds_parts_and_values_that_are_none() -> None:
    assert all(has(VALUES, key) for key in ("a", "b", "b.c", "b.d.end"))
    assert not any(has(VALUES, key) for key in ("", "c", "a.x", "b.c.x", "e.0"))


def test_apply_changes_a_copy_and_names_what_is_missing() -> None:
    changed = apply(VALUES, {"b.d": {"kind": "step"}, "b.d.kind": "cosine", "a": [2]})
    assert changed == {"a": [2], "b": {"c": None, "d": {"kind": "cosine"}}, "e": [1, "x"]}
    assert VALUES["b"]["d"]["kind"] == "linear"
    for key, message in {
        "b.x": "cannot apply 'b.x=7': b has no key 'x'; it has c, d",
        "x": "cannot apply 'x=7': the configuration has no key 'x'; it has a, b, e",
        "a.x": "cannot apply 'a.x=7': a has no key 'x'; it has no keys",
    }.items():
        with pytest.raises(ConfigError) as error:
            apply(VALUES, {key: 7})
        assert str(error.value) == message


def test_diff_gives_the_changes_that_make_one_configuration_of_another() -> None:
    grass = RunConfig(method=METHODS["grass"].config)
    for other in (grass.override({"seed": 3, "method.sampler.period": 7}), RunConfig(method=METHODS["lora"].config)):
        changes = diff(grass.to_dict(), other.to_dict())
        assert grass.override(changes) == other
    assert diff(VALUES, VALUES) == {}
    assert diff(VALUES, apply(VALUES, {"b.d": {"kind": "step"}})) == {"b.d": {"kind": "step"}}, "other keys: one value"


def test_later_changes_win_and_are_applied_last() -> None:
    assert list(merge({"a": 1, "b": 2}, {"a": 3}).items()) == [("b", 2), ("a", 3)]
    assert parse(["x=1", "x.y=2", "x={y: 3}"]) == {"x.y": 2, "x": {"y": 3}}
    assert list(parse(["x=1", "x.y=2", "x={y: 3}"])) == ["x.y", "x"]


@pytest.mark.parametrize("value", [None, True, 3, 1e-05, "1", "null", "a: b", "...", "", [1, None], {"kind": "step"}])
def test_an_assignment_reads_back_equal(value: object) -> None:
    assert parse([assignment("a.b", value)]) == {"a.b": value}
    assert "\n" not in assignment("a.b", value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("steps", "write it as dotted.key=value"), ("=1", "write it as dotted.key=value"), ("a=[1", "is not YAML")],
)
def test_what_is_no_assignment_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot read the override .*{reason}"):
        parse([text])
