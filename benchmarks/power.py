"""Whether a planned experiment finds a known difference of loss as often as planned, and nothing where nothing is.

    OMP_NUM_THREADS=1 python benchmarks/power.py

Simulated experiments of two methods whose losses are made of known parts: each question's own loss, how much it suits
one method more than the other, each training's shift, and each training's luck with each question. The size is planned
by grass_ray.results.power: with so many seeds, the fewest questions that shall find 0.02 nats in 80 % of the
experiments. Each is then compared as in a leaderboard (grass_ray.results.paired), once with that difference and once
without any.

In the last rows nobody knows the parts: a pilot of three seeds and 300 questions, another one for each experiment, says
what they are, as the records of a sweep do, and the experiment is planned from that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import recording
import tyro
from numpy.typing import NDArray

from grass_ray.results.paired import Answers, Comparison, TaskAnswers, compare_answers
from grass_ray.results.power import SeedSpread, Spread, questions_needed
from grass_ray.results.statistics import wilson_interval

DIFFERENCE = 0.02
PILOT_SEEDS, PILOT_QUESTIONS, MOST_QUESTIONS = 3, 300, 20_000
Shape = Literal["normal", "skewed"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How many experiments and where to write."""

    experiments: int = 2000
    pilots: int = 500
    output: Path = Path("benchmarks/results/power")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What losses are made of: standard deviations in nats; seeds of each method, tasks, and the shape of the parts."""

    seed_sd: float
    question_sd: float
    interaction_sd: float
    seeds: int
    tasks: int = 1
    shape: Shape = "normal"
    one_sided: bool = False  # the first method alone varies with its seed, with twice the variance
    pilot: bool = False

    @property
    def spread(self) -> Spread:
        """The true parts, as the plan takes them."""
        return Spread(seeds=self.seed_sd**2, questions=self.question_sd**2, disagreement=self.interaction_sd**2)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a case's experiments the share that found the difference, and that called one where there was none.

    ``questions`` is the planned number of each task (the median where each experiment has its own plan), and
    ``covered`` the share of 95 % intervals that hold the true difference. ``unplanned`` experiments had pilots by which
    no number of questions is enough, or more than 20,000; they are left out.
    """

    case: Case
    questions: int
    experiments: int
    found: float
    called: float
    covered: float
    unplanned: int = 0


def run(case: Case, experiments: int, difference: float = DIFFERENCE) -> Outcome:
    """Plan and simulate the experiments of a case."""
    sizes, found, called, covered, unplanned = [], 0, 0, 0, 0
    known = questions_needed(difference, case.spread, seeds=case.seeds, tasks=case.tasks)
    for number in range(experiments):
        chance = np.random.default_rng([number, case.seeds, case.tasks, round(1e4 * case.seed_sd)])
        questions = planned_from_pilot(case, chance, difference) if case.pilot else known
        if questions is None or questions > MOST_QUESTIONS:
            unplanned += 1
            continue
        sizes.append(questions)
        for true in (difference, 0.0):
            comparison, _ = experiment(case, chance, case.seeds, questions, true)
            covered += comparison.low <= true <= comparison.high
            if true:
                found += comparison.p_value < 0.05
            else:
                called += comparison.p_value < 0.05
    planned = len(sizes)
    return Outcome(
        case=case,
        questions=round(median(sizes)),
        experiments=planned,
        found=found / planned,
        called=called / planned,
        covered=covered / planned / 2,
        unplanned=unplanned,
    )


def planned_from_pilot(case: Case, chance: np.random.Generator, difference: float) -> int | None:
    """The questions that a small experiment before says are needed."""
    comparison, seeds = experiment(case, chance, PILOT_SEEDS, PILOT_QUESTIONS, difference)
    spread = seeds.spread([comparison])
    assert spread is not None
    return questions_needed(difference, spread, seeds=case.seeds, tasks=case.tasks)


def experiment(
    case: Case, chance: np.random.Generator, seeds: int, questions: int, difference: float
) -> tuple[Comparison, SeedSpread]:
    """One experiment, compared as a leaderboard does, and the spread of its seeds."""
    widths = (2**0.5 * case.seed_sd, 0.0) if case.one_sided else (case.seed_sd, case.seed_sd)
    shifts = [chance.normal(0, width, size=(seeds, 1)) for width in widths]
    sides: list[dict[str, TaskAnswers]] = [{}, {}]
    names = tuple((str(number), 0) for number in range(questions))
    for task in range(case.tasks):
        own = _part(chance, 1.0, (questions,), case.shape)
        suits = _part(chance, case.question_sd, (questions,), case.shape)
        for side, gain in ((0, suits + difference), (1, 0.0)):
            luck = _part(chance, case.interaction_sd, (seeds, questions), case.shape)
            sides[side][str(task)] = TaskAnswers(names, own + gain + shifts[side] + luck)
    first, second = (Answers(tasks=tasks, trained=True, metric="loss") for tasks in sides)
    comparison, spread = compare_answers(first, second), SeedSpread()
    assert comparison is not None
    for answers in (first, second):
        spread.add(answers)
    return comparison, spread


