"""IST's arithmetic by hand: damped passes, importance, draws; and that damping really reaches peft's adapters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
from small import make_batch, make_llama, short_run

from grass_ray import RewardSampler
from grass_ray.layerwise import rewards
from grass_ray.training.adapters import scaled_adapters
from grass_ray.training.loop import StepMeasure
from grass_ray.training.run import Run

UNITS = 4


class Passes:
    """Damped passes with made-up losses; remembers which layers each pass damped."""

    def __init__(self, loss_of: Callable[[tuple[int, ...]], float]) -> None:
        self._loss_of = loss_of
        self.damped: list[tuple[int, ...]] = []
        self.factors: set[float] = set()

    def loss(self, scales: Mapping[int, float]) -> float:
        layers = tuple(scales)
        self.damped.append(layers)
        self.factors |= set(scales.values())
        return self._loss_of(layers)

    def outlier_scores(self, threshold: float, steps: int) -> tuple[float, ...]:
        raise AssertionError("IST looks for no outliers")


def started(units: int = UNITS, **settings: Any) -> RewardSampler:
    sampler = RewardSampler(**settings)
    sampler.start([1] * units)
    return sampler


def drive(sampler: RewardSampler, passes: Passes, steps: int) -> list[tuple[int, ...]]:
    """The active set of every step, driven as the optimizer does."""
    active: list[tuple[int, ...]] = []
    current = sampler.sample() if sampler.due else ()
    for _ in range(steps):
        sampler.probe(passes)
        if sampler.due:
            current = sampler.sample()
        active.append(current)
        sampler.observe(torch.full((UNITS,), math.nan))
        if sampler.due:
            current = sampler.sample()
    return active


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_two_refreshes_by_hand() -> None:
    """I_i += (exp(-loss) - mean) s (1 - s) 10 over the trials that damped i, all with the s from before."""
    losses = itertools.cycle([1.0, 2.0, 0.5])
    passes = Passes(lambda _: next(losses))
    sampler = started(refresh_period=5)
    importance = [0.0] * UNITS
    for refresh in range(2):
        drive(sampler, passes, 5 if refresh else 6)
        sets = passes.damped[3 * refresh :]
        rewards_of = [math.exp(-loss) for loss in (1.0, 2.0, 0.5)]
        mean = sum(rewards_of) / 3
        slopes = [sigmoid(i) * (1 - sigmoid(i)) for i in importance]
        for layers, reward in zip(sets, rewards_of, strict=True):
            for layer in layers:
                importance[layer] += (reward - mean) * slopes[layer] * 10
        assert sampler.importance() == pytest.approx(importance, rel=1e-12)
        assert sampler.refreshes == refresh + 1
    assert len(set(importance)) > 1
    weights = [sigmoid(-i) for i in importance]
    assert sampler.probabilities() == pytest.approx([w / sum(weights) for w in weights])
    assert passes.factors == {0.25}


def test_a_layer_whose_damping_hurts_is_drawn_more_often() -> None:
    passes = Passes(lambda layers: 3.0 if 1 in layers else 1.0)
    sampler = started(refresh_period=2, share=0.25)
    active = drive(sampler, passes, 200)
    importance, probabilities = sampler.importance(), sampler.probabilities()
    assert importance[1] < 0 < min(importance[0], importance[2], importance[3])
    assert probabilities[1] > 2 * max(probabilities[0], probabilities[2], probabilities[3])
    visits = [sum(layer in layers for layers in active[50:]) for layer in range(UNITS)]
    assert visits[1] > 2 * max(visits[0], visits[2], visits[3])


def test_damps_the_layers_it_holds_for_unimportant() -> None:
    """High I is damped more often: a mistake about an important layer is found rarely, one about the others often."""
    sampler = started(learning_rate=40.0, refresh_period=1)
    passes = Passes(lambda layers: 3.0 if 1 in layers else 1.0)
    drive(sampler, passes, 300)
    counts = [sum(layer in layers for layers in passes.damped[300:]) for layer in range(UNITS)]
    assert counts[1] < 0.8 * min(counts[0], counts[2], counts[3])


@pytest.mark.parametrize(("units", "damped_share", "size"), [(4, 0.5, 2), (7, 0.5, 3), (6, 0.1, 1)])
def test_trials_are_distinct_and_of_the_given_share(units: int, damped_share: float, size: int) -> None:
    sampler = started(units, damped_share=damped_share, refresh_period=1)
    passes = Passes(lambda layers: 1.0 + 0.1 * sum(layers))
    drive(sampler, passes, 31)
    assert sampler.refreshes == 30
    for start in range(0, 90, 3):
        trial_sets = passes.damped[start : start + 3]
        assert len(set(trial_sets)) == 3
        assert {len(set(layers)) for layers in trial_sets} == {size}
    assert len(set(passes.damped)) > 3, "each refresh draws its own"


def test_more_trials_than_sets_repeat_them() -> None:
    sampler = started(2, trials=3, refresh_period=1)
    passes = Passes(lambda _: 1.0)
    drive(sampler, passes, 2)
    assert set(passes.damped) == {(0,), (1,)}
    assert len(passes.damped) == 3


def test_a_certain_importance_does_not_search_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 1 and 1e-100 make every trial draw the same set; the search for others must end."""
    drawn = itertools.count()
    plain = rewards.draw_without_replacement

    def counted(*arguments: Any) -> tuple[int, ...]:
        assert next(drawn) < 10_000, "still searching"
        return plain(*arguments)

    monkeypatch.setattr(rewards, "draw_without_replacement", counted)
    sampler = started(refresh_period=1, learning_rate=1e4)
    passes = Passes(lambda layers: 1.0 + sum(layers))
    drive(sampler, passes, 20)
    assert max(map(abs, sampler.importance())) > 200
    assert sampler.refreshes == 19
    assert all(map(math.isfinite, sampler.importance()))
    assert sum(sampler.probabilities()) == pytest.approx(1.0)


