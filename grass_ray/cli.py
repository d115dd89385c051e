"""The command line: ``grass-ray`` and its verbs, each a dataclass in :mod:`grass_ray.commands`.

Exit codes: 0 success, 1 a run failed, 2 bad input (one readable message on stderr), 130 interrupted. Heavy imports
happen when a verb runs, so that help is printed at once.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, Union

import tyro

from grass_ray.commands.chat import Chat
from grass_ray.commands.check_method import CheckMethod
from grass_ray.commands.doctor import Doctor
from grass_ray.commands.export import Export
from grass_ray.commands.leaderboard import Leaderboard
from grass_ray.commands.ls import Ls
from grass_ray.commands.plan import Plan
from grass_ray.commands.plot import Plot
from grass_ray.commands.power import Power
from grass_ray.commands.runs import Eval, Reproduce, SweepFile, Train, train_with_flags
from grass_ray.commands.sync import Sync
from grass_ray.commands.ui import Ui
from grass_ray.commands.verify import Verify
from grass_ray.config import ConfigError
from grass_ray.paths import at_home
from grass_ray.process import leave, prepare_output
from grass_ray.progress import quiet_libraries
from grass_ray.reading import is_plain

VERBS: Mapping[str, type] = {
    "train": Train,
    "sweep": SweepFile,
    "eval": Eval,
    "leaderboard": Leaderboard,
    "power": Power,
    "plot": Plot,
    "ui": Ui,
    "sync": Sync,
    "export": Export,
    "chat": Chat,
    "reproduce": Reproduce,
    "verify": Verify,
    "plan": Plan,
    "check-method": CheckMethod,
    "ls": Ls,
    "doctor": Doctor,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and exit with its code."""
    prepare_output()
    words = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if odd := [word for word in words if not is_plain(word)]:
        leave(lambda: _refuse(odd))
    if words[:1] == ["sweep"] and len(words) > 1 and not words[1].startswith("-"):
        # everything after the file is the script's, --help too
        leave(lambda: _run(at_home(SweepFile(file=Path(words[1]))), words[2:]))
    verb, rest = tyro.cli(
        _parsed_types(words),
        prog="grass-ray",
        description="Fair experiments on memory-efficient LLM fine-tuning (GRASS, arXiv 2604.07808).",
        args=words,
        return_unknown_args=True,
        config=(
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.DisallowNone,
        ),
    )
    quiet_libraries()
    leave(lambda: _run(at_home(verb), rest))


def _refuse(words: Sequence[str]) -> NoReturn:
    raise ConfigError(f"not UTF-8 text, which no record could hold: {', '.join(map(repr, words))}")


def _parsed_types(words: Sequence[str]) -> Any:
    """The union of all verbs; the one that is named has its examples in the help, and the flags of its method."""
    options = []
    for name, verb in VERBS.items():
        help_text = inspect.getdoc(verb) or ""
        if words[:1] != [name]:
            help_text = help_text.partition("\n")[0]
        kind = train_with_flags(words[1:]) if words[:1] == ["train"] == [name] else verb
        options.append(Annotated[kind, tyro.conf.subcommand(name, description=help_text)])
    return Union[tuple(options)]  # noqa: UP007 - made of a list


def _run(verb: Any, rest: Sequence[str]) -> int:
    if isinstance(verb, SweepFile):
        code: int = verb.run(rest)
    elif rest:
        name = next(name for name, kind in VERBS.items() if isinstance(verb, kind))
        raise ConfigError(f"unknown arguments: {' '.join(rest)}; see grass-ray {name} --help")
    else:
        code = verb.run()
    return code
