"""Tokens from a file are the tokens of the tokenizer; files may vanish, break, and be written by many at once."""

import multiprocessing
import os
import time

from task_parts import letter_task, make_model, make_tokenizer

from grass_ray.config import DataConfig, EvaluationConfig
from grass_ray.tasks import encoding
from grass_ray.tasks.encoding import encode_pair, encode_rows
from grass_ray.tasks.evaluation import evaluate
from grass_ray.tasks.inference.token_cache import TokenCache
from grass_ray.tasks.sources import load_train_rows
from grass_ray.tasks.templates import render_prompt, render_response

TEXTS = [f"How many {'apples ' * n}are {n} + {n}?" for n in range(40)] + [""]


class Counting:
    """A tokenizer that notes how often it is called."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts):
        self.calls += 1
        return self.tokenizer(texts)


def test_tokens_are_read_back_equal_without_the_tokenizer(tmp_path):
    tokenizer = make_tokenizer(bos_token="<start>")
    expected = {text: tokenizer(text)["input_ids"] for text in TEXTS}
    for calls in (1, 0):
        counting = Counting(tokenizer)
        assert TokenCache(counting, tmp_path).encode([*TEXTS, TEXTS[3]]) == expected
        assert counting.calls == calls
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_other_tokenizers_and_other_texts_have_files_of_their_own(tmp_path):
    for tokenizer in (make_tokenizer(), make_tokenizer(bos_token="<start>")):
        for texts in (TEXTS, TEXTS[1:], TEXTS[::-1], ["".join(TEXTS[:2]), *TEXTS[2:]]):
            found = TokenCache(tokenizer, tmp_path).encode(texts)
            assert found == {text: tokenizer(text)["input_ids"] for text in texts}
    assert len(list(tmp_path.iterdir())) == 8
    padding = make_tokenizer(pad_token="<pad>")
    padding(TEXTS[:3], padding=True)  # leaves traces in a tokenizer that do not change tokens
    fresh = Counting(make_tokenizer(pad_token="<pad>"))
    TokenCache(padding, tmp_path).encode(TEXTS)
    TokenCache(fresh, tmp_path).encode(TEXTS)
    assert fresh.calls == 0


def test_broken_files_only_cost_time(tmp_path):
    tokenizer = make_tokenizer()
    expected = TokenCache(tokenizer, tmp_path).encode(TEXTS)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damage in (b"", b"nonsense", whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(damage)
        counting = Counting(tokenizer)
        assert TokenCache(counting, tmp_path).encode(TEXTS) == expected
        assert counting.calls == 1
        assert path.read_bytes() == whole, "and the file is whole again"


def test_a_folder_that_cannot_be_written_to_is_no_mistake(tmp_path):
    (tmp_path / "file").write_text("in the way")
    tokenizer = make_tokenizer()
    for folder in (tmp_path / "file", None):
        assert TokenCache(tokenizer, folder).encode(TEXTS)[TEXTS[2]] == tokenizer(TEXTS[2])["input_ids"]


def fight_over(folder):
    tokenizer = make_tokenizer()
    expected = {text: tokenizer(text)["input_ids"] for text in TEXTS}
    for _ in range(60):
        assert TokenCache(tokenizer, folder).encode(TEXTS) == expected
        for path in folder.glob("*.npz"):
            path.unlink(missing_ok=True)


def test_many_processes_share_a_folder(tmp_path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=fight_over, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    assert not list(tmp_path.glob("*.part"))


def test_what_nobody_has_read_for_long_is_deleted(tmp_path):
    tokenizer, day = make_tokenizer(), 24 * 3600
    read, unread, new, other = TEXTS, TEXTS[1:], TEXTS[2:], tmp_path / "notes.txt"
    for texts in (read, unread):
        TokenCache(tokenizer, tmp_path).encode(texts)
    other.touch()
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 100 * day,) * 2)
    TokenCache(tokenizer, tmp_path).encode(read)
    kept = {path for path in tmp_path.iterdir() if path.stat().st_mtime > time.time() - day}
    TokenCache(tokenizer, tmp_path).encode(new)
    assert len(kept) == 1
    assert set(tmp_path.iterdir()) >= kept | {other}
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_an_evaluation_is_the_same_with_and_without_it(tmp_path):
    tokenizer = make_tokenizer()
    model, data = make_model(tokenizer), letter_task(tmp_path, 12)
    for scoring in ("generation", "loglikelihood"):
        config = EvaluationConfig(scoring=scoring)
        plain = evaluate(model, tokenizer, data, config)
        for _ in range(2):
            assert evaluate(model, tokenizer, data, config, cache=tmp_path / "tokens") == plain
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_rows_of_the_training_are_those_that_are_encoded_one_by_one_and_are_read_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_AT_ONCE", 10)
    data, tokenizer = DataConfig(), make_tokenizer(bos_token="<start>")
    rows = load_train_rows(data).rows[:25]
    expected = []
    for row in rows:
        context, answer = encode_pair(tokenizer, render_prompt(row, data.template), render_response(row))
        expected.append(([*context, *answer, tokenizer.eos_token_id], [0] * len(context) + [1] * (len(answer) + 1)))
    for calls in (3, 0):
        counting = Counting(tokenizer)
        found = encode_rows(rows, counting, data, tmp_path).rows
        assert [(row.ids, row.learned) for row in found] == expected
        assert counting.calls == calls
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert [row.ids for row in encode_rows(rows, tokenizer, data, tmp_path).rows] == [ids for ids, _ in expected]
