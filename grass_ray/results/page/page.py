"""The leaderboard as one self-contained HTML page: it loads nothing, and its one small script only sorts tables.

::

    page = render_page(build_leaderboard(records), records)

The answer first, then ranking, figures, layers drawn, environment, and the command that runs each row again. Templates
(``*.html.j2``) escape every text; every figure comes with its numbers as CSV.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from grass_ray.paths import model_label
from grass_ray.results.column import Column
from grass_ray.results.columns import METHOD, RANK, WORDS, column_of, leaderboard_csv
from grass_ray.results.figures.figure import Figure, Runs, page_colour, page_colours
from grass_ray.results.figures.registry import FIGURES, draw_methods
from grass_ray.results.figures.style import style_of
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
from grass_ray.results.page.answer import findings
from grass_ray.results.page.provenance import environment, run_again
from grass_ray.results.record import RunRecord
from grass_ray.results.table_columns import all_columns, lm_eval_columns, task_columns
from grass_ray.tasks.suites import SUITES

_FIGURE_WIDTH = 4.8  # inches: on a phone, letters stay as large as they are drawn
_MODELS = {"smollm2-135m": "SmolLM2-135M", "tiny": "A tiny random model"}


def render_page(tables: Sequence[LeaderboardTable], records: Sequence[RunRecord] = ()) -> str:
    """The page as HTML text.

    Args:
        tables: what :func:`grass_ray.results.leaderboard.build_leaderboard` made, filtered and sorted or not.
        records: what they were made of; without them there are tables, and neither figures nor commands.
    """
    by_id = {record.run_id: record for record in records}
    known = all(run_id in by_id for table in tables for row in table.rows for run_id in row.run_ids)
    numbering = _Numbering()
    sections = [
        _Section(
            key=f"t{number}",
            table=table,
            records=[by_id[run_id] for row in table.rows for run_id in row.run_ids] if known else [],
            numbering=numbering,
        )
        for number, table in enumerate(tables, start=1)
    ]
    return _render("page.html.j2", title="Leaderboard", lead=_lead(tables), sections=sections)


def render_comparison_page(
    title: str, tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]], notes: Sequence[str]
) -> str:
    """A page with headings and cells of tables, and their notes: two sweeps side by side."""
    lead = "Two sweeps, the same questions."
    return _render("comparison.html.j2", title=title, lead=lead, tables=tables, notes=notes)


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["base64"] = lambda text: base64.b64encode(text.encode("utf-8")).decode("ascii")
    templates.globals |= {
        "colour": lambda method: page_colour(style_of(method).colour),
        "count": _count,
        "environment": environment,
        "findings": findings,
        "leaderboard_csv": leaderboard_csv,
        "page_colours": page_colours,
        "words": WORDS,
    }
    return templates


def _render(template: str, **values: object) -> str:
    return _templates().get_template(template).render(values | {"policy": _policy()})


@cache
def _policy() -> str:
    """What the page may do: nothing but its own style and its one script, whatever slipped into its texts."""
    script = _templates().get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    own = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def _lead(tables: Sequence[LeaderboardTable]) -> str:
    rows = [row for table in tables for row in table.rows]
    if not rows:
        return "No runs yet."
    runs = sum(len(row.run_ids) for row in rows)
    not_ranked = sum(row.rank is None for row in rows)
    dates = sorted(row.date for row in rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    ends = f"; {not_ranked} of them not ranked" if not_ranked else ""
    return f"{_count(runs, 'run')} in {_count(len(rows), 'row')} and {_count(len(tables), 'table')}{ends}; {when}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ----------------------------------------------------------------------------------------------- a table's section


@dataclass(frozen=True)
class _Shown:
    """A figure on the page."""

    heading: str
    caption: str
    svg: str
    csv: str
    file: str


@dataclass
class _Numbering:
    """Numbers the figures of one page."""

    figures: int = 0

    def show(self, figure: Figure, heading: str = "", caption: str = "") -> _Shown:
        self.figures += 1
        return _Shown(
            heading=heading,
            caption=caption or figure.title,
            svg=Markup(figure.inline_svg(f"f{self.figures}")),
            csv=figure.csv(),
            file=f"{figure.name}-{self.figures}.csv",
        )


@dataclass(frozen=True, kw_only=True)
class _Section:
    """What the template shows of one table."""

    key: str
    table: LeaderboardTable
    records: Sequence[RunRecord]
    numbering: _Numbering

    @property
    def heading(self) -> str:
        """Model and suite as one would say them."""
        suite = SUITES[self.table.suite].title.lower() if self.table.suite in SUITES else self.table.suite
        return f"{_MODELS.get(self.table.model, model_label(self.table.model))} on {suite}"

    @property
    def place(self) -> str:
        """The machine, and how answers were scored."""
        return self.table.title.removeprefix(f"{self.table.subject}, ")

    @property
    def columns(self) -> list[Column]:
        """Of the ranking; tasks have tables of their own."""
        apart = {column.name for column in self.by_benchmark[2:]} | set(self.table.tasks)
        return [column for column in all_columns(self.table) if column.name not in apart]

    @property
    def by_benchmark(self) -> list[Column]:
        """Of lm-eval's own tasks; none if there are none."""
        return lm_eval_columns(self.table)

    @property
    def by_task(self) -> list[Column]:
        """Of the accuracies (or losses) by task; none if there is only one task, or no row that has been scored."""
        tasks = task_columns(self.table)
        return [RANK, METHOD, column_of(self.table.metric), *tasks] if tasks and self.scored else []

    @property
    def scored(self) -> list[LeaderboardRow]:
        return [row for row in self.table.rows if row.scored]

    @property
    def benchmarked(self) -> list[LeaderboardRow]:
        """Rows with results of lm-eval's own tasks."""
        return [row for row in self.table.rows if row.lm_eval_tasks]

    @property
    def notes(self) -> list[str]:
        return [note for note in self.table.all_notes if note != self.table.budget]

    @cached_property
    def _runs(self) -> Runs:
        return Runs([self.table], self.records)

    @cached_property
    def figures(self) -> list[_Shown]:
        """Figures of all the table's runs."""
        drawn = [
            (kind, figure)
            for kind in FIGURES.values()
            if self.records and kind.of_sweep and (figure := kind.of_sweep(self._runs, width=_FIGURE_WIDTH))
        ]
        return [self.numbering.show(figure, kind.heading, kind.caption) for kind, figure in drawn]

    @cached_property
    def layers(self) -> dict[str, list[_Shown]]:
        """By row: figures of one run of each method that draws layers."""
        found: dict[str, list[_Shown]] = {}
        kinds = [name for name, kind in FIGURES.items() if self.records and not kind.of_sweep]
        drawn = [pair for kind in kinds for pair in draw_methods(kind, self.table, self._runs, width=_FIGURE_WIDTH)]
        for row, figure in sorted(drawn, key=lambda pair: self.table.rows.index(pair[0])):
            found.setdefault(row.label, []).append(self.numbering.show(figure))
        return found

    @property
    def commands(self) -> list[tuple[LeaderboardRow, str]]:
        """For each row, what runs its seeds again."""
        return [(row, run_again(self._runs.seeds(row))) for row in self.table.rows] if self.records else []
