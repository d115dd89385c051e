"""The command line: ``grass-ray`` and its verbs, each a dataclass in :mod:`grass_ray.commands`.

Exit codes: 0 success, 1 a run failed, 2 bad input (one readable message on stderr), 130 interrupted. Heavy imports
happen when a verb runs, so that help is printed at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from grass_ray.commands.export import Export
from grass_ray.commands.leaderboard import Leaderboard
from grass_ray.commands.ls import Ls
from grass_ray.commands.plan import Plan
from grass_ray.commands.plot import Plot
from grass_ray.commands.runs import Eval, Reproduce, Sweep, SweepFile, Train, train_with_flags
from grass_ray.config import ConfigError
from grass_ray.paths import at_home
from grass_ray.process import leave, prepare_output
from grass_ray.progress import quiet_libraries

Verb = Train | SweepFile | Eval | Leaderboard | Plot | Export | Reproduce | Plan | Ls


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and exit with its code."""
    prepare_output()
    words = sys.argv[1:] if argv is None else argv
    train = train_with_flags(words)
    verbs: Any = train | Sweep | Eval | Leaderboard | Plot | Export | Reproduce | Plan | Ls
    verb, rest = tyro.cli(
        verbs,
        prog="grass-ray",
        description="Fair experiments on memory-efficient LLM fine-tuning (GRASS, arXiv 2604.07808).",
        args=words,
        return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    leave(lambda: _run(at_home(verb), rest))


def _run(verb: Verb, rest: Sequence[str]) -> int:
    if isinstance(verb, SweepFile):
        return verb.run(rest)
    if rest:
        raise ConfigError(f"unknown arguments: {' '.join(rest)}; see grass-ray {type(verb).__name__.lower()} --help")
    return verb.run()
