"""The settings of a method as flags of ``grass-ray train METHOD``."""

from __future__ import annotations

import pytest
import yaml

from grass_ray.cli import main
from grass_ray.config import RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import as_yaml, flatten


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> RunConfig:
    with pytest.raises(SystemExit) as ended:
        main(["train", *words, "--model", "tiny", "--dry-run"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    return RunConfig.parse(yaml.safe_load(said.out))


@pytest.mark.parametrize("method", ["grass", "lora", "galore", "hift"])
def test_every_setting_of_a_method_is_a_flag(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = RunConfig(method=METHODS[method].config).override({"model.name": "tiny"})
    settings = flatten(plain.to_dict()["method"])
    flags = {key: value for key, value in settings.items() if key.split(".")[-1] not in ("name", "kind", "lr")}
    absent = [key for key, value in flags.items() if value is None and key in ("adapter", "optimizer.projection")]
    given = [word for key in flags if key not in absent for word in (f"--{key}", as_yaml(flags[key]))]
    assert dry_run(capsys, method, *given) == plain


def test_flags_of_a_method_change_its_settings_and_set_takes_precedence(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = "{kind: linear, start: 2, end: 10}"
    config = dry_run(capsys, "--sampler.period", schedule, "grass", "--sampler.num-active-layers=1")
    assert config.method.sampler.period.kind == "linear"
    assert config.method.sampler.num_active_layers == 1
    changed = dry_run(capsys, "grass", "--sampler.period", "5", "--set", "method.sampler.period=7")
    assert changed.method.sampler.period == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("grass", "--sampler.temperature", "cold"), "method.sampler.temperature: Input should be a valid number"),
        (("lisa", "--sampler.temperature", "1"), "unknown arguments: --sampler.temperature 1"),
        (("gras", "--sampler.period", "1"), "unknown arguments: --sampler.period 1"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *words, "--dry-run"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
