"""Batches by length, halved where memory runs out; nothing is lost, and nothing else is caught."""

import itertools
import random
import subprocess
import sys

import pytest
import torch
from small import REPOSITORY

from grass_ray.tasks.inference.batching import Batcher, similar_groups

GENERATOR = random.Random(0)
MIXED = [GENERATOR.randint(5, 400) for _ in range(300)]


def run(batcher: Batcher, lengths: list[int], **options: int) -> list[list[int]]:
    """The lengths of each batch; checks that every request is answered once, in its place."""
    batches = []

    def answer(batch: list[int]) -> list[int]:
        batches.append([lengths[number] for number in batch])
        return [10 * number for number in batch]

    assert batcher.run(range(len(lengths)), lengths, answer, **options) == [10 * n for n in range(len(lengths))]
    return batches


def test_no_requests_need_no_batches():
    assert run(Batcher("auto", "cpu"), []) == []
    assert run(Batcher(4, "cpu"), []) == []


def test_a_given_batch_size_is_kept():
    assert [len(batch) for batch in run(Batcher(7, "cpu"), MIXED)] == [7] * 42 + [6]


@pytest.mark.parametrize(("device", "room"), [("cpu", 0), ("cuda", 0), ("cpu", 16), ("cpu", 256), ("cuda", 256)])
def test_auto_keeps_within_its_tokens_and_pads_no_more_than_another_batch_would_cost(device, room):
    batcher = Batcher("auto", device)
    batches = run(batcher, MIXED, room=room)
    assert max(len(batch) * (max(batch) + room) for batch in batches) <= batcher.max_tokens
    worth = batcher.pass_tokens * max(room, 1)
    for batch, following in zip(batches, [*batches[1:], [0]], strict=True):
        assert len(batch) * max(batch) - sum(batch) <= worth
        one_more = [*batch, following[0]]
        too_much = len(one_more) * max(one_more) - sum(one_more) > worth
        assert too_much or len(one_more) * (max(one_more) + room) > batcher.max_tokens or following == [0]
    if (device, room) == ("cpu", 0):
        in_order = sum(len(part) * max(part) for part in (MIXED[at : at + 16] for at in range(0, 300, 16)))
        assert sum(len(batch) * max(batch) for batch in batches) < 1.05 * sum(MIXED) < 0.6 * in_order


def test_groups_of_similar_length_cost_least():
    lengths = [98, 95, 94, 85, 78, 74, 66, 63, 63, 60, 51, 51]

    def cost(sizes):
        starts = itertools.accumulate([0, *sizes[:-1]])
        return sum(25 + size * lengths[start] for start, size in zip(starts, sizes, strict=True))

    found = similar_groups(lengths, 25)
    cuts = (itertools.combinations(range(1, 12), count) for count in range(12))
    every = [[b - a for a, b in itertools.pairwise((0, *at, 12))] for ats in cuts for at in ats]
    assert sum(found) == 12
    assert cost(found) == min(map(cost, every)) < cost([12])
    assert similar_groups([], 25) == []
    assert similar_groups([7, 7, 7], 25) == [3]


def test_a_request_longer_than_the_most_goes_alone():
    assert run(Batcher("auto", "cpu"), [100_000, 3]) == [[100_000], [3]]


@pytest.mark.long
@pytest.mark.parametrize("batch_size", [64, "auto"])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(batch_size):
    """A pass over more than 900 tokens fails, as one on a small device would."""
    batcher, sizes = Batcher(batch_size, "cuda"), []

    def answer(batch: list[int]) -> list[int]:
        if (size := len(batch) * max(MIXED[number] for number in batch)) > 900:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(size)
        return batch

    assert batcher.run(range(300), MIXED, answer) == list(range(300))
    assert batcher.halvings > 2
    assert len(sizes) < 200


@pytest.mark.long
def test_what_fits_not_even_alone_and_other_errors_are_raised():
    def too_big(batch: list[int]) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def broken(batch: list[int]) -> list[int]:
        raise RuntimeError("shapes do not match")

    batcher = Batcher("auto", "cuda")
    with pytest.raises(torch.OutOfMemoryError):
        batcher.run(range(8), [9] * 8, too_big)
    assert batcher.halvings == 3
    with pytest.raises(RuntimeError, match="shapes"):
        batcher.run(range(8), [9] * 8, broken)
    assert batcher.halvings == 3


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
@pytest.mark.parametrize("scoring", ["generation", "loglikelihood"])
def test_an_evaluation_outlives_a_machine_with_little_memory(scoring):
    """A real limit on the process's memory, a real failed allocation: the same answers as without it."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(REPOSITORY / "tests")!r})
import torch
from task_parts import make_model, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from grass_ray.config import DataConfig, EvaluationConfig
from grass_ray.tasks.evaluation import evaluate
from task_parts import letter_task
torch.set_num_threads(1)
tokenizer = make_tokenizer()
model = make_model(tokenizer, intermediate=10_000)
data = letter_task(sys.argv[1], 24)
config = EvaluationConfig(scoring={scoring!r}, batch_size=24)
free = evaluate(model, tokenizer, data, config)["letters"]
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
tight = evaluate(model, tokenizer, data, config)["letters"]
assert free.workload.halvings == 0, free.workload
assert tight == free
print("halved", tight.workload.halvings)
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 1
