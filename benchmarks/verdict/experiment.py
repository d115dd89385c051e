"""The verdict's experiment as data: what PLAN.md says, in a form that the runner reads.

A run is a row (a method with its settings) on one data set at one learning rate with one seed. Paths in a run's
configuration are relative to the folder the runner works in, so that records do not depend on the machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grass_ray.config import CustomSource, DataConfig, FolderSource, GeneratedSource, ModelConfig, RunConfig, whole_file
from grass_ray.methods import METHODS
from grass_ray.overrides import parse

MODEL = "smollm2-135m"
LADDER = tuple(float(f"{digit}e-{power}") for power in range(7, 0, -1) for digit in (1, 3))  # of learning rates
MOST_EXTENSIONS = 3  # of a grid, on either side
SEARCH_SEED, SEARCH_STEPS = 0, 50
STEPS = 100
SHORT = 450  # characters of a GSM8K question and its solution together, at most

COMMON = (
    "training.batch_size=4",
    "training.warmup_steps=10",
    "data.batching=bucketed",
    "data.validation_rows=48",
    "data.max_length_tokens=256",
    "evaluation.limit=300",
    "evaluation.batch_size=16",
)
LAYERS = ("method.sampler.num_active_layers=4", "method.sampler.period=25")
PROBED = (*LAYERS, "method.sampler.probing_steps=10")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method with its settings, the middle of the three learning rates its search begins with, and its seeds."""

    method: str
    settings: tuple[str, ...] = ()
    middle: float = 1e-3
    seeds: int = 3


ROWS: Mapping[str, Row] = {
    "grass": Row(method="grass", settings=(*PROBED, "method.sampler.refresh_period=25"), seeds=5),
    "uniform": Row(method="uniform", settings=(*PROBED, "method.sampler.refresh_period=25"), seeds=5),
    "grass-static": Row(method="grass-static", settings=PROBED, seeds=5),
    "inverse": Row(method="inverse", settings=(*PROBED, "method.sampler.refresh_period=25"), seeds=5),
    "top": Row(method="top", settings=(*PROBED, "method.sampler.refresh_period=25"), seeds=5),
    "full": Row(method="full", middle=1e-4),
    "lora": Row(method="lora", middle=3e-3),
    "lisa": Row(method="lisa", settings=LAYERS),
    "badam": Row(method="badam", settings=("method.sampler.period=5",), middle=3e-3),
    "base": Row(method="base", seeds=1),
    "dora": Row(method="dora", middle=3e-3),
}
# the rows of each question, in the order in which they run
STAGES: tuple[tuple[str, ...], ...] = (
    ("base", "grass", "uniform"),
    ("grass-static", "inverse", "top"),
    ("full", "lora", "lisa", "badam", "dora"),
)

DATA: Mapping[str, tuple[DataConfig, str]] = {
    "mixture": (
        DataConfig(
            suite="commonsense",
            tasks=("boolq", "arc_easy", "arc_challenge", "openbookqa"),
            source=FolderSource(path="data/llm-adapters"),
        ),
        "loglikelihood",
    ),
    "generated": (DataConfig(source=GeneratedSource(train_rows=4000, test_rows=300)), "generation"),
    "gsm8k": (
        DataConfig(
            suite="gsm8k_short",
            tasks=("gsm8k_short",),
            source=CustomSource(
                name="gsm8k_short",
                answer="number",
                max_new_tokens=256,
                train="data/gsm8k_short/train.jsonl",
                test="data/gsm8k_short/test.jsonl",
            ),
        ),
        "loss",
    ),
}


def configure(data: str, row: str, lr: float, *, seed: int, steps: int, test: bool) -> RunConfig:
    """The configuration of one run."""
    config, scoring = DATA[data]
    settings = [
        *COMMON,
        *ROWS[row].settings,
        f"method.optimizer.lr={lr!r}",
        f"training.steps={steps if METHODS[ROWS[row].method].trains else 0}",
        f"evaluation.scoring={scoring}",
        f"evaluation.test={str(test).lower()}",
    ]
    base = RunConfig(method=METHODS[ROWS[row].method].config, model=ModelConfig(name=MODEL), data=config, seed=seed)
    return base.override(parse(settings))


def prepare_data(data_dir: Path, folder: Path) -> None:
    """Lay out the data under ``folder``: a link to the published files, and GSM8K's short rows as a custom task.

    Args:
        data_dir: holds ``llm-adapters/dataset`` and ``gsm8k/{train,test}.jsonl`` as published.
        folder: receives ``data/llm-adapters`` and ``data/gsm8k_short``.
    """
    (folder / "data" / "gsm8k_short").mkdir(parents=True, exist_ok=True)
    link = folder / "data" / "llm-adapters"
    if not link.exists():
        link.symlink_to((data_dir / "llm-adapters").resolve())
    for split in ("train", "test"):
        lines = (data_dir / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        with whole_file(folder / "data" / "gsm8k_short" / f"{split}.jsonl") as file:
            for row in map(json.loads, lines):
                solution = re.sub(r"<<.*?>>", "", row["answer"])  # the calculator's marks
                if len(row["question"]) + len(solution) <= SHORT:
                    answer = solution.rsplit("####", 1)[1].strip()
                    file.write(
                        json.dumps({"instruction": row["question"], "output": solution, "answer": answer}) + "\n"
                    )
