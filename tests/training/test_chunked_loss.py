"""The loss in chunks against the cross-entropy of all logits: value, gradients, hooks, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import peft
import pytest
import torch
import torch.nn.functional as functional
from small import make_llama, make_optimizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from grass_ray import GradNormSampler
from grass_ray.config import LoraConfig, PrefixConfig, PromptConfig
from grass_ray.layerwise.importance import GradNormMeter
from grass_ray.layerwise.stack import find_decoder_stack
from grass_ray.memory.step import SteppedModel, StepShape, profile_step
from grass_ray.optim.recompute import Recompute
from grass_ray.tasks.inference import lm_head
from grass_ray.tasks.inference.lm_head import Head
from grass_ray.training.adapters import add_adapter
from grass_ray.training.batches import IGNORED, Batch
from grass_ray.training.chunked_loss import chunked_cross_entropy
from grass_ray.training.loss import accumulate_gradients, summed_loss
from grass_ray.training.metrics import MemoryMeter

CPU = torch.device("cpu")
VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
# what the head does differs: bias, scale, soft cap, two layers, a cast; tied or not
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "mistral": SIZES,
    "mixtral": SIZES | {"num_local_experts": 4},
    "gemma": SIZES | {"head_dim": 8},
    "gemma2": SIZES | {"head_dim": 8, "final_logit_softcapping": 0.5},
    "gemma3_text": SIZES | {"head_dim": 8},
    "phi": SIZES,
    "phi3": SIZES,
    "cohere": SIZES | {"logit_scale": 4.0},
    "granite": SIZES | {"logits_scaling": 0.25},
    "gpt2": GPT2,
    "gpt_neox": {key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
    "opt": {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32}
    | {"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "modernbert-decoder": SIZES | {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "cls_token_id": 4},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of so few positions that every batch below takes several, the last one not full."""
    monkeypatch.setattr(lm_head, "CHUNK_POSITIONS", 5)
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 0)


def make_batch(seed: int = 0) -> Batch:
    """Three rows of different lengths with 18 labels at different places."""
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    labels[:, :3] = labels[1, 8:] = labels[2, :9] = IGNORED
    mask[1, 9:] = ids[1, 9:] = 0
    batch = Batch(ids, mask, labels, tokens=int(mask.sum()))
    assert batch.num_labels == 15
    return batch


