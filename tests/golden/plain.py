"""Makes what is printed the same on every machine: no colours, widths, paths, dates or last digits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

_SIDES = re.compile(r"^[|│] | *[|│]$")
_TITLE = re.compile(r"^[+╭╰][-─]+|[-─]+[+╮╯]$")  # around a box's title
_LONG_NUMBER = re.compile(r"-?\d+\.\d{12,}(?:e[+-]?\d+)?|-?\d(?:\.\d{12,})e[+-]?\d+")
_PROGRESS = re.compile(r" (step|evaluating) .*\d/\d")
_SHOWN_LINES = 40


def rounded(text: str) -> str:
    """The text with twelve significant digits a number: sums differ in the last ones between processors."""
    return _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.12g}", text)


def without_blank_ends(text: str) -> str:
    """The text without blanks at the ends of lines, with one line break at its end."""
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n"


def shortened(text: str) -> str:
    """The first lines of a long table, and a hash of the others."""
    lines = text.splitlines()
    if len(lines) <= _SHOWN_LINES + 10:
        return text
    rest = "\n".join(lines[_SHOWN_LINES:])
    return "\n".join([*lines[:_SHOWN_LINES], f"... {len(lines) - _SHOWN_LINES} more lines, sha256 {sha256(rest)[:16]}"])


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def unframed(text: str) -> str:
    """A help text or a message without boxes, columns and wide gaps: a line for each flag."""
    lines: list[str] = []
    for line in text.splitlines():
        content = _TITLE.sub("", _SIDES.sub("", line.rstrip()))
        if not content.strip("-─ "):
            continue
        if content.startswith(" " * 6) and lines:  # goes on with what is said of a flag
            lines[-1] += " " + " ".join(content.split())
        else:
            lines.append(" ".join(content.split()))
    return "\n".join(lines)


def without_measurements(text: str, hardware: str) -> str:
    """What a run prints, without what it measured and where and when it ran."""
    lines = [line for line in text.replace(hardware, "HARDWARE").splitlines() if not _PROGRESS.search(line)]
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "TIME", "\n".join(lines))
    return re.sub(r" +", " ", re.sub(r"\d+\.\d+", "X", text))


def keys(value: Any, place: str = "") -> Iterator[str]:
    """Dotted paths of everything in nested mappings and lists, each once."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from keys(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        found: dict[str, None] = {}
        for inner in value:
            found |= dict.fromkeys(keys(inner, f"{place}[]"))
        yield from found
    else:
        yield place


class _Page(HTMLParser):
    """Visible text with its structure: a line a block, cells apart, pictures by their label, links by where they go."""

    BLOCKS = frozenset(
        [
            "h1",
            "h2",
            "h3",
            "h4",
            "p",
            "li",
            "dt",
            "dd",
            "tr",
            "caption",
            "summary",
            "figcaption",
            "pre",
            "section",
            "nav",
            "details",
            "title",
        ]
    )
    HIDDEN = frozenset({"style", "script", "svg"})

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._line, self._mark, self._hidden = "", "", 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "svg" and not self._hidden:
            self._block("figure")
        if tag in self.HIDDEN:
            self._hidden += 1
        elif self._hidden:
            return
        elif tag in self.BLOCKS:
            self._block(tag)
        elif tag in ("td", "th"):
            self._line += " | "
        elif tag == "a":
            target = values.get("href") or ""
            self._line += f"[{values.get('download') or target}] "

    def handle_endtag(self, tag: str) -> None:
        if tag in self.HIDDEN:
            self._hidden -= 1
        elif tag in self.BLOCKS and not self._hidden:
            self._block("")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._line += data

    def _block(self, mark: str) -> None:
        text = " / ".join(part for line in self._line.splitlines() if (part := " ".join(line.split())))
        if text or self._mark in ("figure",):
            self.lines.append(f"{self._mark}: {text}" if self._mark else text)
        self._line, self._mark = "", mark


def page_text(html: str) -> str:
    """What a reader of a page sees, without its looks."""
    page = _Page()
    page.feed(html)
    page._block("")
    return "\n".join(page.lines)
