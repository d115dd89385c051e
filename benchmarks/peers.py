"""The same training by this project and by what people use now: speed, peak memory, seconds to the first step.

    python benchmarks/peers.py                       # SmolLM2-135M, on whatever device there is
    python benchmarks/peers.py --rounds 5 --dtype bfloat16 --batch-size 16       # on a GPU
    python benchmarks/peers.py --model tiny --rounds 1 --steps 2 --output /tmp/peers

Every contender trains the same model on the same rows, all of one length, so that no batch is padded; the loss is on
the answers alone. Each has a process of its own in each round, in a new order, and ratios are taken within a round:

- ``trainer-full``, ``trainer-lora``: transformers' Trainer, with and without peft's LoRA;
- ``sft-lora``: TRL's SFTTrainer with peft's LoRA;
- ``trainer-lisa``: LISA as a callback of Trainer that freezes and unfreezes layers, and one AdamW over all parameters;
- ``trainer-badam``: ``badam``'s BlockOptimizer in Trainer;
- ``trainer-galore``: Trainer with ``optim="galore_adamw"``, which is ``galore-torch``;
- ``trainer-grass``: this project's LayerwiseAdamW in Trainer;
- the others: rows of this project, run by its own loop.

Seconds to the first step are counted from the start of the process. The first steps are not timed; in the third the
allocations are recorded (on a CPU by torch's profiler). Needs neither ray nor mlflow, but what is compared with:
``pip install trl bitsandbytes`` and ``pip install --no-deps badam galore-torch``.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import recording
import torch
import tyro
from matplotlib.figure import Figure

from grass_ray.results.provenance import versions

PAIRS = {
    "full": ("trainer-full",),
    "lora": ("trainer-lora", "sft-lora"),
    "lisa": ("trainer-lisa",),
    "badam": ("trainer-badam",),
    "galore": ("trainer-galore",),
    "grass": ("trainer-grass",),
}
CONTENDERS = tuple(name for own, peers in PAIRS.items() for name in (own, *peers))
WATCHED_STEP = 3  # its allocations are recorded; steps up to it are not timed
ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str = "smollm2-135m"
    dtype: Literal["float32", "bfloat16"] = "float32"
    contenders: Annotated[tuple[str, ...], tyro.conf.arg(help=f"of {', '.join(CONTENDERS)}")] = CONTENDERS
    rounds: Annotated[int, tyro.conf.arg(help="interleaved rounds")] = 3
    steps: Annotated[int, tyro.conf.arg(help="timed steps a round")] = 6
    batch_size: int = 4
    problems: Annotated[int, tyro.conf.arg(help="problems in a prompt: the more, the longer a row")] = 3
    threads: Annotated[int | None, tyro.conf.arg(help="CPU threads; default: torch's own")] = None
    output: Annotated[Path, tyro.conf.arg(help="written with .json and .md")] = Path("benchmarks/results/peers")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does: ``contender`` on the model and the rows in ``folder``."""

    contender: str
    folder: str
    dtype: Literal["float32", "bfloat16"]
    steps: int
    batch_size: int
    threads: int

    @property
    def all_steps(self) -> int:
        """Steps in all."""
        return WATCHED_STEP + self.steps


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One contender in one round. Memory in GiB; ``peak_resident_gib`` is the process's, of the host."""

    first_step_s: float
    step_s: float
    tokens_per_s: float
    tokens_per_cpu_s: float
    peak_allocated_gib: float
    peak_resident_gib: float


class Stopwatch:
    """Times the steps of one process. ``end_of_step`` is called after each."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._first_step_s = 0.0
        self._ends: list[tuple[float, float]] = []

    def end_of_step(self) -> None:
        """Take the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if not self._ends:
            self._first_step_s = time.time() - psutil.Process().create_time()
        self._ends.append((time.perf_counter(), time.process_time()))

    def cost(self, peak_allocated_gib: float) -> Cost:
        """What was measured."""
        seconds, cpu_seconds = (
            [after - before for before, after in zip(ends[WATCHED_STEP - 1 :], ends[WATCHED_STEP:], strict=False)]
            for ends in zip(*self._ends, strict=True)
        )
        tokens = self._job.batch_size * json.loads(Path(self._job.folder, "rows.json").read_text())["tokens"]
        return Cost(
            first_step_s=self._first_step_s,
            step_s=statistics.median(seconds),
            tokens_per_s=tokens / statistics.median(seconds),
            tokens_per_cpu_s=tokens / statistics.median(cpu_seconds),
            peak_allocated_gib=peak_allocated_gib,
            peak_resident_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
        )


