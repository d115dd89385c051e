"""OWS: outlier scores against a slow plain reference, and the sampler that draws by them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import make_batch, make_llama, make_optimizer, short_run
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from grass_ray import LayerwiseAdamW, OutlierSampler
from grass_ray.layerwise.outliers import outlier_scores
from grass_ray.training.loop import StepMeasure
from grass_ray.training.run import Run


def forward(model: nn.Module, step: int = 0) -> Callable[[], None]:
    def run() -> None:
        model(input_ids=make_batch(step))

    return run


def plain_scores(model: Any, threshold: float) -> tuple[float, ...]:
    """The definition, one weight after another in Python's float, from activations captured on the way."""
    inputs: dict[nn.Module, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, given, _: inputs.setdefault(m, []).extend(given[0].unbind(0)))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        forward(model)()
    for handle in handles:
        handle.remove()
    scores = []
    for layer in model.model.layers:
        saliencies: list[float] = []
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                tokens = [token for row in inputs[module] for token in row.double().tolist()]
                norms = [math.sqrt(sum(token[j] ** 2 for token in tokens)) for j in range(module.in_features)]
                saliencies += [abs(w) * n for row in module.weight.tolist() for w, n in zip(row, norms, strict=True)]
        limit = threshold * sum(saliencies) / len(saliencies)
        assert not any(abs(s / limit - 1) < 1e-6 for s in saliencies), "too near the limit for float32"
        scores.append(100 * sum(s > limit for s in saliencies) / len(saliencies))
    return tuple(scores)


@pytest.mark.parametrize("threshold", [2.5, 4.0])
def test_scores_are_the_plain_definition(threshold: float) -> None:
    model = make_llama(layers=3, hidden=16)
    scores = outlier_scores(model.model.layers, forward(model), threshold)
    assert scores == pytest.approx(plain_scores(model, threshold), rel=1e-12)
    assert len(set(scores)) == 3, "layers differ"
    assert all(0 < score < 100 for score in scores)


class Pair(nn.Module):
    """A layer of two linear maps of constant weights that see the same inputs."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.constant_(self.first.weight, first)
        nn.init.constant_(self.second.weight, second)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).sum() + self.second(x).sum()


def test_the_mean_is_over_all_weights_of_a_layer_in_percent() -> None:
    """8 saliencies of 10 and 4 of 1 make a mean of 7; a mean for each linear map would see no outlier at all."""
    layer = Pair(1.0, 10.0)
    assert outlier_scores([layer], lambda: layer(torch.ones(1, 1, 2)), 1.2) == pytest.approx((100 * 8 / 12,))
    assert outlier_scores([layer], lambda: layer(torch.ones(1, 1, 2)), 1.5) == (0.0,)


def test_an_outlier_exceeds_the_limit() -> None:
    """Strictly: weights that are all equal have no outliers at a threshold of 1."""
    layer = Pair(2.0, 2.0)
    assert outlier_scores([layer], lambda: layer(torch.ones(1, 1, 2)), 1.0) == (0.0,)
    assert outlier_scores([layer], lambda: layer(torch.ones(1, 1, 2)), 0.999) == (100.0,)


def test_the_inputs_norm_counts_over_all_passes() -> None:
    """One column's input is 6 in one pass and 8 in another: norm 10, against 1 and 1."""
    layer = Pair(1.0, 1.0)

    def two_passes() -> None:
        layer(torch.tensor([[[6.0, 1.0]]]))
        layer(torch.tensor([[[8.0, 0.0]]]))

    # saliencies 10 and 1, mean 5.5: half of the weights are above 1.8 times the mean, none above 1.82 times
    assert outlier_scores([layer], two_passes, 1.8) == (50.0,)
    assert outlier_scores([layer], two_passes, 1.82) == (0.0,)


