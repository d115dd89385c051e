"""The model card of an export: what was measured, on what, and how to load it.

::

    write_card(Path("my-model"), "model", config, record)      # my-model/README.md; record None: with less

The YAML head is written and read by ``huggingface_hub``, the text is the template ``card.md.j2``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grass_ray.config import RunConfig
from grass_ray.paths import model_label
from grass_ray.results.notes import lost_by
from grass_ray.results.record import RunRecord, TaskScore
from grass_ray.results.statistics import average_interval, wilson_interval

Kind = Literal["model", "adapter", "delta"]

# Weights of a built-in name come from here; a random model for tests has no base anywhere.
_HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_NO_HUB_NAME = ("tiny",)
_WHAT = {"model": "A model", "adapter": "An adapter", "delta": "The layers that changed of a model"}
_LIBRARY = {"model": "transformers", "adapter": "peft", "delta": "grass_ray"}
_LOADING = {
    "model": """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype=torch.{dtype})
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")""",
    "adapter": """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.{dtype})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")""",
    "delta": """\
import torch
from transformers import AutoModelForCausalLM
from grass_ray.export.delta import apply_delta

model = AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.{dtype})
apply_delta(model, "THIS_FOLDER")  # every bit of the base is checked first""",
}
_COSTS = {
    "memory/peak_allocated_gib": ("peak memory allocated in training", "GiB"),
    "memory/peak_reserved_gib": ("peak memory reserved", "GiB"),
    "memory/host_pinned_gib": ("optimizer states in host memory", "GiB"),
    "throughput/tokens_per_second": ("speed of training", "tokens/s"),
    "time/train_s": ("training time", "s"),
    "forgetting": ("rise of the loss on a text that has nothing to do with the task", "nats per token"),
}


def write_card(
    folder: Path, kind: Kind, config: RunConfig, record: RunRecord | None, *, written: str | None = None
) -> None:
    """Write ``README.md`` into ``folder``, replacing one that is there.

    Args:
        folder: an exported model, adapter or delta.
        kind: which of them.
        config: of the run that it comes from.
        record: what the run measured; None if its ``record.json`` is missing.
        written: what the export says of itself, such as the layers in a delta.
    """
    (folder / "README.md").write_text(render_card(folder.name, kind, config, record, written=written), encoding="utf-8")


def render_card(
    title: str, kind: Kind, config: RunConfig, record: RunRecord | None, *, written: str | None = None
) -> str:
    """The card as text (see :func:`write_card`)."""
    base = hub_name(config)
    tasks = {} if record is None else {task: score for task, score in record.tasks.items() if score.num_examples}
    answered = {task: score for task, score in tasks.items() if score.scoring != "loss"}
    train = {} if record is None else record.data.get("train", {})
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ") or '""'
    return templates.get_template("card.md.j2").render(
        card_data=_card_data(title, kind, config, tasks).to_yaml(),
        title=title,
        kind=kind,
        what=_WHAT[kind],
        config=config,
        record=record,
        base=_base(config),
        loading=_loading(kind, base or "BASE_MODEL", config.model.dtype),
        converted_from=base if config.model.name in _HUB_NAMES and kind != "model" else None,
        written=written,
        scores=_scores(answered),
        ways=sorted({f"{score.scoring}, {score.extraction} extraction" for score in answered.values()}),
        losses={task: score for task, score in tasks.items() if task not in answered},
        benchmarks={} if record is None else record.lm_eval,
        number=lambda value: "" if value is None else f"{value:.3f} ",
        costs=[] if record is None else _costs(record),
        settings={key: value for key, value in config.flatten().items() if key.startswith("method.")},
        train=train if isinstance(train, Mapping) else {},
        lost=[] if record is None else lost_by(record),
        percent=lambda share: f"{100 * share:.1f}",
    )


