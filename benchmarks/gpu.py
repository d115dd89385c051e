"""Everything that only a GPU can tell, in one command, the most valuable first.

    python benchmarks/gpu.py --minutes 12                          # goes on where it was cut
    python benchmarks/gpu.py --minutes 12 --data-dir DATA          # the verdict's runs last, in what time is left
    python benchmarks/gpu.py --device cpu --models tiny --out /tmp/gpu    # tries every part, in about a minute

1. ``tests``: the tests that need a GPU, file by file.
2. ``peaks``: measured peaks beside the memory plan's, models with random weights.
3. ``steps``: step times of lazy, resident and streamed, with low, middle and high active layers.
4. ``throughput``: tokens per second of grass, lora and full, on the same batches.
5. ``verdict``: runs of benchmarks/verdict/run.py.

Every measurement is a process of its own and a file of its own in ``--out``, written at once, so that an end of any
kind loses no more than the one in progress; what has a file is not measured again, unless it failed. Running out of
memory is a result.
``gpu.json`` and ``gpu.md`` there are written anew after each. Needs neither ray nor mlflow nor lm-eval.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import recording
import torch
import tyro
from memory_plan import Case, describe, make_batches, run_case

from grass_ray.config import OptimizerConfig
from grass_ray.config.files import whole_file
from grass_ray.memory.step import StepShape
from grass_ray.methods import METHODS
from grass_ray.optim.host_weights import move_outside_of_layers
from grass_ray.training.adapters import add_adapter
from grass_ray.training.loss import accumulate_gradients
from grass_ray.training.metrics import default_device
from grass_ray.training.models import load_model
from grass_ray.training.optimizer import build_optimizer
from grass_ray.training.shapes import SHAPES, build_shape

ROOT = Path(__file__).resolve().parent.parent
GIB = 1024**3
PARTS = ("tests", "peaks", "steps", "throughput", "verdict")
Part = Literal["tests", "peaks", "steps", "throughput", "verdict"]
MODELS = ("llama2-7b", "gemma-2b", "tinyllama-1.1b")
TEST_FILES = (
    "tests/optim/test_offload.py",
    "tests/optim/test_gpu_resume.py",
    "tests/optim/test_loss_scaling.py",
    "tests/optim/test_sharded.py",
    "tests/training/test_gpu_runs.py",
)
REPEATS = 2
WARM_UP_STEPS, TIMED_STEPS = 3, 8
# no measurement may take more than this, and none is begun with less than the second
MOST_S, LEAST_S = 240, 15
PLACES = ("low", "middle", "high")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and for how long."""

    minutes: float = 12.0
    out: Annotated[Path, tyro.conf.arg(help="folder of the results")] = Path("benchmarks/results/gpu")
    device: Annotated[Literal["cpu", "cuda"] | None, tyro.conf.arg(help="default: cuda where there is one")] = None
    models: tuple[str, ...] = MODELS
    parts: tuple[Part, ...] = PARTS
    data_dir: Annotated[Path | None, tyro.conf.arg(help="data of the verdict's runs; None leaves them out")] = None
    item: Annotated[str | None, tyro.conf.arg(help="one measurement, as this script starts itself")] = None

    @property
    def kind(self) -> str:
        """Where to measure."""
        return self.device or default_device().type


@dataclass(frozen=True, kw_only=True)
class Item:
    """One measurement: a process and a file.

    Attributes:
        part: what it belongs to.
        name: of its file.
        values: what its process must know.
    """

    part: Part
    name: str
    values: dict[str, Any]

    def path(self, out: Path) -> Path:
        """Where its result is."""
        return out / self.part / f"{self.name}.json"


# ------------------------------------------------------------------------------------------------------ what to measure


def items(options: Options) -> Iterator[Item]:
    """All measurements, in order of value."""
    makers: dict[str, Callable[[Options], Iterator[Item]]] = {
        "tests": test_items,
        "peaks": peak_items,
        "steps": step_items,
        "throughput": throughput_items,
        "verdict": verdict_items,
    }
    known: set[tuple[str, str]] = set()
    for item in (item for part in PARTS if part in options.parts for item in makers[part](options)):
        if (item.part, item.name) not in known:  # a small model has fewer shapes
            known.add((item.part, item.name))
            yield item


def test_items(options: Options) -> Iterator[Item]:
    """Files with tests that need a GPU."""
    for file in TEST_FILES if options.kind == "cuda" else TEST_FILES[-1:]:
        yield Item(part="tests", name=Path(file).stem, values={"file": file})