def test_gpt2s_transposed_weights_count_as_linear_maps() -> None:
    """Against the same model with every Conv1D replaced by the nn.Linear it stands for."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32)).eval()
    nn.init.normal_(model.transformer.wte.weight, std=2.0)
    scores = outlier_scores(model.transformer.h, forward(model), 3.0)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                outputs, inputs = child.weight.T.shape
                linear = nn.Linear(inputs, outputs)
                linear.weight, linear.bias = nn.Parameter(child.weight.T.contiguous()), child.bias
                setattr(module, name, linear)
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert scores == outlier_scores(model.transformer.h, forward(model), 3.0)
    assert min(scores) > 0


def test_a_layer_with_planted_outliers_scores_highest() -> None:
    model = make_llama(layers=4)
    clean = outlier_scores(model.model.layers, forward(model), 10.0)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.view(-1)[:20] = 1.0
    planted = outlier_scores(model.model.layers, forward(model), 10.0)
    assert clean == (0.0,) * 4
    assert planted[2] > 0
    assert planted[:2] + planted[3:] == (0.0,) * 3


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = make_llama(layers=2)
    outlier_scores(model.model.layers, forward(model), 3.0)

    def failing() -> None:
        raise KeyError("no batch")

    with pytest.raises(KeyError):
        outlier_scores(model.model.layers, failing, 3.0)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_layer_out_of_reach_is_an_error() -> None:
    model = make_llama(layers=2)
    with pytest.raises(ValueError, match="layer 0 has no linear weight that the calibration batch reached"):
        outlier_scores(model.model.layers, lambda: None, 3.0)
    with pytest.raises(ValueError, match="layer 1 has no linear weight"):
        outlier_scores([model.model.layers[0], nn.LayerNorm(4)], forward(model), 3.0)


def test_padding_does_not_count() -> None:
    """What stands on padded positions changes nothing; a word in its place does."""
    run = Run.prepare(short_run("ows"))
    (batch,) = run.state.batches[0]
    padded = batch.attention_mask == 0
    assert padded.any()
    measure = StepMeasure(run.state, [])
    scores = measure.outlier_scores(3.0, 1)
    assert run.state.model.training

    class Tampered:
        def __init__(self, where: Tensor) -> None:
            self._where = where

        def __getitem__(self, step: int) -> list[Any]:
            (found,) = run_batches[step]
            found.input_ids[self._where] = 5
            return [found]

    run_batches = run.state.batches
    run.state.batches = Tampered(padded)  # type: ignore[assignment]
    assert measure.outlier_scores(3.0, 1) == scores
    run.state.batches = Tampered(~padded)  # type: ignore[assignment]
    assert measure.outlier_scores(3.0, 1) != scores


# ------------------------------------------------------------------------------------------------------- the sampler


def test_draws_in_proportion_to_the_scores() -> None:
    from scipy.stats import chisquare

    sampler = OutlierSampler([4.0, 1.0, 0.0, 3.0], 1, 1)
    sampler.start([1] * 4)
    assert sampler.probabilities() == pytest.approx((0.5, 0.125, 0.0, 0.375))
    counts = [0] * 4
    for _ in range(4000):
        counts[sampler.sample()[0]] += 1
    assert counts[2] == 0
    assert chisquare([counts[0], counts[1], counts[3]], [2000, 500, 1500]).pvalue > 1e-3


def test_a_layer_without_outliers_trains_when_the_others_do_not_suffice() -> None:
    sampler = OutlierSampler([1.0, 0.0, 2.0, 0.0], 3, 1)
    sampler.start([1] * 4)
    drawn = [sampler.sample() for _ in range(50)]
    assert set(drawn) == {(0, 1, 2), (0, 2, 3)}


class Counting:
    """A measurement with known scores that counts how often it is asked."""

    def __init__(self, scores: tuple[float, ...]) -> None:
        self.scores = scores
        self.asked: list[tuple[float, int]] = []

    def loss(self, scales: object) -> float:
        raise AssertionError("OWS measures no loss")

    def outlier_scores(self, threshold: float, steps: int) -> tuple[float, ...]:
        self.asked.append((threshold, steps))
        return self.scores


def test_measures_its_scores_once_before_the_first_step() -> None:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, OutlierSampler(None, 1, 2, threshold=7.0, calibration_steps=3), lr=1e-3)
    assert optimizer.active_layers == ()
    measure = Counting((0.0, 0.0, 1.0, 0.0))
    for step in range(5):
        optimizer.probe(measure)
        assert optimizer.active_layers == (2,)
        model(input_ids=make_batch(step), labels=make_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert measure.asked == [(7.0, 3)]
    assert optimizer.sampler.refreshes == 1


@pytest.mark.parametrize(
    "others",
    [
        {},
        pytest.param(
            {"train_embeddings": True, "train_head": True, "train_norm": True},
        ),
    ],
    ids=["layers", "layers-and-others"],
)
def test_a_step_before_the_scores_were_measured_is_an_error(others: dict[str, bool]) -> None:
    """Also where embeddings, head and norm always train, as in the ows row: they alone must not train silently."""
    optimizer = make_optimizer(make_llama(), OutlierSampler(None, 1, 2), **others)  # type: ignore[arg-type]
    with pytest.raises(
        RuntimeError, match=r"OutlierSampler has not drawn yet: call optimizer\.probe\(measure\) before the first step"
    ):
        optimizer.step()


@pytest.mark.parametrize(
    "scores",
    [[1.0, math.nan], [1.0, math.inf], [1.0, -0.5], [0.0, 0.0], []],
    ids=["nan", "inf", "minus", "zero", "none"],
)
def test_refuses_bad_scores(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"scores is \[.*\]; it must be finite, not negative, and not all zero"):
        OutlierSampler(scores, 1)
    if any(scores):
        measured = OutlierSampler(None, 1)
        measured.start([1, 1])
        with pytest.raises(ValueError, match="scores is"):
            measured.probe(Counting(tuple(scores)))


def test_a_threshold_that_nothing_exceeds_is_an_error() -> None:
    measured = OutlierSampler(None, 1, threshold=50.0)
    measured.start([1, 1])
    with pytest.raises(ValueError, match=r"no layer .* exceeds 50 times .*; lower the threshold"):
        measured.probe(Counting((0.0, 0.0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "threshold is 0.0; it must be above 0"),
        ({"calibration_steps": 0}, "calibration_steps is 0; it must be at least 1"),
        ({"num_active_layers": 0}, "num_active_layers is 0"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutlierSampler([1.0], **settings)  # type: ignore[arg-type]


def test_refuses_scores_of_another_model() -> None:
    with pytest.raises(ValueError, match="there are 3 scores for 4 layers"):
        LayerwiseAdamW(make_llama(), OutlierSampler([1.0, 2.0, 3.0], 1))
    measured = LayerwiseAdamW(make_llama(), OutlierSampler(None, 1))
    with pytest.raises(ValueError, match="there are 3 scores for 4 layers"):
        measured.probe(Counting((1.0, 2.0, 3.0)))
