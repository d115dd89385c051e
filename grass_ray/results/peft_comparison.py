"""peft's method comparison: records written in its form, and its published results read as reference rows.

::

    write_peft_results(records, folder)                       # one JSON per run, as its load_df reads them
    print(render_reference(read_peft_results(folder)))        # published elsewhere: other hardware, one seed

https://github.com/huggingface/peft/tree/main/method_comparison
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from grass_ray.config import ConfigError, RunConfig, fingerprint_of, slug, to_json
from grass_ray.results.formats import NONE, gib, nats_more, number, percent
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render_cells
from grass_ray.training.report import FORGETTING, GIB

_NEEDED = {
    "memory/peak_reserved_gib": "peak memory",
    "memory/mean_reserved_gib": "memory after each step",
    "memory/p99_reserved_gib": "memory after each step",
    "checkpoint/mib": "size of its checkpoint",
}
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write_peft_results(records: Sequence[RunRecord], folder: Path) -> tuple[list[Path], list[str]]:
    """Write one file per run that was trained, finished and evaluated.

    Returns:
        The files, and one sentence for each run that lacks something the form needs.

    Raises:
        ConfigError: there is no run to write.
    """
    written, left_out = [], []
    for record in records:
        if (missing := _missing(record)) is not None:
            left_out.append(f"{record.name} is left out: {missing}")
            continue
        values = to_peft_result(record)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{values['run_info']['experiment_name'].replace('/', '--')}.json"
        path.write_text(to_json(values, indent=2) + "\n", encoding="utf-8")
        written.append(path)
    if not written:
        raise ConfigError("no run can be written in peft's form" + "".join(f"; {reason}" for reason in left_out))
    return list(dict.fromkeys(written)), left_out  # a run may be found twice


def _missing(record: RunRecord) -> str | None:
    if record.status != "finished" or not record.config["training"]["steps"]:
        return "it was not trained to its end"
    if _accuracy(record) is None:
        return "it has no accuracy"
    absent = dict.fromkeys(words for name, words in _NEEDED.items() if name not in record.metrics)
    return f"its record does not know the {' and the '.join(absent)}" if absent else None


def to_peft_result(record: RunRecord) -> dict[str, Any]:
    """Return a record in peft's form; what peft's runs do not have, such as a sampler, is in ``peft_config``."""
    config = RunConfig.parse(record.config)
    training, method, metrics = config.training, config.method, record.metrics
    tokens, losses = record.step_tokens(), [loss for _, loss in record.series.get("train/loss", ())]
    began, ended = map(datetime.fromisoformat, (record.started_at, record.finished_at))
    last = {
        "step": training.steps,
        "test accuracy": _accuracy(record),
        "train loss": fmean(losses[-_LAST_STEPS:]) if losses else math.nan,
        "train samples": training.steps * training.batch_size,
        "train total tokens": int(sum(tokens.values())),
        **({FORGETTING: metrics[FORGETTING]} if FORGETTING in metrics else {}),
    }
    layers, name = record.layers, f"{slug(config.model.name)}-s{config.seed}-{fingerprint_of(record.config)}"
    return {
        "run_info": {
            "created_at": record.started_at,
            "total_time": (ended - began).total_seconds(),
            "experiment_name": f"{method.name}/{name}",
            "peft_branch": f"grass_ray {(record.git_commit or 'unknown')[:9]}",
            "train_config": _train_config(config),
            "peft_config": _method(config),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(metrics["memory/mean_reserved_gib"] * GIB),
            "accelerator_memory_max": int(metrics["memory/peak_reserved_gib"] * GIB),
            "accelerator_memory_reserved_99th": int(metrics["memory/p99_reserved_gib"] * GIB),
            "train_time": metrics.get("time/train_s", 0.0),
            "file_size": int(metrics["checkpoint/mib"] * 1024**2),
            "num_trainable_params": None if layers is None else layers.trainable_parameters,
            "num_total_params": None if layers is None else layers.total_parameters,
            "status": "success",
            "metrics": [last],
        },
        "meta_info": {
            "model_info": {"sha": record.model_revision, "created_at": None},
            "dataset_info": {config.data.suite: {"sha": None, "created_at": None}},
            "package_info": _packages(record),
            "system_info": {"system": platform.system(), "accelerator": record.hardware},
            "pytorch_info": "",
        },
    }


_OPTIMIZERS = {"sgd": "SGD", "muon": "Muon"}  # of torch.optim
_LAST_STEPS = 250  # over which peft averages the loss that it shows


def _accuracy(record: RunRecord) -> float | None:
    scores = [score.accuracy for score in record.tasks.values() if math.isfinite(score.accuracy)]
    if scores:
        return fmean(scores)
    return record.metrics.get("lm_eval/average")


def _train_config(config: RunConfig) -> dict[str, Any]:
    training, optimizer = config.training, config.method.optimizer
    return {
        "model_id": config.model.name,
        "dtype": config.model.dtype,
        "max_seq_length": config.data.max_length_tokens,
        "batch_size": training.batch_size,
        "max_steps": training.steps,
        "compile": False,
        "use_gc": training.gradient_checkpointing != "none",
        "seed": config.seed,
        "grad_norm_clip": optimizer.max_grad_norm or 0.0,
        "optimizer_type": _OPTIMIZERS.get(getattr(optimizer.projection, "kind", ""), "AdamW"),
        "optimizer_kwargs": {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay},
        "lr_scheduler": None if training.lr_schedule == "constant" else training.lr_schedule,
        "use_amp": False,
    }


def _method(config: RunConfig) -> dict[str, Any] | None:
    """The adapter as peft names it; a method without an adapter by its own name; None for full fine-tuning."""
    method = config.method
    if method.adapter is not None:
        return {"peft_type": method.adapter.peft_type, "task_type": "CAUSAL_LM", **method.adapter.peft_settings()}
    if method.name == "full":
        return None
    return {"peft_type": method.name.upper(), **method.model_dump(mode="json", exclude={"name", "adapter"})}


def _packages(record: RunRecord) -> dict[str, str | None]:
    known: dict[str, str | None] = {}
    for name in _PACKAGES:
        known |= {f"{name}-version": record.versions.get(name), f"{name}-commit-hash": None}
    return known


# ------------------------------------------------------------------------------------------------------- published rows


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """One result of peft's comparison, as far as it can be read beside a leaderboard."""

    name: str
    kind: str
    model: str
    hardware: str
    accuracy: float
    loss: float
    peak_gib: float
    mean_gib: float
    p99_gib: float
    train_s: float
    checkpoint_mib: float
    forgetting: float | None


