"""The benchmarks: scripts of this folder, and the flags with which each is quick."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A script that measures something.

    Attributes:
        script: the file; run alone, it measures in full and writes into ``benchmarks/results``.
        quick: flags of a run of a minute or so, for ``all`` and ``compare``; None if there is none.
        needs: what it needs beside the package, in words.
        frozen: whether it belongs to an experiment that began, so that it must not change.
    """

    script: Path
    quick: tuple[str, ...] | None = None
    needs: str = ""
    frozen: bool = False

    @property
    def about(self) -> str:
        """The first line of the script's docstring."""
        text = ast.get_docstring(ast.parse(self.script.read_text(encoding="utf-8"))) or ""
        return text.partition("\n")[0]


def _script(name: str, quick: str | None = None, needs: str = "", *, frozen: bool = False) -> Benchmark:
    flags = None if quick is None else tuple(quick.split())
    return Benchmark(script=HERE / f"{name}.py", quick=flags, needs=needs, frozen=frozen)


BENCHMARKS: dict[str, Benchmark] = {
    "methods": _script(
        "methods", "--model tiny --rounds 1 --steps 8 --methods full lora grass lisa galore --threads 1"
    ),
    "offload": _script("offload", "--repeats 1 --steps 4 --entries floor resident lazy full --minutes 2"),
    "memory_plan": _script("memory_plan", "--models tiny --methods full grass"),
    "moments": _script("moments", "--steps 60"),
    "commands": _script("commands", "--runs 200 --rounds 1"),
    "leaderboard": _script("leaderboard", "--records 200 --rounds 1"),
    "driver": _script("driver", "--trials 50 --every 25 --steps 20"),
    "orchestration": _script("orchestration", "--trials 2 --steps 10 --saves 2"),
    "evaluation": _script("evaluation", needs="--data-dir with the published data"),
    "base_scores": _script("base_scores", needs="--data-dir with the published data"),
    "comparison": _script("comparison", needs="--data-dir with the published data; hours"),
    "staleness": _script("staleness", "--seeds 1"),
    "power": _script("power", "--experiments 20 --pilots 5"),
    "training_variance": _script("training_variance", "--tables 4"),
    "recipes": _script("recipes", needs="nothing, but writes examples/recipes"),
    "gpu": _script("gpu", needs="a GPU"),
    "verdict": _script("verdict/run", needs="--data-dir, --work; days", frozen=True),
}
