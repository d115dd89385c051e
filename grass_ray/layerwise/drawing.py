"""Draws without replacement, keyed by (seed, draw): the same on every worker and after a resume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grass_ray.layerwise.generators import keyed_generator


def draw_without_replacement(log_p: Tensor, count: int, seed: int, draw: int) -> tuple[int, ...]:
    """Draw ``count`` distinct indices one after another, each in proportion to the probabilities of those left.

    Adding Gumbel noise to log-probabilities and taking the largest has the same distribution as drawing in sequence,
    and stays exact where a probability is too small for a float.

    Args:
        log_p: float64 log-probabilities, shape (L,).
        count: how many to draw, at most L.
        seed: of the generator.
        draw: index of this draw; (seed, draw) determines the result.

    Returns:
        Ascending indices.
    """
    return tuple(sorted(random_order(log_p, seed, draw)[:count]))


def random_order(log_p: Tensor, seed: int, draw: int) -> list[int]:
    """All indices in the order in which :func:`draw_without_replacement` finds them."""
    uniform = torch.rand(len(log_p), dtype=torch.float64, generator=keyed_generator("draw", seed, draw)).clamp_(
        min=1e-300
    )
    order: list[int] = torch.topk(log_p - (-uniform.log()).log(), len(log_p)).indices.tolist()
    return order


def heaviest_sets(weights: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """The heaviest set of ``count`` units, and the heaviest one with unit 0 if that is lighter.

    Among equally heavy units the highest are taken: their gradients exist first, while most activations still do.
    """
    by_weight = sorted(range(len(weights)), key=lambda unit: (weights[unit], unit), reverse=True)
    with_first = (0, *[unit for unit in by_weight if unit][: count - 1])
    return distinct_sets(weights, with_first, by_weight[:count])


def distinct_sets(weights: Sequence[int], with_first: Sequence[int], heaviest: Sequence[int]) -> list[tuple[int, ...]]:
    """Both sets in ascending order, or only the first one if the second is no heavier."""
    first, second = tuple(sorted(with_first)), tuple(sorted(heaviest))
    more = sum(weights[unit] for unit in second) > sum(weights[unit] for unit in first)
    return [first, second] if more else [first]