# ------------------------------------------------------------------------------------------------ this project's loop


def run_own(job: Job) -> Cost:
    from grass_ray.training.report import WARM_UP_STEPS
    from grass_ray.training.run import Run

    assert WARM_UP_STEPS == WATCHED_STEP
    stopwatch = Stopwatch(job)
    run = Run.prepare(own_config(job.contender, job))
    probed = 0
    for report in run.fit():
        probed += report.phase == "probe"
        if report.phase == "train" or probed == 1:  # the measuring step is the first; not one of the timed
            stopwatch.end_of_step()
        if report.train_step == job.all_steps - probed:
            break
    return stopwatch.cost(run.state.memory.peak_allocated_gib)


def own_config(method: str, job: Job) -> Any:
    """A row of this project, with the rows of ``folder`` as its data. Also says what the peers' settings are."""
    from grass_ray.config import DataConfig, DatasetSource, ModelConfig, RunConfig
    from grass_ray.methods import METHODS
    from grass_ray.overrides import parse

    settings = [f"training.steps={job.all_steps}", f"training.batch_size={job.batch_size}", "training.warmup_steps=0"]
    settings += ["training.lr_schedule=constant", "evaluation.scoring=loss"]
    if METHODS[method].config.sampler.kind == "grad_norm":
        settings.append("method.sampler.probing_steps=1")
    rows = json.loads(Path(job.folder, "rows.json").read_text())
    source = DatasetSource(name="rows", path=str(Path(job.folder, "rows.jsonl")), chat=False)
    return RunConfig(
        method=METHODS[method].config,
        model=ModelConfig(name=str(Path(job.folder, "model")), dtype=job.dtype),
        data=DataConfig(suite="rows", tasks=("rows",), source=source, max_length_tokens=rows["tokens"]),
    ).override(parse(settings))


# --------------------------------------------------------------------------------------------------------- the peers


def run_peer(job: Job) -> Cost:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    stopwatch = Stopwatch(job)
    watch = make_watch(stopwatch)
    trainer = PEERS[job.contender](job, watch)
    trainer.train()
    return stopwatch.cost(watch.peak_allocated_gib)


def make_watch(stopwatch: Stopwatch) -> Any:
    """A callback of Trainer that times its steps and records the allocations of one."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.peak_allocated_gib = 0.0
            self._open: Any = None
            self._meter: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WATCHED_STEP - 1:
                from grass_ray.training.metrics import MemoryMeter

                self._meter = MemoryMeter(args.device)
                self._open = self._meter.watch(held(kwargs["model"], kwargs["optimizer"]), closely=True)
                self._open.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._open is not None:
                self._open.__exit__(None, None, None)
                self._open, self.peak_allocated_gib = None, self._meter.peak_allocated_gib
            stopwatch.end_of_step()

    return Watch()


def held(model: torch.nn.Module, optimizer: Any) -> list[torch.Tensor]:
    """Weights, gradients and states that are there before a step."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    while hasattr(optimizer, "optimizer"):  # of accelerate
        optimizer = optimizer.optimizer
    for values in getattr(optimizer, "state", {}).values():
        tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return tensors


def arguments(job: Job, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(Path(job.folder, "output")),
        "max_steps": job.all_steps,
        "per_device_train_batch_size": job.batch_size,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **changes,
    }


def load(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(Path(job.folder, "model"), dtype=getattr(torch, job.dtype))


def rows(job: Job) -> Any:
    from datasets import Dataset

    return Dataset.from_list(json.loads(Path(job.folder, "rows.json").read_text())["rows"])


def trainer_of(job: Job, model: Any, callbacks: list[Any], *, optimizer: Any = None, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments, default_data_collator

    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(job, **changes)),
        train_dataset=rows(job),
        data_collator=default_data_collator,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )


def trainer_full(job: Job, watch: Any) -> Any:
    return trainer_of(job, load(job), [watch])


def lora_settings(job: Job) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **own_config("lora", job).method.adapter.peft_settings())


def trainer_lora(job: Job, watch: Any) -> Any:
    from peft import get_peft_model

    return trainer_of(job, get_peft_model(load(job), lora_settings(job)), [watch])


