"""A delta holds the tensors that changed and no other; on its base it is the trained model, elsewhere an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import make_llama
from torch import nn

from grass_ray.config import ConfigError, ModelConfig, RunConfig
from grass_ray.export import delta as delta_module
from grass_ray.export.delta import apply_delta, export_delta, export_from_delta, save_delta
from grass_ray.export.model import export_adapter, export_run, find_run
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.training.models import load_model
from grass_ray.training.run import Run

LLAMA = ModelConfig(name="some/llama", revision="abc123")


def make_config(method: str, model: ModelConfig, *overrides: str) -> RunConfig:
    config = RunConfig(method=METHODS[method].config, model=model)
    settings = ["training.steps=6", "training.warmup_steps=0", "data.source.train_rows=64", "data.source.test_rows=8"]
    settings.append("method.optimizer.lr=0.01")
    if method in ("lisa", "grass"):
        settings += ["method.sampler.period=3", "method.sampler.num_active_layers=1"]
    small = {"c3a": "method.adapter.block_size=16", "fourierft": "method.adapter.n_frequency=100"}
    settings += [small[method]] if method in small else []
    if method == "grass":
        settings += ["method.sampler.probing_steps=2"]
    return config.override(parse([*settings, *overrides]))


def train(config: RunConfig) -> Run:
    run = Run.prepare(config, torch.device("cpu"))
    for _ in run.fit():
        pass
    return run


def train_into(folder: Path, config: RunConfig) -> Run:
    """A run's folder as ``grass-ray train`` leaves it, as far as export reads it."""
    run = train(config)
    folder.mkdir()
    config.save(folder / "config.yaml")
    run.save(folder / "checkpoint")
    return run


