"""Model folders as people have them: what loads, and what is refused in one sentence before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import short_run
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from grass_ray.config import ConfigError, ModelConfig
from grass_ray.memory.plan import Planner
from grass_ray.training.checks import check_run
from grass_ray.training.models import check_lengths, check_model, load_model
from grass_ray.training.shapes import build_shape

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "plain"
    loaded = load_model(ModelConfig(name="tiny"))
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def changed(plain: Path, folder: Path, change: Change) -> ModelConfig:
    shutil.copytree(plain, folder)
    change(folder)
    return ModelConfig(name=str(folder))


def edit(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def write(name: str, text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def all_of(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def remove(*patterns: str) -> Change:
    def change(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def cut(name: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def weights(of: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(of(load_file(path)), path, metadata={"format": "pt"})

    return change


def as_bin(of: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda tensors: tensors) -> Change:
    def change(folder: Path) -> None:
        torch.save(of(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return change


def in_shards(*, without: str = "none") -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        load_model(ModelConfig(name="tiny")).model.save_pretrained(folder, max_shard_size="200KB")
        for path in folder.glob(without):
            path.unlink()

    return change


def with_token(**tokens: Any) -> Change:
    def change(folder: Path) -> None:
        tokenizer = load_model(ModelConfig(name="tiny")).tokenizer
        tokenizer.add_special_tokens(tokens)
        tokenizer.save_pretrained(folder)

    return change


def with_word(folder: Path) -> None:
    tokenizer = load_model(ModelConfig(name="tiny")).tokenizer
    tokenizer.add_tokens(["Response"])
    tokenizer.save_pretrained(folder)


def other_model(model: Any) -> Change:
    def change(folder: Path) -> None:
        remove("config.json", "model*")(folder)
        model.save_pretrained(folder)

    return change


def mixtral(folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=512)
    other_model(MixtralForCausalLM(config))(folder)


def without_an_expert(folder: Path) -> None:
    mixtral(folder)
    weights(lambda own: {name: t for name, t in own.items() if "experts.1.w1" not in name})(folder)


GPT2_SIZES = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}


def old_gpt2(folder: Path) -> None:
    """As GPT-2's own files are: no prefix, and causal masks among the weights."""
    other_model(GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)))(folder)
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    weights(lambda own: {name.removeprefix("transformer."): t for name, t in own.items()} | masks)(folder)


def picture_token(folder: Path) -> None:
    """As Gemma 3's tokenizer: a stand-in for pictures that the text model has no embedding for."""
    with_token(additional_special_tokens=["<image>"])(folder)
    edit("tokenizer_config.json", extra_special_tokens={"image_token": "<image>"})(folder)


INV_FREQ = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(4)}


def no_head(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in own.items() if name != "lm_head.weight"}


