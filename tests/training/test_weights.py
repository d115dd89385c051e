"""The hash of the base model's weights is that of the bytes on the disk."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import torch
from small import make_llama, short_run

from grass_ray.config import ModelConfig
from grass_ray.training.run import Run
from grass_ray.training.weights import base_model_sha256, parameters_sha256


def test_one_file_has_its_own_hash_and_another_bit_another(tmp_path: Path) -> None:
    make_llama(seed=0).save_pretrained(tmp_path / "zero")
    make_llama(seed=1).save_pretrained(tmp_path / "one")
    bytes_of_it = (tmp_path / "zero" / "model.safetensors").read_bytes()
    assert base_model_sha256(ModelConfig(name=str(tmp_path / "zero"))) == hashlib.sha256(bytes_of_it).hexdigest()
    hashes = {base_model_sha256(ModelConfig(name=str(tmp_path / name))) for name in ("zero", "one")}
    assert len(hashes) == 2
    (tmp_path / "zero" / "model.safetensors").write_bytes(bytes_of_it[:-1] + bytes([bytes_of_it[-1] ^ 1]))
    assert base_model_sha256(ModelConfig(name=str(tmp_path / "zero"))) not in hashes


def test_several_files_are_hashed_as_the_shell_would(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    command = "LC_ALL=C sha256sum *.safetensors | sha256sum"
    told = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert base_model_sha256(ModelConfig(name=str(tmp_path))) == told.split()[0]


def test_the_built_in_model_has_one_whatever_the_dtype_and_an_absent_one_has_none() -> None:
    assert base_model_sha256(ModelConfig(name="tiny")) == base_model_sha256(ModelConfig(name="tiny", dtype="bfloat16"))
    assert base_model_sha256(ModelConfig(name="no/such-model")) is None


def test_one_changed_bit_of_any_parameter_changes_the_hash_of_a_model_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = make_llama(tied=True).to(dtype)
        before = parameters_sha256(model)
        assert parameters_sha256(make_llama(tied=True).to(dtype)) == before
        for parameter in model.parameters():
            bits = parameter.data.flatten().view(torch.int16)
            bits[0] ^= 1
            assert parameters_sha256(model) != before
            bits[0] ^= 1
        assert parameters_sha256(model) == before


def test_a_run_that_was_interrupted_ends_with_the_hash_of_one_that_was_not(tmp_path: Path) -> None:
    config = short_run("grass")
    whole = Run.prepare(config)
    untrained = whole.weights_sha256()
    for _ in whole.fit():
        pass
    first = Run.prepare(config)
    for report in first.fit():
        if report.step == 5:
            first.save(tmp_path / "checkpoint")
            break
    second = Run.prepare(config)
    second.restore(tmp_path / "checkpoint")
    for _ in second.fit():
        pass
    assert second.weights_sha256() == whole.weights_sha256()
    assert second.weights_sha256() != untrained
