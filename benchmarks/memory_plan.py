"""Compare the memory plan's predictions with what steps really take.

    python benchmarks/memory_plan.py             # CPU: tiny and SmolLM2-135M, tensor bytes counted; GPU: big shapes
    python benchmarks/memory_plan.py --models tiny --output /tmp/memory_plan
    python benchmarks/memory_plan.py --models llama2-7b --methods grass lora

Every case is predicted first, without weights, and then run: all layers are visited once (so that their states exist,
with rows of a few tokens), then two steps are taken on the active set that the plan calls the worst, with rows exactly
as long as planned. On a CPU the peak is the bytes alive before a step plus the highest point of what torch's profiler
sees the step allocate; on CUDA it is the allocator's peak. The models of the GPU cases have random weights.
Needs neither ray nor mlflow.
"""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import recording
import torch
import tyro
from recording import Measure
from torch import Tensor

from grass_ray.config import ConfigError, ModelConfig, RunConfig, Weights, recomputed_layers
from grass_ray.memory.fit import TOLERANCE, plan_decided
from grass_ray.memory.plan import MemoryPlan, Mode, Planner
from grass_ray.memory.settings import IN_BACKWARD, needed_bytes
from grass_ray.memory.step import StepShape
from grass_ray.methods import METHODS
from grass_ray.optim.host_weights import move_outside_of_layers
from grass_ray.optim.recompute import Recompute
from grass_ray.overrides import assignment, parse
from grass_ray.results.provenance import git_state
from grass_ray.training.adapters import add_adapter
from grass_ray.training.batches import IGNORED, Batch
from grass_ray.training.loss import accumulate_gradients
from grass_ray.training.metrics import MemoryMeter, default_device, storage_bytes
from grass_ray.training.models import load_model
from grass_ray.training.optimizer import build_optimizer
from grass_ray.training.report import GIB
from grass_ray.training.shapes import SHAPES, build_shape

