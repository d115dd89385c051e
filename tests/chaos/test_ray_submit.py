"""``ray up`` and ``ray submit`` over real SSH, on this machine: deploy/cluster.local.yaml at another address and port.

What is changed for the test: this machine's loopback with an SSH server of its own on a high port and a home of its
own; free ports; an existing environment (GRASS_RAY_VENV, by default the running one) in the place of ``pip install``;
and no ``ray stop``, which would end every other Ray of this machine. Ray's processes are ended by their ids.

    python -m pytest --slow tests/chaos/test_ray_submit.py -s
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from small import REPOSITORY

from grass_ray.results.record import RunRecord

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
PROXY = """import socket, sys, threading
end = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def pump(read, write, close):
    while data := read(65536):
        write(data)
    close()
out = lambda data: (sys.stdout.buffer.write(data), sys.stdout.buffer.flush())
threading.Thread(target=pump, args=(sys.stdin.buffer.read1, end.sendall, lambda: end.shutdown(socket.SHUT_WR)),
                 daemon=True).start()
pump(end.recv, out, lambda: None)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def end_processes_of(folder: Path) -> None:
    """Kill the processes that were started with the test's own folder in their environment or command line."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for _ in range(3):  # what a dying process had just started
        for process in psutil.process_iter():
            try:
                known = " ".join([*process.cmdline(), *process.environ().values()])
                if process.pid not in spared and str(folder) in known:
                    process.kill()
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        time.sleep(0.5)


@contextmanager
def ssh_server(folder: Path, home: Path, port: int) -> Iterator[None]:
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nUsePAM no\nStrictModes no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"SetEnv HOME={home} RAY_TMPDIR={folder} RAY_USAGE_STATS_ENABLED=0\nSubsystem sftp internal-sftp\n"
    )
    assert SSHD is not None
    with (folder / "sshd.log").open("w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def cluster_file(folder: Path, home: Path, ssh_port: int, mlflow_port: int) -> Path:
    config: dict[str, Any] = yaml.safe_load(
        (REPOSITORY / "deploy/cluster.local.yaml").read_text().replace(":5000", f":{mlflow_port}")
        .replace("--port 5000", f"--port {mlflow_port}")
    )  # fmt: skip
    config["cluster_name"] = folder.name
    config["provider"] = {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}
    config["auth"] = {
        "ssh_user": getuser(),
        "ssh_private_key": str(folder / "user_key"),
        "ssh_proxy_command": shlex.join([sys.executable, str(folder / "proxy.py"), "127.0.0.1", str(ssh_port)]),
    }
    config["file_mounts"] = {
        where.replace("~", str(home), 1): what.replace("~", str(home), 1)
        for where, what in config["file_mounts"].items()
    }
    config["setup_commands"] = [command for command in config["setup_commands"] if "pip install" not in command]
    ports = f"--port={free_port()} --dashboard-port={free_port()} --dashboard-agent-listen-port={free_port()}"
    ports += f" --ray-client-server-port={free_port()} --metrics-export-port={free_port()}"
    starts = [command for command in config["head_start_ray_commands"] if "ray stop" not in command]
    config["head_start_ray_commands"] = [
        command.replace("--port=6379", f"{ports} --num-cpus=2 --object-store-memory=150000000 --temp-dir={folder}/ray")
        for command in starts
    ]
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config, width=1000))
    return path


@pytest.mark.slow
def test_a_sweep_submitted_over_ssh_runs_on_the_cluster_and_ends_in_its_mlflow(real_data: Path) -> None:
    missing = [name for name, path in (("sshd", SSHD), ("rsync", shutil.which("rsync"))) if path is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed (apt-get install openssh-server rsync)")
    folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))  # short: Ray's sockets lie in it
    home = folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / "venv").symlink_to(os.environ.get("GRASS_RAY_VENV", sys.prefix))
    (home / ".bashrc").write_text("export PYTHONPATH=$HOME/grass_ray OMP_NUM_THREADS=1\n")
    (home / ".bash_profile").write_text("source ~/.bashrc\n")
    (folder / "proxy.py").write_text(PROXY)
    ssh_port, mlflow_port = free_port(), free_port()
    environment = {**os.environ, "HOME": str(home), "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    ray = str(Path(sys.prefix, "bin", "ray"))

    def launcher(*words: str) -> str:
        command = [ray, *words]
        print("$", shlex.join(command))
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=900,
        )  # fmt: skip
        print(done.stdout)
        assert done.returncode == 0, done.stdout
        return done.stdout

    try:
        with ssh_server(folder, home, ssh_port):
            config = cluster_file(folder, home, ssh_port, mlflow_port)
            launcher("get-auth-token", "--generate")
            launcher("up", "--yes", "--no-config-cache", str(config))
            results = home / "results"
            said = launcher(
                "submit", "--no-config-cache", str(config), "sweeps/commonsense.py", "--",
                "--smoke", "--models", "tiny", "--methods", "full", "grass", "--tasks", "arc_easy", "--no-base",
                "--machines", "1", "--cpus-per-trial", "1", "--storage-path", str(results),
                "--data-dir", str(real_data / "llm-adapters"),
            )  # fmt: skip
            assert "joined Ray at" in said
            records = [RunRecord.load(path) for path in results.glob("commonsense/*/*/record.json")]
            statuses = {record.config["method"]["name"]: record.status for record in records}
            assert statuses == {"full": "finished", "grass": "finished"}
            client = MlflowClient(f"http://127.0.0.1:{mlflow_port}")
            experiment = client.get_experiment_by_name("commonsense")
            runs = client.search_runs([experiment.experiment_id])
            assert sorted(run.info.status for run in runs) == ["FINISHED"] * 3  # the sweep and two trials
    finally:
        end_processes_of(folder)
    shutil.rmtree(folder, ignore_errors=True)
