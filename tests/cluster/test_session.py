"""What a trial gets on a cluster of several machines, and what is said of it. Nothing is started here."""

import os
import socket
from pathlib import Path

import pytest

from grass_ray.cluster.resources import ClusterInfo
from grass_ray.cluster.session import check_address, ray_cluster, short_folders, token_without_home
from grass_ray.config import ConfigError


def view(*machines: tuple[int, int], joined: bool = True) -> ClusterInfo:
    return ClusterInfo(address="10.0.0.1:6379", machines=machines, joined=joined)


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
    resources = view(*machines).trial_resources(cpus=asked[0], gpus=asked[1], max_concurrent=None)
    assert (resources.cpus, resources.gpus, resources.slots) == expected
    places = sum(
        min(cpus // resources.cpus, gpus // resources.gpus if resources.gpus else cpus // resources.cpus)
        for cpus, gpus in machines
    )
    assert resources.slots <= places


def test_an_elastic_trial_needs_room_for_its_smallest_number_of_workers() -> None:
    def slots(*machines: tuple[int, int]) -> int:
        asked = view(*machines)
        return asked.trial_resources(cpus=1, gpus=None, max_concurrent=None, workers=4, min_workers=2).slots

    assert slots((1, 0), (1, 0)) == 1
    assert slots((4, 0), (4, 0), (3, 0)) == 2
    with pytest.raises(ConfigError, match="cannot hold 2 workers of 1 CPUs and 0 GPUs each; it has 1 CPUs"):
        slots((1, 0))


def test_what_no_single_machine_holds_is_refused_although_all_together_would() -> None:
    with pytest.raises(ConfigError, match="no machine can hold a trial of 3 CPUs and 0 GPUs; the cluster has 2 CPUs"):
        view((2, 0), (2, 0)).trial_resources(cpus=3, gpus=None, max_concurrent=None)


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:8265", "https://head:443", "ray://127.0.0.1:10001", "localhost", "head:", ":6379", " "],
)
def test_what_is_no_address_of_a_cluster_is_refused_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(ConfigError, match=r"cannot join the Ray cluster of RAY_ADDRESS=.*HOST:PORT.*RAY_ADDRESS=local"),
        ray_cluster(),
    ):
        pass


def test_an_address_where_nobody_listens_or_no_ray_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grass_ray.cluster.session.ANSWER_WITHIN_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match="What answers there is no head of a Ray cluster"):
            check_address(address)
    with pytest.raises(ConnectionError, match="Nobody answers there"):
        check_address(address)


def test_sockets_go_where_their_paths_are_short_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = str(tmp_path / ("x" * 100))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    assert short_folders() == {}
    monkeypatch.setenv("TMPDIR", long)
    assert short_folders() == {"RAY_TMPDIR": "/tmp", "TMPDIR": "/tmp"}
    monkeypatch.setenv("RAY_TMPDIR", "/var/tmp")
    assert short_folders() == {"RAY_TMPDIR": "/var/tmp", "TMPDIR": "/var/tmp"}
    monkeypatch.setenv("RAY_TMPDIR", long)
    with pytest.raises(ConfigError, match="set RAY_TMPDIR to a folder"):
        short_folders()


def test_a_home_that_cannot_be_written_to_keeps_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_without_home() == {}
    monkeypatch.setenv("HOME", f"{os.devnull}/home")
    assert len(token_without_home()["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert token_without_home() == {}
