"""Taking models apart, and refusing those that are no decoders or whose wrapping cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from small import backward, make_llama
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from grass_ray import LayerwiseAdamW, UniformSampler
from grass_ray.layerwise.stack import decay_parameters, find_decoder_stack


@pytest.fixture
def _process_group() -> Iterator[None]:
    """A group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def names(model: nn.Module, parameters: tuple[nn.Parameter, ...]) -> list[str]:
    return [name for name, p in model.named_parameters() if any(p is q for q in parameters)]


def test_every_parameter_is_in_exactly_one_part() -> None:
    for tied in (False, True):
        model = make_llama(tied=tied)
        stack = find_decoder_stack(model)
        assert stack.path == "model.layers"
        assert stack.num_layers == 4
        parts = [*stack.layers, stack.embeddings, stack.head, stack.norm, stack.unmanaged]
        ids = [id(p) for part in parts for p in part]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
        assert names(model, stack.embeddings) == ["model.embed_tokens.weight"]
        assert names(model, stack.head) == ([] if tied else ["lm_head.weight"]), "a tied head is the embedding"
        assert names(model, stack.norm) == ["model.norm.weight"]


def test_weight_decay_leaves_norms_and_biases_alone() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64))
    decayed = names(model, tuple(decay_parameters(model)))
    assert "transformer.h.0.attn.c_attn.weight" in decayed
    assert not [name for name in decayed if "bias" in name or "ln_" in name]
    assert all(p.ndim >= 2 for p in decay_parameters(model))
    assert isinstance(model.transformer.h[0].ln_1.weight, torch.Tensor)


# ---------------------------------------------------------------------------------------------- modules of one's own


