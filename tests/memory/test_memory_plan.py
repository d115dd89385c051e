"""The memory plan against real runs: exact where parts are sums of shapes, close where a step was followed."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import make_llama, short_run
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import memory_plan as benchmark
from grass_ray.cli import main
from grass_ray.config import ConfigError, ModelConfig, RunConfig
from grass_ray.memory import fit as memory_fit
from grass_ray.memory import plan as memory_plan
from grass_ray.memory import settings as memory_settings
from grass_ray.memory.fit import MemoryRefusalError, fit_to_memory, longest_shape, real_shape
from grass_ray.memory.plan import CannotPlanError, Planner, applicable_modes
from grass_ray.memory.step import SteppedModel, StepShape, profile_step
from grass_ray.methods import METHODS
from grass_ray.optim.recompute import Recompute
from grass_ray.overrides import parse
from grass_ray.training.loss import accumulate_gradients
from grass_ray.training.metrics import MemoryMeter
from grass_ray.training.models import describe_model, load_model
from grass_ray.training.optimizer import build_optimizer
from grass_ray.training.report import GIB
from grass_ray.training.run import Run
from grass_ray.training.shapes import SHAPES, build_shape

MIB = 2**20
CPU = torch.device("cpu")
SHAPE = StepShape(rows=4, tokens=48)


@pytest.fixture(scope="module")
def tiny() -> Planner:
    return Planner(ModelConfig(name="tiny"), "cpu")


@pytest.fixture(scope="module")
def tinyllama() -> Planner:
    return Planner(ModelConfig(name="tinyllama-1.1b", dtype="bfloat16"), "cuda")


# ----------------------------------------------------------------------------------------------- against real runs


@pytest.mark.parametrize(
    ("method", "offload", "dtype"),
    [
        ("full", "none", "float32"),
        ("full", "none", "bfloat16"),
        ("lora", "none", "bfloat16"),
        ("prefix", "none", "float32"),
        ("prompt", "none", "float32"),
        ("lisa", "none", "float32"),
        ("lisa-keep", "none", "float32"),
        ("ows-galore", "resident", "float32"),
        ("hift", "resident", "float32"),
        ("badam", "none", "bfloat16"),
        ("bread", "none", "float32"),
        ("bread", "none", "bfloat16"),
        ("misa", "none", "float32"),
        ("adagradselect", "resident", "float32"),
        ("last-third", "none", "float32"),
        ("grades", "none", "float32"),
        ("sgd", "none", "float32"),
        ("sgd", "none", "bfloat16"),
        ("muon", "none", "float32"),
        ("grass-muon", "resident", "bfloat16"),
        ("apollo", "none", "float32"),
        ("grass", "none", "float32"),
        ("grass", "resident", "bfloat16"),
        ("grass", "lazy", "float32"),
    ],
)
def test_weights_and_states_are_exact_and_the_peak_is_close(method: str, offload: str, dtype: str) -> None:
    row = benchmark.run_case(
        benchmark.Case(model="tiny", method=method, offload=offload, dtype=dtype, shape=SHAPE), CPU
    )
    assert row.plan.weights == row.weights
    assert row.plan.states + row.plan.staging == row.states
    assert row.plan.host_bytes == row.host
    assert row.plan.peak_bytes == pytest.approx(row.peak, rel=0.02)


@pytest.mark.parametrize(
    ("method", "offload", "dtype"),
    [
        ("full", "none", "float32"),
        ("full", "none", "bfloat16"),
        ("full", "lazy", "float32"),
        ("full", "blocking", "bfloat16"),
        ("grass", "lazy", "float32"),
        ("misa", "none", "float32"),
        ("hift", "resident", "float32"),
        ("muon", "none", "float32"),
        ("lora", "none", "float32"),
    ],
)
@pytest.mark.parametrize("shape", [SHAPE, StepShape(rows=2, tokens=64, micro_batches=3, checkpointing="all")], ids=str)
def test_updates_in_backward_take_what_is_planned(method: str, offload: str, dtype: str, shape: StepShape) -> None:
    case = benchmark.Case(model="tiny", method=method, offload=offload, dtype=dtype, shape=shape, in_backward=True)
    row = benchmark.run_case(case, CPU)
    assert row.plan.phase in ("backward", "probing")
    assert row.plan.peak_bytes == pytest.approx(row.peak, rel=0.02)


@pytest.mark.parametrize(
    ("method", "offload", "shape"),
    [
        ("grass", "resident", SHAPE),
        ("grass", "lazy", SHAPE),
        ("grass", "none", StepShape(rows=1, tokens=2)),
        ("grass", "resident", StepShape(rows=2, tokens=64, micro_batches=3)),
        ("misa", "resident", SHAPE),
        ("lisa", "none", SHAPE),
        ("lora", "none", SHAPE),
    ],
)
def test_streamed_weights_take_what_is_planned(method: str, offload: str, shape: StepShape) -> None:
    """Counted as on a device: what is on the host is not."""
    row = benchmark.run_case(
        benchmark.Case(model="tiny", method=method, offload=offload, dtype="bfloat16", shape=shape, weights="streamed"),
        CPU,
    )
    assert row.plan.weights == row.weights
    assert row.plan.states + row.plan.staging == row.states
    assert row.plan.host_bytes == row.host
    assert row.plan.peak_bytes == pytest.approx(row.peak, rel=0.03)


@pytest.mark.parametrize(
    "shape",
    [
        StepShape(rows=1, tokens=100),
        StepShape(rows=4, tokens=100, padded=False),
        StepShape(rows=4, tokens=100, labelled=5),
        StepShape(rows=4, tokens=100, checkpointing="all"),
        StepShape(rows=4, tokens=100, checkpointing=2),
        StepShape(rows=2, tokens=64, micro_batches=3),
        StepShape(rows=1, tokens=2),  # the update is the peak
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["full", "grass"])
def test_peaks_are_close_in_every_shape(method: str, shape: StepShape) -> None:
    offload = METHODS[method].config.offload
    row = benchmark.run_case(
        benchmark.Case(model="tiny", method=method, offload=offload, dtype="bfloat16", shape=shape), CPU
    )
    assert row.plan.peak_bytes == pytest.approx(row.peak, rel=0.02)


@pytest.mark.parametrize(
    "shape",
    [
        StepShape(rows=4, tokens=100),
        StepShape(rows=4, tokens=100, labelled=5),
        StepShape(rows=4, tokens=100, checkpointing="all"),
        StepShape(rows=2, tokens=64, micro_batches=3),
        StepShape(rows=1, tokens=2),
    ],
    ids=str,
)
def test_probing_takes_less_than_training(tiny: Planner, shape: StepShape) -> None:
    """Predicted in every mode, and measured step by step."""
    method = METHODS["grass"].config
    assert {plan.phase for plan in tiny.plan_modes(method, shape)} <= {"backward", "update"}
    config = benchmark.Case(model="tiny", method="grass", offload="resident", dtype="float32", shape=shape).config
    model = load_model(config.model).model
    if shape.checkpointing == "all":
        Recompute(model.model.layers).switch(True)
    (active,) = tiny.apply(method).active_sets()
    sampler = benchmark.Forced(config.method.sampler.build(seed=0, train_steps=10), active, 4)
    optimizer = build_optimizer(model.train(), sampler, config.method)
    peaks: dict[bool, list[float]] = {True: [], False: []}
    while len(peaks[False]) < 5:
        probing, meter = optimizer.probing, MemoryMeter(CPU)
        with meter.watch(itertools.chain(model.parameters(), optimizer.resident_states()), closely=True):
            accumulate_gradients(model, benchmark.make_batches(shape, 128, CPU), CPU)
            optimizer.step()
            optimizer.zero_grad()
        peaks[probing].append(meter.peak_allocated_gib)
    assert optimizer.active_units == active
    assert max(peaks[True]) < peaks[False][-1]


def test_gradients_are_exact(tiny: Planner) -> None:
    run = Run.prepare(short_run("lisa"))
    accumulate_gradients(run.state.model, run.state.batches[0], CPU)
    held = sum(p.grad.nbytes for p in run.state.model.parameters() if p.grad is not None)
    trains = tiny.apply(METHODS["lisa"].config)
    (active,) = trains.active_sets()
    assert tiny.min_bytes(trains, "none") == sum(
        (
            sum(p.nbytes for p in run.state.model.parameters()),
            sum(b.nbytes for b in run.state.model.buffers()),
            held,
            trains.state_bytes(trains.trained(active)),
        )
    )


def test_a_run_stays_below_the_plan_of_its_own_rows(tiny: Planner) -> None:
    config = short_run("lisa")
    shape = real_shape(config)
    assert shape.tokens < longest_shape(config).tokens
    assert shape.labelled is not None
    assert shape.labelled < shape.tokens
    run = Run.prepare(config)
    for _ in run.fit():
        pass
    (plan,) = tiny.plan_modes(config.method, shape, modes=["none"])
    measured = run.outcome().metrics["memory/peak_allocated_gib"] * GIB
    assert 0.7 * plan.peak_bytes < measured <= 1.02 * plan.peak_bytes  # its first rows need not be its longest


FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 32},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128},
    "gpt_neox": {},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_other_families_is_followed_too(family: str, rows: int) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, vocab_size=300, **({} if family == "gpt2" else sizes), **FAMILIES[family])
    shape = StepShape(rows=rows, tokens=80)
    with torch.device("meta"):
        predicted = profile_step(SteppedModel(AutoModelForCausalLM.from_config(config)), shape, device="cpu").peak.total
    model = AutoModelForCausalLM.from_config(config).train()
    meter = MemoryMeter(CPU)
    with meter.watch((), closely=True):
        accumulate_gradients(model, benchmark.make_batches(shape, 300, CPU), CPU)
    assert predicted == pytest.approx(meter.peak_allocated_gib * GIB, rel=0.05)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_tied_head_adds_two_gradients_in_place(micro_batches: int) -> None:
    """The head's and the embeddings', which are nearly all that this model has."""
    shape = StepShape(rows=1, tokens=4, micro_batches=micro_batches)
    model = make_llama(layers=1, vocabulary=4000, tied=True)
    with torch.device("meta"):
        predicted = profile_step(SteppedModel(type(model)(model.config)), shape, device="cpu").peak.total
    meter = MemoryMeter(CPU)
    for _ in range(2):  # the first looks for the head, too
        model.zero_grad()
        with meter.watch((), closely=True):
            accumulate_gradients(model, benchmark.make_batches(shape, 4000, CPU), CPU)
    assert predicted == pytest.approx(meter.peak_allocated_gib * GIB, rel=0.02)


# ------------------------------------------------------------------------------------------------- order and growth


def test_methods_and_modes_come_in_the_order_that_their_states_give(tinyllama: Planner) -> None:
    least = {
        (name, mode): tinyllama.min_bytes(trains, mode)
        for name in ("full", "galore", "apollo", "lora", "lisa", "lisa-keep", "grass", "badam")
        for trains in (tinyllama.apply(METHODS[name].config),)
        for mode in applicable_modes(METHODS[name].config)
    }
    assert least["grass", "lazy"] < least["grass", "resident"] < least["lisa", "none"] < least["full", "none"]
    assert least["grass", "resident"] < least["grass", "none"] < least["full", "none"]
    assert least["lisa-keep", "resident"] == least["lisa", "none"] < least["lisa-keep", "none"]
    assert least["full", "lazy"] < least["full", "none"]
    assert least["lora", "none"] < least["galore", "none"] < least["apollo", "none"] < least["full", "none"]
    assert least["grass", "lazy"] == least["grass", "overlap"] == least["grass", "blocking"]


def test_states_take_what_their_precision_says(tinyllama: Planner) -> None:
    one_layer = 44_044_288
    for precision, size in (("weights", 4), ("rem16", 6), ("exact", 10)):
        optimizer = METHODS["grass"].config.optimizer.model_copy(update={"precision": precision})
        trains = tinyllama.apply(METHODS["grass"].config.model_copy(update={"optimizer": optimizer}))
        assert trains.state_bytes([trains.units[0]]) == one_layer * size


def trained_only(layers: tuple[int, ...]) -> SteppedModel:
    model: nn.Module = build_shape(ModelConfig(name="tiny"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(f"model.layers.{layer}.") for layer in layers))
    return SteppedModel(model)


def test_activations_are_kept_down_to_the_lowest_active_layer() -> None:
    top, bottom, both = (
        profile_step(trained_only(layers), SHAPE, device="cpu").peak.activations for layers in ((3,), (0,), (0, 3))
    )
    assert top < bottom < both


def test_no_other_active_set_takes_more_than_the_planned_one(tiny: Planner) -> None:
    (planned,) = tiny.apply(METHODS["grass"].config).active_sets()
    for shape in (SHAPE, StepShape(rows=1, tokens=2), StepShape(rows=4, tokens=48, checkpointing="all")):
        peaks = {
            layers: profile_step(trained_only(layers), shape, device="cpu").peak.total
            for layers in itertools.combinations(range(4), 2)
        }
        assert peaks[planned] == max(peaks.values())


@pytest.mark.parametrize("recomputed", [0, 1, 2, 3, 4])
def test_no_other_active_set_takes_more_where_layers_are_recomputed(tiny: Planner, recomputed: int) -> None:
    """An active layer that is recomputed keeps less than one that is not, so other sets are the worst."""
    checkpointing: Any = recomputed or "none"
    for shape in (SHAPE, StepShape(rows=4, tokens=48, labelled=4), StepShape(rows=1, tokens=2)):
        shape = replace(shape, checkpointing=checkpointing)
        peaks = {
            layers: profile_step(trained_only(layers), shape, device="cpu").peak.total
            for layers in itertools.combinations(range(4), 2)
        }
        planned = tiny.apply(METHODS["grass"].config).active_sets(recomputed)
        assert max(peaks[layers] for layers in planned) >= 0.97 * max(peaks.values())


def test_an_adapter_that_draws_a_number_in_forward_is_planned_as_it_runs() -> None:
    """LoHa and LoKr draw whether they are dropped out."""
    planner = Planner(ModelConfig(name="tiny"), "cpu")
    plans = {name: planner.plan_modes(METHODS[name].config, SHAPE)[0] for name in ("ia3", "loha", "lokr")}
    assert min(plan.activations for plan in plans.values()) > max(plan.activations for plan in plans.values()) / 3


def test_a_dropped_gradient_is_not_held() -> None:
    shape = StepShape(rows=1, tokens=2)
    held = profile_step(trained_only((0, 1, 2, 3)), shape, device="cpu")
    dropped = profile_step(trained_only((0, 1, 2, 3)), shape, device="cpu", probing=True)
    assert dropped.gradients == 0
    assert dropped.peak.total < held.gradients / 4


def test_no_matrix_of_scores_is_kept_and_logits_grow_with_labels_alone() -> None:
    def parts(device: Any, tokens: int, **settings: Any) -> Any:
        return profile_step(
            trained_only((0,)), StepShape(rows=2, tokens=tokens, padded=False, **settings), device=device
        ).peak

    for device in ("cpu", "cuda"):
        assert parts(device, 2000).activations == pytest.approx(2 * parts(device, 1000).activations, rel=0.01)
    assert parts("cpu", 500, labelled=20).logits < parts("cpu", 500).logits / 10


def test_checkpointing_saves_and_rows_cost(tiny: Planner) -> None:
    def peak(**settings: Any) -> int:
        (plan,) = tiny.plan_modes(METHODS["full"].config, StepShape(tokens=128, **settings), modes=["none"])
        return plan.peak_bytes

    assert peak(rows=8, checkpointing="all") < peak(rows=8) / 1.5
    # a step in two micro-batches holds half the activations, and the first one's gradients
    assert peak(rows=4) < peak(rows=4, micro_batches=2) < peak(rows=8)


# ---------------------------------------------------------------------------------------------- before a run starts


def with_memory(monkeypatch: pytest.MonkeyPatch, nbytes: float) -> None:
    """Let this machine have so much memory."""
    monkeypatch.setattr(memory_fit, "total_bytes", lambda device: int(nbytes) + memory_fit.RESERVE_BYTES)


def test_a_run_that_fits_goes_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = short_run("grass", "method.offload=resident")
    with_memory(monkeypatch, 1 * GIB)
    assert fit_to_memory(config, CPU) == config


def test_a_run_that_cannot_fit_is_refused_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = short_run("full", "training.batch_size=64")
    with_memory(monkeypatch, 32 * MIB)
    with pytest.raises(MemoryRefusalError) as refused:
        fit_to_memory(config, CPU)
    message = str(refused.value)
    assert "cannot fit: predicted to need 0." in message
    assert "activations 0." in message
    assert "leaves it 0.03 GiB" in message
    assert "--no-memory-check" in message
    settings = message.partition("--set ")[2].partition(" (")[0].split()
    assert "training.gradient_checkpointing=all" in settings
    assert fit_to_memory(config.override(parse(settings)), CPU).training.gradient_checkpointing == "all"


def recomputed(config: RunConfig, **limits: Any) -> object:
    return fit_to_memory(config, CPU, **limits).training.gradient_checkpointing


def test_auto_recomputes_the_fewest_layers_that_fit(tiny: Planner) -> None:
    def needed(method: str, layers: Any) -> int:
        shape = replace(real_shape(short_run(method)), checkpointing=layers)
        (plan,) = tiny.plan_modes(short_run(method).method, shape, modes=[METHODS[method].config.offload])
        assert plan.recomputed_layers == {"none": 0, "all": 4}.get(layers, layers)
        return memory_fit.needed_bytes(plan, "cpu")

    for method in ("full", "prefix", "grass"):
        config = short_run(method, "training.gradient_checkpointing=auto")
        settings: list[Any] = ["none", 1, 2, 3, "all"]
        sizes = [needed(method, setting) for setting in settings]
        assert sizes == sorted(sizes, reverse=True)
        safe = 1 + memory_fit.TOLERANCE
        for memory in [math.ceil(size * safe) + more for size in sizes for more in (0, -1000)]:
            fitting = [s for s, size in zip(settings, sizes, strict=True) if size * safe <= memory]
            expected = fitting[0] if fitting else "all"
            assert recomputed(config, memory=memory_fit.RESERVE_BYTES + memory) == expected
        with pytest.raises(MemoryRefusalError, match="cannot fit"):
            recomputed(config, memory=memory_fit.RESERVE_BYTES + int(sizes[-1] / safe) - 1000)


def test_auto_recomputes_nothing_on_a_cpu_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 32 * MIB)
    full = short_run("full", "training.gradient_checkpointing=auto", "training.batch_size=64")
    with pytest.raises(MemoryRefusalError, match=r"--set training.gradient_checkpointing=all"):
        recomputed(full)
    assert recomputed(full, memory=memory_fit.RESERVE_BYTES + 32 * MIB) == "all"
    assert recomputed(short_run("full", "training.gradient_checkpointing=auto")) == "none"
    untrained = short_run("full", "training.gradient_checkpointing=auto", "training.steps=0")
    assert recomputed(untrained) == "none"


def test_another_offload_mode_comes_before_recomputing(tiny: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grass_ray.memory.plan.RING_BYTES", MIB // 16)
    for module in (memory_fit, memory_settings):  # a device of its own: what is on the host is not in its memory
        monkeypatch.setattr(module, "needed_bytes", lambda plan, device: plan.peak_bytes)
    config = short_run("grass", "method.offload=auto", "training.gradient_checkpointing=auto")
    shape = replace(real_shape(config), checkpointing="none")
    plans = tiny.plan_modes(config.method, shape, modes=["resident", "lazy"])
    resident, lazy = (plan.peak_bytes * (1 + memory_fit.TOLERANCE) + memory_fit.RESERVE_BYTES for plan in plans)

    def decided(memory: float) -> tuple[str, object]:
        fitted = fit_to_memory(config, CPU, memory=math.ceil(memory))
        return fitted.method.offload, fitted.training.gradient_checkpointing

    assert lazy < resident
    assert decided(resident) == ("resident", "none")
    assert decided(resident - 1000) == ("lazy", "none")
    assert decided(lazy) == ("lazy", "none")
    assert decided(lazy - 1000) == ("resident", 1)


def test_rows_shorter_than_the_cut_off_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = short_run("full", "data.max_length_tokens=1000", "training.batch_size=8")
    with_memory(monkeypatch, 40 * MIB)  # ten times less than rows of 1000 tokens would take
    assert fit_to_memory(config, CPU) == config


def test_auto_becomes_lazy_where_resident_states_do_not_fit(monkeypatch: pytest.MonkeyPatch, tiny: Planner) -> None:
    monkeypatch.setattr("grass_ray.memory.plan.RING_BYTES", MIB // 16)
    method = "method.sampler.num_active_layers=4"
    config = short_run(
        "grass", method, "method.offload=auto", "training.batch_size=1", "method.sampler.probing_steps=0"
    )
    by_mode = {p.offload: p for p in tiny.plan_modes(config.method, real_shape(config), modes=["resident", "lazy"])}
    between = (by_mode["resident"].peak_bytes + by_mode["lazy"].peak_bytes) / 2 / (1 + memory_fit.TOLERANCE)
    monkeypatch.setattr(memory_fit, "needed_bytes", lambda plan, device: plan.peak_bytes)
    with_memory(monkeypatch, between)
    assert fit_to_memory(config, CPU).method.offload == "lazy"
    with_memory(monkeypatch, 10 * between)
    assert fit_to_memory(config, CPU).method.offload == "resident"
    with_memory(monkeypatch, by_mode["lazy"].peak_bytes / 1.3)
    with pytest.raises(MemoryRefusalError, match="offload lazy"):
        fit_to_memory(config, CPU)


def test_what_cannot_be_followed_starts_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr("grass_ray.memory.plan.profile_step", fail)
    with pytest.raises(CannotPlanError, match="cannot predict the memory of a step of LlamaForCausalLM"):
        Planner(ModelConfig(name="tiny"), "cpu").plan_modes(METHODS["full"].config, SHAPE)
    with pytest.warns(UserWarning, match="the run starts unchecked"):
        fit_to_memory(short_run("full"), CPU)


@pytest.mark.long
def test_training_refuses_and_can_be_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    huge = ["train", "full", "--model", "tiny", "--batch-size", "200000", "--steps", "1", "--dry-run"]
    with pytest.raises(SystemExit) as stopped:
        main(huge)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "full-tiny-generated-s0 cannot fit" in error
    with pytest.raises(SystemExit) as stopped:
        main([*huge, "--no-memory-check"])
    assert stopped.value.code == 0


@pytest.mark.long
def test_training_takes_a_limit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny_run = ["train", "full", "--model", "tiny", "--steps", "2", "--batch-size", "16", "--limit", "4", "--quiet"]
    tiny_run += ["--set", "training.gradient_checkpointing=auto", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    for memory, layers in (("0.525", [0]), ("1", [])):
        with pytest.raises(SystemExit) as stopped:
            main([*tiny_run, "--output", str(tmp_path / memory), "--gpu-memory", memory])
        assert stopped.value.code == 0
        record = json.loads((tmp_path / memory / "record.json").read_text())
        assert record["layers"]["recomputed"] == layers
        assert record["config"]["training"]["gradient_checkpointing"] == "auto"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*tiny_run, "--output", str(tmp_path / "none"), "--gpu-memory", "0.3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --gpu-memory 0.3: give more than the 0.5 GiB of a process\n"


# ------------------------------------------------------------------------------------------------- the command line


def test_built_in_shapes_have_the_published_sizes_and_no_weights() -> None:
    sizes = {"tinyllama-1.1b": 1_100_048_384, "gemma-2b": 2_506_172_416, "llama2-7b": 6_738_415_616}
    sizes |= {"llama3.1-8b": 8_030_261_248, "qwen2.5-7b": 7_615_616_512}
    assert set(sizes) == set(SHAPES)
    for name, size in sizes.items():
        model = build_shape(ModelConfig(name=name, dtype="bfloat16"))
        assert sum(p.numel() for p in model.parameters()) == size
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.long
def test_the_command_plans_seven_billion_parameters_in_little_memory() -> None:
    program = [sys.executable, "-c", "from grass_ray.cli import main; main()", "plan", "--format", "json"]
    flags = ["--model", "llama2-7b", "--gpu-memory", "24", "--batch-size", "4", "--methods", "full", "grass"]
    done = subprocess.run([*program, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    plans = {(plan["method"], plan["offload"]): plan for plan in values["plans"]}
    weights = 6_738_415_616 * 2
    assert all(plan["weights"] == pytest.approx(weights, rel=1e-4) for plan in plans.values())
    assert plans["full", "none"]["states"] == 6_738_415_616 * 6
    assert plans["grass", "none"]["fits"] == "no"
    advice = values["advice"]["full"]
    assert {"method.optimizer.max_grad_norm=null", "method.update_in_backward=true"} < set(advice["settings"])
    # a layer's gradients and those of the embeddings or the head, in place of all
    assert advice["plan"]["gradients"] < weights / 15
    advice = values["advice"]["grass"]
    layers = advice["plan"]["recomputed_layers"]
    assert 0 < layers < advice["plan"]["num_layers"] == 32
    assert f"training.gradient_checkpointing={layers}" in advice["settings"]
    assert advice["plan"]["peak_gib"] < 23.5
    # the largest process this one ever started held less than a quarter of the weights
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < weights / 4


def run_verb(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *flags])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_table_and_markdown_say_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "tiny", "--gpu-memory", "0.6", "--batch-size", "16", "--methods", "full", "lisa", "misa")
    code, table, _ = run_verb(capsys, *flags)
    assert code == 0
    assert "activations" in table
    assert "what fits 0.6 GiB, the least change first:" in table
    assert "lisa" in table
    assert "misa  not possible: budget is 0.03" in table
    code, markdown, _ = run_verb(capsys, *flags, "--format", "markdown")
    assert code == 0
    assert "| method | offload | weights |" in markdown


def test_the_plan_says_what_clipping_costs(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "tiny", "--device", "cpu", "--batch-size", "1", "--seq-len", "8", "--methods", "full")
    _, out, _ = run_verb(capsys, *flags)
    said = next(line for line in out.splitlines() if line.startswith("clipping keeps the gradients"))
    assert "--set method.optimizer.max_grad_norm=null method.update_in_backward=true: full none " in said
    _, out, _ = run_verb(
        capsys, *flags, "--set", "method.optimizer.max_grad_norm=null", "method.update_in_backward=true"
    )
    assert "clipping" not in out
    code, _, err = run_verb(capsys, *flags, "--set", "method.update_in_backward=true")
    assert code == 2
    assert "clipping (optimizer.max_grad_norm 1) has to see all gradients first" in err


def test_the_plan_says_which_layers_are_recomputed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "tiny", "--gpu-memory", "0.56", "--batch-size", "16", "--seq-len", "128", "--methods", "full")

    def planned(*given: str) -> list[dict[str, Any]]:
        _, out, _ = run_verb(capsys, *flags, "--format", "json", *given)
        return [plan for plan in json.loads(out)["plans"] if plan["offload"] == "none"]

    ((none,), (all_of_them,), (some,)) = (planned("--gradient-checkpointing", s) for s in ("none", "all", "2"))
    assert none["recomputed_layers"] == 0
    assert planned() == planned("--gradient-checkpointing", "false") == [none]
    assert planned("--gradient-checkpointing") == planned("--gradient-checkpointing", "true") == [all_of_them]
    assert none["peak_bytes"] > some["peak_bytes"] > all_of_them["peak_bytes"]
    (auto,) = planned("--gradient-checkpointing", "auto")
    assert auto["fits"] == "yes"
    assert 0 < auto["recomputed_layers"] < 4
    _, table, _ = run_verb(capsys, *flags, "--gradient-checkpointing", "auto")
    count = auto["recomputed_layers"]
    assert f"layers 0-{count - 1} of 4: at most {25 * count}% of forward again" in table


def test_settings_reach_the_methods_that_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    def states(*flags: str) -> dict[str, int]:
        flags = ("--model", "tiny", "--gpu-memory", "2", "--seq-len", "32", "--format", "json", *flags)
        _, out, _ = run_verb(capsys, "--methods", "full", "lisa", *flags)
        return {plan["method"]: plan["states"] for plan in json.loads(out)["plans"] if plan["offload"] == "none"}

    one, two = states("--set", "method.sampler.num_active_layers=1"), states()
    assert one["full"] == two["full"]
    assert one["lisa"] < two["lisa"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "no/such-model", "--gpu-memory", "24"), "llama2-7b"),
        (("--model", "tiny", "--gpu-memory", "0"), "--gpu-memory 0.0: give more than 0 GiB"),
        (("--model", "tiny", "--gpu-memory", "-3"), "--gpu-memory -3.0"),
        (("--model", "tiny", "--gpu-memory", "0.25"), "must be more than the 0.5 GiB"),
        (("--model", "tiny", "--gpu-memory", "8", "--methods", "gras"), "Did you mean 'grass'?"),
        (("--model", "tiny", "--gpu-memory", "8", "--methods", "base"), "nothing trains"),
        (("--model", "tiny", "--gpu-memory", "8", "--methods", "ows"), "num_active_layers (gamma) is 5"),
        (("--model", "tiny", "--gpu-memory", "8", "--batch-size", "0", "--seq-len", "0"), "; --seq-len 0"),
        (("--model", "tiny", "--gpu-memory", "8", "--accumulation-steps", "3"), "a divisor of the 4 rows"),
        (("--model", "tiny", "--gpu-memory", "8", "--labelled", "2000"), "give 1 to 1024"),
        (
            ("--model", "tiny", "--gpu-memory", "8", "--gradient-checkpointing", "some"),
            "give none, all, auto",
        ),
        (("--model", "tiny", "--gpu-memory", "8", "--gradient-checkpointing", "0"), "give none, all, auto"),
        (("--model", "tiny", "--gpu-memory", "8", "--gradient-checkpointing", "5"), "the model has 4 decoder layers"),
        (("--model", "tiny", "--gpu-memory", "8", "--set", "method.sampler.tau=1"), "method.sampler.tau=1"),
    ],
)
def test_mistakes_get_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, error = run_verb(capsys, *flags)
    assert code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_shape_is_not_a_model_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot load model 'tinyllama-1"):
        describe_model(ModelConfig(name="tinyllama-1.1b"))


# ------------------------------------------------------------------------------------------------ planned only once


@pytest.mark.long
def test_methods_that_share_a_planner_have_the_plans_of_their_own(
    tiny: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the values that an adapter starts with, which a plan does without."""

    def plans(planner: Planner, name: str) -> list[dict[str, Any]] | str:
        try:
            return [plan.to_dict() for plan in planner.plan_modes(METHODS[name].config, SHAPE)]
        except ConfigError as error:
            return str(error)

    names = [name for name, row in METHODS.items() if row.trains]
    shared = {name: plans(tiny, name) for name in names}
    monkeypatch.setattr(memory_plan, "_without_values", contextlib.nullcontext)
    assert {name: plans(Planner(ModelConfig(name="tiny"), "cpu"), name) for name in names} == shared
