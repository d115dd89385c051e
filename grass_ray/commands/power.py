"""``grass-ray power``: which differences a table could have seen, and what would see a given one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from grass_ray.commands.flags import RunFilters
from grass_ray.config import ConfigError

if TYPE_CHECKING:
    from grass_ray.results.power import Spread
    from grass_ray.results.power_report import PowerReport, Wish


@dataclass(frozen=True, kw_only=True)
class Power:
    """Say which differences between methods a leaderboard could have seen, and which seeds and questions would.

    For example:
      grass-ray power --experiment quickstart
      grass-ray power --experiment quickstart --metric loss --difference 0.02
      grass-ray power --question-sd 0.3 --seed-sd 0.01 --num-questions 300 --difference 0.02
    """

    runs: RunFilters
    metric: Literal["accuracy", "loss", "lm_eval"] | None = None
    """What differs. Defaults to all that were measured; of figures given by hand to loss."""
    difference: float | None = None
    """Difference to be seen: of accuracy as a share (0.02: two points), of loss in nats."""
    num_seeds: Annotated[tuple[int, ...], arg(metavar="N ...")] = (2, 3, 5, 8, 12, 20)
    """Numbers of seeds a row to plan with."""
    num_questions: int | None = None
    """Number of questions a task to plan with. Defaults to that of the table."""
    power: float = 0.8
    """Share of such experiments that shall find the difference."""
    level: float = 0.05
    """Level of the two-sided test."""
    seed_sd: float | None = None
    """Standard deviation of a training's average over seeds, in place of that of the records."""
    question_sd: float | None = None
    """Standard deviation over questions of the difference between two methods. With it no runs are read: all figures
    are those given by hand, of one task."""
    interaction_sd: float | None = None
    """Standard deviation of one training's value for one question, beyond what the two explain by themselves."""
    format: Literal["table", "markdown", "json"] = "table"
    """Output format."""

    def run(self) -> int:
        """Print the report and return the exit code."""
        import shutil

        from grass_ray.results.power_report import Wish, render_power

        self._check()
        wish = Wish(
            difference=self.difference,
            seeds=self.num_seeds,
            questions=self.num_questions,
            power=self.power,
            level=self.level,
        )
        found = self._of_records(wish) if self.question_sd is None else self._by_hand(wish, self.question_sd)
        print(render_power(found, self.format, width=max(100, shutil.get_terminal_size().columns)))
        return 0

    def _check(self) -> None:
        mistakes = [
            f"--{name.replace('_', '-')} {value:g}: it must be above 0"
            for name in ("difference", "seed_sd", "question_sd", "interaction_sd")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        mistakes += [
            f"--{name} {value:g}: it must be between 0 and 1"
            for name, value in (("power", self.power), ("level", self.level))
            if not 0 < value < 1
        ]
        if self.power <= self.level:
            mistakes.append(f"--power {self.power:g} must be above --level {self.level:g}")
        if not self.num_seeds or min(self.num_seeds) < 2:
            mistakes.append("--num-seeds: with less than two seeds a row nothing is known of other trainings")
        if self.num_questions is not None and self.num_questions < 2:
            mistakes.append(f"--num-questions {self.num_questions}: it must be at least 2")
        if self.question_sd is not None and self.difference is None and self.num_questions is None:
            mistakes.append("figures given by hand need --difference, --num-questions, or both")
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    def _by_hand(self, wish: Wish, question_sd: float) -> list[PowerReport]:
        from grass_ray.results.power import Spread
        from grass_ray.results.power_report import plan

        spread = self._given(Spread(seeds=None, questions=question_sd**2))
        return [plan("figures given by hand", self.metric or "loss", spread, 1, None, wish)]

    def _of_records(self, wish: Wish) -> list[PowerReport]:
        from grass_ray.results.leaderboard import build_leaderboard
        from grass_ray.results.paired import METRICS
        from grass_ray.results.power_report import reports

        selection = self.runs.selection()
        records = selection.records(self.runs.load(series=False))
        metrics = METRICS if self.metric is None else (self.metric,)
        tables = selection.tables(build_leaderboard(records))
        return [report for table in tables for report in reports(table, metrics, wish, given=self._given)]

    def _given(self, spread: Spread) -> Spread:
        """The spread with what was given by hand in its place."""
        if self.seed_sd is not None:
            spread = replace(spread, seeds=self.seed_sd**2)
        if self.interaction_sd is not None:
            spread = replace(spread, disagreement=self.interaction_sd**2)
        return spread
