"""OWS (Findings of ACL 2025, "Outlier-weighed layerwise sampling"): layers drawn by their share of outliers.

A weight's saliency is ``|W_ij| * ||X_j||``, the weight times the norm of the input it meets over a calibration batch; a
layer's score is the share of its saliencies above ``threshold`` times their mean. The scores decide fixed
probabilities; they are computed for any model, never taken from a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grass_ray.layerwise.drawing import draw_without_replacement
from grass_ray.layerwise.periodic import PeriodicSampler
from grass_ray.layerwise.sampler import Measure, age_since, require
from grass_ray.layerwise.schedules import Scheduled


class OutlierSampler(PeriodicSampler):
    """OWS: ``num_active_layers`` layers drawn in proportion to fixed outlier scores, every ``period`` steps.

    Args:
        scores: outlier score of each layer (:func:`outlier_scores`); None measures them before the first step,
            through ``optimizer.probe``.
        num_active_layers: layers that train at a time.
        period: optimizer steps between draws.
        threshold: M, how many times the mean an outlier exceeds.
        calibration_steps: training steps whose batches calibrate, when the scores are measured.
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range, or the scores are not all positive numbers.
    """

    def __init__(
        self,
        scores: Sequence[float] | None = None,
        num_active_layers: Scheduled = 5,
        period: Scheduled = 50,
        *,
        threshold: float = 13.0,
        calibration_steps: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(num_active_layers, period, seed=seed)
        require(threshold > 0, "threshold", threshold, "above 0")
        require(calibration_steps >= 1, "calibration_steps", calibration_steps, "at least 1")
        self.threshold = threshold
        self.calibration_steps = calibration_steps
        self._given: tuple[float, ...] = () if scores is None else self._usable(scores)
        self._scores = self._given
        self._measured_at: int | None = None

    @staticmethod
    def _usable(scores: Sequence[float]) -> tuple[float, ...]:
        usable = all(math.isfinite(score) and score >= 0 for score in scores) and any(scores)
        require(usable, "scores", list(scores), "finite, not negative, and not all zero")
        return tuple(float(score) for score in scores)

    @property
    def due(self) -> bool:
        """Whether there are scores and a period has ended (or nothing was drawn yet)."""
        return bool(self._scores) and super().due

    @property
    def refreshes(self) -> int:
        """1 as soon as there are scores."""
        return int(bool(self._scores))

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with units of ``sizes`` parameters. Raises ValueError when they are not as many as the scores."""
        super().start(sizes, total)
        _check_count(self._given, len(sizes))
        self._scores = self._given
        self._measured_at = None

    def probe(self, measure: Measure) -> None:
        """Measure the scores, once. Raises ValueError when no layer has an outlier."""
        if self._scores:
            return
        scores = measure.outlier_scores(self.threshold, self.calibration_steps)
        if not any(scores):
            raise ValueError(
                f"no layer has a weight whose saliency exceeds {self.threshold:g} times the layer's mean, so outliers "
                "cannot tell the layers apart; lower the threshold"
            )
        _check_count(scores, self._num_units)
        self._scores = self._usable(scores)
        self._measured_at = self._steps

    def probabilities(self) -> tuple[float, ...] | None:
        """Score over the sum of scores; None before there are scores."""
        total = sum(self._scores)
        return tuple(score / total for score in self._scores) or None

    def importance(self) -> tuple[float, ...] | None:
        """The scores; None before there are any."""
        return self._scores or None

    def ages(self) -> tuple[float, ...] | None:
        """Steps since the scores were measured, NaN for scores that were given; None before there are any."""
        return age_since([self._measured_at] * len(self._scores), self._steps) or None

    def pick(self) -> tuple[int, ...]:
        """A draw without replacement in proportion to the scores."""
        # a layer without outliers is drawn only when the others do not suffice
        log_p = torch.tensor(self._scores, dtype=torch.float64).clamp_(min=1e-300).log()
        return draw_without_replacement(log_p, self.now_active, self.seed, self._draws)

    def state_dict(self) -> dict[str, Any]:
        """Clock, draw index and scores."""
        return super().state_dict() | {"scores": list(self._scores), "measured_at": self._measured_at}

    def _upgraded(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"measured_at": None} | dict(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        _check_count(state["scores"], self._num_units)
        self._scores = self._usable(state["scores"]) if state["scores"] else ()
        self._measured_at = state["measured_at"]


def _check_count(scores: Sequence[float], units: int) -> None:
    if scores and len(scores) != units:
        raise ValueError(f"there are {len(scores)} scores for {units} layers; give one a layer")


@torch.no_grad()
def outlier_scores(
    layers: Sequence[nn.Module], forward: Callable[[], None], threshold: float = 13.0
) -> tuple[float, ...]:
    """Outlier score of each layer from the activations of a calibration batch.

    Args:
        layers: the decoder layers, in order.
        forward: runs the model on the calibration batch (no gradient is taken).
        threshold: M, how many times the layer's mean saliency an outlier exceeds.

    Returns:
        For each layer the share, in percent, of its linear weights whose saliency exceeds M times the layer's mean.

    Raises:
        ValueError: a layer has no linear weight that ``forward`` reached.
    """
    squares: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].detach().float().flatten(0, -2)
        squares[module] = squares.get(module, torch.zeros((), device=flat.device)) + flat.square().sum(0)

    linears = [[m for m in layer.modules() if _input_weight(m) is not None] for layer in layers]
    handles = [m.register_forward_pre_hook(note) for modules in linears for m in modules]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    scores = []
    for index, modules in enumerate(linears):
        seen = [m for m in modules if m in squares]
        if not seen:
            raise ValueError(f"layer {index} has no linear weight that the calibration batch reached")
        saliencies = [_saliency(m, squares[m]) for m in seen]
        count = sum(s.numel() for s in saliencies)
        mean = sum(float(s.double().sum()) for s in saliencies) / count
        outliers = sum(int((s > threshold * mean).sum()) for s in saliencies)
        scores.append(100 * outliers / count)
    return tuple(scores)


def _input_weight(module: nn.Module) -> Tensor | None:
    """A linear module's weight as (outputs, inputs); None for other modules. GPT-2's Conv1D stores the transpose."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.weight
    if type(module).__name__ == "Conv1D" and weight is not None:
        transposed: Tensor = weight.T
        return transposed
    return None


def _saliency(module: nn.Module, squares: Tensor) -> Tensor:
    weight = _input_weight(module)
    assert weight is not None
    if hasattr(weight, "full_tensor"):  # sharded by FSDP2: every worker measures the same layers at the same time
        weight = weight.full_tensor()
    return weight.detach().float().abs() * squares.sqrt()
