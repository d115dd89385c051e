"""The clusters' files are ones that Ray's launcher and KubeRay take, and bring the package to every node."""

from importlib.metadata import version
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from small import REPOSITORY

from grass_ray.experiment.flags import parse_options

LAUNCHED = ("cluster.yaml", "deploy/cluster.local.yaml")


def launched(name: str) -> dict[str, Any]:
    config = prepare_config(yaml.safe_load((REPOSITORY / name).read_text()))
    validate_config(config)
    return dict(config)


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_accepts_it_and_every_node_gets_the_package(name: str) -> None:
    config = launched(name)
    assert "." in config["file_mounts"].values()
    assert any("pip install" in command and "grass_ray" in command for command in config["setup_commands"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_asks_for_the_token_and_sweeps_there_join_instead_of_starting_a_ray_of_their_own(name: str) -> None:
    config = launched(name)
    starts = [command for place in ("head", "worker") for command in config[f"{place}_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    shell = " ".join(config["setup_commands"])
    assert "RAY_AUTH_MODE=token" in shell
    assert "RAY_ADDRESS=auto" in shell


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_head_serves_mlflow_where_sweeps_look_for_it_with_absolute_places(name: str) -> None:
    config = launched(name)
    (server,) = [command for command in config["head_setup_commands"] if "mlflow server" in command]
    assert "--host 127.0.0.1 --port 5000" in server
    assert "sqlite:////" in server or "sqlite:///$HOME/" in server
    assert any("MLFLOW_TRACKING_URI=http://127.0.0.1:5000" in command for command in config["setup_commands"])


def test_the_kubernetes_job_runs_a_sweep_on_the_ray_that_is_tested_here() -> None:
    volume, job = yaml.safe_load_all((REPOSITORY / "deploy/cluster.kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert spec["shutdownAfterJobFinishes"] is True
    python, script, *flags = spec["entrypoint"].split()
    assert python == "python"
    assert (REPOSITORY / script.removeprefix("/app/")).is_file()
    options = parse_options(script, "", flags)  # exits where a flag is unknown
    (workers,) = cluster["workerGroupSpecs"]
    assert options.machines == 1 + workers["replicas"]

    head = cluster["headGroupSpec"]["template"]["spec"]
    claims = {volume["metadata"]["name"]}
    for pod in (head, workers["template"]["spec"]):
        ray_container = pod["containers"][0]
        (mount,) = [mount for mount in ray_container["volumeMounts"] if mount["name"] == "shared"]
        assert options.storage_path.startswith(mount["mountPath"] + "/")
        assert {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if v["name"] == "shared"} == claims
    tracking = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["MLFLOW_TRACKING_URI"]
    (server,) = [container["command"] for container in head["containers"] if container["name"] == "mlflow"]
    assert tracking == "http://127.0.0.1:5000"
    assert {"--host=127.0.0.1", "--port=5000"} <= set(server)


def test_the_image_is_of_the_ray_that_is_tested_here_and_holds_what_the_job_runs() -> None:
    lines = (REPOSITORY / "deploy" / "Dockerfile").read_text().splitlines()
    assert f"FROM rayproject/ray:{version('ray')}-py311-gpu" in lines
    assert any(line.startswith("COPY") and line.endswith(". /app") for line in lines)
    assert "deploy/Dockerfile" in (REPOSITORY / "deploy" / "cluster.kuberay.yaml").read_text()
