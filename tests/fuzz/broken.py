"""Valid files changed at random places, and what every reader of a file may do with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import yaml
from hypothesis import strategies as st

from grass_ray.config import ConfigError

Result = TypeVar("Result")
MOST_CHARACTERS = 20_000  # of a message

TEXT = st.one_of(
    st.sampled_from(
        ["", " ", "..", "../../etc/passwd", "/dev/null", "a\x00b", "\ud800", "-1", "NaN", "{{ 7 * 7 }}", "none"]
    ),
    st.text(max_size=12),
    st.sampled_from(["x" * 5000, "é" * 300, "<script>alert(1)</script>", "%s%n", "$(id)", "${HOME}"]),
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64 + 1, -(10**30), 10**299, 0.0, -0.0, 5e-324, 1e308, float("inf")]),
    st.sampled_from([float("-inf"), float("nan"), 0.5, 1e-9]),
    st.integers(-3, 300),
    st.floats(),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
JUNK = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=5
)


def deep(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def outcome(act: Callable[[], Result]) -> Result | None:
    """What ``act`` returns; None if it raises the one error of a user's mistake. Every other error fails the test."""
    try:
        return act()
    except ConfigError as error:
        message = str(error)
        assert message.strip(), "an error without words"
        assert len(message) <= MOST_CHARACTERS, f"{len(message)} characters: {message[:200]}"
        return None


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """The plain value with a few parts replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        value = _change(draw, value)
    return value


def _change(draw: st.DrawFn, value: Any) -> Any:
    inside: dict[Any, Any] = (
        value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    )
    if not inside or draw(st.integers(0, 9)) == 0:
        return draw(JUNK)
    key = draw(st.sampled_from(list(inside)))
    match draw(st.sampled_from(["deeper", "deeper", "deeper", "deeper", "replace", "remove", "add", "rename"])):
        case "deeper":
            inside[key] = _change(draw, inside[key])
        case "replace":
            inside[key] = draw(JUNK)
        case "remove":
            del inside[key]
        case "add":
            inside[draw(TEXT) if isinstance(value, dict) else len(inside)] = draw(JUNK)
        case "rename":
            inside[draw(TEXT) if isinstance(value, dict) else len(inside)] = inside.pop(key)
    return inside if isinstance(value, dict) else list(inside.values())


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut short, with some overwritten, removed, or put in."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["cut", "flip", "insert", "remove", "zeros"])):
            case "cut":
                content = content[:place]
            case "flip":
                content = content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
            case "insert":
                content = content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:]
            case "remove":
                content = content[:place] + content[place + draw(st.integers(1, 64)) :]
            case "zeros":
                length = len(content[place : place + 512])
                content = content[:place] + bytes(length) + content[place + length :]
    return content


# pieces that YAML gives a meaning of its own
_YAML_PIECES = st.sampled_from(
    [
        *("&a", "*a", "<<: *a", "!!python/object/apply:os.system [id]", "!!set {a, b}", "!!timestamp x", "!!int ''"),
        *("!!binary aGk=", "!!bool x", "2024-13-45", "? [1]\n: 2", "0x" + "f" * 5000, "1:" * 200 + "1", "[" * 2000),
        *("{a: " * 900, "%YAML 9.9\n---", "---\na: 1\n---\nb: 2", "\t", "- ", ": ", "|\n", "\x00", "'", '"', "=", "#"),
    ]
)


@st.composite
def yaml_of(draw: st.DrawFn, value: Any) -> bytes:
    """A YAML file with the plain value, changed as a value, as text or as bytes."""
    kind = draw(st.sampled_from(["value", "value", "value", "text", "bytes"]))
    if kind == "value":
        return yaml.safe_dump(draw(changed(value)), sort_keys=False).encode()
    content = yaml.safe_dump(value, sort_keys=False).encode()
    if kind == "bytes":
        return draw(damaged(content))
    lines = content.decode().split("\n")
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        key, _, _ = lines[place].partition(":")
        piece = draw(_YAML_PIECES)
        lines[place] = draw(
            st.sampled_from([f"{key}: {piece}", piece, f"{lines[place]}\n{piece}", lines[place] + piece])
        )
    return "\n".join(lines).encode("utf-8", errors="surrogatepass")
