"""``grass-ray check-method``: whether methods of a user's own keep the contract that the built-in ones keep."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import Positional

from grass_ray.commands.flags import Names, Settings
from grass_ray.config import ConfigError, ImportedPart, MethodConfig, RunConfig
from grass_ray.method_files import methods_with
from grass_ray.methods import METHODS, get_method
from grass_ray.overrides import parse

Check = tuple[str, Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class CheckMethod:
    """Check that the methods of a file train, resume and export as the built-in ones do. Exits with 0 if they do.

    The model is small and random, and the tests of this project make the same checks.

    For example:
      grass-ray check-method my_methods.yaml
      grass-ray check-method my_methods.yaml --methods top-heavy --steps 24
      grass-ray check-method my_methods.yaml --set method.sampler.args.period=3
    """

    file: Positional[Path]
    """YAML file with methods of your own; its code is run."""
    methods: Names = ()
    """Methods of the file. Defaults to all."""
    steps: int = 9
    """Number of optimizer steps of each run: enough for your sampler to draw several times."""
    set: Settings = ()
    """Other settings by dotted key, for the small runs."""

    def run(self) -> int:
        """Make the checks and return the exit code."""
        if self.steps < 3:
            raise ConfigError(f"--steps {self.steps}: give 3 or more")
        known = {name: row for name, row in methods_with(self.file).items() if name not in METHODS}
        chosen = [get_method(name, known).config for name in self.methods or known]
        kept = made = 0
        with tempfile.TemporaryDirectory(prefix="grass_ray-contract-") as folder:
            for method in chosen:
                print(method.name)
                for name, check in self._checks(method, Path(folder) / method.name):
                    reason = _broken(check)
                    kept, made = kept + (reason is None), made + 1
                    print(f"  {'holds ' if reason is None else 'BROKEN'} {name}{reason or ''}", flush=True)
        print(f"{kept} of {made} checks hold")
        return 0 if kept == made else 1

    def _checks(self, method: MethodConfig, folder: Path) -> Iterator[Check]:
        """The checks of a method, in order: its own sampler's, then those of its runs."""
        from grass_ray.contract import methods as runs
        from grass_ray.training.checks import check_run

        if isinstance(method.sampler, ImportedPart):
            yield from _sampler_checks(method)
        config = runs.small_run(method, parse(self.set), steps=self.steps)
        check_run(config)
        yield "changes only what is active", lambda: runs.check_trains_what_is_active(config)
        fast = {"training.steps": 20, "method.optimizer.lr": runs.learning_rate(method), **parse(self.set)}
        yield "learns in twenty steps", lambda: runs.check_loss_falls(config.override(fast))
        yield "reloads in transformers or peft", lambda: runs.check_reloads(config, folder / "reloads")
        yield "resumes bit for bit at every step, in a new process", lambda: self._resume(config, folder / "resumes")

    def _resume(self, config: RunConfig, folder: Path) -> None:
        from grass_ray.contract.fresh import resume_in_a_new_process
        from grass_ray.contract.methods import check_resumed, save_every_step

        whole = save_every_step(config, folder / "run")
        check_resumed(whole, resume_in_a_new_process(folder, self.file)["run"])


def _sampler_checks(method: MethodConfig) -> Iterator[Check]:
    from grass_ray.contract.samplers import CHECKS, sizes_for
    from grass_ray.layerwise.sampler import Sampler

    def make(seed: int) -> Sampler:
        sampler: Sampler = method.sampler.build(seed=seed, train_steps=40)
        return sampler

    try:
        sizes = sizes_for(make)
    except ValueError as error:
        raise ConfigError(f"{method.name}: {error}") from None
    for name, check in CHECKS.items():
        yield f"the sampler {name}", partial(check, make, sizes)


def _broken(check: Callable[[], object]) -> str | None:
    """Why a check does not hold, or what the code raised; None if it holds."""
    try:
        check()
    except AssertionError as error:
        return f": {' '.join(str(error).split())}"
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything, and the other checks are wanted, too
        return f": {type(error).__name__}: {error}"
    return None
