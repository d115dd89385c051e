"""Free orphaned placement groups: what the trials of dead sweeps still hold on a cluster.

When a sweep's driver is killed, its actors live on for a tenth of a second. A placement group that one of them creates
after Ray has cleaned up behind the job is never freed (Ray 2.60): each takes a trial's CPUs and GPUs away, until the
next sweep waits without end.
"""

from __future__ import annotations

import ray
from ray.util import state
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state.exception import RayStateApiException

LIMIT = 10_000  # the most that Ray's dashboard lists


def free_orphans() -> int:
    """Remove the placement groups whose job has ended, except detached ones, which are meant to stay.

    Returns:
        The number of groups removed; 0 also if the dashboard, which lists them, does not answer.
    """
    try:
        # in this order: a job that begins in between is known before its groups would be looked at
        groups = state.list_placement_groups(
            limit=LIMIT, detail=True, filters=[("state", "!=", "REMOVED")], raise_on_missing_output=False
        )
        jobs = state.list_jobs(limit=LIMIT, raise_on_missing_output=False)
    except RayStateApiException:
        return 0
    ended = {job.job_id for job in jobs if job.status not in ("RUNNING", "PENDING")}
    orphans = [group for group in groups if group.creator_job_id in ended and not group.is_detached]
    for group in orphans:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group.placement_group_id))))
    return len(orphans)
