"""Streamed weights in whole runs: the same numbers as resident ones, the planned memory, and refused where unsound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small import short_run

from grass_ray.config import ConfigError, ModelConfig, fingerprint_of
from grass_ray.execute import execute
from grass_ray.memory.plan import Planner
from grass_ray.memory.settings import find_fit
from grass_ray.memory.step import StepShape
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.training.report import GIB
from grass_ray.training.run import Run
from grass_ray.training.sharding import check_shardable

STREAMED = "method.weights=streamed"


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("grass", ("method.offload=lazy", "model.dtype=bfloat16")),
        ("grass", ("training.gradient_checkpointing=true", "training.accumulation_steps=2", "data.validation_rows=4")),
        ("lisa", ()),
        ("lora", ()),
        ("ows-galore", ()),
    ],
)
def test_a_run_has_the_same_numbers(method: str, settings: tuple[str, ...]) -> None:
    resident, streamed = (execute(short_run(method, *settings, *own)) for own in ((), (STREAMED,)))
    assert streamed.status == "finished"
    assert streamed.weights_sha256 == resident.weights_sha256
    assert streamed.outcome is not None
    assert resident.outcome is not None
    ours, theirs = streamed.outcome, resident.outcome
    assert ours.series["train/loss"] == theirs.series["train/loss"]
    assert {key: results.examples for key, results in ours.tasks.items()} == {
        key: results.examples for key, results in theirs.tasks.items()
    }
    host = streamed.run.state.optimizer.weights.host_bytes  # type: ignore[union-attr]
    assert ours.metrics["memory/host_pinned_gib"] - theirs.metrics["memory/host_pinned_gib"] == host / GIB > 0


@pytest.mark.parametrize("method", ["grass", "lora"])
@pytest.mark.parametrize("before", ["resident", "streamed"])
def test_a_checkpoint_is_gone_on_from_with_either(method: str, before: str, tmp_path: Path) -> None:
    whole = execute(short_run(method))
    first = Run.prepare(short_run(method, f"method.weights={before}"))
    for _ in first.fit(until=4):
        pass
    first.save(tmp_path / "checkpoint")
    after = "resident" if before == "streamed" else "streamed"
    second = Run.prepare(short_run(method, f"method.weights={after}"))
    for _ in second.fit(until=2):
        pass  # what it has trained so far is replaced
    second.restore(tmp_path / "checkpoint")
    for _ in second.fit():
        pass
    assert second.weights_sha256() == whole.weights_sha256


def test_the_plan_names_streamed_weights_when_nothing_else_fits() -> None:
    planner = Planner(ModelConfig(name="llama2-7b", dtype="bfloat16"), "cuda")
    shape = StepShape(rows=4, tokens=512)
    for gib, streams in ((16, False), (7, True)):
        fit = find_fit(planner, METHODS["grass"].config, shape, gib * GIB)
        assert fit is not None
        assert (fit.changes.get("method.weights") == "streamed") == streams
        assert fit.plan.peak_bytes <= gib * GIB
    assert fit.plan.host_weights == pytest.approx(12.06 * GIB, rel=1e-3)


def test_what_cannot_stream_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match="every layer trains at every step, so none can be kept on the host"):
        short_run("full", STREAMED)
    with pytest.raises(ConfigError, match=r"method\.weights: Input should be 'resident' or 'streamed'"):
        short_run("grass", "method.weights=host")
    with pytest.raises(ConfigError, match=r"method\.weights=streamed needs whole weights"):
        check_shardable(short_run("grass", STREAMED), workers=2)


def test_the_default_leaves_fingerprints_as_they_were() -> None:
    config = short_run("grass")
    assert config.fingerprint != config.override(parse([STREAMED])).fingerprint
    values: Any = config.to_dict()
    del values["method"]["weights"]
    assert type(config).parse(values) == config
    assert fingerprint_of(values) == config.fingerprint
