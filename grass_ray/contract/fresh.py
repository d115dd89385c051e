"""Resume runs in a process of their own: ``python -m grass_ray.contract.fresh FOLDER [METHOD_FILE]``.

For every folder of :func:`grass_ray.contract.methods.save_every_step` in FOLDER it goes on from each checkpoint. The
last line printed is a JSON mapping from the folders' names to the digests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def resume_in_a_new_process(folder: Path, method_file: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Run this module; the digests of each run, by the name of its folder.

    Raises:
        RuntimeError: the process failed; the message is the end of what it said.
    """
    words = [sys.executable, "-m", __name__, str(folder), *([] if method_file is None else [str(method_file)])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # it finds what this process finds
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"the process that resumes failed:\n{done.stderr[-2000:]}")
    digests: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return digests


def main(arguments: list[str]) -> None:
    """Resume, and print the digests."""
    import torch

    from grass_ray.contract.methods import resume_every_step
    from grass_ray.method_files import methods_with

    torch.set_num_threads(1)
    folder, *method_files = map(Path, arguments)
    for path in method_files:
        methods_with(path)
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    print(json.dumps({run.name: resume_every_step(run) for run in runs}))


if __name__ == "__main__":
    main(sys.argv[1:])
