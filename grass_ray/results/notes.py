"""What a reader of a leaderboard must know, one sentence each: budgets, lost rows, tests, contamination.

::

    print(budget_line(table.rows))            # "same budget: ..." or "budgets differ: ..."
    for note in lost_rows([("grass", records_of_its_seeds), ...]): print(note)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from grass_ray.results.formats import nats, number, percent
from grass_ray.results.paired import Comparison, Test, fact
from grass_ray.results.record import RunRecord
from grass_ray.results.rows import LeaderboardRow
from grass_ray.results.searches import searched
from grass_ray.tasks.suites import TASKS
from grass_ray.training.lost_rows import describe_lost_rows

# --------------------------------------------------------------------------------------------------------------- budget

_SAME_TOKENS = 0.01  # batches of other lengths are another shuffle, not another budget


def budget_line(rows: Sequence[LeaderboardRow], records: Sequence[RunRecord] = ()) -> str | None:
    """One sentence on the budgets of the trained rows; None if none was trained.

    Learning rates are those that the table's own runs tried, and searches those among its ``records``; a search outside
    them is not recorded.
    """
    trained = [row for row in rows if row.trained]
    if not trained:
        return None
    parts: list[tuple[bool, str]] = [
        _values(trained, lambda row: f"{row.training_steps:,} steps"),
        _values(trained, lambda row: f"{row.batch_size} rows a step"),
        *_tokens(trained),
        _values(trained, lambda row: _tried(row.learning_rates_tried)),
    ]
    searches = {method: _searched(own) for method, own in searched(records).items()}
    if searches:
        parts.append(_values(trained, lambda row: searches.get(row.method, "no search")))
    if known := [row for row in trained if row.data_sha256]:  # a run that failed early has read none
        same, text = _values(known, lambda row: " and ".join(hashed[:8] for hashed in row.data_sha256))
        parts.append((True, "the same training rows") if same else (False, f"training rows by hash: {text}"))
    if known := [row for row in trained if row.train_rows is not None]:
        same, text = _values(known, lambda row: f"{row.train_rows:,} rows trained on")
        parts += [] if same else [(False, text)]
    equal = [text for same, text in parts if same]
    other = [text for same, text in parts if not same]
    if not other:
        return f"same budget: {', '.join(equal)}"
    return f"budgets differ: {'; '.join(other)}" + (f"; the same: {', '.join(equal)}" if equal else "")


def _searched(records: Sequence[RunRecord]) -> str:
    """How many trials a method's search had, and their most steps; with ASHA most trials take fewer."""
    steps = max(record.config["training"]["steps"] for record in records)
    return f"a search of {len(records)} trials of at most {steps:,} steps"


def _tried(number: int) -> str:
    return f"{number} learning rate{'' if number == 1 else 's'} tried in these runs"


