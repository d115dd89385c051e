"""Likelihoods are those of a plain forward pass, whatever is shared, for several families and for virtual tokens."""

import peft
import pytest
import torch
from task_parts import make_model, make_tokenizer
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from grass_ray.tasks.inference.likelihood import Scorer, share_rows

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
FAMILIES = {
    "llama": lambda: make_model(make_tokenizer()),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64)),
}
SHARES = {"llama", "gemma", "gpt2"}  # a sliding window and a recurrent state cannot be continued row by row


def make_requests() -> list[tuple[list[int], list[int]]]:
    """Questions of many lengths that begin alike; options of one to three tokens, some with a shared beginning."""
    generator = torch.Generator().manual_seed(0)
    beginning = torch.randint(0, 64, (9,), generator=generator).tolist()
    requests = []
    for length in (3, 14, 7, 1, 22):
        context = beginning + torch.randint(0, 64, (length,), generator=generator).tolist()
        requests += [(context, option) for option in ([5, 6, 1], [5, 6, 2], [7, 1], [9])]
    return [*requests, requests[4]]


def plain(model: torch.nn.Module, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = model(input_ids=torch.tensor([context + continuation]), use_cache=False).logits
    logp = logits[0, -len(continuation) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(continuation)
    return float(logp.gather(1, wanted[:, None]).sum()), bool((logp.argmax(-1) == wanted).all())


def score(model: torch.nn.Module, requests: list[tuple[list[int], list[int]]], rows_at_a_time: int) -> list[object]:
    rows = share_rows(requests, max_length=512)
    scorer = Scorer(model, rows)
    found = {}
    for start in range(0, len(rows), rows_at_a_time):
        batch = rows[start : start + rows_at_a_time]
        for row, scores in zip(batch, scorer.score(batch), strict=True):
            found |= {number: value for (number, _), value in zip(row.continuations, scores, strict=True)}
    return [found[number] for number in range(len(requests))]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_plain_forward_pass(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    requests = make_requests()
    expected = [plain(model, *request) for request in requests]
    rows = share_rows(requests, max_length=512)
    assert len(rows) == 15, "options that differ in their last token share a row, and so do repeated ones"
    assert Scorer(model, rows).shared == (9 if family in SHARES else 0)
    for rows_at_a_time in (1, 4, 15):
        found = score(model, requests, rows_at_a_time)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    ],
    ids=["prompt", "prefix", "lora"],
)
def test_scores_with_adapters_do_not_depend_on_the_batch(config):
    torch.manual_seed(0)
    base = make_model(make_tokenizer())
    requests = make_requests()
    without = [value for value, _ in score(base.eval(), requests, 4)]
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "prompt_encoder" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    one, many = score(model, requests, 1), score(model, requests, 15)
    assert [value for value, _ in many] == pytest.approx([value for value, _ in one], abs=1e-3)
    assert [value for value, _ in many] != pytest.approx(without, abs=1e-2), "the adapter must count"


@torch.no_grad()
def test_what_is_too_long_is_cut_off_at_the_left():
    model = FAMILIES["llama"]().eval()
    requests = make_requests()
    (row,) = share_rows(requests[16:17], max_length=10)
    context, continuation = requests[16]
    assert row.tokens == (context + continuation)[-11:-1]
    ((found,),) = Scorer(model, [row]).score([row])
    assert found[0] == pytest.approx(plain(model, context[-8:], continuation)[0], abs=1e-4)
