"""The report: one self-contained page with everything a sweep came to. No network, no assets, one small script.

::

    page = render_page(build_leaderboard(records), records)

Ranking, Pareto figure, tasks, losses, step times, layers drawn, importance, hyperparameters, environment, and the
command that runs each row again. Every text that comes from records is escaped; every picture has its numbers as CSV.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

from grass_ray.results.column import Column
from grass_ray.results.columns import (
    METHOD,
    RANK,
    WORDS,
    all_columns,
    leaderboard_csv,
    result_columns,
    task_columns,
)
from grass_ray.results.figures.breakdown import draw_sensitivity, draw_step_time, draw_tasks
from grass_ray.results.figures.colours import style_of
from grass_ray.results.figures.figure import Picture
from grass_ray.results.figures.run import draw_ages, draw_importance, draw_sampling
from grass_ray.results.figures.sweep import draw_accuracy_memory, draw_loss_comparison
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
from grass_ray.results.page.commands import reproduce_command
from grass_ray.results.page.style import SCRIPT, STYLE
from grass_ray.results.record import RunRecord

_LONG = 25  # rows beyond which a table scrolls in its own box
_FEW = 8
_OF_LAYERS = (draw_sampling, draw_importance, draw_ages)


@dataclass
class _Page:
    """Counts what must be numbered on one page."""

    pictures: int = 0

    def figure(self, picture: Picture | None, caption: str | None = None) -> str:
        """A figure with its caption and its numbers, nothing for no picture."""
        if picture is None:
            return ""
        self.pictures += 1
        svg = picture.inline_svg(f"f{self.pictures}")
        link = _file(picture.csv(), f"{picture.name}-{self.pictures}.csv", "numbers as CSV")
        return (
            f'<figure><div class="box" tabindex="0" role="group" aria-label="{escape(picture.title)}">{svg}</div>'
            f"<figcaption>{escape(caption or picture.title)}. {link}</figcaption></figure>"
        )


def render_page(tables: Sequence[LeaderboardTable], records: Sequence[RunRecord] = ()) -> str:
    """The page as text.

    Args:
        tables: what :func:`grass_ray.results.leaderboard.build_leaderboard` made, filtered and sorted or not.
        records: what they were made of; without them there are tables and no pictures.
    """
    page = _Page()
    shown = {run_id for table in tables for row in table.rows for run_id in row.run_ids}
    by_id = {record.run_id: record for record in records}
    known = shown <= by_id.keys()
    keys = [f"t{number}" for number in range(1, len(tables) + 1)]
    parts = [_head("Leaderboard", _lead(tables)), '<nav aria-label="Contents"><ul>']
    parts += [
        f'<li><a href="#{key}">{escape(f"{table.model} on {table.suite}, {table.hardware}")}</a></li>'
        for key, table in zip(keys, tables, strict=True)
    ]
    parts.append('</ul></nav></header><main id="main">')
    if not tables:
        parts.append("<p>no runs yet</p>")
    for key, table in zip(keys, tables, strict=True):
        parts.append(f'<section id="{key}" aria-labelledby="{key}-title">')
        parts.append(f'<h2 id="{key}-title">{escape(table.title)}</h2>')
        parts += _ranking(table)
        if known:
            parts += _pictures(page, table, [by_id[run_id] for row in table.rows for run_id in row.run_ids])
            parts += _environment([by_id[run_id] for row in table.rows for run_id in row.run_ids])
            parts += _commands(table, by_id)
        parts.append("</section>")
    return "\n".join([*parts, _foot()])


def render_comparison_page(
    title: str, header: Sequence[str], cells: Sequence[Sequence[str]], notes: Sequence[str]
) -> str:
    """A page with one table and its notes: two sweeps side by side."""
    parts = [_head(title, "Two sweeps, the same questions."), '</header><main id="main">']
    parts.append(f'<div class="box" tabindex="0" role="group" aria-label="{escape(title)}"><table>')
    parts.append(f"<caption>{escape(title)}</caption><thead><tr>")
    parts += [f'<th scope="col"{_word(name)}>{escape(name)}</th>' for name in header]
    parts.append("</tr></thead><tbody>")
    for first, *others in cells:
        row = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        parts.append(f'<tr><th scope="row">{escape(first)}</th>{row}</tr>')
    parts.append("</tbody></table></div>")
    return "\n".join([*parts, *_list(notes), _foot()])


# ------------------------------------------------------------------------------------------------------------- frame


def _head(title: str, lead: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        '<a class="skip" href="#main">Skip to the results</a>'
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
    )


def _foot() -> str:
    return (
        "</main><footer><p>Made by <code>grass-ray leaderboard --format html</code> from run records alone. "
        "Everything is in this file: it loads nothing.</p></footer>"
        f"<script>{SCRIPT}</script></body></html>"
    )


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


def _file(text: str, name: str, label: str, kind: str = "text/csv") -> str:
    data = base64.b64encode(text.encode("utf-8")).decode("ascii")
    return f'<a download="{escape(name)}" href="data:{kind};base64,{data}">{escape(label)}</a>'


def _list(lines: Sequence[str]) -> list[str]:
    return ['<ul class="notes">', *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"] if lines else []


def _word(name: str) -> str:
    return ' class="word"' if name in WORDS else ""


# ----------------------------------------------------------------------------------------------------------- ranking


def _ranking(table: LeaderboardTable) -> list[str]:
    columns = [column for column in all_columns(table) if column.name not in table.tasks]
    parts = [f'<p class="budget">{escape(table.budget)}</p>'] if table.budget else []
    parts += _table(table.rows, columns, f"Ranking of {_count(len(table.rows), 'row')}")
    ended = _list(table.reasons)
    if ended:
        parts.append("<h3>Not ranked</h3>")
        parts += ended if len(ended) <= _FEW + 2 else _details(f"{len(ended) - 2} reasons", ended, opened=True)
    parts += _list([note for note in table.all_notes if note != table.budget])
    meanings = [f"<dt>{escape(column.name)}</dt><dd>{escape(column.meaning)}</dd>" for column in columns]
    parts += _details("What the columns mean", ["<dl>", *meanings, "</dl>"])
    parts.append(f'<p class="files">{_file(leaderboard_csv([table]), "leaderboard.csv", "All figures as CSV")}</p>')
    if (tasks := task_columns(table)) and any(row.tasks for row in table.rows):
        parts.append("<h3>Accuracy by task</h3>")
        accuracy = next(column for column in result_columns(table) if column.name == "acc. %")
        scored = [row for row in table.rows if row.tasks]
        parts += _table(scored, [RANK, METHOD, accuracy, *tasks], "Accuracy (%) by task, 95 % intervals")
    return parts


def _table(rows: Sequence[LeaderboardRow], columns: Sequence[Column], caption: str) -> list[str]:
    """A table that scrolls in its own box, sorts when scripts run, and reads aloud."""
    long = " long" if len(rows) > _LONG else ""
    parts = [f'<div><div class="box{long}" tabindex="0" role="group" aria-label="{escape(caption)}">']
    parts.append(f'<table class="sortable"><caption>{escape(caption)}</caption><thead><tr>')
    parts += [
        f'<th scope="col"{_word(column.name)} title="{escape(column.meaning)}">{escape(column.name)}</th>'
        for column in columns
    ]
    parts.append("</tr></thead><tbody>")
    for row in rows:
        kind = "unranked" if row.rank is None else "pareto" if row.pareto else "ranked"
        cells = "".join(_table_cell(column, row, column.cell_with_interval(row)) for column in columns)
        parts.append(f'<tr class="{kind}">{cells}</tr>')
    parts.append('</tbody></table></div><p class="note" aria-live="polite"></p></div>')
    return parts


def _table_cell(column: Column, row: LeaderboardRow, text: str) -> str:
    value = column.value(row)
    key = "" if value is None else f' data-value="{escape(str(value))}"'
    key += " data-text" if isinstance(value, str) else ""
    if column.name == METHOD.name:
        chip = f'<span class="chip" aria-hidden="true" style="background:{_page_colour(row.method)}"></span>'
        return f'<th scope="row"{key}>{chip}{escape(text)}</th>'
    return f"<td{_word(column.name)}{key}>{escape(text)}</td>"


def _page_colour(method: str) -> str:
    return f"var(--c{style_of(method).colour.removeprefix('#')})"


def _details(summary: str, inside: Sequence[str], *, opened: bool = False) -> list[str]:
    return [f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>", *inside, "</details>"]


# ---------------------------------------------------------------------------------------------------------- pictures


def _pictures(page: _Page, table: LeaderboardTable, records: Sequence[RunRecord]) -> list[str]:
    parts = []
    sections: list[tuple[str, Picture | None, str]] = [
        (
            "Accuracy and memory",
            draw_accuracy_memory([table]),
            "Accuracy over peak allocated memory with 95 % intervals; ringed: on the Pareto front",
        ),
        (
            "Loss",
            draw_loss_comparison([table], records),
            "Training loss against step and against training time, the highest row of each method; "
            "bands: from the lowest to the highest seed",
        ),
        (
            "Step time",
            draw_step_time([table], records),
            "Where training time goes, and how long a step takes; one run of the highest row of each method. "
            "Dots: medians; hollow: steps that end in a switch; lines: the middle 90 % of steps",
        ),
        (
            "Hyperparameters",
            draw_sensitivity([table], records),
            "Accuracy over each setting that differs between rows of a method, with 95 % intervals",
        ),
    ]
    if task_columns(table):
        caption = "Accuracy by task with Wilson intervals, the highest row of each method"
        sections.insert(1, ("Tasks", draw_tasks([table]), caption))
    for title, picture, caption in sections:
        if picture is not None:
            parts += [f"<h3>{title}</h3>", page.figure(picture, caption)]
    return parts + _layers(page, table, records)


def _layers(page: _Page, table: LeaderboardTable, records: Sequence[RunRecord]) -> list[str]:
    """Sampling, importance and its age, of one run of each method that draws layers; the first ones open."""
    by_id = {record.run_id: record for record in records}
    parts: list[str] = []
    done: set[str] = set()
    for row in table.rows:
        pictures = []
        for record in (by_id[run_id] for run_id in row.run_ids if row.method not in done):
            pictures = [picture for draw in _OF_LAYERS if (picture := draw(record)) is not None]
            if pictures:
                break
        if pictures:
            done.add(row.method)
            figures = "".join(page.figure(picture) for picture in pictures)
            parts += _details(row.label, [f'<div class="pair">{figures}</div>'], opened=len(done) <= 2)
    return ["<h3>Layers drawn, and what was measured of them</h3>", *parts] if parts else []


# ------------------------------------------------------------------------------------------- environment and commands


def _environment(records: Sequence[RunRecord]) -> list[str]:
    """Hardware, versions, data and models of all runs; where they differ, each value with its number of runs."""

    def values(of: Callable[[RunRecord], object]) -> str:
        found: dict[str, int] = {}
        for record in records:
            text = str(of(record))
            found[text] = found.get(text, 0) + 1
        if len(found) == 1:
            return next(iter(found))
        shown = [f"{text} ({_count(number, 'run')})" for text, number in list(found.items())[:_FEW]]
        return "; ".join(shown) + (f"; and {len(found) - _FEW} others" if len(found) > _FEW else "")

    packages = list(dict.fromkeys(package for record in records for package in record.versions))
    rows = [
        ("hardware", values(lambda record: record.hardware)),
        ("workers", values(lambda record: record.world_size)),
        ("threads", values(lambda record: record.threads or "not recorded")),
        ("model", values(_model)),
        ("training data", values(_data)),
        ("commit", values(_commit)),
        ("sweeps", values(lambda record: f"{record.sweep} {record.sweep_id}")),
        *((package, values(partial(_version, package))) for package in packages),
    ]
    inside = [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows]
    return ["<h3>Environment</h3>", "<dl>", *inside, "</dl>"]


def _version(package: str, record: RunRecord) -> str:
    return record.versions.get(package, "absent")


def _model(record: RunRecord) -> str:
    config = record.config["model"]
    revision = f", revision {record.model_revision}" if record.model_revision else ""
    hashed = record.model_sha256
    return f"{config['name']}, {config.get('dtype', '-')}{revision}" + (f", sha256 {hashed[:16]}" if hashed else "")


def _data(record: RunRecord) -> str:
    found = record.data.get("train")
    if not isinstance(found, dict):
        return "not recorded" if record.config["training"]["steps"] else "none"
    if not record.config["training"]["steps"]:
        return "none"
    return (
        f"{found.get('description', '-')}; {found.get('rows', '-')} rows, sha256 {str(found.get('rows_sha256'))[:16]}"
    )


def _commit(record: RunRecord) -> str:
    if record.git_commit is None:
        return "not recorded"
    return record.git_commit + (" with uncommitted changes" if record.git_dirty else "")


def _commands(table: LeaderboardTable, by_id: dict[str, RunRecord]) -> list[str]:
    """For each row, what runs its seeds again."""
    rows = []
    for row in table.rows:
        lines = []
        for record in (by_id[run_id] for run_id in row.run_ids):
            command = reproduce_command(record.config)
            lines.append(command or f"# {record.name}: this version of grass_ray cannot read its configuration")
        commits = {record.git_commit for record in (by_id[run_id] for run_id in row.run_ids)} - {None}
        head = [f"git checkout {commit}" for commit in sorted(str(commit) for commit in commits)]
        text = "\n".join([*head, *lines])
        rows += _details(row.label, [f"<pre><code>{escape(text)}</code></pre>"])
    again = (
        "A line a seed, and the commit it ran at; DATA is your folder with the files whose hashes the records hold. "
        "With the records at hand, grass-ray reproduce RUN does the same and says whether the numbers agree."
    )
    parts = ["<h3>Run it again</h3>", f'<p class="note">{escape(again)}</p>']
    return parts + (rows if len(table.rows) <= _LONG else _details(f"Commands of {len(table.rows)} rows", rows))