Dtype = Literal["float32", "bfloat16"]
MEASURED_STEPS = 2
# asked at the start: by the end of the measurements the repository may be further
COMMIT = git_state()[0] or "-"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    models: Annotated[tuple[str, ...] | None, tyro.conf.arg(help="default: by device")] = None
    methods: Annotated[tuple[str, ...] | None, tyro.conf.arg(help="only these of the cases' methods")] = None
    device: Annotated[Literal["cpu", "cuda"] | None, tyro.conf.arg(help="default: cuda where there is one")] = None
    output: Annotated[Path, tyro.conf.arg(help="written with .json and .md")] = Path("benchmarks/results/memory_plan")
    keep: Annotated[bool, tyro.conf.arg(help="do not measure again what the output already holds")] = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prediction and its measurement."""

    model: str
    method: str
    offload: Mode
    dtype: Dtype
    shape: StepShape
    weights: Weights = "resident"
    precision: str | None = None  # of the states; None is the method's own
    in_backward: bool = False  # each unit is updated inside backward, and nothing clipped
    probing: bool = False  # the steps that only measure, in place of those that train
    limit: float | None = None  # with checkpointing "auto": of the peak without checkpointing

    @property
    def placing(self) -> str:
        """The offload mode, what differs from the method's row, and the steps unless they train."""
        streamed = ", weights streamed" if self.weights == "streamed" else ""
        precision = f", {self.precision}" if self.precision else ""
        inside = ", updates in backward" if self.in_backward else ""
        return self.offload + streamed + precision + inside + (", probing" if self.probing else "")

    @property
    def config(self) -> RunConfig:
        """The method with every period one step, and small enough for the tiny model."""
        row = METHODS[self.method].config
        sampler = row.sampler.model_dump()
        settings = []
        if "period" in sampler:
            settings.append("method.sampler.period=1")
        if "probing_steps" in sampler:
            settings.append("method.sampler.probing_steps=1")
        if self.model == "tiny" and sampler["kind"] == "matrix_norm":
            settings.append("method.sampler.budget=0.2")
        if self.model == "tiny" and sampler["kind"] == "outlier":
            settings.append("method.sampler.num_active_layers=2")
        if self.model == "tiny" and hasattr(row.optimizer.projection, "rank"):
            settings.append("method.optimizer.projection.rank=16")
        if self.precision is not None:
            settings.append(f"method.optimizer.precision={self.precision}")
        if self.in_backward:
            settings += [assignment(key, value) for key, value in IN_BACKWARD.items()]
        config = RunConfig(method=row, model=ModelConfig(name=self.model, dtype=self.dtype)).override(parse(settings))
        placed = {"offload": self.offload, "weights": self.weights}
        return config.model_copy(update={"method": config.method.model_copy(update=placed)})


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes, predicted and measured."""

    case: Case
    asked: Case  # with checkpointing as it was before "auto" was decided
    plan: MemoryPlan
    peak: int
    weights: int
    states: int  # with the rings
    host: int
    commit: str = COMMIT  # of the code that measured it

    @property
    def ratio(self) -> float:
        """Predicted over measured peak."""
        return self.plan.peak_bytes / self.peak


# ------------------------------------------------------------------------------------------------------- the cases


def cpu_cases() -> Iterator[Case]:
    """Every method on the tiny model in several shapes; a few on SmolLM2-135M."""
    small = StepShape(rows=4, tokens=96)
    for name, row in METHODS.items():
        if row.trains:
            yield Case(model="tiny", method=name, offload=row.config.offload, dtype="float32", shape=small)
    shapes = (
        StepShape(rows=1, tokens=32),
        StepShape(rows=8, tokens=256),
        StepShape(rows=8, tokens=256, labelled=16),
        StepShape(rows=8, tokens=256, checkpointing="all"),
        StepShape(rows=8, tokens=256, checkpointing=2),
        StepShape(rows=2, tokens=256, micro_batches=4),
    )
    for method, shape in itertools.product(("full", "lora", "lisa", "grass"), shapes):
        yield Case(model="tiny", method=method, offload=METHODS[method].config.offload, dtype="float32", shape=shape)
    # rows so short that the update is the peak, not the backward pass
    for method, dtype in itertools.product(("full", "galore", "apollo", "lisa", "badam"), ("float32", "bfloat16")):
        offload = METHODS[method].config.offload
        yield Case(model="tiny", method=method, offload=offload, dtype=dtype, shape=StepShape(rows=1, tokens=2))
    for method, mode in (("grass", "none"), ("grass", "lazy"), ("full", "lazy"), ("lisa-keep", "resident")):
        yield Case(model="tiny", method=method, offload=mode, dtype="float32", shape=small)
    for method in ("full", "grass", "badam", "galore", "dora"):
        yield Case(model="tiny", method=method, offload=METHODS[method].config.offload, dtype="bfloat16", shape=small)
    few = StepShape(rows=2, tokens=128, labelled=32)
    smollm2: tuple[tuple[str, Mode, StepShape], ...] = (
        ("full", "none", few),
        ("full", "none", replace(few, checkpointing="all")),
        ("lisa", "none", few),
        ("lora", "none", replace(few, rows=4)),
        ("prompt", "none", few),
        ("galore", "none", few),
        ("grass", "none", few),
        ("grass", "resident", few),
        ("grass", "resident", replace(few, rows=4, checkpointing="all")),
        ("grass", "resident", replace(few, rows=4, checkpointing=10)),
        ("lora", "none", replace(few, rows=4, checkpointing=10)),
        ("grass", "resident", StepShape(rows=1, tokens=256)),
        ("grass", "lazy", few),
        ("hift", "resident", few),
    )
    for method, mode, shape in smollm2:
        yield Case(model="smollm2-135m", method=method, offload=mode, dtype="float32", shape=shape)
    # several chunks of logits: of a head that does not train, of one that does, and of one in low precision
    long = StepShape(rows=4, tokens=256)
    yield Case(model="smollm2-135m", method="grass", offload="resident", dtype="float32", shape=long)
    yield Case(model="smollm2-135m", method="lisa", offload="none", dtype="float32", shape=long)
    yield Case(model="smollm2-135m", method="lisa", offload="none", dtype="bfloat16", shape=long)
    for model, shape in (("tiny", small), ("tiny", shapes[1]), ("smollm2-135m", few)):
        yield Case(model=model, method="grass", offload="resident", dtype="float32", shape=shape, probing=True)
    some = replace(few, rows=4, checkpointing="auto")
    for method in ("grass", "lora"):
        offload = METHODS[method].config.offload
        yield Case(model="smollm2-135m", method=method, offload=offload, dtype="float32", shape=some, limit=0.8)
    for precision, mode in itertools.product(("rem16", "int8"), ("none", "resident", "lazy")):
        yield Case(model="tiny", method="grass", offload=mode, dtype="bfloat16", shape=small, precision=precision)
    for method, mode in (("grass", "resident"), ("full", "none")):
        yield Case(model="smollm2-135m", method=method, offload=mode, dtype="bfloat16", shape=few, precision="int8")
    several = replace(small, micro_batches=2, checkpointing="all")
    inside: tuple[tuple[str, str, Mode, Dtype, StepShape], ...] = (
        ("tiny", "full", "none", "float32", small),
        ("tiny", "full", "lazy", "float32", small),
        ("tiny", "full", "lazy", "bfloat16", several),
        ("tiny", "grass", "lazy", "float32", small),
        ("tiny", "galore", "none", "float32", several),
        ("smollm2-135m", "full", "none", "float32", few),
        ("smollm2-135m", "full", "lazy", "float32", replace(few, checkpointing="all")),
        ("smollm2-135m", "grass", "lazy", "float32", few),
    )
    for model, method, mode, dtype, shape in inside:
        yield Case(model=model, method=method, offload=mode, dtype=dtype, shape=shape, in_backward=True)
    # what is on the host is not counted: as on a device, though a CPU has one memory for both
    for method, mode in (("grass", "resident"), ("grass", "lazy"), ("lisa", "none"), ("lora", "none")):
        yield Case(model="smollm2-135m", method=method, offload=mode, dtype="float32", shape=few, weights="streamed")


def cuda_cases() -> Iterator[Case]:
    """Published shapes in bfloat16, 4 rows of 1024 tokens, as the paper measured; what 80 GB hold."""
    long = StepShape(rows=4, tokens=1024)
    saving = replace(long, checkpointing="all")
    for model in SHAPES:
        modes: tuple[tuple[str, Mode], ...] = (
            ("grass", "none"),
            ("grass", "resident"),
            ("grass", "lazy"),
            ("lisa", "none"),
            ("lora", "none"),
            ("galore", "none"),
            ("full", "none"),
        )
        for (method, mode), shape in itertools.product(modes, (long, saving)):
            yield Case(model=model, method=method, offload=mode, dtype="bfloat16", shape=shape)
        for mode in ("resident", "lazy"):
            yield Case(model=model, method="grass", offload=mode, dtype="bfloat16", shape=saving, weights="streamed")


def planned_cases() -> Iterator[Case]:
    """LLaMA2-7B in settings of which the README speaks: planned whatever the device is, never run on a CPU."""
    shape = StepShape(rows=4, tokens=512, checkpointing="all")
    short = StepShape(rows=1, tokens=1024, checkpointing="all")
    settings: tuple[tuple[str, dict[str, Any]], ...] = (
        ("full", {}),
        ("full", {"offload": "lazy", "in_backward": True}),
        ("full", {"offload": "lazy", "precision": "int8", "in_backward": True}),
        ("galore", {}),
        ("lisa", {}),
        ("lora", {}),
        ("badam", {}),
        ("grass", {"offload": "resident"}),
        ("grass", {"offload": "resident", "precision": "int8"}),
        ("grass", {"offload": "lazy"}),
        ("grass", {"offload": "resident", "weights": "streamed"}),
        ("grass", {"offload": "lazy", "weights": "streamed"}),
        ("grass", {"offload": "lazy", "weights": "streamed", "shape": short}),
    )
    for method, placed in settings:
        yield Case(model="llama2-7b", method=method, dtype="bfloat16", **{"offload": "none", "shape": shape} | placed)


# ----------------------------------------------------------------------------------------------------- one measurement


class Forced:
    """A sampler that visits every unit, so that each has states and has left once, then stays on the given set."""

    def __init__(self, inner: Any, active: tuple[int, ...], num_units: int) -> None:
        self._inner = inner
        self._active = active
        self.visits = [tuple(range(first, min(first + 2, num_units))) for first in range(0, num_units, 2)]
        self.visits.append(self.visits[0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def due(self) -> bool:
        """A draw before every step that trains."""
        return not self._inner.probing

    def sample(self) -> tuple[int, ...]:
        """The next units that were not visited, then the planned set."""
        return self.visits.pop(0) if self.visits else self._active

    def probe(self, measure: Any) -> None:
        """No extra passes: they take less than a step."""


def make_batches(shape: StepShape, vocabulary: int, device: torch.device) -> list[Batch]:
    """Random tokens in the planned shape; the last row is one token shorter."""
    ids = torch.randint(0, vocabulary, (shape.rows, shape.tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if shape.masked:
        mask[-1, -1] = 0
    labels = torch.full_like(ids, IGNORED)
    labels[:, shape.tokens - shape.label_positions :] = ids[:, shape.tokens - shape.label_positions :]
    batch = Batch(ids, mask, labels, tokens=ids.numel()).to(device)
    return [batch] * shape.micro_batches


def measure(case: Case, plan: MemoryPlan, active: tuple[int, ...], num_units: int, device: torch.device) -> Row:
    """Run the case on one active set of ``num_units`` units."""
    config = case.config
    torch.manual_seed(0)
    shaped = case.model in SHAPES
    streams = case.weights == "streamed"
    model = build_shape(config.model, "cpu" if streams else str(device)) if shaped else load_model(config.model).model
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    model = add_adapter(model, config.method.adapter)
    if streams:
        move_outside_of_layers(model, device)
    else:
        model.to(device)
    sampler = config.method.sampler.build(seed=0, train_steps=10)
    forced = sampler if sampler.trains_all else Forced(sampler, active, num_units)
    optimizer = build_optimizer(model, forced, config.method)
    recomputed = recomputed_layers(case.shape.checkpointing, optimizer.stack.num_layers)
    Recompute(optimizer.stack.modules[:recomputed]).switch(True)
    model.train()
    batches = make_batches(case.shape, vocabulary, device)
    short = make_batches(StepShape(rows=1, tokens=8), vocabulary, device)
    meter = MemoryMeter(device)

    def alive() -> Iterator[Tensor]:
        weights = optimizer.weights.on_device(model.parameters())
        yield from itertools.chain(weights, model.buffers(), optimizer.resident_states())

    def step(of: list[Batch], closely: bool) -> None:
        with meter.watch(alive(), closely=closely):
            accumulate_gradients(model, of, device, optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    while optimizer.probing:
        step(batches, case.probing)
    while not case.probing and isinstance(forced, Forced) and (forced.visits or optimizer.active_units != active):
        step(short, False)
    for _ in range(0 if case.probing else MEASURED_STEPS):
        step(batches, True)
    optimizer.synchronize()
    states, host = optimizer.state_bytes()
    ring = storage_bytes(optimizer.weights.on_device(()))
    return Row(
        case=case,
        asked=case,
        plan=plan,
        peak=round(meter.peak_allocated_gib * GIB),
        weights=storage_bytes([*optimizer.weights.on_device(model.parameters()), *model.buffers()]) - ring,
        states=states + ring,
        host=host + optimizer.weights.host_bytes,
    )


def predict(case: Case) -> dict[str, Any]:
    """What the plan says of a case on a GPU."""
    planner = Planner(case.config.model, "cuda")
    plan = planner.plan(planner.apply(case.config.method, 10), case.shape, case.offload)
    return asdict(case) | {"predicted": plan.to_dict()}


def run_case(case: Case, device: torch.device) -> Row:
    """Predict, then measure; of several worst sets the one with the higher peak."""
    asked = case
    planner = Planner(case.config.model, "cuda" if device.type == "cuda" else "cpu")
    trained = planner.apply(case.config.method, 10)
    if case.limit is not None:
        without = planner.plan(trained, replace(case.shape, checkpointing="none"), case.offload)
        memory = case.limit * needed_bytes(without, planner.device) * (1 + TOLERANCE)
        decided = plan_decided(planner, trained, case.shape, case.offload, memory)
        case = replace(case, shape=decided.shape)
    plans = planner.plan_phases(trained, case.shape, case.offload)
    plan = max((p for p in plans if (p.phase == "probing") == case.probing), key=lambda p: p.peak_bytes)
    rows = []
    for active in trained.active_sets(plan.recomputed_layers):
        rows.append(measure(case, plan, active, len(trained.units), device))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return replace(max(rows, key=lambda row: row.peak), asked=asked)


# ------------------------------------------------------------------------------------------------------- the report


def table(rows: list[Row]) -> str:
    """Markdown: parts predicted, peak predicted and measured."""
    lines = [
        "| model | dtype | method | offload | rows x tokens | peak in | weights | gradients | states | staging "
        "| activations | logits | other | predicted MiB | measured MiB | predicted / measured | host MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case, plan = row.case, row.plan
        parts = (plan.weights, plan.gradients, plan.states, plan.staging, plan.activations, plan.logits, plan.workspace)
        lines.append(
            f"| {case.model} | {case.dtype} | {case.method} | {case.placing} | {describe(case.shape)} | {plan.phase} | "
            + " | ".join(f"{part / 2**20:.1f}" for part in parts)
            + f" | {plan.peak_bytes / 2**20:.1f} | {row.peak / 2**20:.1f} | {row.ratio:.3f} "
            f"| {row.plan.host_bytes / 2**20:.1f} ({row.host / 2**20:.1f} measured) |"
        )
    return "\n".join(lines)


def describe(shape: StepShape) -> str:
    """A step's shape in a few words."""
    words = [f"{shape.rows} x {shape.tokens}"]
    words += [f"x {shape.micro_batches} micro-batches"] if shape.micro_batches > 1 else []
    words += [f"{shape.labelled} labelled"] if shape.labelled is not None else []
    words += [f"checkpointing {shape.checkpointing}"] if shape.checkpointing != "none" else []
    return ", ".join(words)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = torch.device(options.device) if options.device else default_device()
    cases = [
        case
        for case in (cuda_cases() if device.type == "cuda" else cpu_cases())
        if (options.models is None or case.model in options.models)
        and (options.methods is None or case.method in options.methods)
    ]
    rows = recorded(options.output) if options.keep else []
    skipped: list[str] = []
    for case in cases:
        if any(row.asked == case for row in rows):
            continue
        name = _name(case)
        try:
            rows.append(run_case(case, device))
        except (ConfigError, torch.OutOfMemoryError) as error:
            skipped.append(f"{name}: {str(error).splitlines()[0]}")
            print(f"skipped {skipped[-1]}", flush=True)
            gc.collect()
            continue
        print(f"{name}: {rows[-1].ratio:.3f} of {rows[-1].peak / 2**20:.1f} MiB", flush=True)
    write(options, rows, skipped)


