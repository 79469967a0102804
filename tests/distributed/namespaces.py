"""Two machines on one: network namespaces joined by a cable (a veth pair). They share the file system, as nodes share a
mount."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("node-0", "node-1")                 # how the nodes know each other, as the services of docker/compose.yaml do


@dataclass(frozen=True)
class Node:
    """A machine with a loopback and one interface, eth0, that leads to the other."""

    namespace: str
    address: str

    def start(self, command: Sequence[str | Path], environment: Mapping[str, str],
              folder: Path) -> subprocess.Popen[str]:
        """The command as a process of this machine, started in `folder`; stdout and stderr go to one pipe."""
        return subprocess.Popen(["ip", "netns", "exec", self.namespace, *map(str, command)], cwd=folder, text=True,
                                start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env={**os.environ, **environment})

    def cut_off(self) -> None:
        """Pulls the cable: nobody is told, packets just no longer arrive."""
        ip("-n", self.namespace, "link", "set", "eth0", "down")

    def connect(self) -> None:
        """Puts the cable back."""
        ip("-n", self.namespace, "link", "set", "eth0", "up")

    def end(self) -> None:
        """Kills what still runs here, and removes the machine."""
        for pid in ip("netns", "pids", self.namespace).split():
            os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", self.namespace)
        shutil.rmtree(f"/etc/netns/{self.namespace}", ignore_errors=True)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Both machines, gone at the end whatever happened. Skips the test where they cannot be had."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    nodes = tuple(Node(f"dpo{os.getpid()}-{i}", f"10.213.7.{i + 1}") for i in range(2))
    made: list[Node] = []
    try:
        for node in nodes:
            done = subprocess.run(["ip", "netns", "add", node.namespace], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
            made.append(node)
        _connect(*nodes)
        yield nodes[0], nodes[1]
    finally:
        for node in made:
            node.end()


def _connect(a: Node, b: Node) -> None:
    ip("link", "add", "eth0", "netns", a.namespace, "type", "veth", "peer", "name", "eth0", "netns", b.namespace)
    hosts = "127.0.0.1 localhost\n" + "".join(f"{n.address} {name}\n" for name, n in zip(NAMES, (a, b), strict=True))
    for node in (a, b):
        ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            ip("-n", node.namespace, "link", "set", link, "up")
        # `ip netns exec` puts this file in the place of /etc/hosts
        own = Path("/etc/netns", node.namespace)
        own.mkdir(parents=True, exist_ok=True)
        (own / "hosts").write_text(hosts)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