def save_model(folder: Path, *, tied: bool) -> str:
    """A small Llama with the tokenizer of ``tiny`` in ``folder``; its name for a configuration."""
    make_llama(vocabulary=512, tied=tied).save_pretrained(folder)
    load_model(ModelConfig(name="tiny")).tokenizer.save_pretrained(folder)
    return str(folder)


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of the model under each of its names, as raw bytes."""
    return {name: tensor.detach().view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


def change_layers(model: nn.Module, *layers: int) -> nn.Module:
    """Add to the MLP's down projection of ``layers``."""
    with torch.no_grad():
        for layer in layers:
            model.model.layers[layer].mlp.down_proj.weight.add_(1)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A delta of layers 1 and 3 on ``make_llama()``."""
    save_delta(make_llama(), change_layers(make_llama(), 1, 3), tmp_path / "delta", base_model=LLAMA)
    return tmp_path / "delta"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lisa", "grass"])
def test_base_and_delta_are_the_trained_model(method: str, dtype: str, tied: bool, tmp_path: Path) -> None:
    config = make_config(method, ModelConfig(name=save_model(tmp_path / "base", tied=tied), dtype=dtype))
    run = train_into(tmp_path / "run", config)
    trained = bits(run.state.model)
    delta = export_delta(tmp_path / "run", tmp_path / "delta")

    model = load_model(config.model).model
    changed = differing(bits(model), trained)
    written = load_file(tmp_path / "delta" / "delta.safetensors")
    assert written.keys() == changed - ({"lm_head.weight"} if tied else set())
    assert delta.changed.keys() == written.keys()
    visited = {layer for layer, visits in enumerate(run.outcome().layers.visits) if visits}
    assert set(delta.layers) == visited
    assert {int(name.split(".")[2]) for name in written if ".layers." in name} == visited
    if method == "grass":
        assert len(visited) <= 2
        assert not delta.others, "embeddings, head and norm do not train"
    else:
        assert "model.embed_tokens.weight" in delta.others
    sizes = {p: p.numel() * p.element_size() for p in run.state.model.parameters()}
    assert delta.model_bytes == sum(sizes.values()), "tied tensors count once"
    assert delta.delta_bytes == sum(value.numel() * value.element_size() for value in written.values())

    apply_delta(model, tmp_path / "delta")
    assert not differing(bits(model), trained)

    by_hand = load_model(config.model).model
    by_hand.load_state_dict(written, strict=False)
    assert not differing(bits(by_hand), trained), "the README's way without this package"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_layer_of_the_built_in_model_there_and_back(dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config("grass", ModelConfig(name="tiny", dtype=dtype), "method.sampler.period=6")
    run = train_into(tmp_path / "run", config)
    delta = export_delta(tmp_path / "run", tmp_path / "delta")
    (layer,) = delta.layers
    assert delta.num_layers == 4
    assert all(name.startswith(f"model.layers.{layer}.") for name in delta.changed)
    assert (tmp_path / "delta" / "delta.safetensors").stat().st_size < 0.2 * delta.model_bytes
    assert f": decoder layer {layer} (of 4, counted from 0); base model tiny" in delta.describe()

    export_from_delta(tmp_path / "delta", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=getattr(torch, dtype))
    assert not differing(bits(model), bits(run.state.model))
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_another_place_of_the_same_base_will_do_and_another_model_will_not(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tied=True)
    run = train_into(tmp_path / "run", make_config("grass", ModelConfig(name=base)))
    export_delta(tmp_path / "run", tmp_path / "delta")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"there is no model folder .*base"):
        export_from_delta(tmp_path / "delta", tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"belongs on .*base \(float32\); this is another base model.*: its model.layers"
    ):
        export_from_delta(tmp_path / "delta", tmp_path / "model", base_model="tiny")
    assert not (tmp_path / "model").exists()
    export_from_delta(tmp_path / "delta", tmp_path / "model", base_model=str(tmp_path / "moved"))
    model = load_model(ModelConfig(name=str(tmp_path / "model"))).model
    assert not differing(bits(model), bits(run.state.model))


def test_every_bit_counts(tmp_path: Path) -> None:
    """A NaN is no change, the sign of a zero and the payload of a NaN are."""
    base, trained = make_llama(), make_llama()
    nan, other_nan = (torch.tensor([code], dtype=torch.int32).view(torch.float32) for code in (0x7FC00000, 0x7FC00001))
    with torch.no_grad():
        for model in (base, trained):
            model.model.layers[0].mlp.up_proj.weight.view(-1)[0] = nan
            model.model.layers[1].mlp.up_proj.weight.view(-1)[0] = 0.0
            model.model.layers[2].mlp.up_proj.weight.view(-1)[:1].copy_(nan)
        trained.model.layers[1].mlp.up_proj.weight.view(-1)[0] = -0.0
        trained.model.layers[2].mlp.up_proj.weight.view(-1)[:1].copy_(other_nan)
    delta = save_delta(base, trained, tmp_path / "delta", base_model=LLAMA)
    assert set(delta.changed) == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (1, 2)}
    apply_delta(base, tmp_path / "delta")
    assert not differing(bits(base), bits(trained))


def other_in_an_unchanged_tensor() -> nn.Module:
    return change_layers(make_llama(), 2)


def with_a_dtype_of_its_own() -> nn.Module:
    return make_llama().to(torch.bfloat16)


WRONG: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: make_llama(seed=1), "its model.layers.1.mlp.down_proj.weight has other values"),
    (other_in_an_unchanged_tensor, "its model.layers.2.mlp.down_proj.weight has other values"),
    (lambda: change_layers(make_llama(), 1, 3), "its model.layers.1.mlp.down_proj.weight has other values"),
    (with_a_dtype_of_its_own, r"down_proj.weight is bfloat16 of shape \(32, 64\), not float32 of shape \(32, 64\)"),
    (lambda: make_llama(hidden=16), r"is float32 of shape \(16, 32\), not float32 of shape \(32, 64\)"),
    (lambda: make_llama(layers=3), "it has no model.layers.3.mlp.down_proj.weight"),
    (lambda: make_llama(layers=5), "the delta's base has no model.layers.4."),
    (lambda: make_llama(tied=True), r"embed_tokens.weight is float32 of shape \(64, 32\), tied to lm_head.weight, not"),
]


@pytest.mark.parametrize(("make", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_another_base_is_refused_and_left_alone(make: Callable[[], nn.Module], words: str, saved: Path) -> None:
    model = make()
    before = bits(model)
    with pytest.raises(ConfigError, match=r"belongs on some/llama \(abc123, float32\); this is another.*: .*" + words):
        apply_delta(model, saved)
    assert not differing(bits(model), before)


def truncate(folder: Path) -> None:
    path = folder / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_the_last_bit(folder: Path) -> None:
    path = folder / "delta.safetensors"
    values = bytearray(path.read_bytes())
    values[-1] ^= 1
    path.write_bytes(values)


def lose_a_tensor(folder: Path) -> None:
    values = load_file(folder / "delta.safetensors")
    values.pop("model.layers.3.mlp.down_proj.weight")
    save_file(values, folder / "delta.safetensors")


def add_a_tensor(folder: Path) -> None:
    values = load_file(folder / "delta.safetensors")
    save_file(values | {"model.norm.weight": torch.ones(32)}, folder / "delta.safetensors")


def reshape_a_tensor(folder: Path) -> None:
    values = {name: value.reshape(64, 32) for name, value in load_file(folder / "delta.safetensors").items()}
    save_file(values, folder / "delta.safetensors")


def rewrite(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "delta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "is not a readable delta: delta.safetensors"),
    (flip_the_last_bit, "layers.3.mlp.down_proj.weight in delta.safetensors has not the values"),
    (lose_a_tensor, "layers.3.mlp.down_proj.weight is not in both"),
    (add_a_tensor, "model.norm.weight is not in both"),
    (reshape_a_tensor, r"is not float32 of shape \(32, 64\)"),
    (lambda folder: (folder / "delta.safetensors").unlink(), "is not a readable delta"),
    (lambda folder: (folder / "delta.json").unlink(), "is not a readable delta"),
    (lambda folder: (folder / "delta.json").write_text('{"format": 1'), "is not a readable delta"),
    (lambda folder: (folder / "delta.json").write_text("[1]"), "has delta format None; this version reads 1"),
    (rewrite(format=2), "has delta format 2; this version reads 1"),
    (rewrite(changed=3), "is not a readable delta: delta.json: changed"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words[-30:] for _, words in DAMAGES])
def test_a_damaged_delta_is_refused_and_half_of_it_is_not_applied(
    damage: Callable[[Path], None], words: str, saved: Path
) -> None:
    damage(saved)
    model = make_llama()
    with pytest.raises(ConfigError, match=words):
        apply_delta(model, saved)
    assert not differing(bits(model), bits(make_llama()))


def test_what_cannot_be_a_delta_is_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    with pytest.raises(ConfigError, match="is bitwise the base model"):
        save_delta(make_llama(), make_llama(), folder, base_model=LLAMA)
    for other in (make_llama(layers=3), make_llama(hidden=16), make_llama(tied=True), make_llama().half()):
        with pytest.raises(ConfigError, match="is not the base model with other values"):
            save_delta(make_llama(), other, folder, base_model=LLAMA)
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        save_delta(make_llama(), change_layers(make_llama(), 1), folder, base_model=LLAMA)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_disk_that_loses_bits_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_badly(values: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        save_file(values, path, **options)
        flip_the_last_bit(path.parent)

    monkeypatch.setattr(delta_module, "save_file", save_badly)
    with pytest.raises(ConfigError, match="has not the values that were written"):
        save_delta(make_llama(), change_layers(make_llama(), 1), tmp_path / "delta", base_model=LLAMA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.config.adapter is not None])
def test_an_adapter_goes_to_peft_and_not_into_a_delta(method: str, dtype: str, tmp_path: Path) -> None:
    import peft

    config = make_config(method, ModelConfig(name=save_model(tmp_path / "base", tied=False), dtype=dtype))
    run = train_into(tmp_path / "run", config)
    with pytest.raises(ConfigError, match=rf"is a run of {method}, .*--adapter"):
        export_delta(tmp_path / "run", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()

    assert export_adapter(tmp_path / "run", tmp_path / "adapter").difference == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == config.model.name
    base = load_model(config.model).model
    ids = torch.arange(20)[None]
    with torch.no_grad():
        untrained = base(input_ids=ids).logits
        model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        found, expected = model(input_ids=ids).logits, run.state.model.eval()(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert found.shape != untrained.shape or not torch.equal(found, untrained)


@pytest.mark.parametrize("method", [name for name in ("prefix", "prompt") if name in METHODS])
def test_an_adapter_that_is_no_weight_cannot_be_merged(method: str, tmp_path: Path) -> None:
    train_into(tmp_path / "run", make_config(method, ModelConfig(name="tiny")))
    with pytest.raises(ConfigError, match=r"cannot be merged.*--adapter"):
        export_run(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_run_without_an_adapter_has_none_to_export(tmp_path: Path) -> None:
    train_into(tmp_path / "run", make_config("grass", ModelConfig(name="tiny")))
    with pytest.raises(ConfigError, match="is a run of grass, which has no adapter"):
        export_adapter(tmp_path / "run", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (0, "no checkpoint; it measured the untrained model; give the model itself, tiny"),
        (6, "no checkpoint; a sweep keeps what its trials trained with --keep-checkpoints"),
    ],
)
def test_a_run_without_a_checkpoint_is_refused_with_what_to_do(steps: int, words: str, tmp_path: Path) -> None:
    make_config("lora", ModelConfig(name="tiny"), f"training.steps={steps}").save(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=words):
        find_run(tmp_path)