def sft_lora(job: Job, watch: Any) -> Any:
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=load(job),
        args=SFTConfig(**arguments(job, gradient_checkpointing=False, bf16=False), max_length=None),
        train_dataset=rows(job),
        processing_class=AutoTokenizer.from_pretrained(Path(job.folder, "model")),
        peft_config=lora_settings(job),
        callbacks=[watch],
    )


def trainer_lisa(job: Job, watch: Any) -> Any:
    from transformers import TrainerCallback

    sampler = own_config("lisa", job).method.sampler

    class DrawLayers(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % sampler.period == 0:
                layers = kwargs["model"].model.layers
                layers.requires_grad_(False)
                for layer in random.sample(list(layers), sampler.num_active_layers):
                    layer.requires_grad_(True)

    return trainer_of(job, load(job), [DrawLayers(), watch])


def trainer_badam(job: Job, watch: Any) -> Any:
    from badam import BlockOptimizer

    model = load(job)
    base = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    optimizer = BlockOptimizer(base, list(model.named_parameters()), switch_mode="random", verbose=0)
    return trainer_of(job, model, [watch], optimizer=optimizer)


def trainer_galore(job: Job, watch: Any) -> Any:
    projection = own_config("galore", job).method.optimizer.projection
    return trainer_of(
        job,
        load(job),
        [watch],
        optim="galore_adamw",
        optim_target_modules=["attn", "mlp"],
        optim_args=f"rank={projection.rank}, update_proj_gap={projection.refresh_period}, scale={projection.scale}",
    )


def trainer_grass(job: Job, watch: Any) -> Any:
    from grass_ray import GradNormSampler, LayerwiseAdamW

    model = load(job).to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = LayerwiseAdamW(model, GradNormSampler(num_active_layers=2, period=20, probing_steps=1), lr=1e-4)
    return trainer_of(job, model, [watch], optimizer=optimizer)


PEERS: dict[str, Callable[[Job, Any], Any]] = {
    "trainer-full": trainer_full,
    "trainer-lora": trainer_lora,
    "sft-lora": sft_lora,
    "trainer-lisa": trainer_lisa,
    "trainer-badam": trainer_badam,
    "trainer-galore": trainer_galore,
    "trainer-grass": trainer_grass,
}


# ------------------------------------------------------------------------------------------------------ measuring all


def write_inputs(folder: Path, options: Options) -> int:
    """Write the model and the rows that have the most frequent length, as text and as tokens; return that length."""
    from grass_ray.config import ModelConfig
    from grass_ray.tasks.encoding import encode_pair
    from grass_ray.tasks.generated import generate
    from grass_ray.training.models import load_model

    loaded = load_model(ModelConfig(name=options.model, dtype=options.dtype))
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    problems = iter(generate("train", rows=16 * ROWS * options.problems, seed=0))
    by_length: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for group in zip(*[problems] * options.problems, strict=False):
        prompt = "".join(f"{row.instruction}\n{row.output}\n\n" for row in group[:-1]) + f"{group[-1].instruction}\n"
        context, answer = encode_pair(loaded.tokenizer, prompt, group[-1].output)
        answer = [*answer, loaded.tokenizer.eos_token_id]
        row = {"input_ids": context + answer, "labels": [-100] * len(context) + answer}
        text = {"prompt": prompt, "completion": group[-1].output}
        by_length[len(row["input_ids"])].append({"text": text, "row": row})
    tokens, found = max(by_length.items(), key=lambda item: len(item[1]))
    found = found[:ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row["text"]) + "\n" for row in found))
    (folder / "rows.json").write_text(json.dumps({"tokens": tokens, "rows": [row["row"] for row in found]}))
    return tokens


