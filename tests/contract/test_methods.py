"""The contract every method row keeps. A new row is covered at once; what it may train is one more line in TRAINS."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from small import short_run
from transformers import AutoModelForCausalLM

from grass_ray.config import LoraConfig, RunConfig
from grass_ray.export.model import export_adapter, export_run
from grass_ray.methods import METHODS
from grass_ray.training.models import load_model
from grass_ray.training.run import Run

TRAINED = [name for name, row in METHODS.items() if row.trains]
# what may ever train, by parameter name, told apart from how the package finds it
LAYERS = r"model\.layers\.\d+\..*"
MATRICES = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight"
OTHERS = r"model\.embed_tokens\.weight|lm_head\.weight|model\.norm\.weight"
TRAINS = {
    "full": f"{LAYERS}|{OTHERS}",
    "lora": r".*\.lora_[AB]\..*",
    "dora": r".*\.lora_([AB]|magnitude_vector)\..*",
    "prefix": r"prompt_encoder\..*",
    "prompt": r"prompt_encoder\..*",
    "lisa": f"{LAYERS}|{OTHERS}",
    "lisa-keep": f"{LAYERS}|{OTHERS}",
    "ows": f"{LAYERS}|{OTHERS}",
    "ows-galore": f"{LAYERS}|{OTHERS}",
    "ist": r".*\.lora_[AB]\..*",
    "lift": LAYERS,
    "hift": f"{LAYERS}|{OTHERS}",
    "badam": LAYERS,
    "misa": MATRICES,
    "galore": f"{LAYERS}|{OTHERS}",
    "apollo": f"{LAYERS}|{OTHERS}",
    "grass": LAYERS,
    "grass-static": LAYERS,
    "grass-fresh": LAYERS,
    "uniform": LAYERS,
    "top": LAYERS,
    "inverse": LAYERS,
}
ADAPTERS = {name for name in TRAINED if METHODS[name].config.adapter is not None}
# virtual tokens are few and start at random: they learn slowly
LEARNING_RATES = {"prefix": 0.1, "prompt": 0.1, "lora": 0.02, "dora": 0.02, "ist": 0.02}


def make_config(method: str) -> RunConfig:
    """Nine steps over three epochs, with accumulation and a warm-up."""
    return short_run(method, "training.accumulation_steps=2", "training.warmup_steps=2")


@pytest.mark.parametrize("method", TRAINED)
def test_trains_exactly_what_its_paper_trains(method: str) -> None:
    """At every step: the parameters that change are those that require gradients, and all of them may train."""
    run = Run.prepare(short_run(method))
    optimizer = run.state.optimizer
    allowed = re.compile(TRAINS[method])
    always = {p for unit in optimizer.constant_units for p in unit.parameters}
    before = {name: p.detach().clone() for name, p in run.state.model.named_parameters()}
    ever: set[str] = set()
    for report in run.fit():
        now = dict(run.state.model.named_parameters())
        changed = {name for name, p in now.items() if not torch.equal(before[name], p)}
        before = {name: p.detach().clone() for name, p in now.items()}
        if report.phase == "probe":
            assert not changed
            continue
        active = {
            name
            for name, p in now.items()
            if p in always or any(f".layers.{layer}." in name for layer in report.active_layers)
        }
        if optimizer.units[0].name in ("embeddings",):  # both ends take turns with the layers
            active |= {name for name in now if re.fullmatch(OTHERS, name)}
        if optimizer.units[0].layer is not None and "." not in optimizer.units[0].name and method not in ADAPTERS:
            assert changed == active, report.step
        # an adapter's A starts to move when its B is no longer zero; of matrices and blocks only some are active
        assert changed <= active, report.step
        assert changed, report.step
        assert all(allowed.fullmatch(name) for name in changed), changed
        ever |= changed
    possible = {name for name in before if allowed.fullmatch(name)}
    if method not in ("lift", "ist"):  # nine steps of one pass over four layers, and a quarter of the layers
        missing = {name for name in possible - ever if "layers" not in name}
        assert not missing
    assert run.outcome().layers is not None
    assert run.outcome().layers.only_active_layers_changed  # type: ignore[union-attr]


@pytest.mark.parametrize("method", TRAINED)
def test_loss_falls_in_twenty_steps(method: str) -> None:
    lr = LEARNING_RATES.get(method, 0.005)
    run = Run.prepare(short_run(method, f"method.optimizer.lr={lr}", steps=20))
    losses = [report.loss for report in run.fit() if report.phase == "train"]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.05, losses


@pytest.mark.parametrize("method", TRAINED)
def test_the_result_reloads_in_transformers(method: str, tmp_path: Path) -> None:
    """As an ordinary model folder, or as peft's own folder for virtual tokens; logits are compared by the export."""
    run = Run.prepare(short_run(method, steps=3))
    for _ in run.fit():
        pass
    folder = tmp_path / "run"
    folder.mkdir()
    run.config.save(folder / "config.yaml")
    run.save(folder / "checkpoint")
    ids = torch.tensor([[5, 6, 7, 8]])
    model = run.state.model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    adapter = METHODS[method].config.adapter
    base = load_model(run.config.model).model
    if adapter is not None and not isinstance(adapter, LoraConfig):
        export_adapter(folder, tmp_path / "out")
        reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    else:
        export_run(folder, tmp_path / "out")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = reloaded.eval()(input_ids=ids).logits
        untrained = load_model(run.config.model).model.eval()(input_ids=ids).logits
    if adapter is None:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.shape != untrained.shape or not torch.equal(found, untrained)


