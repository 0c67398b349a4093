"""A Ray cluster of several nodes on this machine, each with a home, a folder for temporary files and a working folder
of its own: as processes side by side, or in namespaces with addresses, disks and processes of their own."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_head import end, free_ports, plain_environment

BIN = Path(sys.executable).parent
IN_WORK = ("sh", "-c", 'cd "$0" && exec "$@"')


@dataclass
class Machine:
    """What runs on it finds home, tmp, work and ray in its private folder."""

    address: str
    private: Path
    """As the machine sees it: on machines with disks of their own, the same path is another folder on each."""
    inside: tuple[str, ...] = ()
    """What a command begins with that runs there."""

    def start(self, command: Sequence[str], environment: dict[str, str], **options: Any) -> subprocess.Popen:
        own = {"HOME": str(self.private / "home"), "TMPDIR": str(self.private / "tmp"), "OMP_NUM_THREADS": "1"}
        own |= {"PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        line = [*self.inside, *IN_WORK, str(self.private / "work"), *command]
        return subprocess.Popen(line, env=plain_environment() | own | environment, start_new_session=True, **options)

    def run(self, command: Sequence[str], environment: dict[str, str] | None = None, timeout: float = 400) -> str:
        """What it prints; it must succeed."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = self.start(command, environment or {}, **streams)
        try:
            said, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, said
        return said


@contextmanager
def machines_side_by_side(count: int) -> Iterator[list[Machine]]:
    """Folders of their own, and nothing else: needs no privileges."""
    folder = Path(tempfile.mkdtemp(prefix="gd-", dir="/tmp"))  # sockets have short paths
    try:
        machines = [Machine("127.0.0.1", folder / str(number)) for number in range(count)]
        for machine in machines:
            _furnish(machine)
        yield machines
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def machines_apart(count: int) -> Iterator[list[Machine]]:
    """Each in namespaces of its own, at one switch: 10.77.0.1 and so on. Their names resolve to nothing."""
    folder = Path(tempfile.mkdtemp(prefix="gd-", dir="/tmp"))
    switch = _hold(["unshare", "--net"], "true")
    held = [switch]
    try:
        _ip(switch, "link add hub type bridge", "link set hub up")
        machines = []
        for number in range(1, count + 1):
            apart = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
            disk = f"mount -t tmpfs -o size=2g tmpfs {folder}"
            held.append(_hold(apart, f"hostname gist-dist-{number} && {disk}"))
            outside = held[-1].pid
            _ip(switch, f"link add port{number} type veth peer name eth0 netns {outside}",
                f"link set port{number} master hub up")  # fmt: skip
            _ip(held[-1], f"addr add 10.77.0.{number}/24 dev eth0", "link set eth0 up", "link set lo up")
            within = Path(f"/proc/{outside}/task/{outside}/children").read_text().split()[0]
            enter = ("nsenter", "--target", within, "--net", "--mount", "--uts", "--pid")
            machines.append(Machine(f"10.77.0.{number}", folder, enter))
            _furnish(machines[-1])
        yield machines
    finally:
        for process in held:  # and all that runs within goes with it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def why_not_apart() -> str | None:
    """Why there can be no machines_apart here, or None."""
    if missing := [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]:
        return f"needs {', '.join(missing)} (iproute2, util-linux)"
    try_it = "ip link add gd0 type veth peer name gd1 && ip link add gd2 type bridge && mount -t tmpfs tmpfs /mnt"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "sh", "-c", try_it], capture_output=True, text=True
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def _furnish(machine: Machine) -> None:
    folders = [str(machine.private / name) for name in ("home", "tmp", "work", "ray")]
    subprocess.run([*machine.inside, "mkdir", "-p", *folders], check=True)


def _hold(namespaces: Sequence[str], setup: str) -> subprocess.Popen:
    """A process that keeps namespaces alive."""
    command = [*namespaces, "sh", "-c", f"{setup} && echo ready && exec sleep infinity"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    return process


def _ip(where: subprocess.Popen, *commands: str) -> None:
    for command in commands:
        subprocess.run(["nsenter", "--target", str(where.pid), "--net", "ip", *command.split()], check=True)


# ------------------------------------------------------------------------------------------------------ the cluster


@dataclass
class Nodes:
    """A head with a dashboard on the first machine and a node on each other, all of one CPU."""

    machines: list[Machine]
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    processes: list[subprocess.Popen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port, self.dashboard_port, self.client_port = free_ports(3)
        self.address = f"{self.machines[0].address}:{self.port}"
        self.dashboard = f"http://{self.machines[0].address}:{self.dashboard_port}"
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        """Of whoever wants to get in."""

    def start(self) -> None:
        self._node(
            0,
            f"""--head --port {self.port} --ray-client-server-port {self.client_port} --include-dashboard=true
            --dashboard-host {self.machines[0].address} --dashboard-port {self.dashboard_port}""",
        )
        self._wait(lambda: self.listed("nodes"), "the head")
        for number in range(1, len(self.machines)):
            self._node(number, f"--address {self.address}")
        self._wait(lambda: len(self.listed("nodes")) == len(self.machines), "all nodes")
        self._wait(lambda: self.get("/api/jobs/") is not None, "the agent that takes jobs")

    def _node(self, number: int, flags: str) -> None:
        machine = self.machines[number]
        command = f"""{BIN / "ray"} start --block --num-cpus 1 --node-ip-address {machine.address} {flags}
            --node-manager-port 0 --object-manager-port 0 --min-worker-port 0 --max-worker-port 0
            --dashboard-agent-listen-port {free_ports(1)[0]} --object-store-memory 100000000
            --temp-dir {machine.private / "ray"} --disable-usage-stats"""
        health = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_USAGE_STATS_ENABLED": "0"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes.append(machine.start(command.split(), self.environment | health, **quiet))

    def _wait(self, reached: Any, what: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline, f"{what} did not come up"
            assert all(process.poll() is None for process in self.processes), f"a node ended before {what} came up"
            time.sleep(0.3)

    def get(self, path: str) -> Any:
        """What the dashboard tells the head's own machine; None if it does not answer."""
        ask = (
            "import os, sys, urllib.request as u; token = 'Bearer ' + os.environ['RAY_AUTH_TOKEN'];"
            "print(u.urlopen(u.Request(sys.argv[1], headers={'Authorization': token}), timeout=10).read().decode())"
        )
        command = [sys.executable, "-c", ask, self.dashboard + path]
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        answer, _ = self.machines[0].start(command, self.environment, **quiet).communicate(timeout=30)
        return json.loads(answer) if answer else None

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """nodes, actors or tasks, as Ray's state API tells."""
        answer = self.get(f"/api/v0/{kind}?detail=1&limit=1000")
        return answer["data"]["result"]["result"] if answer else []

    def end(self) -> None:
        for process in reversed(self.processes):
            with suppress(ProcessLookupError):
                end(process)


@contextmanager
def nodes_on(machines: list[Machine]) -> Iterator[Nodes]:
    nodes = Nodes(machines)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.end()
