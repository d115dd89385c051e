"""Machines with addresses of their own on a network whose cables can be pulled: namespaces of this kernel.

::

    with Network(2) as network:
        subprocess.Popen([*network.enter(1), "ray", "start", "--address", f"{network.address(0)}:6379"])
        network.cut(1)                    # every packet from and to it is lost, and nobody is told
        network.mend(1)

A process holds each namespace and the switch between them; when those end, nothing is left.
"""

from __future__ import annotations

import subprocess
from typing import Any

SUBNET = "10.77.0"


def can_make_networks() -> bool:
    """Whether this user may, and whether the kernel has switches."""
    probe = ["unshare", "--net", "ip", "link", "add", "switch", "type", "bridge"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


class Network:
    """``number`` machines, all joined to one switch."""

    def __init__(self, number: int) -> None:
        self._holders = [
            subprocess.Popen(
                ["unshare", "--net", "sh", "-c", "echo ready; exec cat"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(number + 1)
        ]  # fmt: skip
        for holder in self._holders:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
        self._switch = self._holders.pop()
        self._ip(self._switch, "link add switch type bridge")
        self._ip(self._switch, "link set switch up")
        for place, holder in enumerate(self._holders):
            self._ip(self._switch, f"link add port{place} type veth peer name eth0 netns {holder.pid}")
            self._ip(self._switch, f"link set port{place} master switch up")
            self._ip(holder, f"addr add {self.address(place)}/24 dev eth0")
            self._ip(holder, "link set eth0 up")
            self._ip(holder, "link set lo up")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: Any) -> None:
        for holder in (*self._holders, self._switch):
            holder.communicate()

    def address(self, place: int) -> str:
        """Of a machine."""
        return f"{SUBNET}.{place + 1}"

    def enter(self, place: int) -> tuple[str, ...]:
        """Words before a command that is to run on a machine."""
        return ("nsenter", "--target", str(self._holders[place].pid), "--net")

    def cut(self, place: int) -> None:
        """Pull a machine's cable out of the switch; its own end still shows a link."""
        self._ip(self._switch, f"link set port{place} nomaster")

    def mend(self, place: int) -> None:
        """Plug it in again."""
        self._ip(self._switch, f"link set port{place} master switch")

    def _ip(self, holder: subprocess.Popen[str], words: str) -> None:
        subprocess.run(["nsenter", "--target", str(holder.pid), "--net", "ip", *words.split()], check=True)
