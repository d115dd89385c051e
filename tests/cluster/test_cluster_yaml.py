"""cluster.yaml is one that Ray's launcher accepts, and brings the package to every node."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


def test_the_launcher_accepts_it() -> None:
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    assert "." in config["file_mounts"].values()
    assert any("pip install" in command and "grass_ray" in command for command in config["setup_commands"])
    starts = [command for commands in ("head", "worker") for command in config[f"{commands}_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
