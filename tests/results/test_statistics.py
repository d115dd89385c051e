from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, false_discovery_control, permutation_test
from scipy.stats import t as student
from synthetic import simulated_sweep

from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.statistics import (
    average_interval,
    benjamini_hochberg,
    mcnemar,
    mean_of_shares,
    paired_bootstrap,
    sign_flip,
    two_level,
    wilson_interval,
)


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
    # half a question of forty right over two seeds: between none and one, not an interval that begins at the estimate
    assert wilson_interval(0, 40)[1] < average_interval([0.0125], [40])[1] < wilson_interval(1, 40)[1]
    assert average_interval([0.0125], [40])[0] < 0.005


def test_wilson_as_scipy_does() -> None:
    for successes, n in ((0, 1), (1, 1), (0, 40), (40, 40), (7, 10), (699, 1319)):
        found = binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson_interval(successes, n) == pytest.approx((found.low, found.high), abs=1e-15)
    with pytest.raises(ValueError, match="got 11 of 10"):
        wilson_interval(11, 10)


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


def test_benjamini_hochberg_by_hand_and_as_scipy_does() -> None:
    # sorted .01 .02 .03 .5 times 4/1 4/2 4/3 4/4, then the running minimum from the right
    assert benjamini_hochberg([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.04, 0.5, 0.04, 0.04])
    assert benjamini_hochberg([]) == []
    drawn = np.random.default_rng(0).uniform(size=19).tolist()
    assert benjamini_hochberg(drawn) == pytest.approx(false_discovery_control(drawn).tolist())


def test_sign_flip_is_mcnemar_where_one_task_is_asked_once() -> None:
    for only_first, only_second in ((9, 1), (5, 5), (12, 3), (4, 0), (0, 0)):
        differences = [1.0] * only_first + [-1.0] * only_second + [0.0] * 30
        exact = binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
        assert sign_flip([differences], resamples=20_000) == pytest.approx(exact, abs=0.012)


def test_sign_flip_counts_ties_of_thirds() -> None:
    """Means over three seeds are no exact numbers; a tie that is missed makes the p-value far too small."""
    for size in (1 / 3, 2 / 3, 1 / 7):
        found = sign_flip([[size] * 3 + [0.0] * 97], resamples=20_000)
        assert found == pytest.approx(2 / 2**3, abs=0.012)
    assert sign_flip([[1 / 3, 0.0], [-1 / 3, 0.0]]) == 1.0


def test_sign_flip_as_scipy_does() -> None:
    chance = np.random.default_rng(3)
    differences = [chance.choice([-1, -0.5, 0, 0.5, 1], size=n, p=[0.05, 0.1, 0.6, 0.15, 0.1]) for n in (40, 25)]
    weighted = np.concatenate([task / len(task) for task in differences])  # its sum is twice the mean over tasks
    found = permutation_test(
        (weighted, np.zeros_like(weighted)),
        lambda first, second, axis: np.sum(first - second, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=chance,
    )
    assert sign_flip([task.tolist() for task in differences], resamples=20_000) == pytest.approx(
        found.pvalue, abs=0.015
    )


def test_paired_bootstrap_as_scipy_does() -> None:
    chance = np.random.default_rng(4)
    differences = chance.choice([-1, 0, 1], size=150, p=[0.1, 0.65, 0.25])
    expected = bootstrap((differences,), np.mean, method="percentile", n_resamples=20_000, rng=chance)
    low, high = paired_bootstrap([differences.tolist()], resamples=20_000)
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.008)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.008)


def test_paired_bootstrap_of_several_tasks() -> None:
    # the variance of a mean of two independent means is a quarter of their sum
    one, two = [1.0] * 30 + [-1.0] * 10 + [0.0] * 60, [1.0] * 10 + [-1.0] * 30 + [0.0] * 60
    low, high = paired_bootstrap([one, two], resamples=20_000)
    half_width = 1.96 * np.sqrt((np.var(one) / 100 + np.var(two) / 100) / 4)
    assert (low, high) == pytest.approx((-half_width, half_width), abs=0.006)
    assert paired_bootstrap([[0.0] * 5]) == (0.0, 0.0)


def test_the_same_seed_draws_the_same() -> None:
    differences = [[1.0, 0.0, -1.0, 1.0, 0.5]]
    assert sign_flip(differences) == sign_flip(differences)
    assert paired_bootstrap(differences) == paired_bootstrap(differences)