def plain_loss(model: Any, batch: Batch) -> Tensor:
    """The mean cross-entropy of all logits."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logits = logits[:, -batch.labels.shape[1] :].float()
    loss = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss / batch.num_labels


def chunked_loss(model: Any, batch: Batch) -> Tensor:
    return summed_loss(model, batch, divisor=batch.num_labels)


def loss_and_gradients(model: Any, of: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # dropout
    loss = of(model, make_batch())
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_as_plain(model: nn.Module, tolerance: float = 1e-5) -> dict[str, Tensor]:
    """Loss and all gradients are those of the plain loss; the gradients."""
    expected, expected_gradients = loss_and_gradients(model, plain_loss)
    found, gradients = loss_and_gradients(model, chunked_loss)
    assert lm_head.splits(model)
    assert found == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(gradient.norm()) for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        assert gradient.dtype == expected_gradients[name].dtype
        difference = float((gradient - expected_gradients[name]).norm())
        assert difference <= tolerance * max(float(expected_gradients[name].norm()), 1e-3 * largest), name
    return gradients


# ------------------------------------------------------------------------------------------------------- every head


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_every_family(family: str, tied: bool) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).train()
    head = model.get_output_embeddings()
    head.weight.data *= 5
    gradients = assert_as_plain(model)
    assert tied or any(model.get_parameter(name) is head.weight for name in gradients)


@pytest.mark.parametrize("frozen", ["head", "layers", "all but the embeddings", "all but the top layer"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    model = make_llama()
    model.requires_grad_(not frozen.startswith("all"))
    if frozen == "head":
        model.lm_head.requires_grad_(False)
    elif frozen == "layers":
        model.model.requires_grad_(False)
    elif frozen == "all but the embeddings":
        model.model.embed_tokens.requires_grad_(True)
    else:
        model.model.layers[-1].requires_grad_(True)
    gradients = assert_as_plain(model)
    assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}


LORA = {"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False}
ADAPTERS: dict[str, Any] = {
    "lora on the head": peft.LoraConfig(**LORA, target_modules=["q_proj", "lm_head"]),
    "dora on the head": peft.LoraConfig(**LORA, target_modules=["q_proj", "lm_head"], use_dora=True),
    "a trained head": peft.LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trained tokens": peft.LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_on_the_head_and_virtual_tokens(adapter: str, tied: bool) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(make_llama(tied=tied), ADAPTERS[adapter]).train()
    gradients = assert_as_plain(model)
    if adapter.endswith("on the head"):
        assert any("lm_head" in name for name in gradients)


@pytest.mark.parametrize("adapter", [None, LoraConfig(), PromptConfig(num_virtual_tokens=3), PrefixConfig()])
def test_the_head_stays_the_same_under_checkpointing(adapter: Any) -> None:
    model = add_adapter(make_llama(), adapter).train()
    _, expected = loss_and_gradients(model, chunked_loss)
    Recompute(find_decoder_stack(model).modules).switch(True)
    _, found = loss_and_gradients(model, chunked_loss)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_low_precision_adds_chunks_in_float32() -> None:
    """Gradients in bfloat16 are as near to those of float32 as the plain loss's are, in more than 50 chunks."""
    torch.manual_seed(0)
    features, positions = 32, 256
    weight, hidden = torch.randn(VOCABULARY, features).bfloat16(), torch.randn(1, positions, features).bfloat16()
    labels = torch.randint(0, VOCABULARY, (positions,))

    def gradient(dtype: torch.dtype, chunked: bool) -> Tensor:
        model = make_llama(hidden=features).to(dtype)
        model.lm_head.weight.data = weight.to(dtype)
        model.model.forward = lambda **options: model_output(hidden.to(dtype))  # type: ignore[method-assign]
        batch = Batch(labels[None], torch.ones(1, positions), labels[None], tokens=positions)
        (chunked_loss if chunked else plain_loss)(model, batch).backward()
        assert model.lm_head.weight.grad.dtype == dtype
        return model.lm_head.weight.grad.float()

    exact = gradient(torch.float32, chunked=False)
    plain, found = (float((gradient(torch.bfloat16, c) - exact).norm() / exact.norm()) for c in (False, True))
    assert plain < 5e-3
    assert found < 1.5 * plain


def model_output(hidden: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return BaseModelOutputWithPast(last_hidden_state=hidden)


# --------------------------------------------------------------------------------------------- what others see of it


def test_hooks_see_each_gradient_once_and_whole() -> None:
    model = make_llama()
    arrived: Counter[str] = Counter()
    seen: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.__setitem__(name, gradient.clone()))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.update([name]))
    _, gradients = loss_and_gradients(model, chunked_loss)
    assert arrived == Counter(dict.fromkeys(gradients, 1))
    assert all(torch.equal(seen[name], gradient) for name, gradient in gradients.items())


def test_a_micro_batch_in_chunks_is_one_measurement() -> None:
    model = make_llama()
    meter = GradNormMeter([[model.lm_head.weight], list(model.model.layers.parameters())])
    norms = []
    for of in (plain_loss, chunked_loss):
        loss_and_gradients(model, of)
        assert meter.micro_batches == 1
        norms.append(meter.collect())
    torch.testing.assert_close(norms[1], norms[0])


@pytest.mark.parametrize("train_head", [False, True])
def test_training_layer_by_layer_takes_the_same_steps(train_head: bool) -> None:
    """Probing, freezing and thawing included; the gradients are those of the plain loss up to rounding."""
    weights = []
    for of in (plain_loss, chunked_loss):
        model = make_llama()
        sampler = GradNormSampler(2, 2, probing_steps=2, refresh_period=4, seed=1)
        optimizer = make_optimizer(model, sampler, lr=1e-3, train_head=train_head)
        for step in range(8):
            of(model, make_batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append({name: p.detach() for name, p in model.named_parameters()})
    assert (not torch.equal(weights[0]["lm_head.weight"], make_llama().lm_head.weight)) == train_head
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=2e-5)


def test_several_micro_batches_add_up() -> None:
    model = make_llama()
    batches = [make_batch(0), make_batch(1)]
    loss = accumulate_gradients(model, batches, CPU)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = (plain_loss(model, batches[0]) + plain_loss(model, batches[1])) / 2
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_without_gradients_there_is_no_graph_and_the_same_loss() -> None:
    model = make_llama()
    with_graph = chunked_loss(model, make_batch())
    with torch.no_grad():
        without = chunked_loss(model, make_batch())
    assert with_graph.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_graph, without)
    model.requires_grad_(False)
    assert not chunked_loss(model, make_batch()).requires_grad


