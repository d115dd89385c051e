"""The traps that other implementations of layer-wise training fell into, one check each.

Every check runs twice: as it is, and with the protection taken away, where it must fail. What the traps are: a frozen
first set (LMFlow issue 726), states that pile up (LMFlow 729, 768; LLaMA-Factory 3103), and so on; the names say it.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from small import backward, make_llama, make_optimizer, short_run
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import grass_ray.layerwise.stack as stack_module
import grass_ray.optim.parts as parts_module
import grass_ray.training.models as models_module
from grass_ray import AllLayersSampler, GradNormSampler, LayerwiseAdamW, UniformSampler
from grass_ray.config import ModelConfig
from grass_ray.layerwise.stack import find_decoder_stack
from grass_ray.optim.active_set import ActiveSet
from grass_ray.optim.placement import Resident
from grass_ray.optim.states import States
from grass_ray.optim.watch import Watch
from grass_ray.training import run as run_module
from grass_ray.training.models import load_model
from grass_ray.training.run import Run


def train(model: nn.Module, optimizer: LayerwiseAdamW, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------- 1. an optimizer that only ever sees the first active set


def check_every_drawn_layer_is_really_trained() -> None:
    run = Run.prepare(short_run("grass", steps=12))
    for _ in run.fit():
        pass
    layers = run.outcome().layers
    assert layers is not None
    assert all(layers.visits)
    assert layers.only_active_layers_changed
    frozen = make_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="none of the 4 layers has a parameter that requires a gradient"):
        LayerwiseAdamW(frozen, UniformSampler(1, 2))


def only_update_the_first_set(patch: pytest.MonkeyPatch) -> None:
    update = States.update
    seen: list[str] = []

    def first_only(self: States, unit: Any, groups: Any, skip: torch.Tensor) -> None:
        if len(seen) < 2:
            seen.append(unit.name)
        if unit.name in seen:
            update(self, unit, groups, skip)

    patch.setattr(States, "update", first_only)


# ------------------------------------------------------------------------------ 2. states of visited layers never freed


def check_states_on_the_device_stay_within_gamma_layers() -> None:
    for inactive_states in ("keep", "reset"):
        model = make_llama()
        optimizer = make_optimizer(model, UniformSampler(1, 1), inactive_states=inactive_states)  # type: ignore[arg-type]
        budget = 2 * 4 * sum(p.numel() for p in optimizer.stack.layers[0])
        for step in range(16):
            train(model, optimizer, range(step, step + 1))
            assert optimizer.state_bytes()[0] <= budget


def never_release(patch: pytest.MonkeyPatch) -> None:
    for method in ("leave", "forget", "enter"):
        patch.setattr(Resident, method, lambda self, unit: None)


# ----------------------------------------------------------------------- 3. a resume in mid-interval trains another set


def check_resume_in_mid_interval() -> None:
    whole, resumed = make_llama(), make_llama()
    optimizer = LayerwiseAdamW(whole, GradNormSampler(1, 5, probing_steps=1, seed=3), lr=1e-3)
    train(whole, optimizer, range(4))
    saved_weights, saved = weights(whole), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, range(4, 12))
    other = LayerwiseAdamW(resumed, GradNormSampler(1, 5, probing_steps=1, seed=3), lr=1e-3)
    resumed.load_state_dict(saved_weights)
    other.load_state_dict(saved)
    train(resumed, other, range(4, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def forget_the_active_set(patch: pytest.MonkeyPatch) -> None:
    state_dict = LayerwiseAdamW.state_dict

    def forgetful(self: LayerwiseAdamW) -> dict[str, Any]:
        state = state_dict(self)
        state["layerwise"]["active_units"] = list(range(len(self.units)))
        return state

    patch.setattr(LayerwiseAdamW, "state_dict", forgetful)


# 4. Workers that train different layers, or never synchronise those thawed later: tests/optim/test_data_parallel.py


# ------------------------------------------------------------------- 5. checkpointing sends backward through all layers


def check_backward_stops_at_the_lowest_active_layer() -> None:
    config = short_run("lift", "training.gradient_checkpointing=true", steps=4)
    run = Run.prepare(config)
    model, optimizer = run.state.model, run.state.optimizer
    needed: list[bool] = []
    for layer in optimizer.stack.modules:
        layer.register_forward_hook(
            lambda module, inputs, output: needed.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    for _ in run.fit():
        assert model.training
    first_of_each_step = [needed[start : start + 4] for start in range(0, len(needed), 4)]
    # one step a layer, front to back
    assert [False, False, False, True] in first_of_each_step


def ask_for_input_gradients(patch: pytest.MonkeyPatch) -> None:
    build = run_module.build_optimizer

    def asking(model: Any, *arguments: Any) -> LayerwiseAdamW:
        model.enable_input_require_grads()  # what transformers' own checkpointing does
        return build(model, *arguments)

    patch.setattr(run_module, "build_optimizer", asking)


# -------------------------------------------------------------------- 6. frozen layers moved by momentum and left zeros


def check_left_over_gradients_move_nothing() -> None:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, UniformSampler(1, 2, seed=4), lr=1e-2, weight_decay=0.5, offload="none")
    for step in range(12):
        active = optimizer.active_layers
        before = weights(model)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        frozen = [i for i in range(4) if i not in optimizer.active_layers]
        assert all(p.grad is None for index in frozen for p in optimizer.stack.layers[index])
        for name, p in model.named_parameters():
            moved = any(name.startswith(f"model.layers.{index}.") for index in active)
            assert torch.equal(before[name], p) != moved, name


def update_whatever_has_a_gradient(patch: pytest.MonkeyPatch) -> None:
    def leave_gradients(self: ActiveSet, units: tuple[int, ...]) -> None:
        self.indices = units
        for index, unit in enumerate(self.parts.units):
            for parameter in unit.parameters:
                parameter.requires_grad_(index in units)

    patch.setattr(ActiveSet, "activate", leave_gradients)
    patch.setattr(ActiveSet, "units", property(lambda self: [*self.parts.units, *self.parts.constant]))
    patch.setattr(Watch, "check_active", lambda self, units: None)


# ---------------------------------------------------------------------------- 7. a switch in the middle of accumulation


def check_accumulated_gradients_reach_the_update() -> None:
    ours, theirs = make_llama(), make_llama()
    optimizer = make_optimizer(ours, UniformSampler(2, 1, seed=1), lr=1e-2, inactive_states="reset")
    layers = find_decoder_stack(theirs).layers
    for step in range(4):
        active = optimizer.active_layers
        parameters = [p for index in active for p in layers[index]]
        reference = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0, fused=True)
        for micro in range(3):
            backward(ours, 3 * step + micro)
            backward(theirs, 3 * step + micro)
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        if set(active) & set(optimizer.active_layers):
            break  # from here on a layer's state spans two intervals
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def switch_at_every_forward(patch: pytest.MonkeyPatch) -> None:
    init = LayerwiseAdamW.__init__

    def impatient(self: LayerwiseAdamW, model: nn.Module, *args: Any, **settings: Any) -> None:
        init(self, model, *args, **settings)
        model.register_forward_pre_hook(lambda *_: self._active.switch(self.sampler.sample()))

    patch.setattr(LayerwiseAdamW, "__init__", impatient)


# -------------------------------------------------------------------------- 8. compiling the whole model, set after set


def check_whole_model_compilation_is_refused_and_layers_may_be_compiled() -> None:
    with pytest.raises(ValueError, match=r"compiled as a whole.*for layer in model.model.layers: layer.compile\(\)"):
        LayerwiseAdamW(torch.compile(make_llama(), backend="aot_eager"), UniformSampler(1, 1))
    compiled, plain = make_llama(), make_llama()
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager")
    for model in (compiled, plain):
        train(model, LayerwiseAdamW(model, UniformSampler(1, 1, seed=2), lr=1e-2), range(12))
    for (name, a), b in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def take_compiled_models(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stack_module, "_refuse_compiled", lambda model, path: None)


# ------------------------------------------------------------------------ 9. the first list of blocks is a vision tower


def make_llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=64)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))


def check_the_language_model_is_found_beside_a_vision_tower() -> None:
    model = make_llava()
    stack = find_decoder_stack(model)
    assert stack.num_layers == 4
    tower = {p for name, p in model.named_parameters() if "vision" in name}
    assert tower <= set(stack.unmanaged)


def take_the_first_list(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stack_module, "_choose", lambda model, lists: next(iter(lists)))


# ----------------------------------------------------------------------------- 10. weights loaded in float32 by default


def check_weights_have_the_dtype_asked_for() -> None:
    loaded = load_model(ModelConfig(name="tiny", dtype="bfloat16"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    run = Run.prepare(short_run("grass", "model.dtype=bfloat16", steps=4))
    for _ in run.fit():
        pass
    metrics = run.outcome().metrics
    assert 0 < metrics["memory/peak_allocated_gib"] < metrics["memory/peak_reserved_gib"]


def load_in_float32(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(models_module, "DTYPES", dict.fromkeys(models_module.DTYPES, torch.float32))


# ------------------------------------------------------------------------------------ 11. tied embeddings counted twice


def check_tied_embeddings_are_one_tensor() -> None:
    model = make_llama(tied=True)
    everything = {"train_embeddings": True, "train_head": True, "train_norm": True}
    optimizer = make_optimizer(model, AllLayersSampler(), lr=1e-3, **everything)
    managed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in managed}) == len(managed)
    assert sum(p.numel() for p in optimizer.active_parameters()) == sum(p.numel() for p in model.parameters())
    train(model, optimizer, range(1))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert float(optimizer.state[model.lm_head.weight]["step"]) == 1


def count_the_head_again(patch: pytest.MonkeyPatch) -> None:
    constant = parts_module.constant_units

    def twice(parts: Any, decayed: Any) -> Any:
        return constant({**parts, "again": parts["embeddings"]}, decayed)

    patch.setattr(parts_module, "constant_units", twice)


# ----------------------------------------------------------------- 12. decay on norms; step counters that do not travel


def check_decay_spares_norms_and_counters_travel() -> None:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, UniformSampler(1, 1, seed=5), lr=1e-3, weight_decay=0.1)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if id(p) in decays:
            assert decays[id(p)] == (0.0 if "norm" in name else 0.1), name
    steps = [0] * 4
    for step in range(20):
        (active,) = optimizer.active_layers
        steps[active] += 1
        train(model, optimizer, range(step, step + 1))
    counted = [
        float(optimizer.state[layer[0]]["step"]) if steps[i] else 0 for i, layer in enumerate(optimizer.stack.layers)
    ]
    assert counted == steps


def decay_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parts_module, "decay_parameters", lambda model: set(model.parameters()))


# ------------------------------------------------------------------- 13. frameworks that fix the trainable set at start


def check_partitioned_models_are_refused() -> None:
    partitioned = make_llama()
    for index, parameter in enumerate(partitioned.parameters()):
        parameter.ds_id = index
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        LayerwiseAdamW(partitioned, UniformSampler(1, 1))
    wrapped = nn.Module()
    wrapped.__class__ = type("FullyShardedDataParallel", (nn.Module,), {})
    wrapped.module = make_llama()
    with pytest.raises(ValueError, match="wrapped in FullyShardedDataParallel"):
        LayerwiseAdamW(wrapped, UniformSampler(1, 1))


def take_wrapped_models(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stack_module, "_refuse_wrappers", lambda model: None)


# ------------------------------------------------------------------------ 14. checkpoints that need pickle to be loaded


def check_states_are_tensors_and_plain_values() -> None:
    for projection in (None, optimizer_module_projection()):
        model = make_llama()
        optimizer = make_optimizer(model, GradNormSampler(2, 2, probing_steps=1), projection=projection)
        train(model, optimizer, range(4))
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except Exception as error:
            raise AssertionError("the state needs pickle") from error


def optimizer_module_projection() -> Any:
    from grass_ray import GaLore

    return GaLore(rank=4)


def put_an_object_into_the_state(patch: pytest.MonkeyPatch) -> None:
    state_dict = LayerwiseAdamW.state_dict
    patch.setattr(LayerwiseAdamW, "state_dict", lambda self: state_dict(self) | {"sampler": UniformSampler(1, 1)})


class Trap(NamedTuple):
    check: Callable[[], None]
    without: Callable[[pytest.MonkeyPatch], None]


TRAPS = [
    Trap(check_every_drawn_layer_is_really_trained, only_update_the_first_set),
    Trap(check_states_on_the_device_stay_within_gamma_layers, never_release),
    Trap(check_resume_in_mid_interval, forget_the_active_set),
    Trap(check_backward_stops_at_the_lowest_active_layer, ask_for_input_gradients),
    Trap(check_left_over_gradients_move_nothing, update_whatever_has_a_gradient),
    Trap(check_accumulated_gradients_reach_the_update, switch_at_every_forward),
    Trap(check_whole_model_compilation_is_refused_and_layers_may_be_compiled, take_compiled_models),
    Trap(check_the_language_model_is_found_beside_a_vision_tower, take_the_first_list),
    Trap(check_weights_have_the_dtype_asked_for, load_in_float32),
    Trap(check_tied_embeddings_are_one_tensor, count_the_head_again),
    Trap(check_decay_spares_norms_and_counters_travel, decay_everything),
    Trap(check_partitioned_models_are_refused, take_wrapped_models),
    Trap(check_states_are_tensors_and_plain_values, put_an_object_into_the_state),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trap", TRAPS, ids=[trap.check.__name__.removeprefix("check_") for trap in TRAPS])
def test_protected(trap: Trap) -> None:
    trap.check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trap", TRAPS, ids=[trap.without.__name__ for trap in TRAPS])
def test_the_check_fails_without_the_protection(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    trap.without(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        trap.check()
