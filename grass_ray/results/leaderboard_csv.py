"""Leaderboards as CSV, for the command line and as a file in the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from grass_ray.results.leaderboard import LeaderboardTable


def leaderboard_csv(tables: Sequence[LeaderboardTable]) -> str:
    """One line a row, a column a task."""
    rows = [row.to_dict() for table in tables for row in table.rows]
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    lines: list[dict[str, Any]] = []
    for row in rows:
        line = {key: value for key, value in row.items() if key not in ("tasks", "task_intervals")}
        for key in ("seeds", "run_ids", "contaminated", "data_sha256"):
            line[key] = " ".join(map(str, row[key]))
        for task in tasks:
            low, high = row["task_intervals"].get(task) or (None, None)
            line[f"eval/{task}/accuracy"] = row["tasks"].get(task)
            line |= {f"eval/{task}/accuracy_low": low, f"eval/{task}/accuracy_high": high}
        lines.append(line)
    if not lines:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue().rstrip("\n")
