"""Pages written from the code itself: the command line's help and the keys of a run's configuration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
SCHEDULE = "ScheduleConfig"
HEAD = "\n| key | type | default | meaning |\n|---|---|---|---|\n"


def command_line() -> str:
    """The help of every verb, and of the flags that all sweeps share."""
    (verbs,) = re.findall(r"usage: grass-ray .*\{([a-z,\s-]+)\}", help_of("grass-ray"), flags=re.DOTALL)
    programs = ["grass-ray", *(f"grass-ray {verb}" for verb in re.findall(r"[a-z-]+", verbs))]
    programs.insert(2, "grass-ray train grass")  # lists the settings of the method, too
    programs.append("python sweeps/quickstart.py")
    return "\n\n".join(f"## `{name}`\n\n```text\n{help_of(*name.split()).strip()}\n```" for name in programs)


def help_of(program: str, *arguments: str) -> str:
    """What ``grass-ray VERB --help`` or ``python SCRIPT --help`` prints."""
    environment = os.environ | {"COLUMNS": "84", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    main = ["-c", "from grass_ray.cli import main; main()"] if program == "grass-ray" else []
    command = [sys.executable, *main, *arguments, "--help"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def configuration() -> str:
    """Every key of a run's configuration, from the JSON schema of ``RunConfig``."""
    from grass_ray.config import RunConfig

    schema = RunConfig.model_json_schema()
    parts = {f"#/$defs/{name}": part for name, part in schema["$defs"].items()}
    # what many keys take is explained once, at the end
    schedules = {place: part for place, part in parts.items() if place.endswith(SCHEDULE)}
    own = {place: part for place, part in parts.items() if place not in schedules}
    sections = [
        *_sections("", schema, own),
        *(text for part in schedules.values() for text in _sections("SCHEDULE.", part, own)),
    ]
    return "\n".join(sections)


def memory_predictions() -> str:
    """The memory plan's recorded predictions beside what was measured: by setting, and on SmolLM2-135M one by one."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "memory_plan.json").read_text(encoding="utf-8"))["rows"]
    settings: dict[str, list[float]] = {}
    for row in rows:
        for setting in _memory_settings(row):
            settings.setdefault(setting, []).append(row["ratio"])
    lines = ["| cases | number | planned / measured |", "|---|---|---|"]
    lines += [f"| {name} | {len(own)} | {min(own):.3f} to {max(own):.3f} |" for name, own in settings.items()]
    lines += ["", "| SmolLM2-135M | rows x tokens | planned MiB | measured MiB |", "|---|---|---|---|"]
    for row in rows:
        if row["model"] == "smollm2-135m":
            shape = row["shape"]
            labelled = f", {shape['labelled']} labelled" if shape["labelled"] else ""
            words = [row["method"], *(name for name in _memory_settings(row) if name != "all")]
            sizes = (row["predicted"]["peak_bytes"], row["measured"]["peak"])
            cells = " | ".join(f"{size / 2**20:.0f}" for size in sizes)
            lines.append(f"| {', '.join(words)} | {shape['rows']} x {shape['tokens']}{labelled} | {cells} |")
    return "\n".join(lines)


def memory_table() -> str:
    """Peaks measured on SmolLM2-135M, and planned for LLaMA2-7B, from the recorded results."""
    results = ROOT / "benchmarks" / "results"
    measured = json.loads((results / "methods.json").read_text(encoding="utf-8"))["costs"]
    planned = json.loads((results / "memory_plan.json").read_text(encoding="utf-8"))["planned"]
    smollm2 = {name: f"{max(cost['peak_allocated_gib'] for cost in costs):.2f}" for name, costs in measured.items()}
    lines = ["| method | SmolLM2-135M, measured GiB | LLaMA2-7B, planned GiB | and on the host |", "|---|---|---|---|"]
    for row in planned:
        settings = ["offload lazy"] if row["offload"] == "lazy" else []
        settings += [f"precision {row['precision']}"] if row["precision"] else []
        settings += ["weights streamed"] if row["weights"] == "streamed" else []
        settings += ["updates in backward"] if row["in_backward"] else []
        settings += ["1 x 1,024 tokens"] if row["shape"]["rows"] == 1 else []
        sizes = (row["predicted"]["peak_bytes"], row["predicted"]["host_bytes"])
        cells = [", ".join([f"`{row['method']}`", *settings]), "" if settings else smollm2[row["method"]]]
        lines.append(f"| {' | '.join([*cells, *(f'{size / 2**30:.1f}' for size in sizes)])} |")
    return "\n".join(lines)


def method_costs() -> str:
    """What a step of every method takes beside one of full fine-tuning, from the recorded results."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text(encoding="utf-8"))["costs"]
    lines = ["| method | step / step of full fine-tuning | peak GiB | of full's peak |", "|---|---|---|---|"]
    peaks = {name: max(cost["peak_allocated_gib"] for cost in costs) for name, costs in recorded.items()}
    for name in sorted(recorded, key=peaks.__getitem__):
        pairs = zip(recorded[name], recorded["full"], strict=True)
        ratio = median(own["step_s"] / full["step_s"] for own, full in pairs)
        lines.append(f"| {name} | {ratio:.2f} | {peaks[name]:.2f} | {peaks[name] / peaks['full']:.2f} |")
    return "\n".join(lines)


