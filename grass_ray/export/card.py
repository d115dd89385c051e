"""The model card of something exported: what was measured, on what, and how to load it.

::

    write_card(Path("my-model"), "model", config, record)      # my-model/README.md; record None: with less

Plain Markdown behind the YAML head that the Hugging Face hub reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from grass_ray.config import RunConfig
from grass_ray.paths import model_label
from grass_ray.results.notes import lost_by
from grass_ray.results.record import RunRecord
from grass_ray.results.statistics import average_interval, wilson_interval

Kind = Literal["model", "adapter", "delta"]

# Weights of a built-in name come from here; a random model for tests has no base anywhere.
_HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_NO_HUB_NAME = ("tiny",)
_WHAT = {"model": "A model", "adapter": "An adapter", "delta": "The layers that changed of a model"}
_LIBRARY = {"model": "transformers", "adapter": "peft", "delta": "grass_ray"}


def write_card(
    folder: Path, kind: Kind, config: RunConfig, record: RunRecord | None, *, written: str | None = None
) -> None:
    """Write ``README.md`` into ``folder``, in the place of one that is there.

    Args:
        folder: an exported model, adapter or delta.
        kind: which of them.
        config: of the run that it comes from.
        record: what the run measured; None where its ``record.json`` is missing.
        written: what the export says of itself, such as the layers in a delta.
    """
    (folder / "README.md").write_text(render_card(folder.name, kind, config, record, written=written), encoding="utf-8")


def render_card(
    title: str, kind: Kind, config: RunConfig, record: RunRecord | None, *, written: str | None = None
) -> str:
    """The card as text (see :func:`write_card`)."""
    head = yaml.safe_dump(_front_matter(title, kind, config, record), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{head}---",
        f"# {title}",
        _summary(kind, config),
        f"## Use\n\n{_use(kind, config)}",
        *([] if written is None else [f"What is in this folder: {written}."]),
        f"## Figures\n\n{_figures(record)}",
        f"## Training\n\n{_training(config, record)}",
        f"## Data\n\n{_data(config, record)}",
        f"## Provenance\n\n{_provenance(config, record)}",
        "## Limits\n\nThe figures hold for these tasks, prompts and this way of reading answers. The base model's "
        "licence and limits apply, and those of the training data. Nothing was tested for safety or bias.",
    ]
    return "\n\n".join(parts) + "\n"


def write_delta_card(delta: Path, folder: Path) -> None:
    """Write the card of a model made from a delta and its base: the delta's own, with how to load a model in it.

    Nothing is written where the delta has no card of :func:`write_card`.
    """
    card = delta / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    before, use, after = body.partition("\n## Use\n")
    _, figures, rest = after.partition("\n## Figures\n")
    if not (use and figures):
        return
    values = yaml.safe_load(head)
    dtype = re.search(r"dtype=torch\.(\w+)", after)
    lines = _loading("model", "THIS_FOLDER", "float32" if dtype is None else dtype[1])
    values["library_name"] = _LIBRARY["model"]
    for entry in values.get("model-index", ()):
        entry["name"] = folder.name
    head = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    before = re.sub(r"^# .*", lambda _: f"# {folder.name}", before.strip(), count=1)
    before = "\n" + before.replace(_WHAT["delta"], _WHAT["model"], 1) + "\n"
    (folder / "README.md").write_text(f"---\n{head}---\n{before}{use}\n{lines}\n{figures}{rest}", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------- head


def _front_matter(title: str, kind: Kind, config: RunConfig, record: RunRecord | None) -> dict[str, Any]:
    head: dict[str, Any] = {"library_name": _LIBRARY[kind]}
    base = hub_name(config)
    if base is not None:
        head["base_model"] = base
        head["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
    head["pipeline_tag"] = "text-generation"
    head["tags"] = [
        "grass_ray",
        config.method.name,
        config.data.suite,
        *(["arxiv:2604.07808"] if _is_grass(config) else []),
    ]
    if record is not None and record.tasks:
        results = [
            {
                "task": {"type": "text-generation", "name": task},
                "dataset": {"name": task, "type": task},
                "metrics": [{"type": "accuracy", "value": round(100 * score.accuracy, 2), "name": "accuracy (%)"}],
            }
            for task, score in record.tasks.items()
            if score.num_examples
        ]
        head["model-index"] = [{"name": title, "results": results}]
    return head


def hub_name(config: RunConfig) -> str | None:
    """The base model's name on the hub; None for a folder and for what is on no hub."""
    name = config.model.name
    is_path = name.count("/") != 1 or os.path.isabs(name) or Path(name).exists()
    if name in _NO_HUB_NAME or (name not in _HUB_NAMES and is_path):
        return None
    return _HUB_NAMES.get(name, name)


