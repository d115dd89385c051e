"""The loop as users see it: probing, batches, accumulation, the engagement proof, failures that are recorded."""

from __future__ import annotations

import math

import pytest
import torch

from grass_ray.config import ConfigError, ModelConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.training.batches import IGNORED
from grass_ray.training.checks import check_run
from grass_ray.training.loss import accumulate_gradients
from grass_ray.training.report import LayerTrace, StepReport, TrainingFailure
from grass_ray.training.run import Run


def make_run(method: str = "grass", *overrides: str) -> Run:
    return Run.prepare(make_config(method, *overrides))


def make_config(method: str = "grass", *overrides: str) -> RunConfig:
    config = RunConfig(method=METHODS[method].config, model=ModelConfig(name="tiny"))
    defaults = ["training.steps=6", "data.source.train_rows=64", "data.source.test_rows=8", "training.warmup_steps=0"]
    if method.startswith("grass"):
        defaults += ["method.sampler.period=2", "method.sampler.probing_steps=2", "method.sampler.refresh_period=3"]
    return config.override(parse([*defaults, *overrides]))


def test_probing_loses_no_batch_and_holds_the_schedule_still() -> None:
    run = make_run()
    reports = list(run.fit())
    assert [report.phase for report in reports] == ["probe"] * 2 + ["train"] * 6
    assert [report.step for report in reports] == list(range(1, 9))
    # training starts again from the first batch, with weights that probing left alone
    assert reports[2].loss == reports[0].loss
    assert reports[2].tokens == reports[0].tokens
    assert reports[2].lr == METHODS["grass"].config.optimizer.lr
    assert reports[-1].lr == pytest.approx(reports[2].lr / 6)


def assert_ages(run: Run, layers: LayerTrace) -> None:
    """At every refresh and in every step's series: how long ago a layer was last active, by the draws themselves."""
    series, last = run.state.series, run.state.total_steps
    probed = [(step, (0, 1, 2, 3)) for step in (1, 2)]
    intervals = [*probed, *layers.intervals]
    active = {step: [units for first, units in intervals if first <= step][-1] for step in range(1, last + 1)}
    refreshed = [step for step, _, _ in layers.refreshes]
    assert [step for step, _ in layers.ages] == refreshed
    for step, ages in layers.ages:
        measured = [max(at for at in range(1, step + 1) if layer in active[at]) for layer in range(4)]
        assert ages == tuple(float(step - at) for at in measured)
        assert [dict(series[f"layers/age_{layer:02d}"])[step] for layer in range(4)] == list(ages)
        for later in range(step, min([at for at in refreshed if at > step], default=last + 1)):
            assert dict(series["layers/age_max"])[later] == max(ages) + later - step
            assert dict(series["layers/age_mean"])[later] == pytest.approx(sum(ages) / 4 + later - step)
    assert f" / {layers.ages[-1][1][0]:g}" in layers.describe()
    assert "importance / probability / age in steps" in layers.describe()


@pytest.mark.parametrize("batching", ["plain", "packed"])
@pytest.mark.parametrize("method", ["grass", "lora", "full", "ist", "prompt", "prefix"])
def test_recomputed_layers_change_no_bit(method: str, batching: str) -> None:
    if method in ("prompt", "prefix") and batching == "packed":
        pytest.skip("its virtual tokens cannot be packed")

    def follow(setting: str) -> tuple[str, list[float], list[int], list[int]]:
        run = make_run(method, f"training.gradient_checkpointing={setting}", f"data.batching={batching}")
        begun = [0] * 4
        for index, layer in enumerate(run.state.optimizer.stack.modules):
            first = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
            first.register_forward_pre_hook(lambda *_, index=index: begun.__setitem__(index, begun[index] + 1))
        losses = [report.loss for report in run.fit() if report.phase == "train"]
        layers = run.outcome().layers
        assert layers is not None
        assert layers.only_active_layers_changed
        return run.weights_sha256(), losses, begun, layers.recomputed

    sha256, losses, plain, none = follow("none")
    assert none == []
    assert follow("auto") == (sha256, losses, plain, [])  # on a CPU
    for setting, count in (("2", 2), ("all", 4)):
        other, same, begun, recomputed = follow(setting)
        assert (other, same) == (sha256, losses)
        assert recomputed == list(range(count))
        assert begun[count:] == plain[count:]
        # once more in each of six steps, but those whose lowest active layer is above
        more = [new - old for new, old in zip(begun, plain, strict=True)][:count]
        assert 0 < sum(more) <= 6 * count
        if method not in ("grass", "ist"):
            assert more == [6] * count


def test_layers_to_recompute_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.gradient_checkpointing is 5, but the model has 4 decoder layers"):
        check_run(make_config("full", "training.gradient_checkpointing=5"))


