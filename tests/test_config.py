"""Configurations: YAML in, the same YAML out; overrides; every mistake named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from grass_ray.config import ConfigError, RunConfig, fingerprint_of
from grass_ray.methods import METHODS, get_method
from grass_ray.overrides import parse


@pytest.mark.parametrize("method", METHODS)
def test_yaml_round_trip(method: str, tmp_path: Path) -> None:
    config = RunConfig(method=METHODS[method].config)
    config.save(tmp_path / "config.yaml")
    again = RunConfig.from_yaml(tmp_path / "config.yaml")
    assert again == config
    assert again.to_yaml() == (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert again.fingerprint == config.fingerprint


def test_overrides_change_the_fingerprint_and_nothing_else() -> None:
    config = RunConfig(method=METHODS["grass"].config)
    changed = config.override({"method.sampler.temperature": 0.2, "training.steps": 7})
    assert changed.method.sampler.temperature == 0.2
    assert changed.fingerprint != config.fingerprint
    without = config.to_dict()
    del without["evaluation"]["lm_eval"]  # a configuration of an earlier version
    assert fingerprint_of(without) == config.fingerprint
    assert config.override({"evaluation.lm_eval.tasks": ["mmlu"]}).fingerprint != config.fingerprint
    assert changed.override({"method.sampler.temperature": 0.5, "training.steps": 50}) == config


def test_gradient_checkpointing_was_a_flag_and_still_reads_and_writes_as_one() -> None:
    config = RunConfig(method=METHODS["grass"].config)
    assert config.training.gradient_checkpointing == "none"
    values = config.to_dict()
    assert values["training"]["gradient_checkpointing"] is False
    for words, meant, written in (
        ("false none", "none", False),
        ("true all", "all", True),
        ("auto", "auto", "auto"),
        ("12", 12, 12),
    ):
        for word in words.split():
            changed = config.override(parse([f"training.gradient_checkpointing={word}"]))
            assert changed.training.gradient_checkpointing == meant
            assert changed.to_dict()["training"]["gradient_checkpointing"] is written or meant == written
            assert RunConfig.parse(changed.to_dict()) == changed


def test_names_follow_the_contract() -> None:
    config = RunConfig(method=METHODS["grass"].config).override(
        {"data.suite": "commonsense", "model.name": "org/My-Model.v2"}
    )
    assert config.name == "grass-My_Model.v2-commonsense-s0"


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["training.step=1"], r"training has no key 'step'; it has steps, batch_size"),
        (["steps"], r"cannot read the override 'steps'; write it as dotted.key=value"),
        (["training.steps=-1", "method.optimizer.lr=0"], r"lr: .*greater than 0 .*; training.steps: .*given: -1"),
        (["training.batch_size=8", "training.accumulation_steps=3"], r"batch_size 8 cannot be split into 3"),
        (["method.sampler.temperature=cold"], r"method.sampler.temperature: .*given: 'cold'"),
        (["method.sampler.effective_layers=8"], r"temperature and effective_layers say the same .* both are given"),
        (["method.sampler.temperature=null"], r"temperature and effective_layers say the same .* both are null"),
        (["method.sampler.effective_layers=0.5"], r"effective_layers: .*greater than or equal to 1 \(given: 0.5\)"),
        (["method.sampler.staleness=shrink"], r"staleness: .*'none' or 'level' \(given: 'shrink'\)"),
        (["training.gradient_checkpointing=0"], r"checkpointing: .*none, all, auto, or a number of layers.*given: 0\)"),
        (["training.gradient_checkpointing=some"], r"checkpointing: .*none, all, auto, or .*given: 'some'\)"),
        (["method.sampler.num_active_layers=0"], r"num_active_layers: .*greater than or equal to 1 \(given: 0\)"),
    ],
)
def test_mistakes_are_named(assignments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(method=METHODS["grass"].config).override(parse(assignments))


def test_a_setting_without_effect_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"method.sampler has no key 'temperature'; it has kind, num_active_layers"):
        RunConfig(method=METHODS["lisa"].config).override({"method.sampler.temperature": 1})


def test_every_key_has_a_description() -> None:
    schema = RunConfig.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        assert "description" in part
        own = {key: field for key, field in part["properties"].items() if "$ref" not in field}  # others: of their part
        undescribed = [key for key, field in own.items() if "description" not in field]
        assert undescribed in ([], ["kind"]), part["title"]


def test_unknown_methods_list_what_there_is_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'gras'; available: base, full, .* Did you mean 'grass'\?"):
        get_method("gras")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1", "a configuration is a mapping"), ("x: 1", "method")]
)
def test_broken_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_yaml(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        RunConfig.from_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("layers", ["8", "2.5", "{kind: linear, start: 12, end: 4}"])
def test_a_number_of_effective_layers_takes_the_place_of_the_temperature(layers: str) -> None:
    row = RunConfig(method=METHODS["grass-fresh"].config)
    config = row.override(parse([f"method.sampler.effective_layers={layers}", "method.sampler.temperature=null"]))
    assert RunConfig.parse(config.to_dict()) == config
    assert config.override({"method.sampler.temperature": 0.5, "method.sampler.effective_layers": None}) == row