def _is_grass(config: RunConfig) -> bool:
    return config.method.name.startswith("grass")


def _summary(kind: Kind, config: RunConfig) -> str:
    return (
        f"{_WHAT[kind]} fine-tuned from `{_base(config)}` with **{config.method.name}** on {config.data.suite} "
        f"({', '.join(config.data.tasks)}), written by `grass-ray export`."
    )


def _base(config: RunConfig) -> str:
    """The base model's name, without the place of a folder on this machine."""
    name = model_label(config.model.name)
    return Path(name).name if Path(name).is_dir() else name


def _use(kind: Kind, config: RunConfig) -> str:
    base = hub_name(config) or "BASE_MODEL"
    code = _loading(kind, base, config.model.dtype)
    if kind == "delta":
        code += "\n\nOr `grass-ray export THIS_FOLDER --output my-model` for an ordinary model folder."
    if config.model.name in _HUB_NAMES and kind != "model":
        code += (
            f"\n\nThe base is grass_ray's built-in `{config.model.name}`, converted from quantised weights of {base}; "
            "other weights of that name are not the same bits."
        )
    return code


def _loading(kind: Kind, base: str, dtype: str) -> str:
    """Python that loads what is in the folder."""
    load_base = f'AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.{dtype})'
    lines = {
        "model": [
            "import torch",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype=torch.{dtype})',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        ],
        "adapter": [
            "import torch",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = PeftModel.from_pretrained({load_base}, "THIS_FOLDER")',
        ],
        "delta": [
            "import torch",
            "from transformers import AutoModelForCausalLM",
            "from grass_ray.export.delta import apply_delta",
            "",
            f"model = {load_base}",
            'apply_delta(model, "THIS_FOLDER")  # every bit of the base is checked first',
        ],
    }[kind]
    return "```python\n" + "\n".join(lines) + "\n```"


# ------------------------------------------------------------------------------------------------------------ sections


def _figures(record: RunRecord | None) -> str:
    if record is None:
        return (
            "The run's record was not there when this was written; nothing is known of its accuracy, memory or speed."
        )
    lines = []
    scores = {task: score for task, score in record.tasks.items() if score.num_examples}
    if scores:
        lines += ["| task | accuracy % | 95 % interval | questions |", "| --- | ---: | ---: | ---: |"]
        for task, score in scores.items():
            low, high = wilson_interval(sum(score.correct), score.num_examples)
            lines.append(
                f"| {task} | {100 * score.accuracy:.1f} | {100 * low:.1f}-{100 * high:.1f} | {score.num_examples} |"
            )
        if len(scores) > 1:
            shares = [score.accuracy for score in scores.values()]
            low, high = average_interval(shares, [score.num_examples for score in scores.values()])
            mean = sum(shares) / len(shares)
            lines.append(f"| average | {100 * mean:.1f} | {100 * low:.1f}-{100 * high:.1f} | |")
        ways = {f"{score.scoring}, {score.extraction} extraction" for score in scores.values()}
        lines += [
            "",
            f"Answers read by {'; '.join(sorted(ways))}, greedy decoding unless the configuration says otherwise. The "
            "intervals are Wilson's over the questions of one run; differences between seeds are not in them.",
        ]
    else:
        lines.append(f"Not evaluated: the run is {record.status}{f' ({record.failure})' if record.failure else ''}.")
    costs = _costs(record)
    return "\n".join([*lines, "", *costs] if costs else lines)


