from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from grass_ray.methods import METHODS
from grass_ray.results.figures.style import STYLES, style_of

# Machado, Oliveira and Fernandes 2009, severity 1: what is left of linear RGB
EYES = {
    "all cones": np.eye(3),
    "no red cones": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green cones": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue cones": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> NDArray[np.float64]:
    channels = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.95047, 1, 1.08883])
    x, y, z = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(first: str, second: str) -> float:
    """WCAG's ratio of luminances."""
    lighter, darker = sorted((float(TO_XYZ[1] @ linear(colour)) for colour in (first, second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_every_method_has_a_style_of_its_own() -> None:
    assert STYLES.keys() <= METHODS.keys(), "a style of a method that is gone"
    assert len({style.colour for style in STYLES.values()}) == len(STYLES)
    assert len({style.on_dark for style in STYLES.values()}) == len(STYLES)
    assert len({style_of(name) for name in METHODS}) == len(METHODS)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("page", ["light", "dark"])
def test_colours_that_come_close_have_other_markers_and_dashes(eyes: str, page: str) -> None:
    seen = {
        name: lab(EYES[eyes] @ linear(style.colour if page == "light" else style.on_dark))
        for name, style in ((name, style_of(name)) for name in METHODS)
    }
    alike = [
        (first, second)
        for first, second in combinations(METHODS, 2)
        if np.linalg.norm(seen[first] - seen[second]) < 10
        and (style_of(first).marker == style_of(second).marker or style_of(first).dash == style_of(second).dash)
    ]
    assert alike == []


def test_colours_stand_out_on_both_papers() -> None:
    assert all(contrast(style.colour, "#ffffff") > 2.2 for style in STYLES.values())
    assert all(contrast(style.on_dark, "#16191d") > 4.5 for style in STYLES.values())


def test_an_unknown_method_keeps_its_style() -> None:
    assert style_of("mine") == style_of("mine")
    assert style_of("mine").colour not in {style.colour for style in STYLES.values()}
