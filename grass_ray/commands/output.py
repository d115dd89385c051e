"""What the verbs that run something share: an output folder of their own, and what they print of a run."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grass_ray.config import ConfigError, RunConfig
from grass_ray.results.record import RunRecord


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold a writable output folder that no other process writes to. It is created if it does not exist.

    Raises:
        ConfigError: it cannot be written to, or another run writes there.
    """
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            handle = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot write to the output {output}: {error.strerror}; name another folder") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            made = False
            raise ConfigError(f"another run is writing to the output {output}; wait for it, or name another") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):  # something was written
                output.rmdir()


def check_folder(config: RunConfig, output: Path, resume: bool) -> None:
    """Check that a new run has a new or empty folder, and a resumed one the folder of the same configuration.

    Raises:
        ConfigError: it has not.
    """
    from grass_ray.export.model import check_output

    if not resume:
        check_output(output)
        return
    saved = output / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"nothing to resume in {output}: it has no config.yaml; leave --resume out to start there")
    if RunConfig.from_yaml(saved) != config:
        raise ConfigError(f"{output} holds a run with another configuration; resume with the flags it was started with")


def check_new_folder(output: Path | None) -> None:
    """Check that an output folder, if there is to be one, is new or empty and can be written to.

    Raises:
        ConfigError: it is not, or cannot.
    """
    from grass_ray.export.model import check_output

    if output is not None:
        check_output(output)
        with claimed(output):
            pass


def render_row(record: RunRecord) -> str:
    """Return the leaderboard of a single run as text."""
    from grass_ray.results.leaderboard import build_leaderboard
    from grass_ray.results.rendering import render

    return render(build_leaderboard([record]))


def describe_lost_test_rows(record: RunRecord) -> list[str]:
    """Return a line per set of test rows of which some could not be used, or not as a whole."""
    skipped = {task: score.protocol.get("test_rows_skipped", 0) for task, score in record.tasks.items()}
    lines = [f"skipped   {lost} test rows of {task}: they could not be used" for task, lost in skipped.items() if lost]
    if cut := record.metrics.get("evaluation/prompts_cut"):
        lines.append(
            f"cut       {cut:.0f} test prompts at their beginning: the model has no room for them; take one with more "
            "positions, or a smaller max_new_tokens"
        )
    return lines