def test_the_gradient_of_another_loss_of_it_is_scaled() -> None:
    model = make_llama()
    _, expected = loss_and_gradients(model, lambda model, batch: 3 * plain_loss(model, batch))
    _, found = loss_and_gradients(model, lambda model, batch: 3 * chunked_loss(model, batch))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_second_backward_is_refused() -> None:
    loss = chunked_loss(make_llama(), make_batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


class Mixing(LlamaForCausalLM):
    """The logits of a position depend on those before it, so its head cannot be run on its own."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits.cumsum(1)
        return output


def test_a_model_without_a_head_of_its_own_is_trained_plainly() -> None:
    torch.manual_seed(0)
    model = Mixing(make_llama().config)
    with pytest.warns(UserWarning, match="logits of Mixing"):
        found, gradients = loss_and_gradients(model, chunked_loss)
    expected, expected_gradients = loss_and_gradients(model, plain_loss)
    assert found == expected
    assert gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected_gradients.items())


# ------------------------------------------------------------------------------------------------- work and memory


def test_the_head_runs_at_labels_only_and_once() -> None:
    model = make_llama()
    lm_head.splits(model)
    positions: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: positions.append(output.shape[-2]))
    chunked_loss(model, make_batch()).backward()
    assert positions == [0, 5, 5, 5]


@pytest.mark.parametrize("trained", [False, True])
def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    """Measured, and as the plan says: beyond one chunk no tensor grows with positions times vocabulary."""
    monkeypatch.setattr(lm_head, "CHUNK_POSITIONS", 16)
    model = make_llama(layers=1, vocabulary=4000)
    model.lm_head.requires_grad_(trained)
    peaks: dict[str, list[float]] = {}
    for tokens in (65, 129):
        ids = torch.randint(0, 4000, (2, tokens), generator=torch.Generator().manual_seed(0))
        batch = Batch(ids, torch.ones_like(ids), ids.roll(-1, 1), tokens=ids.numel())
        for name, of in (("plain", plain_loss), ("chunked", chunked_loss)):
            of(model, batch).backward()  # the head is looked for, and no gradient is left to be made
            meter = MemoryMeter(CPU)
            with meter.watch((), closely=True):
                of(model, batch).backward()
            peaks.setdefault(name, []).append(meter.peak_allocated_gib * 2**30)
            model.zero_grad(set_to_none=True)
    logits = 64 * 2 * 4000 * 4  # what 64 more tokens in each of two rows add to all logits, in float32
    assert peaks["plain"][1] - peaks["plain"][0] > 2 * logits
    assert peaks["chunked"][1] - peaks["chunked"][0] < 0.2 * logits
    assert peaks["chunked"][1] < 0.4 * peaks["plain"][1]
    stepped = SteppedModel(model.to("meta"))
    parts = [profile_step(stepped, StepShape(rows=2, tokens=n), device="cpu").peak for n in (65, 129)]
    assert parts[0].logits == parts[1].logits


@pytest.mark.parametrize("last", [torch.tanh, lambda logits: 3 * torch.tanh(logits), torch.square, torch.sigmoid])
def test_logits_that_backward_needs_are_left_alone(last: Callable[[Tensor], Tensor]) -> None:
    """What makes them may keep its result for backward, and the probabilities take only the place of the logits."""
    torch.manual_seed(0)
    head, labels = OneProduct(torch.randn(5, 6), last), torch.arange(9) % 5
    hidden = torch.randn(9, 6, requires_grad=True)
    functional.cross_entropy(head(hidden), labels, reduction="sum").backward()
    again = hidden.detach().clone().requires_grad_()
    chunked_cross_entropy(again, labels, cast(Head, head)).backward()
    torch.testing.assert_close(again.grad, hidden.grad)


class OneProduct:
    """A head of one product, and of something that comes last."""

    def __init__(self, weight: Tensor, last: Callable[[Tensor], Tensor]) -> None:
        self.chunk = 4
        self.parameters: list[Tensor] = []
        self._weight, self._last = weight, last

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._last(hidden @ self._weight.T)

    @contextmanager
    def stand_ins(self) -> Iterator[list[Tensor]]:
        yield []