def _values(rows: Sequence[LeaderboardRow], text: Callable[[LeaderboardRow], str]) -> tuple[bool, str]:
    """Whether a property is the same in all rows, and the property, or which rows have which."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.method not in found[text(row)]:
            found[text(row)].append(row.method)
    if len(found) == 1:
        return True, next(iter(found))
    most = max(found, key=lambda value: len(found[value]))
    named = [f"{value} ({_some(methods)})" for value, methods in found.items() if value != most]
    return False, f"{most} (most rows), " + ", ".join(named)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


def _tokens(rows: Sequence[LeaderboardRow]) -> list[tuple[bool, str]]:
    known = [(row.train_tokens, row.label) for row in rows if row.train_tokens is not None]
    if not known:
        return []
    least, most = min(known), max(known)
    if most[0] - least[0] <= _SAME_TOKENS * most[0]:
        return [(True, f"{_count(most[0])} tokens")]
    extremes = f"{_count(least[0])} ({least[1]}) to {_count(most[0])} ({most[1]})"
    return [(False, f"tokens read, those for measuring included: {extremes}")]


def _count(tokens: float) -> str:
    return f"{tokens / 1e6:.2f} M" if tokens >= 1e6 else f"{tokens / 1e3:.1f} k" if tokens >= 1e3 else f"{tokens:.0f}"


# ------------------------------------------------------------------------------------------------------------ lost rows


def lost_rows(groups: Sequence[tuple[str, Sequence[RunRecord]]]) -> list[str]:
    """What was lost, and by which rows; they are not named if it is all that were trained.

    Args:
        groups: each row's label with its runs.
    """
    found: dict[str, list[str]] = {}
    trained = set()
    for label, group in groups:
        for record in group:
            if record.config["training"]["steps"]:
                trained.add(label)
            for text in lost_by(record):
                labels = found.setdefault(text, [])
                if label not in labels:
                    labels.append(label)
    return [text if trained <= set(labels) else f"{', '.join(labels)}: {text}" for text, labels in found.items()]


def lost_by(record: RunRecord) -> list[str]:
    """What one run lost, as the terminal said it, and the test rows that were skipped."""
    train = record.data.get("train")
    data = {**record.data, "train": train if isinstance(train, Mapping) else {}}
    texts = [
        " ".join(line.split()) for line in describe_lost_rows(data, record.config["data"].get("max_length_tokens", 0))
    ]
    for task, score in record.tasks.items():
        if skipped := score.protocol.get("test_rows_skipped"):
            texts.append(f"skipped {skipped} test rows of {task}: they could not be used")
    return texts


# ---------------------------------------------------------------------------------------------------------- comparisons


def scope_notes(found: Iterable[bool | None]) -> list[str]:
    """What ``any seed`` and ``these runs`` mean, one sentence each."""
    covered, notes = set(found), []
    if True in covered:
        notes.append("p for any seed: p-value and interval of the difference cover other seeds and other questions")
    if False in covered:
        notes.append(
            "p for these runs: one seed on a side, so p-value and interval of the difference cover other questions "
            "alone and say nothing of other seeds"
        )
    return notes


_TESTS: dict[Test, str] = {
    "exact McNemar": "exact McNemar",
    "paired sign-flip": "paired sign-flip test of the average over tasks and seeds (McNemar's, generalised)",
    "paired t": "paired t-test over questions",
    "two-level t": "two-level t-test over seeds and questions",
}


def comparison_notes(rows: Sequence[LeaderboardRow]) -> list[str]:
    """How the differences were tested, what they cover and leave open, and which rows trained on test questions."""
    accuracies = [found for row in rows for found in (row.to_full, row.to_best) if found is not None]
    losses = [found for row in rows for found in (row.loss_to_full, row.loss_to_best) if found is not None]
    notes = []
    if accuracies:
        full = any(row.to_full is not None for row in rows)
        against = f"{'against full and ' if full else ''}against the best row, on the same questions"
        notes.append(f"p: {_named(accuracies)} {against}, Benjamini-Hochberg over this table")
    if losses:
        notes.append(f"p loss: {_named(losses)}; its best row is that of the lowest loss")
    benchmarks = [row.lm_eval_to_base for row in rows if row.lm_eval_to_base is not None]
    if benchmarks:
        notes.append(
            f"lm-eval vs base: {_named(benchmarks)} against the untrained model, by example; p-values of single "
            "tasks are adjusted over rows and tasks, and ± beside them is lm-eval's standard error over the examples"
        )
    notes += detectable_notes(rows)
    notes += scope_notes(found.covers_training for found in accuracies + losses + benchmarks)
    if accuracies or losses:
        notes.append("the best row is chosen on these same questions, which flatters it: vs best leans its way")
    notes += _loss_notes(rows)
    if len(texts := sorted({text for row in rows for text in row.forgetting_texts})) > 1:
        notes.append(f"forgot: measured on different texts, which cannot be compared: {', '.join(texts)}")
    notes += _contamination(rows)
    if reused := [f"{row.label} ({', '.join(row.reused_from)})" for row in rows if row.reused_from]:
        notes.append(f"taken over from earlier runs, not run again: {', '.join(reused)}")
    return notes


def detectable_notes(rows: Sequence[LeaderboardRow]) -> list[str]:
    """The smallest differences that the comparisons of trained rows could have seen: one sentence, if any."""
    compared = [row for row in rows if row.trained] or rows
    full = any(row.to_full is not None or row.loss_to_full is not None for row in compared)
    accuracies = [row.to_full if full else row.to_best for row in compared]
    losses = [row.loss_to_full if full else row.loss_to_best for row in compared]
    parts = [
        f"{_range(values, form)} {unit}"
        for found, form, unit in (
            (accuracies, lambda value: number(value, 1, 100), "points of accuracy"),
            (losses, nats, "nats of loss"),
        )
        if (values := [each.detectable for each in found if each is not None and each.detectable is not None])
    ]
    if not parts:
        return []
    whom = "full" if full else "the best row"
    return [
        f"smallest difference to {whom} that this table could have seen (80 % power at p .05, not corrected for many "
        f"comparisons): {', '.join(parts)}"
    ]


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
    least, most = form(min(values)), form(max(values))
    return least if least == most else f"{least} to {most}"


def _named(found: Sequence[Comparison]) -> str:
    return " or ".join(_TESTS[test] for test in sorted({comparison.test for comparison in found}))


def _loss_notes(rows: Sequence[LeaderboardRow]) -> list[str]:
    """What a loss is, and whose cannot be told from the lowest."""
    measured = [row for row in rows if row.loss is not None]
    if not measured:
        return []
    notes = [
        "loss: of the right answer in nats, -log of the right option's share where a task has options, else per token "
        "of the reference answer; lower is better"
    ]
    compared = [row for row in measured if row.loss_to_best is not None]
    alike = [row.label for row in compared if not fact(row.loss_to_best, "told_apart")]
    lowest = [row.label for row in measured if row.is_ranked and row not in compared]
    if alike and lowest:
        notes.append(f"by loss, not told apart from {lowest[0]}, the lowest: {_some(alike)}")
    return notes


def _contamination(rows: Sequence[LeaderboardRow]) -> list[str]:
    """Which rows trained on test questions of which tasks, and their averages without these."""
    found: defaultdict[tuple[str, ...], list[LeaderboardRow]] = defaultdict(list)
    for row in rows:
        if row.contaminated:
            found[tuple(row.contaminated)].append(row)
    trained = [row for row in rows if row.trained and row.tasks]
    notes = []
    for tasks, those in found.items():
        titles = ", ".join(TASKS[task].title for task in tasks)
        who = "" if len(those) == len(trained) else f" of {', '.join(row.label for row in those)}"
        clean = [f"{row.label} {percent(row.accuracy_clean)}" for row in those if row.accuracy_clean is not None]
        without = f"; average without them: {', '.join(clean)}" if clean else ""
        notes.append(f"the training data{who} contains test questions of {titles}{without}")
    return notes