def tied(folder: Path) -> None:
    weights(no_head)(folder)
    edit("config.json", tie_word_embeddings=True)(folder)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: None, id="plain"),
        pytest.param(as_bin(), id="bin"),
        pytest.param(in_shards(), id="shards"),
        pytest.param(tied, id="tied-head-absent"),
        pytest.param(weights(lambda own: own | INV_FREQ), id="old-rotary-buffers"),
        pytest.param(old_gpt2, id="old-causal-masks"),
        pytest.param(mixtral, id="experts-one-by-one"),
        pytest.param(picture_token, id="picture-token"),
        pytest.param(edit("config.json", quantization_config=None), id="null-quantisation"),
    ],
)
def test_what_is_legitimately_absent_or_left_over_loads(change: Change, plain: Path, tmp_path: Path) -> None:
    config = changed(plain, tmp_path / "model", change)
    check_model(config)
    assert not any(parameter.is_meta for parameter in load_model(config).model.parameters())


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
BERT_SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
T5_SIZES = {"vocab_size": 512, "d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16}
PREFIX = "base_model.model."
REFUSED: dict[str, tuple[Change, str]] = {
    "prefixed": (
        weights(lambda own: {PREFIX + name: t for name, t in own.items()}),
        "39 missing: lm_head.weight.* and 36 more; 39 left over: base_model.model.lm_head.weight",
    ),
    "bin-missing": (as_bin(no_head), "1 missing: lm_head.weight"),
    "bin-nested": (as_bin(lambda own: {"state_dict": own}), "39 missing.*left over: state_dict"),
    "bin-cut": (
        all_of(as_bin(), cut("pytorch_model.bin")),
        "cannot read .*model.bin",
    ),
    "head-absent": (weights(no_head), "1 missing: lm_head.weight"),
    "layer-left-over": (edit("config.json", num_hidden_layers=3), "9 left over: model.layers.3.input"),
    "layer-missing": (edit("config.json", num_hidden_layers=5), "9 missing: model.layers.4.input"),
    "value-head": (weights(lambda own: own | {"v_head.weight": torch.ones(4)}), "1 left over: v_head.weight"),
    "other-shape": (
        edit("config.json", vocab_size=600),
        r"2 of another shape: lm_head.weight \(512, 64\) inst",
    ),
    "expert-missing": (without_an_expert, "do not fit.*experts.gate_up_proj"),
    "no-weights": (remove("model.safetensors"), "has no weights"),
    "half-downloaded": (cut("model.safetensors"), "cannot read .*model.safetensors: .*; copy or download it again"),
    "lfs-pointer": (write("model.safetensors", POINTER), "model.safetensors in .*LFS pointer.*git lfs pull"),
    "lfs-tokenizer": (write("tokenizer.json", POINTER), "tokenizer.json in .*LFS pointer"),
    "shard-missing": (in_shards(without="model-00002*"), "1 of the 5 weight files .* model-00002-of-00005"),
    "index-empty": (
        all_of(remove("model.safetensors"), write("model.safetensors.index.json", "{}")),
        "lists no weights",
    ),
    "integers": (weights(lambda own: {name: t.to(torch.int8) for name, t in own.items()}), r"quantised.*torch.int8"),
    "gptq": (edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
    "bitsandbytes-4": (edit("config.json", quantization_config={"quant_method": "bitsandbytes"}), "quantised"),
    "bitsandbytes-8": (edit("config.json", quantization_config={"load_in_8bit": True}), "quantised"),
    "fp8": (edit("config.json", quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    "adapter": (
        all_of(remove("*"), write("adapter_config.json", '{"base_model_name_or_path": "o/b"}')),
        "adapter of o/b, not a model.*grass-ray export RUN --output MODEL",
    ),
    "adapter-inside": (write("adapter_config.json", '{"peft_type": "LORA"}'), "LORA adapter of"),
    "run": (
        all_of(remove("*"), write("config.yaml", ""), lambda folder: (folder / "checkpoint").mkdir()),
        "a trained run, not a model.*grass-ray export",
    ),
    "delta": (all_of(remove("*"), write("delta.json", "{}")), "a delta, not a model"),
    "gguf": (all_of(remove("*"), write("m.gguf", "GGUF")), "GGUF"),
    "empty": (remove("*"), "has no config.json"),
    "config-broken": (write("config.json", "{not"), "config.json is not JSON"),
    "config-list": (write("config.json", "[1]"), "config.json holds no JSON object"),
    "unknown-type": (edit("config.json", model_type="grassformer"), "model type `grassformer`"),
    "own-code": (
        edit("config.json", model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}),
        "code of its own.*model.trust_remote_code=true",
    ),
    "encoder": (other_model(BertLMHeadModel(BertConfig(**BERT_SIZES, intermediate_size=32))), "not a decoder-only"),
    "encoder-decoder": (other_model(T5ForConditionalGeneration(T5Config(**T5_SIZES))), "not a decoder-only"),
    "no-tokenizer": (remove("tok*"), "has no tokenizer"),
    "no-vocabulary": (
        all_of(other_model(GPT2LMHeadModel(GPT2Config(**GPT2_SIZES))), remove("tok*")),
        "has no tokenizer",
    ),
    "tokenizer-cut": (cut("tokenizer.json"), "has no tokenizer that can be used"),
    "no-eos": (edit("tokenizer_config.json", eos_token=None), "no end token.*eos_token"),
    "eos-beyond": (
        with_token(eos_token="<|im_end|>"),
        r"makes id 512 \('<\|im_end\|>'\), but .* 512 embeddings",
    ),
    "pad-beyond": (with_token(pad_token="[PAD]"), "makes id 512"),
    "chat-beyond": (with_token(additional_special_tokens=["<|a|>", "<|b|>"]), "makes id 512 .* and 1 more"),
    "word-beyond": (with_word, r"makes id 512 \('Response'\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_way_to_load_refuses_in_one_sentence(case: str, plain: Path, tmp_path: Path) -> None:
    change, said = REFUSED[case]
    config = changed(plain, tmp_path / "model", change)
    for way in (check_model, load_model):
        with pytest.raises(ConfigError, match=said) as error:
            way(config)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=said):
        check_run(short_run("full").model_copy(update={"model": config}))


@pytest.mark.parametrize("case", ["gptq", "adapter", "encoder-decoder", "unknown-type", "own-code"])
def test_no_plan_is_made_of_what_cannot_be_trained(case: str, plain: Path, tmp_path: Path) -> None:
    change, said = REFUSED[case]
    config = changed(plain, tmp_path / "model", change)
    for way in (build_shape, lambda config: Planner(config, "cpu")):
        with pytest.raises(ConfigError, match=said):
            way(config)


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub() -> None:
    for way in (check_model, load_model, build_shape):
        with pytest.raises(ConfigError, match="there is no model folder '/no/model'"):
            way(ModelConfig(name="/no/model"))


@pytest.mark.parametrize("kind", ["learned", "rotary"])
def test_rows_and_answers_need_positions(kind: str, plain: Path, tmp_path: Path) -> None:
    gpt2 = other_model(GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, n_positions=96)))
    model = changed(
        plain, tmp_path / "m", gpt2 if kind == "learned" else edit("config.json", max_position_embeddings=96)
    )

    def run(method: str, *overrides: str) -> Any:
        return short_run(method, *overrides).model_copy(update={"model": model})

    check_lengths(run("full", "data.max_length_tokens=96"))
    with pytest.raises(ConfigError, match=r"96 positions, but training rows take up to 97; .* at most 96"):
        check_run(run("full", "data.max_length_tokens=97"))
    with pytest.raises(ConfigError, match=r"take up to 96 and 20 virtual; set data.max_length_tokens to at most 76"):
        check_lengths(run("prompt", "data.max_length_tokens=96"))
    check_lengths(run("base", "data.max_length_tokens=97", "training.steps=0"))
    long = run("base", "training.steps=0", "data.suite=arithmetic", "data.tasks=[gsm8k]")
    with pytest.raises(ConfigError, match="answers of gsm8k take up to 256"):
        check_lengths(long)
    check_lengths(long.override({"evaluation.test": False}))


COMMIT = "0123456789012345678901234567890123456789"


def test_a_hub_model_is_checked_alike_once_it_is_here(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def download(name: str, change: Change) -> ModelConfig:
        home = tmp_path / f"models--org--{name}"
        changed(plain, home / "snapshots" / COMMIT, change)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)
        return ModelConfig(name=f"org/{name}")

    assert load_model(download("plain", lambda folder: None)).revision == COMMIT
    check_model(download("weights-to-come", remove("model.safetensors")))
    for case in ("prefixed", "half-downloaded", "gptq", "adapter", "pad-beyond"):
        change, said = REFUSED[case]
        with pytest.raises(ConfigError, match=said):
            check_model(download(case, change))