# ------------------------------------------------------------------------------------------------------------ resume


def digest(run: Run) -> dict[str, object]:
    """Everything that must not depend on a stop: weights, states, sampler, schedule, engagement, losses."""
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
        "engagement": run.state.tracer.state_dict(),
        "losses": run.state.series["train/loss"],
    }
    return json.loads(json.dumps(values).replace("NaN", '"NaN"'))


def resume_all(folder: str) -> dict[str, list[dict[str, object]]]:
    """Go on from every checkpoint of every method in ``folder``; called in a new process."""
    torch.set_num_threads(1)
    digests: dict[str, list[dict[str, object]]] = {}
    for method in TRAINED:
        for checkpoint in sorted((Path(folder) / method).iterdir()):
            run = Run.prepare(make_config(method))
            run.restore(checkpoint)
            for _ in run.fit():
                pass
            digests.setdefault(method, []).append(digest(run))
    return digests


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, list[object]]]:
    """For every method: the digest of a whole run, and those of runs resumed after each of its steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = {}
    for method in TRAINED:
        run = Run.prepare(make_config(method))
        run.save(folder / method / "step-00")
        for report in run.fit():
            run.save(folder / method / f"step-{report.step:02d}")
        whole[method] = digest(run)
        assert len(list((folder / method).iterdir())) == run.state.total_steps + 1
    code = (
        "import json, sys; sys.path[:0] = sys.argv[1:3]; import test_methods as t\n"
        "print('RESULT' + json.dumps(t.resume_all(sys.argv[3])))"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(folder)]
    done = subprocess.run([sys.executable, "-c", code, *folders], check=True, capture_output=True, text=True)
    resumed = json.loads(done.stdout.split("RESULT")[1])
    return {method: (whole[method], resumed[method]) for method in TRAINED}


@pytest.mark.long
@pytest.mark.parametrize("method", TRAINED)
def test_resume_at_every_step_in_a_new_process_is_bitwise(
    method: str, runs: dict[str, tuple[object, list[object]]]
) -> None:
    """Through probing, sampling and refresh."""
    expected, resumed = runs[method]
    for step, found in enumerate(resumed):
        assert found == expected, f"resumed after step {step}"
