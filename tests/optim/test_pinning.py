"""Host memory allocated in the background: what is there is taken, what is not is allocated as without it."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
import torch
from small import backward, make_llama, make_optimizer

from grass_ray import UniformSampler
from grass_ray.optim import pinning
from grass_ray.optim.chunks import allocate_block, total_bytes
from grass_ray.optim.pinning import BlocksAhead

CHUNK = 64 * 1024


def finished(ahead: BlocksAhead) -> BlocksAhead:
    ahead._thread.join(10)
    assert not ahead._thread.is_alive()
    return ahead


def test_blocks_are_there_before_they_are_asked_for() -> None:
    ahead = finished(BlocksAhead([64, 128, 64], lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8)))
    assert ahead.bytes == 256
    taken = [ahead.take(nbytes) for nbytes in (64, 64, 64, 128)]
    assert [None if block is None else block.nbytes for block in taken] == [64, 64, None, 128]
    assert ahead.bytes == 0


def test_what_is_asked_for_too_early_is_not_allocated_twice() -> None:
    may_go, made = threading.Event(), []

    def allocate(nbytes: int) -> Any:
        may_go.wait(10)
        made.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    ahead = BlocksAhead([64, 64, 128], allocate)
    assert ahead.take(64) is None
    assert ahead.take(128) is None
    may_go.set()
    finished(ahead)
    assert made == [64] * len(made)
    assert ahead.bytes == 64 * len(made)
    assert len(made) <= 2


def test_it_takes_half_of_the_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "available_bytes", lambda: 2 * (pinning.RESERVE_BYTES + 1000))
    assert finished(BlocksAhead([1000], lambda nbytes: torch.zeros(nbytes))).bytes > 0
    assert BlocksAhead([1001], lambda nbytes: torch.zeros(nbytes)).take(1001) is None


def test_a_failure_is_left_to_the_one_who_asks() -> None:
    def fail(nbytes: int) -> Any:
        raise RuntimeError("cannot be pinned")

    assert finished(BlocksAhead([64], fail)).take(64) is None


def test_the_thread_ends_with_its_owner() -> None:
    began = threading.Event()

    def allocate(nbytes: int) -> Any:
        began.set()
        time.sleep(0.005)
        return torch.zeros(1)

    ahead = BlocksAhead([4] * 5000, allocate)
    thread = ahead._thread
    began.wait(10)
    del ahead
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("mode", ["resident", "lazy"])
def test_training_takes_the_blocks(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the host's memory were pinned: no step allocates any, and the weights are the same."""
    models = {}
    for kind in ("none", mode):
        model = models[kind] = make_llama(hidden=72)
        if kind != "none":
            store = "grass_ray.optim.host_store"
            monkeypatch.setattr(f"{store}.allocate_block", lambda nbytes, pinned: allocate_block(nbytes, pinned=False))
            original = "grass_ray.optim.placement.HostStore"
            monkeypatch.setattr(original, _pinned(pytest.importorskip(store).HostStore))
        optimizer = make_optimizer(model, UniformSampler(2, 2), lr=1e-3, offload=kind, chunk_bytes=CHUNK)
        host = optimizer._placement.host
        if kind != "none":
            assert host.ahead is not None
            finished(host.ahead)
            whole = host.bytes
            monkeypatch.setattr(host, "_allocate", None)
        for step in range(12):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert len(host.units) == 4
    assert host.ahead.bytes == 0
    assert host.bytes == whole == sum(total_bytes(host.chunks(unit)) for unit in host.units)
    for a, b in zip(models["none"].parameters(), models[mode].parameters(), strict=True):
        assert torch.equal(a, b)


def _pinned(store: Any) -> Any:
    class Pinned(store):  # type: ignore[misc]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.pinned = True

    return Pinned


@pytest.mark.gpu
def test_gpu_switches_allocate_no_host_memory() -> None:
    model = make_llama(hidden=256, layers=8).cuda().bfloat16()
    optimizer = make_optimizer(model, UniformSampler(2, 1), lr=1e-3, offload="resident", chunk_bytes=1024 * 1024)
    host = optimizer._placement.host
    assert host.ahead is not None
    finished(host.ahead)
    made = []
    host._allocate = lambda nbytes: made.append(nbytes)  # type: ignore[method-assign, assignment, func-returns-value]
    batch = torch.randint(0, 64, (2, 16), device="cuda")
    for _ in range(20):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert made == []
    assert all(host.block(chunk).is_pinned() for unit in host.units for chunk in host.chunks(unit))