def _part(chance: np.random.Generator, width: float, size: tuple[int, ...], shape: Shape) -> NDArray[np.float64]:
    """Independent numbers of mean 0; skewed ones are exponential, as losses are that are small but for a few."""
    return chance.normal(0, width, size) if shape == "normal" else width * (chance.exponential(size=size) - 1)


CASES = (
    Case(seed_sd=0.005, question_sd=0.1, interaction_sd=0.15, seeds=3),
    Case(seed_sd=0.005, question_sd=0.1, interaction_sd=0.15, seeds=5),
    Case(seed_sd=0.005, question_sd=0.1, interaction_sd=0.15, seeds=5, shape="skewed"),
    Case(seed_sd=0.005, question_sd=0.1, interaction_sd=0.15, seeds=5, tasks=4),
    Case(seed_sd=0.0, question_sd=0.1, interaction_sd=0.15, seeds=2),
    Case(seed_sd=0.01, question_sd=0.2, interaction_sd=0.1, seeds=8),
    Case(seed_sd=0.01, question_sd=0.2, interaction_sd=0.1, seeds=8, shape="skewed"),
    Case(seed_sd=0.01, question_sd=0.2, interaction_sd=0.1, seeds=8, tasks=4),
    Case(seed_sd=0.01, question_sd=0.2, interaction_sd=0.1, seeds=8, one_sided=True),
    Case(seed_sd=0.01, question_sd=0.2, interaction_sd=0.1, seeds=12),
    Case(seed_sd=0.005, question_sd=0.1, interaction_sd=0.15, seeds=5, pilot=True),
    Case(seed_sd=0.01, question_sd=0.2, interaction_sd=0.1, seeds=12, pilot=True),
)


def main(options: Options) -> None:
    outcomes = []
    for number, case in enumerate(CASES, start=1):
        outcomes.append(run(case, options.pilots if case.pilot else options.experiments))
        print(f"{number} of {len(CASES)}: {outcomes[-1]}", flush=True)
    values = recording.facts(options) | {"difference": DIFFERENCE, "outcomes": outcomes}
    page = describe(outcomes, recording.commit(), str(values["measured_at"])[:10])
    recording.write(options.output, values, page)


def describe(outcomes: list[Outcome], commit: str, date: str) -> str:
    """The table as Markdown."""
    lines = [
        "# Planned experiments find what they were planned for",
        "",
        f"Simulated experiments of two methods whose losses differ by {DIFFERENCE} nats, or by nothing",
        "(benchmarks/power.py). `questions` is the fewest of each task that `grass-ray power` plans for 80 % power at",
        "p .05 with these seeds; `found` is the share of the experiments of that size that found the difference,",
        "`nothing differs` the share that called one where there was none, each with its 95 % interval, and `holds`",
        "the share of 95 % intervals that hold the truth. Spread: standard deviations, in thousandths of a nat, of a",
        "training as a whole / of the difference over questions / of one training at one question. `from pilots`:",
        "planned from what three seeds and 300 questions showed of the spread, each time anew; those by which no size",
        "is enough are counted as not planned. So small a pilot knows the spread over seeds roughly.",
        "",
        f"One thread, commit {commit}, {date}.",
        "",
        "| spread | seeds | tasks | losses | questions | experiments | found | nothing differs | holds |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for outcome in outcomes:
        case, n = outcome.case, outcome.experiments
        spread = " / ".join(f"{1000 * sd:g}" for sd in (case.seed_sd, case.question_sd, case.interaction_sd))
        shape: str = case.shape + (", one method varies" if case.one_sided else "") + (", from pilots" * case.pilot)
        shares = [f"{100 * share:.1f} % ({_limits(share, n)})" for share in (outcome.found, outcome.called)]
        left_out = f" ({outcome.unplanned} not planned)" if outcome.unplanned else ""
        lines.append(
            f"| {spread} | {case.seeds} | {case.tasks} | {shape} | {outcome.questions:,} | {n:,}{left_out} | "
            f"{' | '.join(shares)} | {100 * outcome.covered:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def _limits(share: float, n: int) -> str:
    low, high = wilson_interval(share * n, n)
    return f"{100 * low:.1f}-{100 * high:.1f}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
