"""What the tests of this room share: records, files, and a tiny model with its own tokenizer."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grass_ray.config import CustomSource, DataConfig
from grass_ray.tasks.generated import generate
from grass_ray.tasks.row_files import read_file
from grass_ray.tasks.templates import render_prompt, render_response


def record(answer: object = "true", **changes: object) -> dict[str, object]:
    """One record of a data file."""
    return {
        "instruction": "Is it so?",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    } | changes


def write(path: Path, value: object) -> Path:
    """Write bytes and text as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
    path.write_bytes(data)
    return path


def letter_task(folder: Path, rows: int) -> DataConfig:
    """A task of one's own with questions of many lengths, whose options differ before their last token."""
    lines = [record("ABC"[n % 3], instruction=f"Which letter? {'word ' * (7 * n % 23)}{n}") for n in range(rows)]
    path = write(Path(folder) / "letters.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    source = CustomSource(name="letters", answer="letter", labels=("A", "B", "C"), max_new_tokens=6, test=str(path))
    return DataConfig(suite="letters", tasks=("letters",), source=source)


def make_tokenizer(*, pad_token: str | None = None, bos_token: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, trained on generated problems."""
    rows = generate("train", rows=100, seed=0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>", "<pad>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([render_prompt(row, "clean") + render_response(row) for row in rows], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token=pad_token, bos_token=bos_token, padding_side="right"
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, positions: int = 2048, intermediate: int = 64
) -> LlamaForCausalLM:
    """A random Llama of two layers whose outputs vary from prompt to prompt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=intermediate,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=positions,
                initializer_range=0.3,
                eos_token_id=tokenizer.eos_token_id,
            )
        )


def read_rows(path, task):
    """The rows of a file in which every row must be valid."""
    return read_file(path, task).rows
