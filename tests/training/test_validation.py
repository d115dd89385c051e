"""Rows held out for choosing settings: the same for every seed, never trained on, and their loss is exact."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from grass_ray.config import ConfigError, RunConfig
from grass_ray.methods import get_method
from grass_ray.overrides import parse
from grass_ray.tasks.rows import Row
from grass_ray.tasks.sources import load_train_rows
from grass_ray.training.run import Run
from grass_ray.training.validation import hold_out


def rows(count: int) -> list[Row]:
    return [Row(instruction=f"question {i}", input="", output=f"answer {i}", answer=str(i)) for i in range(count)]


def test_held_out_rows_are_the_same_every_time_and_never_trained_on() -> None:
    data = rows(50)
    train, held = hold_out(data, 10)
    assert (train, held) == hold_out(data, 10)
    assert len(held) == 10
    assert not set(train) & set(held)
    assert set(train) | set(held) == set(data)


def test_copies_of_a_held_out_row_are_not_trained_on() -> None:
    data = rows(20) + rows(20)
    train, held = hold_out(data, 5)
    assert len(held) == 5
    assert len(train) == 30
    assert not set(train) & set(held)


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"validation_rows=20 of 20 different training rows.* 1 to 19"):
        hold_out(rows(20), 20)


def configure(*settings: str) -> RunConfig:
    config = RunConfig(method=get_method("full").config).override(
        parse(["model.name=tiny", "training.steps=2", "evaluation.limit=2", "data.source.train_rows=40", *settings])
    )
    return config


def test_a_run_reports_the_loss_on_rows_it_never_saw() -> None:
    run = Run.prepare(configure("data.validation_rows=8"))
    for _ in run.fit():
        pass
    run.evaluate()
    loss = run.outcome().metrics["validation/loss"]
    # the same rows, one after another, by transformers' own loss
    _, held = hold_out(load_train_rows(run.config.data).rows, 8)
    assert run.outcome().data["validation"]["rows"] == 8
    assert run.outcome().data["train_rows_used"] == 32
    from grass_ray.tasks.templates import render_prompt, render_response

    total, labels = 0.0, 0
    run.state.model.eval()
    for row in held:
        prompt = run.tokenizer(render_prompt(row, "clean"))["input_ids"]
        response = run.tokenizer(render_response(row), add_special_tokens=False)["input_ids"]
        response = [*response, run.tokenizer.eos_token_id]
        ids = torch.tensor([prompt + response])
        targets = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            total += float(run.state.model(input_ids=ids, labels=targets).loss) * len(response)
        labels += len(response)
    assert math.isclose(loss, total / labels, rel_tol=1e-5)


def test_held_out_rows_do_not_depend_on_the_seed() -> None:
    hashes = {
        Run.prepare(configure("data.validation_rows=8", f"seed={seed}")).outcome().data["validation"]["sha256"]
        for seed in (0, 1)
    }
    assert len(hashes) == 1


def test_measuring_on_the_way_is_a_point_of_the_series_and_changes_nothing() -> None:
    plain, watched = (
        Run.prepare(configure("data.validation_rows=8", "training.steps=4", "method.optimizer.lr=0.01")) for _ in "ab"
    )
    for _ in plain.fit():
        pass
    losses = []
    for report in watched.fit():
        losses.append((report.step, watched.validate()))
    assert watched.state.series["validation/loss"] == losses
    assert len({loss for _, loss in losses}) == 4
    assert watched.weights_sha256() == plain.weights_sha256()


def test_a_trial_of_a_search_meets_no_test_question() -> None:
    run = Run.prepare(configure("data.validation_rows=8", "evaluation.test=false"))
    for _ in run.fit():
        pass
    run.evaluate()
    outcome = run.outcome()
    assert outcome.tasks == {}
    assert not [name for name in outcome.metrics if name.startswith("eval/")]
    assert math.isfinite(outcome.metrics["validation/loss"])


def test_a_run_that_goes_on_from_anothers_checkpoint_trains_at_its_own_learning_rate(tmp_path: Path) -> None:
    shared = ("training.steps=8", "training.warmup_steps=2", "training.lr_schedule=linear")
    donor = Run.prepare(configure(*shared, "method.optimizer.lr=0.01"))
    for report in donor.fit():
        if report.step == 4:
            break
    donor.save(tmp_path / "donor")
    member = Run.prepare(configure(*shared, "method.optimizer.lr=0.002"))
    member.restore(tmp_path / "donor")
    assert member.weights_sha256() == donor.weights_sha256()
    member.apply_learning_rate()
    rates = {report.step: report.lr for report in member.fit()}
    expected = {report.step: report.lr for report in Run.prepare(configure(*shared, "method.optimizer.lr=0.002")).fit()}
    assert rates == {step: pytest.approx(expected[step]) for step in (5, 6, 7, 8)}
