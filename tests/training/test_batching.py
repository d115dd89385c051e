"""Plain, bucketed and packed batches: the same rows, less padding, documents that never see each other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from small import make_llama, short_run
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grass_ray.config import ConfigError, DataConfig, GeneratedSource, LoraConfig
from grass_ray.layerwise.generators import keyed_generator
from grass_ray.tasks.generated import generate
from grass_ray.training import batches as module
from grass_ray.training.adapters import add_adapter
from grass_ray.training.batches import IGNORED, Batch, Batches, pack, pad
from grass_ray.training.checks import check_run
from grass_ray.training.loss import accumulate_gradients, summed_loss
from grass_ray.training.models import load_tokenizer
from grass_ray.training.packing import check_packing
from grass_ray.training.run import Run

KINDS = ("plain", "bucketed", "packed")
CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": lambda: make_llama(layers=2),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL, vocab_size=64, num_key_value_heads=1, head_dim=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, vocab_size=64, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(short_run("full").model)


def make_batches(tokenizer, kind: str, *, rows: int = 53, batch_size: int = 8, accumulation_steps: int = 2) -> Batches:
    data = DataConfig(source=GeneratedSource(), batching=kind)
    return Batches(
        generate("train", rows=rows, seed=0),
        tokenizer,
        data,
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        seed=3,
    )


def documents(batches: Batches, steps: range) -> list[tuple[int, ...]]:
    return [tuple(ids.tolist()) for step in steps for batch in batches[step] for ids in batch.documents()]


def padding_share(batches: Batches, steps: int) -> float:
    taken = [batch for step in range(steps) for batch in batches[step]]
    return 1 - sum(batch.tokens for batch in taken) / sum(batch.input_ids.numel() for batch in taken)


def random_documents(lengths: list[int], vocabulary: int = 64) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [(ids, [IGNORED] * (len(ids) // 3) + ids[len(ids) // 3 :]) for ids in texts]


def losses(model: torch.nn.Module, batch: Batch) -> dict[tuple[int, ...], float]:
    """Each document's summed loss."""
    where = {"position_ids": batch.position_ids} if batch.position_ids is not None else {}
    mask = {} if where else {"attention_mask": batch.attention_mask}
    # a cache, which forward passes make unless told not to, would switch the telling apart off
    logits = model(input_ids=batch.input_ids, use_cache=False, **where, **mask).logits.float()
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    each = each.view(batch.labels.shape)
    found = {}
    for row in range(len(each)):
        positions = torch.arange(each.shape[1]) if batch.position_ids is None else batch.position_ids[row]
        starts = (positions == 0).nonzero().squeeze(1).tolist()
        for start, end in zip(starts, [*starts[1:], each.shape[1]], strict=True):
            end = start + int(batch.attention_mask[row, start:end].sum())
            if end > start:
                found[tuple(batch.input_ids[row, start:end].tolist())] = float(each[row, start:end].sum())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_comes_once_an_epoch_and_steps_can_be_asked_for_in_any_order(tokenizer, kind):
    batches = make_batches(tokenizer, kind)
    seen = documents(batches, range(53))  # eight epochs
    assert set(Counter(seen).values()) == {8}
    if kind != "packed":  # there, the rows of a micro-batch are in another order
        assert len(set(seen[:53])) == len(set(seen[53:106])) == 53
    other = make_batches(tokenizer, kind)
    for step in (30, 2, 17, 2):
        assert documents(other, range(step, step + 1)) == documents(batches, range(step, step + 1))


def test_packed_steps_hold_the_documents_of_plain_ones(tokenizer):
    plain, packed = make_batches(tokenizer, "plain"), make_batches(tokenizer, "packed")
    for step in range(20):
        for one, other in zip(plain[step], packed[step], strict=True):
            assert Counter(map(tuple, map(torch.Tensor.tolist, one.documents()))) == Counter(
                map(tuple, map(torch.Tensor.tolist, other.documents()))
            )
            assert (one.tokens, one.num_labels) == (other.tokens, other.num_labels)


def test_bucketed_and_packed_batches_pad_less(tokenizer):
    shares = {kind: padding_share(make_batches(tokenizer, kind, rows=301), 200) for kind in KINDS}
    assert shares["bucketed"] < 0.4 * shares["plain"]  # in later epochs too, which begin within a micro-batch
    assert shares["packed"] == 0
    order = documents(make_batches(tokenizer, "bucketed", rows=301), range(20))
    lengths = [len(ids) for ids in order]
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)


