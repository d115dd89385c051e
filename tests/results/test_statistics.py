from __future__ import annotations

import pytest

from grass_ray.results.statistics import average_interval, benjamini_hochberg, mcnemar, wilson_interval


def test_wilson_by_hand() -> None:
    # centre (p + z2/2n) / (1 + z2/n), half-width z sqrt(p(1-p)/n + z2/4n2) / (1 + z2/n), with z = 1.959964, p = 8/10
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)


def test_half_width_at_the_size_of_gsm8k() -> None:
    low, high = wilson_interval(699, 1319)
    assert (high - low) / 2 == pytest.approx(0.027, abs=0.0005)


def test_interval_of_one_task_is_wilsons() -> None:
    assert average_interval([0.8], [10]) == pytest.approx(wilson_interval(8, 10))


def test_interval_of_an_average() -> None:
    # two tasks alike: each limit's distance from the mean shrinks by the root of two
    low, high = wilson_interval(8, 10)
    expected = (0.8 - (0.8 - low) / 2**0.5, 0.8 + (high - 0.8) / 2**0.5)
    assert average_interval([0.8, 0.8], [10, 10]) == pytest.approx(expected)
    low, high = average_interval([1.0, 1.0], [20, 20])
    assert low < 0.95
    assert high == 1.0


def test_interval_holds_a_mean_over_seeds_that_is_no_count() -> None:
    low, high = average_interval([0.333], [10])
    assert low < 0.333 < high


def test_mcnemar_by_hand() -> None:
    # nine questions only the first answers, one only the second: 2 * (1 + 10) / 2**10
    first = [True] * 9 + [False] + [True] * 5 + [False] * 5
    second = [False] * 9 + [True] + [True] * 5 + [False] * 5
    assert mcnemar(first, second) == pytest.approx(22 / 1024)
    assert mcnemar(second, first) == pytest.approx(22 / 1024)
    assert mcnemar([True, False], [True, False]) == 1.0


def test_mcnemar_refuses_unpaired_answers() -> None:
    with pytest.raises(ValueError, match="longer"):
        mcnemar([True], [True, False])


def test_benjamini_hochberg_by_hand() -> None:
    # sorted .01 .02 .03 .5 times 4/1 4/2 4/3 4/4, then the running minimum from the right
    assert benjamini_hochberg([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.04, 0.5, 0.04, 0.04])
    assert benjamini_hochberg([]) == []
