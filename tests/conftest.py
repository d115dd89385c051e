"""Shared by all tests: a small decoder, quiet threads, and where the real benchmark data may lie."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent


def make_llama(
    *, layers: int = 4, hidden: int = 32, vocabulary: int = 64, tied: bool = False, seed: int = 0
) -> LlamaForCausalLM:
    """A random small Llama; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=tied,
            )
        )


def make_batch(step: int, *, rows: int = 4, tokens: int = 12, vocabulary: int = 64) -> torch.Tensor:
    """Random token ids that depend on ``step`` alone, shape (rows, tokens)."""
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(step))


def backward(model: LlamaForCausalLM, step: int, **sizes: int) -> float:
    """One backward pass on the batch of ``step``; the loss."""
    batch = make_batch(step, **sizes)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return float(loss.detach())


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny models; several threads only wait for each other


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real benchmark data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("GRASS_RAY_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "llm-adapters" / "dataset").is_dir():
        pytest.skip(f"no real benchmark data at {folder}; set GRASS_RAY_DATA to a folder that holds llm-adapters/")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