def test_the_engagement_proof_holds_and_would_notice() -> None:
    run = make_run()
    for _ in run.fit():
        pass
    layers = run.outcome().layers
    assert layers is not None
    assert layers.only_active_layers_changed
    assert [step for step, _ in layers.intervals] == [3, 5, 7]
    assert sum(layers.visits) == 6
    assert [step for step, _, _ in layers.refreshes] == [2, 5, 8]
    assert layers.trainable_parameters == sum(p.numel() for p in run.state.optimizer.active_parameters())
    assert_ages(run, layers)

    tampered = make_run()
    for report in tampered.fit():
        if report.step == 4:
            frozen = next(layer for layer in range(4) if layer not in report.active_layers)
            with torch.no_grad():
                tampered.state.optimizer.stack.layers[frozen][0].view(-1)[0] += 1e-3
    outcome = tampered.outcome().layers
    assert outcome is not None
    assert not outcome.only_active_layers_changed


def test_accumulation_gives_the_gradient_of_the_whole_batch() -> None:
    """Micro-batches of unequal length weigh every token alike."""
    losses = {}
    for accumulation in (1, 2, 4):
        run = make_run("full", f"training.accumulation_steps={accumulation}", "training.batch_size=4")
        losses[accumulation] = [report.loss for report in run.fit()]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert losses[4] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("on_inputs", ["false", "true"])
def test_leaving_out_unlabelled_logits_changes_no_gradient(on_inputs: str) -> None:
    """Against the plain loss over all logits."""
    run = make_run("full", f"data.train_on_inputs={on_inputs}")
    state = run.state
    (batch,) = state.batches[0]
    loss = accumulate_gradients(state.model, [batch], state.device)
    ours = [p.grad.clone() for p in state.model.parameters()]
    state.model.zero_grad()
    logits = state.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    plain.backward()
    assert loss == pytest.approx(float(plain.detach()), rel=1e-6)
    for ours_one, parameter in zip(ours, state.model.parameters(), strict=True):
        torch.testing.assert_close(ours_one, parameter.grad, rtol=1e-4, atol=1e-7)
    labelled = batch.labelled_positions()
    assert len(labelled) < batch.input_ids.shape[1]


def test_untrained_base_has_no_steps_and_no_costs() -> None:
    run = make_run("base", "training.steps=0")
    assert list(run.fit()) == []
    outcome = run.outcome()
    assert outcome.layers is None
    assert "memory/peak_allocated_gib" not in outcome.metrics


def test_loss_falls_for_every_method() -> None:
    for method in ("full", "lora", "lisa", "grass", "grass-static"):
        run = make_run(method, "training.steps=20", "method.optimizer.lr=0.005")
        reports = [report for report in run.fit() if report.phase == "train"]
        first, last = (sum(r.loss for r in part) / 3 for part in (reports[:3], reports[-3:]))
        assert last < first - 0.05, (method, first, last)


def test_memory_of_the_methods_is_ordered_and_accounted() -> None:
    """Full holds gradients and states of everything, grass of two layers; both above the weights alone."""
    peaks = {}
    for method in ("full", "grass"):
        run = make_run(method)
        for _ in run.fit():
            pass
        peaks[method] = run.outcome().metrics["memory/peak_allocated_gib"] * 1024**3
        weights = sum(p.numel() * 4 for p in run.state.model.parameters())
        assert peaks[method] > weights
    trained = sum(p.numel() * 4 for p in run.state.model.parameters())
    assert peaks["full"] - peaks["grass"] > 0.3 * 2 * trained


def test_a_loss_that_is_no_number_is_a_recorded_failure() -> None:
    run = make_run("full", "method.optimizer.lr=1e30", "method.optimizer.max_grad_norm=null")
    with pytest.raises(TrainingFailure, match=r"(loss|gradient norm) became (nan|inf) at step \d") as failure:
        list(run.fit())
    assert failure.value.status == "failed"


def test_leaving_the_loop_and_coming_back_is_going_on() -> None:
    whole = [report.loss for report in make_run().fit()]
    run = make_run()
    first: list[StepReport] = []
    for report in run.fit():
        first.append(report)
        if len(first) == 3:
            break
    assert [report.loss for report in first] + [report.loss for report in run.fit()] == whole
    assert not any(math.isnan(loss) for loss in whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.sampler.num_active_layers=5"], r"gamma.* is 5, but the model has 4 decoder layers; choose 1 to 4"),
        (["model.name=no-such-model"], r"cannot load model 'no-such-model'.*built-in smollm2-135m, tiny"),
    ],
)
def test_mistakes_show_before_weights_are_loaded(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(make_config("grass", *overrides))


def test_a_cut_off_that_leaves_no_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"none of 64 training rows has an answer within 8 tokens"):
        make_run("grass", "data.max_length_tokens=8")
