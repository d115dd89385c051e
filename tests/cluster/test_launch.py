"""What a trial gets on a cluster of several machines, and what is said of it. Nothing is started here."""

import pytest

from grass_ray.cluster.launch import ClusterView
from grass_ray.config import ConfigError


def view(*machines: tuple[int, int], joined: bool = True) -> ClusterView:
    return ClusterView(address="10.0.0.1:6379", machines=machines, joined=joined)


def test_a_sweep_says_whether_it_joined_a_cluster_or_started_a_ray_of_its_own() -> None:
    assert view((8, 1), (8, 1)).describe() == "joined Ray at 10.0.0.1:6379: 2 machine(s), 16 CPUs, 2 GPUs"
    assert view((2, 0), joined=False).describe().startswith("started Ray at 10.0.0.1:6379: 1 machine(s), 2 CPUs")


@pytest.mark.parametrize(
    ("machines", "asked", "expected"),
    [
        (((1, 0),), (None, None), (1, 0, 1)),
        (((2, 0),), (1, None), (1, 0, 2)),
        (((1, 0),) * 3, (1, None), (1, 0, 3)),
        (((0, 0), (8, 2), (8, 2)), (None, None), (4, 1, 4)),  # the head holds no trial
        (((32, 1), (16, 1)), (None, None), (16, 1, 2)),
        (((4, 0), (2, 0)), (3, 0), (3, 0, 1)),
    ],
)
def test_trials_at_once_always_fit_together(
    machines: tuple[tuple[int, int], ...], asked: tuple[int | None, int | None], expected: tuple[int, int, int]
) -> None:
    share = view(*machines).share(cpus=asked[0], gpus=asked[1], max_concurrent=None)
    assert (share.cpus, share.gpus, share.slots) == expected
    places = sum(
        min(cpus // share.cpus, gpus // share.gpus if share.gpus else cpus // share.cpus) for cpus, gpus in machines
    )
    assert share.slots <= places


def test_an_elastic_trial_needs_room_for_its_fewest_workers() -> None:
    def slots(*machines: tuple[int, int]) -> int:
        asked = view(*machines)
        return asked.share(cpus=1, gpus=None, max_concurrent=None, workers=4, fewest_workers=2).slots

    assert slots((1, 0), (1, 0)) == 1
    assert slots((4, 0), (4, 0), (3, 0)) == 2
    with pytest.raises(ConfigError, match="cannot hold 2 workers of 1 CPUs and 0 GPUs each; it has 1 CPUs"):
        slots((1, 0))


def test_what_no_single_machine_holds_is_refused_although_all_together_would() -> None:
    with pytest.raises(ConfigError, match="no machine can hold a trial of 3 CPUs and 0 GPUs; the cluster has 2 CPUs"):
        view((2, 0), (2, 0)).share(cpus=3, gpus=None, max_concurrent=None)