# ---------------------------------------------------------------------------------------------- whole sweeps, simulated


def called(skills: dict[str, float], *, seeds: int, questions: int, sweeps: int) -> tuple[float, float]:
    """Shares of single comparisons to full, and of whole sweeps, that are called significant at 5 %."""
    single: list[bool] = []
    whole: list[bool] = []
    for draw in range(sweeps):
        (table,) = build_leaderboard(simulated_sweep(skills, questions=questions, seeds=seeds, draw=draw))
        rivals = [row for row in table.rows if row.method != "full"]
        single += [row.to_full.p_value < 0.05 for row in rivals]
        whole.append(any((row.to_full.p_adjusted or 0.0) < 0.05 for row in rivals))
    return float(np.mean(single)), float(np.mean(whole))


@pytest.mark.parametrize(("seeds", "questions"), [(1, 120), (3, 80)])
def test_without_a_difference_significance_is_called_at_the_stated_rate(seeds: int, questions: int) -> None:
    skills = dict.fromkeys(("full", "grass", "lora", "lisa"), 0.0)
    single, whole = called(skills, seeds=seeds, questions=questions, sweeps=100)
    # McNemar's exact test is conservative: at most 5 %, and not far below it
    assert 0.005 < single < 0.08
    assert whole < 0.11


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_known_difference_is_found(seeds: int) -> None:
    single, whole = called({"full": 0.0, "grass": 0.2}, seeds=seeds, questions=300, sweeps=25)
    assert single > 0.9
    assert whole > 0.9


def test_the_interval_of_a_difference_holds_the_truth() -> None:
    inside = []
    for draw in range(120):
        (table,) = build_leaderboard(simulated_sweep({"full": 0.0, "grass": 0.1}, questions=150, seeds=2, draw=draw))
        (row,) = [row for row in table.rows if row.method == "grass"]
        assert row.to_full is not None
        inside.append(row.to_full.low <= 0.1 <= row.to_full.high)
    assert 0.88 < np.mean(inside) <= 1.0


# ------------------------------------------------------------------------------------------- seeds and questions


def seeds_of(chance: np.random.Generator, ease: np.ndarray, seeds: int, shift: float, skill: float = 0.0) -> np.ndarray:
    """Answers of several trainings, seeds by questions; each training is a little better or worse at everything."""
    own = chance.normal(0, shift, size=(seeds, 1)) + chance.normal(0, 0.5, size=(seeds, len(ease)))
    return (ease + skill + own > 0).astype(float)


@pytest.mark.parametrize(
    ("seeds", "shift", "others"), [(2, 0.0, 0.0), (2, 0.1, 0.1), (3, 0.06, 0.06), (3, 0.1, 0.0), (5, 0.1, 0.1)]
)
def test_seeds_of_one_method_are_seldom_called_different(seeds: int, shift: float, others: float) -> None:
    """Shifts of .06 and .1 are 1.5 and 2.5 points; over questions alone a third to a half were called different."""
    chance = np.random.default_rng(seeds)
    called, alone, held = 0, 0, 0
    for _ in range(300):
        ease = chance.normal(0, 1.5, size=1319)
        first, second = (seeds_of(chance, ease, seeds, own) for own in (shift, others))
        low, high, p_value = two_level([(first, second)], vary=(True, True))
        assert (low <= 0 <= high) == (p_value > 0.05), "the interval says what the p-value says"
        called += p_value <= 0.05
        held += low <= 0 <= high
        alone += sign_flip([(first.mean(axis=0) - second.mean(axis=0)).tolist()], resamples=200) <= 0.05
    assert called <= 0.085 * 300  # 5 % and three standard errors
    assert alone >= 0.2 * 300 or not shift
    assert held >= 0.915 * 300


def test_a_true_difference_is_found_over_seeds() -> None:
    chance = np.random.default_rng(1)
    for seeds, shift, wanted in ((2, 0.0, 0.85), (3, 0.06, 0.9), (5, 0.1, 0.95)):
        found = 0
        for _ in range(60):
            ease = chance.normal(0, 1.5, size=1319)
            better = seeds_of(chance, ease, seeds, shift, skill=0.4)  # ten points
            found += two_level([(better, seeds_of(chance, ease, seeds, shift))], vary=(True, True))[2] <= 0.05
        assert found >= wanted * 60, (seeds, shift)


