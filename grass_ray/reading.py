"""Read files that others wrote: plain values, or one :class:`ConfigError` that says what is wrong.

::

    values = read_yaml(path, "the method file")

A file may come from anywhere. It can be no text, broken, nested without end, or small and describe gigabytes: YAML that
repeats itself by aliases, a compressed file of zeros. YAML tags that make objects are refused, and nothing is executed.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Never

import yaml

from grass_ray.errors import ConfigError

MOST_BYTES = 256 * 1024**2  # of a file that people write, and of a record
MOST_VALUES = 1_000_000  # of a YAML file, aliases followed
MOST_DIGITS = 300  # more than the largest float has
_UNPACKED_BYTES, _UNPACKED_TIMES = 1024**3, 100  # text is packed to a twentieth or so; zeros to a thousandth
_NO_GZIP = "it is not compressed by gzip, or cut short"
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")}
_INT, _MERGE = "tag:yaml.org,2002:int", "tag:yaml.org,2002:merge"
# what PyYAML raises for values that are no dates, numbers or keys, beside its own errors
_BROKEN_YAML = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


def read_file(path: Path, what: str) -> str:
    """Read a text file in UTF-8.

    Args:
        path: the file.
        what: the words for it in messages, such as "the method file".

    Raises:
        ConfigError: it cannot be read, is no text, or larger than ``MOST_BYTES``.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {what} {path}: {reason(error)}") from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"cannot read {what} {path}: it has more than {MOST_BYTES // 1024**2} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {what} {path}: it is no text in UTF-8 ({error.reason})") from None


def read_yaml(path: str | Path, what: str) -> Any:
    """Return the plain values of a YAML file; raises what :func:`read_file` and :func:`parse_yaml` raise."""
    return parse_yaml(read_file(Path(path), what), f"{what} {path}")


def parse_yaml(text: str, where: str) -> Any:
    """Return the plain values of a YAML text. Raises :class:`ConfigError` that begins with ``where``."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ConfigError(f"{where} is not YAML that can be read: it is nested too deeply") from None
    except _BROKEN_YAML as error:
        raise ConfigError(f"{where} is not YAML: {reason(error)}") from None


def _check(root: yaml.Node) -> None:
    """Raise ``ValueError`` if a node is of a kind that is not read, or all of them are too many."""
    sizes: dict[int, int] = {}  # values below each node; None of an outer node is known yet
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            _refuse("a value contains itself", node)
        if node.tag not in _TAGS and node.tag != _MERGE:
            _refuse(f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')!r} is not read", node)
        open_nodes.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            if node.tag == _INT and len(node.value) > MOST_DIGITS:
                _refuse(f"a whole number has more than {MOST_DIGITS} digits", node)
            if not is_plain(node.value):
                _refuse("a text has a zero byte or half a character, which no path and no file can hold", node)
            found = 1
        elif isinstance(node, yaml.MappingNode):
            found = 1 + sum(size(key) + size(value) for key, value in node.value)
        else:
            found = 1 + sum(map(size, node.value))
        if found > MOST_VALUES:
            _refuse(f"with its aliases it has more than {MOST_VALUES:,} values", node)
        open_nodes.discard(id(node))
        sizes[id(node)] = found
        return found

    size(root)


def is_plain(text: str) -> bool:
    """Whether a text can be written as UTF-8 and handed to the system."""
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _refuse(why: str, node: yaml.Node) -> Never:
    raise ValueError(f"{why} (line {node.start_mark.line + 1})")


def parse_json(text: str | bytes, where: str) -> Any:
    """Return the values of a JSON text. Raises :class:`ConfigError` that begins with ``where``."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ConfigError(f"{where} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {reason(error)}") from None


def unpack(content: bytes) -> bytes:
    """Decompress gzip as a whole, without more memory than such a file of text can need.

    Raises:
        ValueError: it is no gzip, cut short, or grows beyond all measure.
    """
    most = max(_UNPACKED_BYTES, _UNPACKED_TIMES * len(content))
    parts: list[bytes] = []
    rest, left = content, most
    try:
        while rest:  # a file may have several members, one after another
            member = zlib.decompressobj(wbits=31)
            part = member.decompress(rest, left + 1)
            left -= len(part)
            if left < 0:
                raise ValueError(f"it unpacks to more than {most:,} bytes")
            if not member.eof:
                raise ValueError(_NO_GZIP)
            parts.append(part)
            rest = member.unused_data.lstrip(b"\x00")
    except zlib.error:
        raise ValueError(_NO_GZIP) from None
    if not parts:
        raise ValueError(_NO_GZIP)
    return b"".join(parts)


def reason(error: Exception) -> str:
    """The message of an error in one line; the kind of error if it has none."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:500] or type(error).__name__
