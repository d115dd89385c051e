"""Model cards: figures and provenance of the record, YAML that the hub's own library reads, less without a record."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from result_records import answers, make_history, make_record

from grass_ray.config import RunConfig
from grass_ray.export.card import Kind, hub_name, render_card, write_card, write_delta_card
from grass_ray.results.record import RunRecord


def record() -> RunRecord:
    made = make_record(
        "grass",
        correct={"gsm8k": answers(30, 100), "svamp": answers(50, 100)},
        suite="arithmetic",
        overrides=["model.name=smollm2-135m"],
        metrics={"memory/peak_allocated_gib": 1.5, "throughput/tokens_per_second": 178.4, "time/train_s": math.nan},
        layers=make_history(),
    )
    return made.model_copy(
        update={
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "model_sha256": "a" * 64,
            "data": {
                "train": {
                    "rows": 90, "rows_available": 100, "description": "the mixture math_10k", "rows_sha256": "c" * 64,
                }
            },
        }
    )  # fmt: skip


def config(made: RunRecord) -> RunConfig:
    return RunConfig.parse(made.config)


@pytest.mark.parametrize("kind", ["model", "adapter", "delta"])
def test_a_card_holds_the_records_figures_and_provenance(kind: Kind) -> None:
    made = record()
    text = render_card("my-model", kind, config(made), made)
    card = ModelCard(text)
    assert card.data.library_name == {"model": "transformers", "adapter": "peft", "delta": "grass_ray"}[kind]
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {"grass_ray", "grass", "arithmetic", "arxiv:2604.07808"} <= set(card.data.tags)
    assert [(result.dataset_name, result.metric_value) for result in card.data.eval_results] == [
        ("gsm8k", 30.0), ("svamp", 50.0),
    ]  # fmt: skip
    for words in (
        "| gsm8k | 30.0 | 21.9-39.6 | 100 |",
        "| average | 40.0 |",
        "peak memory allocated in training: 1.5 GiB",
        "70 of 1,000 parameters (7.00 %)",
        "| `method.sampler.num_active_layers` | 2 |",
        f"sha256 of the rows: `{'c' * 64}`",
        f"sha256 of its weights `{'a' * 64}`",
        "grass_ray commit: 0123456789abcdef",
        "torch 2.13.0",
        {"model": "AutoTokenizer.from_pretrained", "adapter": "PeftModel", "delta": "apply_delta"}[kind],
    ):
        assert words in text


def test_a_card_without_a_record_says_so_and_what_the_configuration_knows() -> None:
    made = record()
    text = render_card("my-model", "model", config(made), None)
    assert ModelCard(text).data.eval_results is None
    assert "nothing is known of its accuracy" in text
    assert "| `method.sampler.temperature` | 0.5 |" in text


def test_a_run_that_failed_has_no_invented_figures() -> None:
    failed = make_record("full", status="failed", failure="loss became nan")
    text = render_card("my-model", "model", config(failed), failed)
    assert "Not evaluated: the run is failed (loss became nan)." in text


def test_a_folder_as_base_model_is_named_without_its_place(tmp_path: Path) -> None:
    (tmp_path / "my base").mkdir()
    made = make_record("full", overrides=[f"model.name={tmp_path}/my base"])
    text = render_card("out", "adapter", config(made), made)
    assert str(tmp_path) not in text
    assert "fine-tuned from `my base`" in text
    assert "base_model" not in text.split("---")[1]
    assert hub_name(config(make_record(overrides=["model.name=tiny"]))) is None
    assert hub_name(config(make_record(overrides=["model.name=/gone"]))) is None
    assert hub_name(config(make_record(overrides=["model.name=meta-llama/Llama-3.2-1B"]))) == "meta-llama/Llama-3.2-1B"


def test_a_model_made_from_a_delta_keeps_the_deltas_figures(tmp_path: Path) -> None:
    delta, model = tmp_path / "delta", tmp_path / "model"
    delta.mkdir(), model.mkdir()
    write_delta_card(delta, model)
    assert not list(model.iterdir()), "nothing is made up where the delta has no card"
    made = record()
    write_card(delta, "delta", config(made), made, written="layers 1 and 3")
    write_delta_card(delta, model)
    text = (model / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.model_name) == ("transformers", "model")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "# model\n\nA model fine-tuned" in text
    assert "apply_delta" not in text
    assert "layers 1 and 3" not in text
    assert "| gsm8k | 30.0 | 21.9-39.6 | 100 |" in text
    assert text.split("## Figures")[1] == (delta / "README.md").read_text().split("## Figures")[1]