class Two(nn.Module):
    """Two lists of blocks, and nothing that says which one is meant."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.right = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)


def test_ambiguity_fails_and_lists_what_was_found() -> None:
    with pytest.raises(ValueError, match=r"2 possible decoder stacks.*left \(2 x Linear\), right \(3 x Linear\)"):
        find_decoder_stack(Two())
    with pytest.raises(ValueError, match="has no list of layers called 'middle'"):
        find_decoder_stack(Two(), "middle")
    with pytest.raises(ValueError, match="no decoder stack in Linear"):
        find_decoder_stack(nn.Linear(2, 2))


def test_the_list_that_was_not_named_is_unmanaged() -> None:
    model = Two()
    stack = find_decoder_stack(model, "right")
    assert stack.num_layers == 3
    assert names(model, stack.head) == ["head.weight", "head.bias"]
    assert names(model, stack.unmanaged) == ["left.0.weight", "left.0.bias", "left.1.weight", "left.1.bias"]


def test_a_model_shortened_by_hand_is_taken_as_it_is() -> None:
    """Its configuration still speaks of four layers, but there is only one list of blocks."""
    model = make_llama()
    model.model.layers = model.model.layers[:3]
    assert find_decoder_stack(model).num_layers == 3


# ------------------------------------------------------------------------------------------------- what is refused


def test_refuses_encoders_and_encoder_decoders_and_classifiers() -> None:
    bert = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64)
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=64))
    classifier = LlamaForSequenceClassification(make_llama().config)
    no_decoder = (BertForMaskedLM(bert), BertModel(bert), BertLMHeadModel(bert), t5, classifier)
    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64))
    xlm = XLMWithLMHeadModel(XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4))
    for model in (*no_decoder, xlnet, xlm):
        with pytest.raises(ValueError, match=f"{type(model).__name__} is not a decoder-only language model.*AutoModel"):
            find_decoder_stack(model)


def test_a_kind_of_model_that_can_be_both_is_taken_as_a_decoder_when_it_says_so() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    assert find_decoder_stack(BertLMHeadModel(BertConfig(**sizes, vocab_size=64, is_decoder=True))).num_layers == 2


def test_refuses_quantised_weights_unless_adapters_train_beside_them() -> None:
    model = make_llama()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=r"the model is quantised.*bfloat16"):
        LayerwiseAdamW(model, UniformSampler(num_active_layers=1, period=2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert find_decoder_stack(adapted).num_layers == 4


@pytest.mark.usefixtures("_process_group")
def test_refuses_ddp_and_fsdp1_and_tensor_parallelism() -> None:
    instead = r"bare model and LayerwiseOptions\(process_gr"
    with pytest.raises(ValueError, match=rf"the model is wrapped in DistributedDataParallel.*{instead}"):
        find_decoder_stack(DistributedDataParallel(make_llama()))
    with pytest.raises(ValueError, match="the model is wrapped in DataParallel"):
        find_decoder_stack(nn.DataParallel(make_llama()))
    flat = FullyShardedDataParallel(make_llama(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the model is wrapped in FullyShardedDataParallel.*FSDP2 \(fully_shard\)"):
        find_decoder_stack(flat)
    with pytest.raises(ValueError, match=r"the inside of a FullyShardedDataParallel.*FSDP2 \(fully_shard\) instead"):
        find_decoder_stack(flat.module)
    inside = make_llama()
    inside.model.layers[1] = FullyShardedDataParallel(inside.model.layers[1], device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"model.layers.1 is wrapped in FullyShardedDataParallel"):
        find_decoder_stack(inside)

    parallel = make_llama()
    for layer in parallel.model.layers:
        parallelize_module(layer, dist.init_device_mesh("cpu", (1,)), {"mlp.up_proj": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"split over workers by tensor parallelism.*bare model"):
        find_decoder_stack(parallel)


@pytest.mark.usefixtures("_process_group")
def test_takes_a_model_apart_that_fsdp2_has_sharded() -> None:
    """Sizes are those of whole parameters."""
    sharded, plain = make_llama(), find_decoder_stack(make_llama())
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (1,)))
    stack = find_decoder_stack(sharded)
    assert stack.num_layers == plain.num_layers
    for part in ("embeddings", "head", "norm"):
        assert [p.shape for p in getattr(stack, part)] == [p.shape for p in getattr(plain, part)]
    for mine, theirs in zip(stack.layers, plain.layers, strict=True):
        assert [p.shape for p in mine] == [p.shape for p in theirs]


def test_refuses_parameters_without_elements() -> None:
    """As ZeRO and FSDP1 leave them between forwards."""
    model = make_llama()
    model.model.layers[0].mlp.up_proj.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"1 parameters have no elements \(model.layers.0.mlp.up_proj.weight\).*ZeRO"):
        find_decoder_stack(model)


def test_refuses_deepspeed() -> None:
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(ValueError, match=r"the model is wrapped in DeepSpeedEngine.*bare model"):
        find_decoder_stack(DeepSpeedEngine(make_llama()))
    partitioned = make_llama()
    for index, parameter in enumerate(partitioned.parameters()):
        parameter.ds_id = index
    with pytest.raises(ValueError, match=r"partitioned by DeepSpeed ZeRO-3.*load the model without ZeRO-3"):
        find_decoder_stack(partitioned)


def test_refuses_a_model_compiled_as_a_whole() -> None:
    in_place, inner = make_llama(), make_llama()
    in_place.compile(backend="eager")
    inner.model = torch.compile(inner.model, backend="eager")
    for model in (torch.compile(make_llama(), backend="eager"), in_place):
        with pytest.raises(ValueError, match=r"the model is compiled.*for layer in model.model.layers: layer.compile"):
            find_decoder_stack(model)
    with pytest.raises(ValueError, match=r"model is compiled as a whole \(OptimizedModule\)"):
        find_decoder_stack(inner)


def compile_in_place(layers: Any) -> None:
    for layer in layers:
        layer.compile(backend="eager")


def replace_by_compiled(layers: Any) -> None:
    for index in (1, 3):
        layers[index] = torch.compile(layers[index], backend="eager")


@pytest.mark.long
@pytest.mark.parametrize("compile_layers", [compile_in_place, replace_by_compiled])
def test_layers_compiled_one_by_one_train_as_uncompiled_ones(compile_layers: Any) -> None:
    torch._dynamo.reset()
    plain, compiled = make_llama(), make_llama()
    compile_layers(compiled.model.layers)
    for model in (plain, compiled):
        optimizer = LayerwiseAdamW(model, UniformSampler(2, 1, seed=3), lr=1e-3)
        for step in range(5):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    for (name, left), right in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(left, right, msg=name)