def shape_of(model: str) -> StepShape:
    """The work of a step: 4 x 512, as in the paper's memory figures; little for a small model."""
    return StepShape(rows=4, tokens=512) if model in SHAPES else StepShape(rows=2, tokens=32)


def peak_items(options: Options) -> Iterator[Item]:
    """Rows of methods by settings, the project's own method first."""
    for model in options.models:
        plain, saving = shape_of(model), replace(shape_of(model), checkpointing="all")
        long = replace(saving, rows=1, tokens=1024) if model in SHAPES else saving
        int8 = (
            [{"precision": "int8"}] if "int8" in get_args(OptimizerConfig.model_fields["precision"].annotation) else []
        )
        settings: list[tuple[StepShape, dict[str, Any]]] = [
            (plain, {}),
            (saving, {}),
            (saving, {"weights": "streamed"}),
            (long, {"weights": "streamed"}),
            *((saving, extra) for extra in int8),
        ]
        for method in ("grass", "lora", "lisa", "full"):
            for shape, extra in settings:
                if "weights" in extra and not METHODS[method].config.can_stream_weights:
                    continue
                offload = METHODS[method].config.offload
                case = Case(model=model, method=method, offload=offload, dtype=dtype_of(model), shape=shape, **extra)
                words = (model, method, f"{shape.rows}x{shape.tokens}", str(shape.checkpointing), *extra.values())
                yield Item(part="peaks", name="-".join(words), values={"case": asdict(case)})
        inside = Case(model=model, method="full", offload="lazy", dtype=dtype_of(model), shape=saving, in_backward=True)
        yield Item(part="peaks", name=f"{model}-full-in-backward", values={"case": asdict(inside)})


def dtype_of(model: str) -> Literal["float32", "bfloat16"]:
    """Of a shape's random weights bfloat16, of weights that exist float32."""
    return "bfloat16" if model in SHAPES else "float32"


def step_items(options: Options) -> Iterator[Item]:
    """Where states and weights live, repeats interleaved."""
    places = ({"offload": "resident"}, {"offload": "lazy"}, {"offload": "resident", "weights": "streamed"})
    for model in options.models:
        for repeat, place in itertools.product(range(REPEATS), places):
            case = Case(model=model, method="grass", dtype=dtype_of(model), shape=shape_of(model), **place)
            name = f"{model}-{'-'.join(place.values())}-{repeat}"
            yield Item(part="steps", name=name, values={"case": asdict(case), "places": PLACES})


def throughput_items(options: Options) -> Iterator[Item]:
    """Methods on the same batches, repeats interleaved."""
    for model in options.models:
        for repeat, method in itertools.product(range(REPEATS), ("grass", "lora", "full")):
            offload = METHODS[method].config.offload
            case = Case(model=model, method=method, offload=offload, dtype=dtype_of(model), shape=shape_of(model))
            # grass with active layers in the middle, which a draw has on average
            values = {"case": asdict(case), "places": ("middle",)}
            yield Item(part="throughput", name=f"{model}-{method}-{repeat}", values=values)


def verdict_items(options: Options) -> Iterator[Item]:
    """Runs as long as there is time."""
    if options.data_dir is not None:
        yield Item(part="verdict", name="runs", values={"data_dir": str(options.data_dir.resolve())})


# ------------------------------------------------------------------------------------------------ in its own process


def measure(item: Item, device: torch.device) -> dict[str, Any]:
    """One measurement."""
    values = item.values["case"]
    case = Case(**{**values, "shape": StepShape(**values["shape"])})
    if item.part == "peaks":
        row = run_case(case, device)
        return {"predicted": row.plan.peak_bytes, "measured": row.peak, "host": row.host}
    return {"step_s": step_times(case, item.values["places"], device), "tokens": case.shape.rows * case.shape.tokens}


class Chosen:
    """A sampler that switches to the set it is told, and only then."""

    def __init__(self, inner: Any, active: tuple[int, ...]) -> None:
        self._inner = inner
        self._active = active
        self.due = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def stay(self, active: tuple[int, ...]) -> None:
        """Switch to this set at the end of the next step."""
        self._active, self.due = active, True

    def sample(self) -> tuple[int, ...]:
        """The set."""
        self.due = False
        return self._active