def _memory_settings(row: dict[str, Any]) -> Iterator[str]:
    """The settings of a recorded prediction by which predictions are counted."""
    asked = row.get("asked", row)["shape"]["checkpointing"]
    yield "all"
    yield f"states {row['offload']}"
    if asked != "none":
        yield f"gradient_checkpointing {asked}"
    if row.get("weights") == "streamed":
        yield "weights streamed"
    if row.get("probing"):
        yield "probing"
    if row["dtype"] != "float32":
        yield row["dtype"]
    if row.get("precision"):
        yield f"precision {row['precision']}"


def _sections(prefix: str, part: dict[str, Any], parts: dict[str, Any]) -> Iterator[str]:
    """The table of ``part``, whose keys begin with ``prefix``, then those of the parts inside it."""
    kind = part["properties"].get("kind", {}).get("const")
    rows, inside = [], []
    for name, field in part["properties"].items():
        leaves = list(_leaves(field))
        nested = [parts[leaf["$ref"]] for leaf in leaves if leaf.get("$ref") in parts]
        inside += [(f"{prefix}{name}.", inner) for inner in nested]
        if name == "kind" or len(nested) == len(leaves):
            continue
        types = " or ".join(dict.fromkeys(map(_type, leaves)))
        default = f"`{json.dumps(field['default'])}`" if "default" in field else ""
        types += "" if default else ", required"
        rows.append(f"| `{prefix}{name}` | {types} | {default} | {_text(field['description'])} |\n")
    title = f"`{prefix.removesuffix('.')}`" if prefix else "A run"
    paragraphs = [_text(paragraph) for paragraph in part["description"].split("\n\n")]
    heading = f"## {title}" + (f" of kind `{kind}`" if kind else "")
    yield "\n\n".join([heading, *paragraphs]) + "\n" + (HEAD if rows else "") + "".join(rows)
    for key, inner in inside:
        yield from _sections(key, inner, parts)


def _text(docstring: str) -> str:
    """A docstring as one line of Markdown that a cell of a table can hold."""
    return " ".join(docstring.split()).replace("``", "`").replace("|", r"\|")


def _leaves(field: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a field, those inside alternatives too."""
    branches = field.get("anyOf") or field.get("oneOf")
    if branches is None:
        yield field
    else:
        for branch in branches:
            yield from _leaves(branch)


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        is_schedule = field["$ref"].endswith(SCHEDULE)
        return "[schedule](#schedule-of-kind-linear)" if is_schedule else "a part with keys of its own"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items') or field['prefixItems'][0])}"
    limits = (f" {sign} {field[limit]:g}" for limit, sign in LIMITS.items() if limit in field)
    return field.get("type", "any") + ",".join(limits)
