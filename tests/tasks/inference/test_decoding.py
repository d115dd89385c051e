"""Decoding a few tokens at a time gives what decoding at once gives, and drops rows that are finished."""

import pytest
import torch
from task_parts import make_model, make_tokenizer

from grass_ray.tasks.generated import generate
from grass_ray.tasks.inference.decoding import TOKENS_AT_A_TIME, Decoder
from grass_ray.tasks.inference.harness import undisturbed
from grass_ray.tasks.templates import render_prompt

NEW = 3 * TOKENS_AT_A_TIME - 5


@pytest.fixture(scope="module")
def parts():
    tokenizer = make_tokenizer(pad_token="<pad>")
    model = make_model(tokenizer).eval()
    prompts = tokenizer(
        [render_prompt(row, "clean") for row in generate("test", rows=8, seed=0)],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return model, tokenizer, prompts.input_ids, prompts.attention_mask


def at_once(parts, stop: str) -> list[str]:
    """Each row alone, by transformers, cut at the stop text."""
    model, tokenizer, prompts, masks = parts
    texts = []
    for prompt, mask in zip(prompts, masks, strict=True):
        own = prompt[mask.bool()].unsqueeze(0)
        tokens = model.generate(own, attention_mask=torch.ones_like(own), max_new_tokens=NEW, do_sample=False)
        texts.append(tokenizer.decode(tokens[0, own.shape[1] :], skip_special_tokens=True).split(stop)[0])
    return texts


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_say_what_they_say_alone(parts, num_beams):
    model, tokenizer, prompts, masks = parts
    with undisturbed(model, tokenizer):
        text = tokenizer.decode(model.generate(prompts[:1], attention_mask=masks[:1], max_new_tokens=NEW)[0, -20:-18])
        decoder = Decoder(model, tokenizer, stop=[text], num_beams=num_beams)
        tokens = decoder.generate(prompts, masks, NEW)
        assert tokens.shape == (8, prompts.shape[1] + NEW)
        assert torch.equal(tokens[:, : prompts.shape[1]], prompts)
        found = [
            t.split(text)[0] for t in tokenizer.batch_decode(tokens[:, prompts.shape[1] :], skip_special_tokens=True)
        ]
        if num_beams == 1:
            assert found == at_once(parts, text)
        else:
            alone = [
                Decoder(model, tokenizer, stop=[text], num_beams=num_beams).generate(
                    prompt[mask.bool()].unsqueeze(0), mask[mask.bool()].unsqueeze(0), NEW
                )[0, int(mask.sum()) :]
                for prompt, mask in zip(prompts, masks, strict=True)
            ]
            assert found == [tokenizer.decode(row, skip_special_tokens=True).split(text)[0] for row in alone]


def test_finished_rows_leave_the_batch_and_are_counted(parts):
    """A stop text that some rows write soon and others never."""
    model, tokenizer, prompts, masks = parts
    sizes = []
    with undisturbed(model, tokenizer):
        everything = Decoder(model, tokenizer).generate(prompts, masks, NEW)[:, prompts.shape[1] :]
        texts = tokenizer.batch_decode(everything, skip_special_tokens=True)
        shares = {c: sum(c in text for text in texts) for text in texts for c in text}
        stop = next(c for c, count in sorted(shares.items()) if 2 <= count <= 6)
        hook = model.register_forward_pre_hook(
            lambda _, args, given: sizes.append(given["input_ids"].shape), with_kwargs=True
        )
        decoder = Decoder(model, tokenizer, stop=[stop])
        tokens = decoder.generate(prompts, masks, NEW)[:, prompts.shape[1] :]
        hook.remove()
    read = [(count, width) for count, width in sizes if width > 1]
    assert read[0] == (1, 14), "what all prompts begin with is read once"
    assert sum(count for count, _ in read[1:]) == 8
    assert sum(count * width for count, width in read[1:]) < 8 * (prompts.shape[1] - 14), "in groups of similar length"
    rows = [8, *(count for count, width in sizes if width == 1)]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 8
    assert [t.split(stop)[0] for t in tokenizer.batch_decode(tokens, skip_special_tokens=True)] == [
        text.split(stop)[0] for text in texts
    ]
    end = tokenizer.eos_token_id
    written = [
        next((n for n in range(1, NEW + 1) if row[n - 1] == end or stop in tokenizer.decode(row[:n])), NEW)
        for row in everything
    ]
    assert decoder.passes == len(sizes)
    assert decoder.tokens == int(masks.sum()) - 7 * 14 + sum(written)
    computed = sum(count * width for count, width in sizes) + 8  # the last token of an answer is not read
    assert decoder.tokens + decoder.padding_tokens == computed