def write_delta_card(delta: Path, folder: Path) -> None:
    """Write the card of a model made from a delta and its base: the delta's card, with how to load a model in it.

    Nothing is written if the delta has no card of :func:`write_card`.
    """
    path = delta / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    parts = re.fullmatch(r"---\n.*?\n---\n(.*?\n## Use\n)(.*?)(\n## Figures\n.*)", text, flags=re.DOTALL)
    if parts is None:
        return
    before, use, after = parts.groups()
    data = ModelCard(text, ignore_metadata_errors=True).data
    data["library_name"] = _LIBRARY["model"]
    data["model_name"] = folder.name
    dtype = re.search(r"dtype=torch\.(\w+)", use)
    loading = _loading("model", "THIS_FOLDER", "float32" if dtype is None else dtype[1])
    before = re.sub(r"^# .*", lambda _: f"# {folder.name}", before, count=1, flags=re.MULTILINE)
    before = before.replace(_WHAT["delta"], _WHAT["model"], 1)
    card = f"---\n{data.to_yaml()}\n---\n{before}\n```python\n{loading}\n```\n{after}"
    (folder / "README.md").write_text(card, encoding="utf-8")


def find_record(folder: Path) -> RunRecord | None:
    """The record of the run in ``folder``; None if there is none. Raises ConfigError if it cannot be read."""
    path = folder / "record.json"
    return RunRecord.load(path) if path.is_file() else None


def hub_name(config: RunConfig) -> str | None:
    """The base model's name on the hub; None for a folder and for what is on no hub."""
    name = config.model.name
    is_path = name.count("/") != 1 or os.path.isabs(name) or Path(name).exists()
    if name in _NO_HUB_NAME or (name not in _HUB_NAMES and is_path):
        return None
    return _HUB_NAMES.get(name, name)


def _card_data(title: str, kind: Kind, config: RunConfig, tasks: Mapping[str, TaskScore]) -> ModelCardData:
    """What the hub reads of a card."""
    base = hub_name(config)
    more: dict[str, Any] = {}
    if base is not None:
        more["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
    paper = ["arxiv:2604.07808"] if config.method.name.startswith("grass") else []
    results = [
        EvalResult(
            task_type="text-generation",
            task_name=task,
            dataset_type=task,
            dataset_name=task,
            metric_type=name.split()[0],
            metric_name=name,
            metric_value=value,
        )
        for task, score in tasks.items()
        for name, value in [_result(score)]
    ]
    return ModelCardData(
        base_model=base,
        library_name=_LIBRARY[kind],
        pipeline_tag="text-generation",
        tags=["grass_ray", config.method.name, config.data.suite, *paper],
        model_name=title if results else None,
        eval_results=results or None,
        **more,
    )


def _base(config: RunConfig) -> str:
    """The base model's name; of a folder only its last component."""
    name = model_label(config.model.name)
    return Path(name).name if Path(name).is_dir() else name


def _loading(kind: Kind, base: str, dtype: str) -> str:
    """Python that loads what is in the folder."""
    return _LOADING[kind].format(base=base, dtype=dtype)


def _result(score: TaskScore) -> tuple[str, float]:
    """What the hub shows of a task."""
    if score.scoring == "loss":
        return "loss (nats)", round(math.nan if score.loss is None else score.loss, 4)
    return "accuracy (%)", round(100 * score.accuracy, 2)


class _Score(NamedTuple):
    """A line of the table of accuracies, shares from 0 to 1."""

    task: str
    accuracy: float
    low: float
    high: float
    questions: int | None


def _scores(tasks: Mapping[str, TaskScore]) -> list[_Score]:
    lines = [
        _Score(task, score.accuracy, *wilson_interval(sum(score.correct), score.num_examples), score.num_examples)
        for task, score in tasks.items()
    ]
    if len(lines) > 1:
        shares = [line.accuracy for line in lines]
        interval = average_interval(shares, [score.num_examples for score in tasks.values()])
        lines.append(_Score("average", sum(shares) / len(shares), *interval, None))
    return lines


def _costs(record: RunRecord) -> list[str]:
    return [
        f"{words}: {record.metrics[name]:.3g} {unit}"
        for name, (words, unit) in _COSTS.items()
        if name in record.metrics
    ]