def test_measures_at_refreshes_only_and_once() -> None:
    sampler = started(refresh_period=3)
    passes = Passes(lambda _: 1.0)
    measured = []
    for step in range(10):
        for _ in range(2):
            before = len(passes.damped)
            sampler.probe(passes)
            measured += [step] * (len(passes.damped) > before)
        sampler.observe(torch.full((UNITS,), math.nan))
    assert measured == [3, 6, 9], "never before the first step, and not again in the same step"
    assert len(passes.damped) == 9


def test_only_damped_layers_change() -> None:
    sampler = started(6, damped_share=0.2, refresh_period=1)
    passes = Passes(lambda layers: 1.0 + 0.1 * layers[0])
    drive(sampler, passes, 2)
    damped = {layer for layers in passes.damped for layer in layers}
    assert len(damped) == 3
    assert {layer for layer, i in enumerate(sampler.importance()) if i != 0.0} <= damped
    assert sum(i != 0.0 for i in sampler.importance()) >= 2


def test_a_share_of_the_layers_trains_drawn_anew_every_step() -> None:
    sampler = started(share=0.5, refresh_period=100)
    active = drive(sampler, Passes(lambda _: 1.0), 40)
    assert {len(layers) for layers in active} == {2}
    assert len(set(active)) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share is 0.0; it must be above 0 and at most 1"),
        ({"damped_share": 1.5}, "damped_share is 1.5"),
        ({"refresh_period": 0}, "refresh_period is 0"),
        ({"trials": 1}, "trials is 1; it must be at least 2"),
        ({"damping": -0.1}, "damping is -0.1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSampler(**settings)


# ---------------------------------------------------------------------------------------------------------- adapters


def make_adapted(**settings: Any) -> Any:
    """A Llama with LoRA adapters that add something; q_proj's alpha differs from the others'."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        alpha_pattern={"q_proj": 32},
        **settings,
    )
    model = peft.get_peft_model(make_llama(), config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=make_batch(0)).logits.clone()


def layers_of(model: Any) -> Any:
    return model.get_base_model().model.layers


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_scaling_reaches_the_adapters_and_ends_with_the_block(settings: dict[str, bool]) -> None:
    model = make_adapted(**settings)
    before = outputs(model)
    with scaled_adapters([layers_of(model)[1]], [0.25]):
        one = outputs(model)
        with scaled_adapters([layers_of(model)[3]], [0.0]):
            two = outputs(model)
    assert not torch.equal(one, before)
    assert not torch.equal(two, one)
    assert torch.equal(outputs(model), before)


def test_scaling_is_scaling_what_the_layers_own_adapters_add() -> None:
    """Against a model whose B matrices of those layers are multiplied by the factors."""
    model, scaled = make_adapted(), make_adapted()
    factors = {0: 0.25, 2: 3.0}
    for name, parameter in scaled.named_parameters():
        for layer, factor in factors.items():
            if f"layers.{layer}." in name and "lora_B" in name:
                parameter.data.mul_(factor)
    with scaled_adapters([layers_of(model)[layer] for layer in factors], list(factors.values())):
        inside = outputs(model)
    torch.testing.assert_close(inside, outputs(scaled), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(inside, outputs(model), atol=1e-3)


def test_scaling_ends_on_an_error_too() -> None:
    model = make_adapted()
    before = outputs(model)
    with pytest.raises(KeyError), scaled_adapters(list(layers_of(model)), [0.25] * 4):
        raise KeyError("no batch")
    assert torch.equal(outputs(model), before)


def test_a_layer_without_adapters_is_an_error_and_restores_the_others() -> None:
    model = make_adapted(layers_to_transform=[0, 1])
    before = outputs(model)
    with pytest.raises(ValueError, match="scaling"), scaled_adapters(list(layers_of(model)), [0.25] * 4):
        pass
    assert torch.equal(outputs(model), before)


def test_the_measured_loss_is_of_damped_adapters_without_dropout() -> None:
    run = Run.prepare(short_run("ist", "method.adapter.dropout=0.5", "method.optimizer.lr=0.05"))
    for _ in run.fit():
        pass
    state = run.state
    measure = StepMeasure(state, state.batches[0])
    plain, damped = measure.loss({}), measure.loss({0: 0.25, 2: 0.25})
    assert damped != plain
    assert measure.loss({}) == plain, "restored, and without dropout"
    assert measure.loss({0: 1.0, 2: 1.0}) == plain
    assert measure.loss({0: 0.25}) not in (plain, damped)
    assert state.model.training
    assert all(p.grad is None for p in state.model.parameters())


def test_a_run_measures_at_its_refreshes() -> None:
    run = Run.prepare(short_run("ist", "method.sampler.refresh_period=4"))
    reports = list(run.fit())
    assert [report.step for report in reports if report.refreshed] == [5, 9], "before the fifth and the ninth step"
    assert len({report.importance for report in reports}) == 3