def _name(case: Case) -> str:
    return f"{case.model} {case.dtype} {case.method} {case.placing} {describe(case.shape)}"


def recorded(output: Path) -> list[Row]:
    """The rows of earlier results; none if there are no results."""
    path = output.with_suffix(".json")
    facts = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    rows = []
    for values in facts["rows"]:
        case = read_case(values)
        plan = {key: values["predicted"][key] for key in MemoryPlan.__dataclass_fields__}
        rows.append(
            Row(
                case=case,
                asked=read_case(values["asked"]) if "asked" in values else case,
                plan=MemoryPlan(**{**plan, "shape": StepShape(**plan["shape"])}),
                commit=values.get("commit", facts["git_commit"]),
                **values["measured"],
            )
        )
    return rows


def read_case(values: dict[str, Any]) -> Case:
    """The case that a recorded row describes."""
    known = {key: values[key] for key in Case.__dataclass_fields__ if key in values}
    return Case(**{**known, "shape": StepShape(**values["shape"])})


def write(options: Options, rows: list[Row], skipped: list[str]) -> None:
    """The results as JSON and Markdown."""
    worst = max((abs(row.ratio - 1) for row in rows), default=0.0)
    facts = recording.facts() | {
        "largest_error": worst,
        "skipped": skipped,
        "planned": [predict(case) for case in planned_cases()],
        "rows": [
            asdict(row.case)
            | {"asked": asdict(row.asked), "commit": row.commit}
            | {"predicted": row.plan.to_dict(), "ratio": row.ratio}
            | {"measured": {"peak": row.peak, "weights": row.weights, "states": row.states, "host": row.host}}
            for row in rows
        ],
    }
    commits = ", ".join(dict.fromkeys(row.commit[:10] for row in rows))
    text = (
        f"# The memory plan against measurements\n\n{recording.hardware()}; torch {torch.__version__}, commit "
        f"{commits}. All sizes in MiB; largest error {100 * worst:.1f} % of the measured peak. "
        f"Columns from weights to other are parts of the predicted peak.\n\n{table(rows)}\n"
    )
    text += "".join(f"\nnot run: {line}\n" for line in skipped)
    peaks = [Measure(f"{_name(row.case)} peak", "MiB", [row.peak / 2**20]) for row in rows]
    recording.write(options.output, facts, text, measures=peaks)


if __name__ == "__main__":
    main()