def test_long_documents_are_packed_into_several_rows_of_about_one_length(monkeypatch):
    monkeypatch.setattr(module, "PACKED_TOKENS", 100)
    texts = random_documents([90, 12, 55, 47, 31, 8, 20, 60])
    batch = pack(texts, 0)
    assert batch.input_ids.shape[0] == 4
    assert batch.tokens == 323 == int(batch.attention_mask.sum())
    assert batch.input_ids.numel() < 1.2 * batch.tokens
    assert sorted(ids.tolist() for ids in batch.documents()) == sorted(ids for ids, _ in texts)
    assert batch.num_labels == pad(texts, 0).num_labels
    assert pack(texts[:1], 0).input_ids.shape == (1, 90)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_documents_loss_is_the_same_packed_and_alone(family, attention, monkeypatch):
    """Measured: equal to 1e-6 of a loss in nats; a document that sees the one before differs by hundredths."""
    monkeypatch.setattr(module, "PACKED_TOKENS", 60)
    torch.manual_seed(1)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation(attention)
    for parameter in model.parameters():
        parameter.data *= 3  # random small weights hardly look at other tokens
    check_packing(model)
    texts = random_documents([21, 9, 33, 14, 5, 17])
    packed = pack(texts, 0)
    assert packed.input_ids.shape[0] == 2
    with torch.no_grad():
        together = losses(model, packed)
        alone = {tuple(ids): losses(model, pad([(ids, labels)], 0))[tuple(ids)] for ids, labels in texts}
        positions = torch.arange(packed.input_ids.shape[1]).expand_as(packed.input_ids)
        seeing = model(input_ids=packed.input_ids, position_ids=positions, use_cache=False).logits
        kept = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits
    assert together == pytest.approx(alone, rel=1e-5)
    assert float((seeing - kept).abs().max()) > 1e-2, "the model must care for other documents, or this shows nothing"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_packed_steps_loss_and_gradients_are_those_of_a_plain_one(tokenizer, method):
    plain, packed = make_batches(tokenizer, "plain"), make_batches(tokenizer, "packed")
    torch.manual_seed(0)
    model = make_llama(vocabulary=len(tokenizer))
    if method == "lora":
        model = add_adapter(model, LoraConfig(rank=4, dropout=0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    found = []
    for batches in (plain, packed):
        loss = accumulate_gradients(model, batches[0], CPU)
        found.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)), "position ids"),
        (lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64)), "position ids"),
    ],
)
def test_models_without_position_ids_are_refused(model, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        check_packing(model())
    assert "data.batching=bucketed" in str(error.value)


def test_a_model_that_only_takes_position_ids_is_refused_too():
    """A Llama that is given a mask in any case, as an own attention would be: documents see each other."""
    model = make_llama(layers=2)
    for parameter in model.parameters():
        parameter.data *= 3
    model.model.register_forward_pre_hook(
        lambda _, args, given: (args, given | {"attention_mask": torch.ones_like(given["input_ids"])}), with_kwargs=True
    )
    with pytest.raises(ConfigError, match="LlamaForCausalLM with sdpa attention gives a document other logits"):
        check_packing(model)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_and_packing_are_refused_before_a_model_is_loaded(method):
    with pytest.raises(ConfigError, match=f"{method} tuning has virtual tokens"):
        check_run(short_run(method, "data.batching=packed"))


def test_the_check_leaves_the_model_and_random_numbers_alone():
    model = make_llama(layers=2)
    model.train()
    model.model.layers[0].eval()
    modes, state = [part.training for part in model.modules()], torch.get_rng_state()
    check_packing(model)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "method", ["grass", pytest.param("ows", marks=pytest.mark.slow), pytest.param("lora", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["bucketed", "packed"])
def test_a_resumed_run_is_the_run_that_never_stopped(method, kind, tmp_path: Path):
    config = short_run(method, f"data.batching={kind}", "training.accumulation_steps=2")
    whole = Run.prepare(config)
    for report in whole.fit():
        whole.save(tmp_path / str(report.step))
    for step in range(1, whole.state.total_steps):
        resumed = Run.prepare(config)
        resumed.restore(tmp_path / str(step))
        for _ in resumed.fit():
            pass
        for series in ("train/loss", "data/padding_share"):
            assert resumed.state.series[series] == whole.state.series[series]
        for one, other in zip(resumed.state.model.parameters(), whole.state.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_record_says_how_rows_were_batched_and_how_much_was_padding():
    metrics, shares, losses_by_kind = {}, {}, {}
    for kind in KINDS:
        config = short_run("full", f"data.batching={kind}")
        run = Run.prepare(config)
        shares[kind] = [report.padding_share for report in run.fit()]
        metrics[kind] = run.outcome().metrics
        losses_by_kind[kind] = metrics[kind]["train/loss"]
        assert config.flatten()["data.batching"] == kind
        assert metrics[kind]["data/padding_share"] == pytest.approx(sum(shares[kind]) / len(shares[kind]))
    assert metrics["plain"]["data/padding_share"] > metrics["bucketed"]["data/padding_share"] > 0
    assert metrics["packed"]["data/padding_share"] == 0
    assert losses_by_kind["packed"] == pytest.approx(losses_by_kind["plain"], rel=1e-3)
    assert losses_by_kind["bucketed"] != losses_by_kind["plain"]
    assert len({short_run("full", f"data.batching={kind}").fingerprint for kind in KINDS}) == 3


def test_plain_batches_are_what_they_were_before_there_were_others(tokenizer):
    """The order of rows is a contract: recorded runs must stay reproducible."""
    rows = generate("train", rows=53, seed=0)
    batches = make_batches(tokenizer, "plain")
    order = torch.randperm(53, generator=keyed_generator("epoch", 3, 0)).tolist()
    firsts = [tuple(next(iter(pad([batches._rows[row]], 0).documents())).tolist()) for row in order]
    assert documents(batches, range(6))[:48] == firsts[:48]
    assert len(rows) == 53
    assert all(batch.position_ids is None for batch in batches[0])


def test_summed_loss_sees_packed_positions(tokenizer):
    model = make_llama(vocabulary=len(tokenizer))
    for parameter in model.parameters():
        parameter.data *= 3
    (batch,) = make_batches(tokenizer, "packed", accumulation_steps=1)[0]
    blind = Batch(batch.input_ids, batch.attention_mask, batch.labels, batch.tokens)
    with torch.no_grad():
        assert float(summed_loss(model, batch)) != pytest.approx(float(summed_loss(model, blind)), rel=1e-4)