def test_two_level_by_hand() -> None:
    """The variance of three and two seeds' levels, and of a thousand questions without the seeds' disagreement."""
    first = np.array([[1.0] * right + [0.0] * (1000 - right) for right in (500, 540, 520)])
    second = np.array([[1.0] * right + [0.0] * (1000 - right) for right in (400, 430)])
    low, high, p_value = two_level([(first, second)], vary=(True, True))
    variance = 0.02**2 / 3 + (0.03**2 / 2) / 2
    welch = variance**2 / ((0.02**2 / 3) ** 2 / 2 + (0.03**2 / 4) ** 2)
    alike = (1 / 3 + 1 / 2) ** 2 / (1 / (9 * 2) + 1 / (4 * 1))
    degrees = 2 / (1 / welch + 1 / alike)
    own = (first.mean(axis=0) - second.mean(axis=0)).var(ddof=1)
    rest = sum(_rest(side) for side in (first, second))
    questions = (own - rest) / 1000
    total = variance + questions
    spread = student(total**2 / (variance**2 / degrees + questions**2 / 999))
    assert p_value == pytest.approx(
        max(2 * spread.sf(0.105 / total**0.5), sign_flip([(first.mean(0) - second.mean(0)).tolist()]))
    )
    half = spread.ppf(0.975) * total**0.5
    assert (low, high) == pytest.approx((min(0.105 - half, 0 if p_value > 0.05 else 1), 0.105 + half))


def _rest(answers: np.ndarray) -> float:
    rest = answers - answers.mean(0) - answers.mean(1, keepdims=True) + answers.mean()
    return float((rest**2).sum() / ((len(answers) - 1) * 999) / len(answers))


def test_an_untrained_side_has_no_spread_over_trainings() -> None:
    base = np.array([[1.0] * 40 + [0.0] * 60])
    trained = np.array([[1.0] * right + [0.0] * (100 - right) for right in (60, 64, 62)])
    low, high, p_value = two_level([(trained, base)], vary=(True, False))
    assert p_value < 0.01
    assert 0 < low < 0.22 < high
    again = two_level([(trained, np.repeat(base, 3, axis=0))], vary=(True, False))
    assert again == pytest.approx((low, high, p_value)), "asked three times it is the same model"


def test_few_questions_that_differ_decide_nothing_however_alike_seeds_are() -> None:
    first, second = np.zeros((3, 1000)), np.zeros((3, 1000))
    first[:, :4] = 1
    low, high, p_value = two_level([(first, second)], vary=(True, True))
    assert p_value == pytest.approx(2 / 2**4, abs=0.02), "four flips of a coin"
    assert low <= 0 < 0.004 <= high
    assert two_level([(first, first)], vary=(True, True)) == (0.0, 0.0, 1.0)
    one = np.ones((2, 1))
    assert two_level([(one, 0 * one)], vary=(True, True))[2] == 1.0, "one question"


def test_the_seeds_of_tasks_shift_together_in_an_average() -> None:
    """A training that is good at every task makes the average vary more than tasks taken one by one would say."""
    chance = np.random.default_rng(5)
    first = [(chance.random((3, 400)) < np.array([[0.4], [0.5], [0.6]])).astype(float) for _ in range(4)]
    second = [(chance.random((3, 400)) < 0.4).astype(float) for _ in range(4)]
    together = two_level(list(zip(first, second, strict=True)), vary=(True, True))
    apart = [np.roll(task, number, axis=0) for number, task in enumerate(first)]
    shuffled = two_level(list(zip(apart, second, strict=True)), vary=(True, True))
    assert together[1] - together[0] > 1.5 * (shuffled[1] - shuffled[0])


def test_equal_averages_are_equal_in_every_bit() -> None:
    chance = np.random.default_rng(6)
    for _ in range(300):
        counts = chance.integers(0, 25, size=6).tolist()
        shares = [count / 24 for count in counts]
        other = chance.permutation(shares).tolist()
        halves = [mean_of_shares([mean_of_shares(own[:3]), mean_of_shares(own[3:])]) for own in (shares, other)]
        assert halves[0] == halves[1] == mean_of_shares(shares) == sum(counts) / 144
    assert np.isnan(mean_of_shares([]))
    assert np.isnan(mean_of_shares([0.5, float("nan")]))