def _costs(record: RunRecord) -> list[str]:
    units = {
        "memory/peak_allocated_gib": ("peak memory allocated in training", "GiB"),
        "memory/peak_reserved_gib": ("peak memory reserved", "GiB"),
        "memory/host_pinned_gib": ("optimizer states in host memory", "GiB"),
        "throughput/tokens_per_second": ("speed of training", "tokens/s"),
        "time/train_s": ("training time", "s"),
    }
    return [
        f"- {words}: {record.metrics[name]:.3g} {unit}"
        for name, (words, unit) in units.items()
        if name in record.metrics
    ] + ([f"- measured on: {record.hardware}"] if record.metrics else [])


def _training(config: RunConfig, record: RunRecord | None) -> str:
    training, optimizer = config.training, config.method.optimizer
    lines = [
        f"- method: {config.method.name}",
        f"- steps: {training.steps} of {training.batch_size} rows, warm-up {training.warmup_steps}, "
        f"{training.lr_schedule} learning rate from {optimizer.lr:g}",
        f"- seed: {config.seed}",
    ]
    if record is not None and record.layers is not None:
        layers = record.layers
        lines.append(
            f"- trained at a time: {layers.trainable_parameters:,} of {layers.total_parameters:,} parameters "
            f"({100 * layers.trainable_share:.2f} %)"
        )
        proof = "yes" if layers.only_active_layers_changed else "NO"
        lines.append(f"- exactly the active layers changed, by fingerprints of the weights: {proof}")
    settings = {key: value for key, value in config.flatten().items() if key.startswith("method.")}
    table = [
        "| setting | value |",
        "| --- | --- |",
        *(f"| `{key}` | {_cell(value)} |" for key, value in settings.items()),
    ]
    return "\n".join([*lines, "", *table])


def _data(config: RunConfig, record: RunRecord | None) -> str:
    train = {} if record is None else record.data.get("train", {})
    if not isinstance(train, Mapping) or not train:
        return f"Suite {config.data.suite}, source {config.data.source.kind}; no hashes are known without the record."
    lines = [
        f"- trained on: {train.get('rows')} of {train.get('rows_available')} rows, {train.get('description')}",
        f"- sha256 of the rows: `{train.get('rows_sha256')}`",
    ]
    assert record is not None
    lines += [f"- {text}" for text in lost_by(record)]
    for task, score in record.tasks.items():
        protocol = score.protocol
        lines.append(
            f"- {task}: {score.num_examples} of {protocol.get('test_rows', '?')} test rows, "
            f"sha256 `{protocol.get('test_sha256', 'unknown')}`"
        )
    return "\n".join(lines)


def _provenance(config: RunConfig, record: RunRecord | None) -> str:
    if record is None:
        return f"- base model: {_base(config)}" + (
            f", revision {config.model.revision}" if config.model.revision else ""
        )
    commit = record.git_commit or "unknown: not a checkout"
    lines = [
        f"- base model: {_base(config)}, revision {record.model_revision or 'unknown'}, "
        f"sha256 of its weights `{record.model_sha256 or 'not recorded'}`",
        f"- run: {record.name} (`{record.run_id}`), {record.status}, {record.started_at} to {record.finished_at}",
        f"- grass_ray commit: {commit}{' with uncommitted changes' if record.git_dirty else ''}",
        f"- versions: {', '.join(f'{name} {number}' for name, number in record.versions.items())}",
    ]
    lines.append("- again: `grass-ray reproduce RUN` with the run's folder or its MLflow id")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ") or '""'


def find_record(folder: Path) -> RunRecord | None:
    """The record of the run in ``folder``; None where it has none. Raises ConfigError when it cannot be read."""
    path = folder / "record.json"
    return RunRecord.load(path) if path.is_file() else None
