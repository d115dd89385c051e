"""What every result says of itself, and how it is written: JSON, Markdown and a picture beside each other.

::

    facts = recording.facts(options)            # hardware, versions, commit, options, threads
    recording.write(options.output, facts | {"rows": rows}, page, measures=[Measure("step", "s", seconds)])

``measures`` are what ``python -m benchmarks compare`` looks at: named numbers of which a smaller one is better, each
with its repeats. Needs neither ray nor mlflow.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from grass_ray.config import to_json, whole_file
from grass_ray.results.provenance import git_state, hardware, now, versions

# asked at the start: by the end of a measurement the repository may be further
_GIT = git_state()
# where results go and what data is read depends on the machine
PLACES = ("output", "data_dir", "store")


@dataclass(frozen=True)
class Measure:
    """Something of which less is better, such as seconds or bytes, once per repeat.

    Attributes:
        name: what was measured, unique in its benchmark.
        unit: of the values, such as ``s`` or ``MiB``.
        values: one number per repeat.
    """

    name: str
    unit: str
    values: list[float]


class Ended(NamedTuple):
    """How a process ended, and what it and those below it took: seconds of the processor, and the largest in MiB."""

    code: int
    processor_s: float
    peak_mib: float


def run_process(command: Sequence[str], **how: IO[bytes] | Path | Mapping[str, str]) -> Ended:
    """Run a command to its end; ``how`` is for :class:`subprocess.Popen`."""
    process = subprocess.Popen(command, **how)  # type: ignore[call-overload]
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(process.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def facts(options: Any = None) -> dict[str, Any]:
    """Where numbers come from: options (a dataclass), threads, hardware, versions, commit, and the time."""
    found: dict[str, Any] = {} if options is None else {"options": _plain(options)}
    if "torch" in sys.modules:
        found["threads"] = sys.modules["torch"].get_num_threads()
    about = {"hardware": hardware(), "versions": versions(), "git_commit": _GIT.commit, "git_dirty": _GIT.dirty}
    return found | about | {"measured_at": now()}


def _plain(options: Any) -> dict[str, str]:
    return {key: str(value) for key, value in vars(options).items() if key not in PLACES}


def commit() -> str:
    """The first digits of the commit, and whether files differ from it."""
    return (_GIT.commit or "-")[:10] + (" (modified)" if _GIT.dirty else "")


def made_on() -> str:
    """Hardware, torch's version and the commit, for the head of a page."""
    return f"{hardware()}; torch {versions().get('torch', '-')}, commit {commit()}"


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    names = list(header)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(
    output: Path,
    values: Mapping[str, Any],
    page: str,
    *,
    measures: Iterable[Measure] = (),
    draw: Callable[[Path], object] | None = None,
) -> None:
    """Write ``output`` with ``.json`` and ``.md``, and with ``.png`` if there is something that draws; print the page.

    Args:
        output: the path without its suffix; its folder is made.
        values: what the JSON file holds, usually with :func:`facts`.
        page: Markdown.
        measures: what ``compare`` looks at.
        draw: writes the picture to a path.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = {one.name: {"unit": one.unit, "values": one.values} for one in measures}
    whole = dict(values) | ({"measures": kept} if kept else {})
    for suffix, text in ((".json", to_json(whole, indent=1)), (".md", page.rstrip("\n"))):
        with whole_file(output.with_suffix(suffix)) as file:
            file.write(text + "\n")
    if draw is not None:
        draw(output.with_suffix(".png"))
    print("\n" + page)


def costs(taken: Iterable[Any], prefix: str, units: Mapping[str, str]) -> list[Measure]:
    """The fields of dataclasses, one object per repeat, as measures named ``PREFIX FIELD``."""
    rows = [asdict(one) for one in taken]
    return [Measure(f"{prefix} {name}", unit, [row[name] for row in rows]) for name, unit in units.items()]
