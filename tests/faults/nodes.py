"""A Ray cluster of several nodes on this machine, each a `ray start` with processes, ports and folders of its own."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from faults.product import clean_environment, kill, marked_processes, name_of

HOST = "127.0.0.1"


class Node:
    """One raylet and what belongs to it."""

    def __init__(self, cluster: "Cluster", mark: str, flags: list[str]) -> None:
        self.cluster, self.mark = cluster, mark
        environment = clean_environment(mark) | cluster.environment
        command = [
            _script("ray"), "start", *flags, f"--temp-dir={cluster.folders[-1]}", f"--node-ip-address={HOST}",
            "--node-manager-port=0", "--object-manager-port=0", "--min-worker-port=0", "--max-worker-port=0",
            f"--dashboard-agent-listen-port={_free_port()}", f"--object-store-memory={100 * 2**20}",
            "--disable-usage-stats",
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def raylet(self) -> int:
        return next(pid for pid in marked_processes(self.mark) if "/raylet/raylet " in name_of(pid))

    @property
    def id(self) -> str:
        return re.search(r"--node[-_]id=(\w+)", name_of(self.raylet))[1]

    def lose(self) -> None:
        """SIGKILL of the raylet: to the others the node is gone, and its workers end."""
        kill(self.raylet, signal.SIGKILL)

    def announce_preemption(self, seconds: int) -> None:
        """The notice of a spot machine that is to be taken away in so many seconds."""
        command = [
            _script("ray"), "drain-node", f"--address={self.cluster.address}", f"--node-id={self.id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={seconds}",
        ]  # fmt: skip
        environment = clean_environment("notice") | self.cluster.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def end(self) -> None:
        for pid in marked_processes(self.mark):
            kill(pid, signal.SIGKILL)


class Cluster:
    """A head without cores, and nodes of one core. environment: what a command needs to get in, and all its workers."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.address = f"{HOST}:{_free_port()}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = token | environment
        self.mark = f"{os.getpid()}-{self.port}"
        self.folders: list[Path] = []
        self.nodes: list[Node] = []
        self.start_head()

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def start_head(self) -> None:
        """At the same address each time, on a disk of its own."""
        self.folders.append(Path(tempfile.mkdtemp(prefix="gist-chaos-", dir="/tmp")))  # sockets have short paths
        flags = [
            "--head", f"--port={self.port}", f"--ray-client-server-port={_free_port()}", "--include-dashboard=false",
            "--num-cpus=0",
        ]  # fmt: skip
        self.head = Node(self, f"{self.mark}-head-{len(self.folders)}", flags)

    def add(self) -> Node:
        node = Node(self, f"{self.mark}-{len(self.nodes)}", [f"--address={self.address}", "--num-cpus=1"])
        self.nodes.append(node)
        return node

    def end(self) -> None:
        for node in [*self.nodes, self.head]:
            node.end()
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