def read_peft_results(folder: Path) -> list[PublishedResult]:
    """Read the JSON files of a folder, those of older versions too, best accuracy first.

    Raises:
        ConfigError: there are none, or one is not a result of peft's comparison.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = _read(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                f"{path} is no result of peft's method comparison: {type(error).__name__}: {error}"
            ) from None
        found += [] if result is None else [result]
    if not found:
        raise ConfigError(
            f"there are no results in {folder}; give a folder of peft's method comparison, such as "
            "method_comparison/MetaMathQA/results"
        )
    return sorted(found, key=lambda result: (-result.accuracy, result.name))


def _read(values: Mapping[str, Any]) -> PublishedResult | None:
    run, train, meta = (values[part] for part in ("run_info", "train_info", "meta_info"))
    if train["status"] != "success":
        return None
    last, config = train["metrics"][-1], run["peft_config"]
    device = "accelerator" if "accelerator_memory_max" in train else "cuda"  # its name in older results
    system = meta["system_info"]
    return PublishedResult(
        name=run["experiment_name"],
        kind=config["peft_type"] if config else "full-finetuning",
        model=run["train_config"]["model_id"],
        hardware=str(system.get("accelerator") or system.get("gpu")),
        accuracy=float(last["test accuracy"]),
        loss=float(last["train loss"]),
        peak_gib=train[f"{device}_memory_max"] / GIB,
        mean_gib=train[f"{device}_memory_reserved_avg"] / GIB,
        p99_gib=train[f"{device}_memory_reserved_99th"] / GIB,
        train_s=float(train["train_time"]),
        checkpoint_mib=train["file_size"] / 1024**2,
        forgetting=last.get("forgetting"),
    )


def render_reference(
    results: Sequence[PublishedResult], format: Literal["table", "markdown"] = "table", width: int = 100
) -> str:
    """The results as a table of its own, which says that they are not to be ranked with one's own rows."""
    header = ("method", "acc. %", "loss", "resrv. GiB", "mean GiB", "p99 GiB", "ckpt. MiB", "min", "forgot")
    cells = [
        (
            result.name,
            percent(result.accuracy),
            number(result.loss, 3),
            gib(result.peak_gib),
            gib(result.mean_gib),
            gib(result.p99_gib),
            number(result.checkpoint_mib),
            number(result.train_s, 1, 1 / 60),
            NONE if result.forgetting is None else nats_more(result.forgetting),
        )
        for result in results
    ]
    models = ", ".join(sorted({result.model for result in results}))
    machines = ", ".join(sorted({result.hardware for result in results}))
    notes = [
        "reference rows, published by peft's method comparison: other hardware and code, one seed each; not ranked or "
        "compared with the rows above",
        "loss: of training, over its last steps; forgot: rise of the loss on Wikipedia text in nats a token",
    ]
    return render_cells(f"{models}, {machines} (published by peft)", [(header, cells)], notes, format, width=width)