def step_times(case: Case, places: tuple[str, ...], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, by which layers are active."""
    config = case.config.override({"method.sampler.probing_steps": 0} if case.method == "grass" else {})
    torch.manual_seed(0)
    model = build_shape(config.model, str(device)) if case.model in SHAPES else load_model(config.model).model
    model = add_adapter(model, config.method.adapter)
    if case.weights == "streamed":
        move_outside_of_layers(model.to("cpu"), device)
    else:
        model.to(device)
    sampler = config.method.sampler.build(seed=0, train_steps=1000)
    forced = None if sampler.trains_all else Chosen(sampler, layers_at(places[0], model))
    optimizer = build_optimizer(model.train(), sampler if forced is None else forced, config.method)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    batches = make_batches(case.shape, vocabulary, device)
    times: dict[str, list[float]] = {place: [] for place in places}
    for place in places:
        if forced is not None:
            forced.stay(layers_at(place, model))
        for step in range(WARM_UP_STEPS + TIMED_STEPS):
            started = time.perf_counter()
            accumulate_gradients(model, batches, device, optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                # the training's stream alone: lazy updates may go on under the next step, which then has their cost
                torch.cuda.current_stream().synchronize()
            if step >= WARM_UP_STEPS:
                times[place].append(time.perf_counter() - started)
    optimizer.synchronize()
    return times


def layers_at(place: str, model: Any) -> tuple[int, int]:
    """Two neighbouring layers at the bottom, in the middle, or at the top."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    first = {"low": 0, "middle": count // 2 - 1, "high": count - 2}[place]
    return first, first + 1


def run_item(options: Options) -> None:
    """Be the process of a measurement; prints its result as the last line."""
    assert options.item is not None
    item = Item(**json.loads(options.item))
    try:
        result = {"status": "done"} | measure(item, torch.device(options.kind))
    except torch.OutOfMemoryError as error:
        result = {"status": "out of memory", "reason": str(error).splitlines()[0]}
    print(json.dumps(result))


# --------------------------------------------------------------------------------------------------------- one by one


def carry_out(item: Item, options: Options, seconds: float) -> dict[str, Any] | None:
    """The result of a measurement; None if the time was not enough."""
    device = ["--device", options.kind]
    if item.part == "tests":
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", item.values["file"]]
    elif item.part == "verdict":
        script, work = ROOT / "benchmarks" / "verdict" / "run.py", options.out.resolve() / "verdict" / "runs"
        minutes = f"{seconds / 60 - 1:.2f}"
        command = [sys.executable, str(script), "--data-dir", item.values["data_dir"], "--work", str(work)]
        command += ["--minutes", minutes]
    else:
        command = [sys.executable, __file__, "--item", json.dumps(asdict(item)), *device]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    if item.part == "tests":
        said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()
        # 5: the file has no test for a GPU
        return {"status": "done" if done.returncode in (0, 5) else "failed", "said": said[-1].strip("= ")[:300]}
    if done.returncode != 0:
        return {"status": "failed", "reason": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    if item.part == "verdict":
        return {"status": "done", "records": len(list((options.out / "verdict" / "runs").rglob("record.json")))}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure_all(options: Options) -> None:
    """Every measurement that has no file yet, as long as there is time."""
    deadline = time.monotonic() + 60 * options.minutes
    facts = recording.facts()
    wanted = list(items(options))
    for item in wanted:
        path, left = item.path(options.out), deadline - time.monotonic()
        if path.is_file() and json.loads(path.read_text())["result"]["status"] != "failed":
            continue
        if left < LEAST_S:
            break
        path.parent.mkdir(parents=True, exist_ok=True)
        result = carry_out(item, options, left if item.part == "verdict" else min(left, MOST_S))
        if result is None and left > MOST_S:
            result = {"status": "cut", "reason": f"took more than {MOST_S} s"}
        if result is not None:
            write_whole(path, json.dumps(asdict(item) | facts | {"result": result}, indent=1))
        report(options.out, wanted)
        print(f"{item.part} {item.name}: {'cut' if result is None else summary(result)}", flush=True)
    report(options.out, wanted)


def summary(result: dict[str, Any]) -> str:
    """A result in a few words."""
    if "measured" in result:
        ratio = result["predicted"] / result["measured"]
        return f"{gib(result['measured'])} GiB, planned {gib(result['predicted'])} ({ratio:.3f})"
    if "step_s" in result:
        return ", ".join(f"{place} {1000 * statistics.median(own):.0f} ms" for place, own in result["step_s"].items())
    words = (result["status"], result.get("said"), result.get("reason"), result.get("records"))
    return "; ".join(str(word) for word in words if word is not None)


# --------------------------------------------------------------------------------------------------------- the report


def report(out: Path, wanted: list[Item]) -> None:
    """Write ``gpu.json`` and ``gpu.md`` from the files that are there."""
    found = [json.loads(item.path(out).read_text()) for item in wanted if item.path(out).is_file()]
    missing = [f"{item.part}/{item.name}" for item in wanted if not item.path(out).is_file()]
    if not found:
        return
    write_whole(out / "gpu.json", json.dumps({"results": found, "not_measured": missing}, indent=1))
    where = sorted(
        {(one["hardware"], one["versions"].get("torch", "-"), (one["git_commit"] or "-")[:10]) for one in found}
    )
    lines = [
        "# On a GPU",
        "",
        "; ".join(f"{name}, torch {version}, commit {commit}" for name, version, commit in where),
    ]
    tables = {"tests": tests_table, "peaks": peaks_table, "steps": times_table, "throughput": speed_table}
    for part in PARTS:
        own = [one for one in found if one["part"] == part]
        if own:
            lines += ["", f"## {part.capitalize()}", "", *tables.get(part, tests_table)(own)]
    lines += ["", f"not measured: {', '.join(missing)}"] if missing else []
    write_whole(out / "gpu.md", "\n".join(lines) + "\n")


def tests_table(found: list[dict[str, Any]]) -> list[str]:
    """What each file of tests, or the verdict's command, said."""
    return [
        "| what | result |",
        "|---|---|",
        *(f"| {one['values'].get('file', one['name'])} | {summary(one['result'])} |" for one in found),
    ]


def peaks_table(found: list[dict[str, Any]]) -> list[str]:
    """Predicted and measured peaks."""
    lines = [
        "| model | method | offload | rows x tokens | planned GiB | measured GiB | planned / measured | host GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        case, result = read_case(one), one["result"]
        sizes = [result["status"], "", "", ""]
        if "measured" in result:
            planned, measured = result["predicted"], result["measured"]
            sizes = [gib(planned), gib(measured), f"{planned / measured:.3f}", gib(result["host"])]
        lines.append(
            f"| {case.model} | {case.method} | {case.placing} | {describe(case.shape)} | {' | '.join(sizes)} |"
        )
    return lines


def times_table(found: list[dict[str, Any]]) -> list[str]:
    """Median step times over all repeats, and the smallest and largest median of a repeat."""
    lines = ["| model | offload | " + " | ".join(f"{place} ms" for place in PLACES) + " |", "|---" * 5 + "|"]
    for (model, placing), own in repeats_of(found, lambda case: (case.model, case.placing)).items():
        cells = [spread([one["step_s"][place] for one in own], lambda s: f"{1000 * s:.0f}") for place in PLACES]
        lines.append(f"| {model} | {placing} | {' | '.join(cells)} |")
    return lines


def speed_table(found: list[dict[str, Any]]) -> list[str]:
    """Tokens per second of each method."""
    lines = ["| model | method | tokens/s |", "|---|---|---|"]
    for (model, method), own in repeats_of(found, lambda case: (case.model, case.method)).items():
        per_token = [[s / one["tokens"] for s in one["step_s"]["middle"]] for one in own]
        cell = spread(per_token, lambda s: f"{1 / s:.0f}")
        lines.append(f"| {model} | {method} | {cell} |")
    failed = [one for one in found if "step_s" not in one["result"]]
    return [*lines, "", *(f"- {one['name']}: {summary(one['result'])}" for one in failed)] if failed else lines


def gib(size: int) -> str:
    """A size in GiB, also of a tiny model."""
    return f"{size / GIB:.2f}" if size >= GIB / 10 or not size else f"{size / GIB:.5f}"


def repeats_of(
    found: list[dict[str, Any]], key: Callable[[Case], tuple[str, str]]
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Results that have step times, those of equal cases together."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in found:
        if "step_s" in one["result"]:
            groups.setdefault(key(read_case(one)), []).append(one["result"])
    return groups


def spread(repeats: list[list[float]], form: Callable[[float], str]) -> str:
    """The median of all steps, with the range of the repeats' medians."""
    medians = [statistics.median(own) for own in repeats]
    ends = dict.fromkeys((form(min(medians)), form(max(medians))))
    return f"{form(statistics.median(itertools.chain(*repeats)))} ({' to '.join(ends)})"


def read_case(one: dict[str, Any]) -> Case:
    """The case of a result."""
    values = one["values"]["case"]
    return Case(**{**values, "shape": StepShape(**values["shape"])})


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never half there."""
    with whole_file(path) as file:
        file.write(text)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.item is not None:
        run_item(options)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        measure_all(options)
        print(f"\n{options.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
