"""How often a leaderboard calls two methods different: where they are not (level), and where they are (power).

    python benchmarks/training_variance.py

Simulated tables of two rows. A question is answered right where its ease, the method's skill, this training's shift and
this training's own luck with the question add up above nought. ``spread`` is the standard deviation of a training's
accuracy that its shift alone makes; the observed ± over seeds is larger, by the luck. Ease is such that accuracies are
near one half. The p-values are the leaderboard's own (grass_ray.results.paired), and beside them those of a test over
questions alone, which knows nothing of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import recording
import tyro
from numpy.typing import NDArray
from scipy.stats import norm

from grass_ray.results.paired import Answers, TaskAnswers, compare_answers
from grass_ray.results.statistics import sign_flip

EASE, LUCK = 1.5, 0.5
OWN_SKILL = 0.3  # how much a question may suit one method more than the other, in the rows with a difference
SEEDS = ((1, 1), (2, 2), (3, 3), (5, 5), (2, 3), (2, 5))
SPREADS = (0.0, 1.5, 2.7)
QUESTIONS = (1319, 10_000)
DIFFERENCES = (0.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How many tables and where to write."""

    tables: int = 400
    output: Path = Path("benchmarks/results/training_variance")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of table: seeds and spread (in points) of both rows, questions, true difference in points."""

    seeds: tuple[int, int]
    spreads: tuple[float, float]
    questions: int
    difference: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a case's tables the share called different at .05, and whose 95 % interval holds the true difference."""

    case: Case
    called: float
    called_by_questions_alone: float
    covered: float


def simulate(case: Case, tables: int) -> Outcome:
    """Draw tables and compare their rows."""
    chance = np.random.default_rng(
        [*case.seeds, round(1000 * sum(case.spreads)), case.questions, round(case.difference)]
    )
    latent = np.hypot(EASE, LUCK)
    points = norm.pdf(0, scale=latent) * 100  # of accuracy, for one unit
    called = alone = covered = 0
    for _ in range(tables):
        ease = chance.normal(0, EASE, size=case.questions)
        own = chance.normal(0, OWN_SKILL, size=case.questions) if case.difference else 0.0
        skill = latent * norm.ppf(0.5 + case.difference / 100)
        first = _answers(chance, ease + skill + own, case.seeds[0], case.spreads[0] / points)
        second = _answers(chance, ease, case.seeds[1], case.spreads[1] / points)
        found = compare_answers(_row(first), _row(second))
        assert found is not None
        called += found.p_value <= 0.05
        covered += found.low <= case.difference / 100 <= found.high
        alone += sign_flip([(first.mean(axis=0) - second.mean(axis=0)).tolist()]) <= 0.05
    return Outcome(
        case=case, called=called / tables, called_by_questions_alone=alone / tables, covered=covered / tables
    )


def _answers(chance: np.random.Generator, skill: NDArray[np.float64], seeds: int, shift: float) -> NDArray[np.float64]:
    luck = chance.normal(0, LUCK, size=(seeds, len(skill)))
    return (skill + luck + chance.normal(0, shift, size=(seeds, 1)) > 0).astype(float)


def _row(correct: NDArray[np.float64]) -> Answers:
    questions = tuple((str(number), 0) for number in range(correct.shape[1]))
    return Answers(tasks={"task": TaskAnswers(questions, correct)}, trained=True)


def main(options: Options) -> None:
    cases = [
        Case(seeds=seeds, spreads=(spread, spread), questions=questions, difference=difference)
        for seeds in SEEDS
        for questions in QUESTIONS
        for spread in SPREADS
        for difference in (DIFFERENCES if seeds[0] == seeds[1] else (0.0,))
    ]
    cases += [
        Case(seeds=seeds, spreads=spreads, questions=1319, difference=0.0)
        for seeds in ((2, 2), (3, 3), (5, 5), (2, 5))
        for spreads in ((0.0, 2.7), (2.7, 0.0))
    ]
    outcomes = []
    for number, case in enumerate(cases, start=1):
        outcomes.append(simulate(case, options.tables))
        print(f"{number} of {len(cases)}: {outcomes[-1]}", flush=True)
    values = recording.facts(options) | {"outcomes": outcomes}
    recording.write(options.output, values, describe(outcomes, options.tables))


def describe(outcomes: list[Outcome], tables: int) -> str:
    """The tables as Markdown."""
    power = {(o.case.seeds, o.case.spreads, o.case.questions, o.case.difference): o for o in outcomes}
    lines = [
        "# Level and power of a leaderboard's p-values",
        "",
        f"{tables} simulated tables of two rows each (benchmarks/training_variance.py): how many are called different",
        "at p <= .05. `nothing differs` should be at most 5 %; the next column is what a test over questions alone,",
        "which does not know that trainings differ, calls different there; `holds 0` is the 95 % interval; the last",
        f"three have a true difference of so many points. Error: up to {50 / tables**0.5:.1f} points. With one",
        "seed a side the p-value is that of McNemar's exact test, and its row says that it is for these runs alone.",
        "",
        "| seeds | spread, points | questions | nothing differs | questions alone | holds 0 | 2.5 | 5 | 10 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for outcome in outcomes:
        case = outcome.case
        if case.difference:
            continue
        spread = " and ".join(f"{value:g}" for value in dict.fromkeys(case.spreads))
        found = [power.get((case.seeds, case.spreads, case.questions, difference)) for difference in DIFFERENCES[1:]]
        shares = [outcome.called, outcome.called_by_questions_alone, outcome.covered]
        cells = [f"{100 * share:.1f} %" for share in shares]
        cells += ["-" if other is None else f"{100 * other.called:.0f} %" for other in found]
        seeds = f"{case.seeds[0]} vs {case.seeds[1]}"
        lines.append(f"| {seeds} | {spread} | {case.questions:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options))
