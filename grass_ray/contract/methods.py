"""What every method must do. Each check takes a configuration of a small run.

::

    config = small_run(method)
    check_trains_what_is_active(config)
    check_loss_falls(config.override({"training.steps": 20}))
    check_reloads(config, folder)

A bitwise resume needs a new process: :func:`save_every_step` writes the checkpoints, from which
:mod:`grass_ray.contract.fresh` goes on there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grass_ray.config import MethodConfig, ModelConfig, RunConfig
from grass_ray.contract.broken import demand
from grass_ray.export.model import export_adapter, export_run, is_mergeable
from grass_ray.overrides import Changes
from grass_ray.training.models import load_model
from grass_ray.training.report import StepReport
from grass_ray.training.run import Run

# parameters at both ends of a model, which granularity "block" trains in turn with the layers
ENDS = r"model\.embed_tokens\.weight|lm_head\.weight|model\.norm\.weight"
SMALL: Mapping[str, Any] = {
    "training.batch_size": 4,
    "training.warmup_steps": 0,
    "data.source.train_rows": 30,
    "data.source.test_rows": 4,
}
FALLS_BY = 0.05  # nats
_IDS = ((5, 6, 7, 8),)


def small_run(method: MethodConfig, changes: Changes | None = None, *, steps: int = 9) -> RunConfig:
    """A run of the random small model on generated problems, over three epochs.

    Raises:
        ConfigError: a change that the method does not take.
    """
    config = RunConfig(method=method, model=ModelConfig(name="tiny"))
    return config.override({"training.steps": steps, **SMALL, **(changes or {})})


def learning_rate(method: MethodConfig) -> float:
    """A learning rate with which twenty steps show that a method learns."""
    if method.adapter is None:
        return 0.005
    return 0.1 if method.optimizer.lr >= 0.01 else 0.02  # adapters of few numbers learn slowly


def _moving(run: Run, report: StepReport) -> Collection[int]:
    """The layers in which something may change at a step: the active ones, and those that get small updates."""
    small = run.config.method.inactive_updates
    if small is None:
        return report.active_layers
    return range(0 if small.layers == "all" else min(report.active_layers), run.state.optimizer.stack.num_layers)


def check_trains_what_is_active(config: RunConfig, allowed: str = ".*", *, exactly: bool = False) -> set[str]:
    """At every step the parameters that change are those that are active, and may train at all.

    Args:
        config: the run.
        allowed: regular expression of the names of what may ever train.
        exactly: whether everything active must change, too.

    Returns:
        The names of the parameters that changed at some step.
    """
    run = Run.prepare(config)
    optimizer = run.state.optimizer
    always = {p for unit in optimizer.constant_units for p in unit.parameters}
    before = {name: p.detach().clone() for name, p in run.state.model.named_parameters()}
    ever: set[str] = set()
    for report in run.fit():
        now = dict(run.state.model.named_parameters())
        changed = {name for name, p in now.items() if not torch.equal(before[name], p)}
        before = {name: p.detach().clone() for name, p in now.items()}
        if report.phase == "probe":
            demand(not changed, f"step {report.step} only measures, but changed {_some(changed)}")
            continue
        active = {
            name
            for name, p in now.items()
            if p in always or any(f".layers.{layer}." in name for layer in _moving(run, report))
        }
        if optimizer.units[0].name == "embeddings":
            active |= {name for name in now if re.fullmatch(ENDS, name)}
        demand(changed <= active, f"step {report.step} changed what is not active: {_some(changed - active)}")
        demand(changed, f"step {report.step} changed nothing")
        others = {name for name in changed if not re.fullmatch(allowed, name)}
        demand(not others, f"step {report.step} changed {_some(others)}, which the method does not train")
        if exactly:
            demand(changed == active, f"step {report.step} did not change {_some(active - changed)}")
        ever |= changed
    layers = run.outcome().layers
    demand(layers is not None and layers.only_active_layers_changed, "the run's own proof failed: see engagement.txt")
    return ever


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def check_loss_falls(config: RunConfig) -> None:
    """The mean loss of the last three steps is below that of the first three."""
    losses = [report.loss for report in Run.prepare(config).fit() if report.phase == "train"]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    demand(last < first - FALLS_BY, f"the loss was {first:.3f} and is {last:.3f} after {len(losses)} steps")


def check_reloads(config: RunConfig, folder: Path) -> None:
    """What was trained reloads as an ordinary model of transformers, or as peft's adapter, with the same logits."""
    import peft
    from transformers import AutoModelForCausalLM

    run = Run.prepare(config)
    for _ in run.fit():
        pass
    source, output = folder / "run", folder / "out"
    source.mkdir(parents=True)
    config.save(source / "config.yaml")
    run.save(source / "checkpoint")
    ids = torch.tensor(_IDS)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.eval()(input_ids=ids).logits
        return found

    expected = logits(run.state.model)
    if is_mergeable(config):
        export_run(source, output)
        reloaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    else:
        export_adapter(source, output)
        reloaded = peft.PeftModel.from_pretrained(load_model(config.model).model, output)
    found, untrained = logits(reloaded), logits(load_model(config.model).model)
    if config.method.adapter is None:
        demand(torch.equal(found, expected), "the exported model has other logits")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    other = found.shape != untrained.shape or not torch.equal(found, untrained)
    demand(other, "the trained model has the logits of the untrained one")


# ------------------------------------------------------------------------------------------------------------- resume


def digest(run: Run) -> dict[str, Any]:
    """Everything that must not depend on a stop: weights, states, sampler, schedule, which layers trained, losses."""
    sha = hashlib.sha256()
    for parameter in run.state.model.parameters():
        sha.update(parameter.detach().numpy().tobytes())
    for state in run.state.optimizer.state_dict()["state"].values():
        for name in sorted(state):
            sha.update(state[name].numpy().tobytes())
    values = {
        "sha": sha.hexdigest(),
        "sampler": run.state.optimizer.sampler.state_dict(),
        "lr": run.state.optimizer.param_groups[0]["lr"],
        "layers": run.state.tracer.state_dict(),
        "losses": run.state.series["train/loss"],
    }
    found: dict[str, Any] = json.loads(json.dumps(values).replace("NaN", '"NaN"'))
    return found


def save_every_step(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Train, with a checkpoint before the first step and after each, and return the digest of the whole run."""
    run = Run.prepare(config)
    folder.mkdir(parents=True)
    config.save(folder / "config.yaml")
    run.save(folder / "step-00")
    for report in run.fit():
        run.save(folder / f"step-{report.step:02d}")
    saved = len([path for path in folder.iterdir() if path.is_dir()])
    demand(saved == run.state.total_steps + 1, f"there are {saved} checkpoints of {run.state.total_steps} steps")
    return digest(run)


def resume_every_step(folder: Path) -> list[dict[str, Any]]:
    """Go on from every checkpoint of :func:`save_every_step` to the end, and return each one's digest."""
    config = RunConfig.from_yaml(folder / "config.yaml")
    digests = []
    for checkpoint in sorted(path for path in folder.iterdir() if path.is_dir()):
        run = Run.prepare(config)
        run.restore(checkpoint)
        for _ in run.fit():
            pass
        digests.append(digest(run))
    return digests


def check_resumed(whole: Mapping[str, Any], resumed: Sequence[Mapping[str, Any]]) -> None:
    """Every resumed run ended with the digest of the whole one."""
    for step, found in enumerate(resumed):
        differing = [key for key, value in whole.items() if found[key] != value]
        demand(not differing, f"resumed after step {step}, these differ at the end: {', '.join(differing)}")