def measure(job: Job) -> Cost:
    """Run one contender in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job.contender} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return Cost(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure_all(options: Options, folder: Path, threads: int) -> dict[str, list[Cost]]:
    order, shuffler = list(options.contenders), random.Random(0)
    costs: dict[str, list[Cost]] = {name: [] for name in order}
    for index in range(options.rounds):
        shuffler.shuffle(order)
        for name in order:
            job = Job(
                contender=name,
                folder=str(folder),
                dtype=options.dtype,
                steps=options.steps,
                batch_size=options.batch_size,
                threads=threads,
            )
            costs[name].append(measure(job))
            print(f"round {index + 1}/{options.rounds}  {name}: {costs[name][-1]}", flush=True)
    return costs


def table(costs: dict[str, list[Cost]]) -> str:
    """The result in Markdown: each of our rows above what it is compared with."""
    header = ["", "tokens a second: median (min-max)", "ours / it", "tokens a second of CPU"]
    header += ["peak allocated GiB", "resident GiB", "first step after s"]
    rows = []
    pairs = [(own, name) for own, peers in PAIRS.items() for name in (own, *peers) if name in costs]
    for own, name in pairs:
        taken = costs[name]
        speeds = [cost.tokens_per_s for cost in taken]
        rows.append(
            [
                f"**{name}**" if name == own else name,
                f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})",
                "" if name == own or own not in costs else f"{ratio_of(costs[own], taken):.2f}",
                f"{statistics.median(cost.tokens_per_cpu_s for cost in taken):,.0f}",
                f"{max(cost.peak_allocated_gib for cost in taken):.2f}",
                f"{max(cost.peak_resident_gib for cost in taken):.2f}",
                f"{statistics.median(cost.first_step_s for cost in taken):.1f}",
            ]
        )
    return recording.table(header, rows)


def ratio_of(own: list[Cost], other: list[Cost]) -> float:
    """The median over rounds of how many times as fast ``own`` is."""
    return statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in zip(own, other, strict=True))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if unknown := set(options.contenders) - set(CONTENDERS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
    needed = {
        "trl": "sft-lora",
        "badam": "trainer-badam",
        "bitsandbytes": "trainer-galore",
        "galore_torch": "trainer-galore",
    }
    absent = [name for name, user in needed.items() if user in options.contenders and not find_spec(name)]
    if absent:
        raise SystemExit(
            f"not installed: {', '.join(absent)}; install it, or leave its contender out with --contenders"
        )
    torch.set_num_threads(options.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_inputs(Path(folder), options)
        taken = measure_all(options, Path(folder), torch.get_num_threads())
    packages = [name for name in ("trl", "badam", "galore-torch") if find_spec(name.replace("-", "_"))]
    found = versions() | {name: metadata.version(name) for name in packages}
    named = ", ".join(f"{name} {found[name]}" for name in ("transformers", "peft", *packages))
    heading = (
        f"# The same training by what people use\n\n{options.model}, {options.dtype}, {options.batch_size} rows of "
        f"{tokens} tokens a step, loss on the answer, {options.rounds} interleaved rounds of {options.steps} steps, "
        f"each contender in a process of its own, {torch.get_num_threads()} threads on {recording.made_on()}; {named}. "
        "Made by `python -m benchmarks run peers`.\n\n"
    )
    units = {"first_step_s": "s", "step_s": "s", "peak_allocated_gib": "GiB", "peak_resident_gib": "GiB"}
    recording.write(
        options.output,
        recording.facts(options)
        | {
            "tokens_a_row": tokens,
            "versions": found,
            "costs": {k: [asdict(one) for one in v] for k, v in taken.items()},
        },
        heading + table(taken),
        measures=[measure for name, own in taken.items() for measure in recording.costs(own, name, units)],
        draw=lambda path: draw(taken, path),
    )


def draw(taken: dict[str, list[Cost]], path: Path) -> None:
    """Speed against peak memory: each of our rows joined with what it is compared with."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (own, peers) in enumerate(PAIRS.items()):
        for name in (one for one in (own, *peers) if one in taken):
            x = max(cost.peak_allocated_gib for cost in taken[name])
            y = statistics.median(cost.tokens_per_s for cost in taken[name])
            marker = "o" if name == own else "x"
            axes.plot(x, y, marker, color=f"C{number}", markersize=8)
            axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize="small")
            if name != own and own in taken:
                start = max(cost.peak_allocated_gib for cost in taken[own])
                axes.plot(
                    [start, x], [statistics.median(c.tokens_per_s for c in taken[own]), y], color=f"C{number}", lw=0.8
                )
    axes.set_xlabel("peak allocated, GiB")
    axes.set_ylabel("tokens a second")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        one = Job(**json.loads(sys.argv[2]))
        torch.set_num_threads(one.threads)
        print(json.dumps(asdict(run_peer(one) if one.contender in PEERS else run_own(one))))
    else:
        main()
