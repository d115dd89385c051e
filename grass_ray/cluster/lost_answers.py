"""Let Ray Tune survive what it knows no answer to: a process that Ray's memory monitor killed, an answer that was lost.

Tune (Ray 2.60) starts a trial again whose process died, but for other errors of Ray's than a dead actor's it ends the
whole sweep: for ``OutOfMemoryError``, which says that the memory monitor killed the process, and for an answer that was
lost with its machine. Either is the death of a process and nothing else.
"""

from __future__ import annotations

from typing import Any

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError

_known_to_tune = RayActorManager._actor_task_failed


def survive_lost_answers() -> None:
    """Let every Tuner of this process take such an error for the death of the trial's process."""
    RayActorManager._actor_task_failed = _as_death


def _as_death(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
    if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
        exception = RayActorError(error_msg=str(exception))
    _known_to_tune(manager, tracked_actor_task, exception)
