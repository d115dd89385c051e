"""The contract every method row keeps. A new row is covered at once; what it may train is one more line in TRAINS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from small import short_run

from grass_ray.config import RunConfig
from grass_ray.contract.fresh import resume_in_a_new_process
from grass_ray.contract.methods import (
    ENDS,
    check_loss_falls,
    check_reloads,
    check_resumed,
    check_trains_what_is_active,
    learning_rate,
    save_every_step,
)
from grass_ray.methods import METHODS
from grass_ray.training.run import Run

Digests = tuple[dict[str, Any], list[dict[str, Any]]]  # of the whole run, and of each resumed one

TRAINED = [name for name, row in METHODS.items() if row.trains]
# what may ever train, by parameter name, told apart from how the package finds it
LAYERS = r"model\.layers\.\d+\..*"
MATRICES = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight"
TRAINS = {
    "full": f"{LAYERS}|{ENDS}",
    "lora": r".*\.lora_[AB]\..*",
    "dora": r".*\.lora_([AB]|magnitude_vector)\..*",
    "prefix": r"prompt_encoder\..*",
    "prompt": r"prompt_encoder\..*",
    "rslora": r".*\.lora_[AB]\..*",
    "pissa": r".*\.lora_[AB]\..*",
    "vera": r".*\.vera_lambda_[bd]\..*",
    "randlora": r".*\.randlora_(lambda|gamma)\..*",
    "loha": r".*\.hada_w[12]_[ab]\..*",
    "lokr": r".*\.lokr_w[12](_[ab])?\..*",
    "miss": r".*\.miss_block\..*",
    "oft": r".*\.oft_R\..*",
    "c3a": r".*\.c3a_kernel\..*",
    "fourierft": r".*\.fourierft_spectrum\..*",
    "ia3": r".*\.ia3_l\..*",
    "ln-tuning": r".*layernorm\.ln_tuning_layers\..*",
    "lisa": f"{LAYERS}|{ENDS}",
    "lisa-keep": f"{LAYERS}|{ENDS}",
    "ows": f"{LAYERS}|{ENDS}",
    "ows-galore": f"{LAYERS}|{ENDS}",
    "ist": r".*\.lora_[AB]\..*",
    "lift": LAYERS,
    "hift": f"{LAYERS}|{ENDS}",
    "badam": LAYERS,
    "bread": LAYERS,
    "misa": MATRICES,
    "galore": f"{LAYERS}|{ENDS}",
    "apollo": f"{LAYERS}|{ENDS}",
    "grass": LAYERS,
    "grass-static": LAYERS,
    "grass-fresh": LAYERS,
    "uniform": LAYERS,
    "top": LAYERS,
    "inverse": LAYERS,
    "first-third": LAYERS,
    "middle-third": LAYERS,
    "last-third": LAYERS,
    "adagradselect": LAYERS,
    "grades": f"{MATRICES}|{ENDS}",
    "sgd": f"{LAYERS}|{ENDS}",
    "muon": f"{LAYERS}|{ENDS}",
    "grass-muon": LAYERS,
}


def make_config(method: str) -> RunConfig:
    """Nine steps over three epochs, with accumulation and a warm-up."""
    return short_run(method, "training.accumulation_steps=2", "training.warmup_steps=2")


@pytest.mark.parametrize("method", TRAINED)
def test_trains_exactly_what_its_paper_trains(method: str) -> None:
    """At every step: the parameters that change are those that require gradients, and all of them may train."""
    row = METHODS[method].config
    # an adapter's A starts to move when its B is no longer zero; of matrices and blocks only some are active
    exactly = row.granularity == "layer" and row.adapter is None
    config = short_run(method)
    ever = check_trains_what_is_active(config, TRAINS[method], exactly=exactly)
    if method not in ("lift", "ist"):  # nine steps of one pass over four layers, and a quarter of the layers
        names = [name for name, _ in Run.prepare(config).state.model.named_parameters()]
        possible = {name for name in names if re.fullmatch(TRAINS[method], name)}
        assert not {name for name in possible - ever if "layers" not in name}


@pytest.mark.parametrize("method", TRAINED)
def test_loss_falls_in_twenty_steps(method: str) -> None:
    lr = learning_rate(METHODS[method].config)
    check_loss_falls(short_run(method, f"method.optimizer.lr={lr}", steps=20))


@pytest.mark.parametrize("method", TRAINED)
def test_the_result_reloads_in_transformers(method: str, tmp_path: Path) -> None:
    """As an ordinary model folder, or as peft's own folder for virtual tokens; logits are compared by the export."""
    check_reloads(short_run(method, steps=3), tmp_path)


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Digests]:
    """For every method: the digest of a whole run, and those of runs resumed after each of its steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = {method: save_every_step(make_config(method), folder / method) for method in TRAINED}
    resumed = resume_in_a_new_process(folder)
    return {method: (whole[method], resumed[method]) for method in TRAINED}


@pytest.mark.long
@pytest.mark.parametrize("method", TRAINED)
def test_resume_at_every_step_in_a_new_process_is_bitwise(method: str, runs: dict[str, Digests]) -> None:
    """Through probing, sampling and refresh."""
    check_resumed(*runs[method])
