"""A Ray head of its own on loopback: dashboard, jobs, a token; it disturbs no other Ray of this machine."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Head:
    port: int
    dashboard_port: int
    token: str
    folder: Path
    """Its temporary files, the job logs among them."""
    process: subprocess.Popen

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    def get(self, path: str) -> Any:
        """What the dashboard answers; OSError if it does not."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def environment(self) -> dict[str, str]:
        """Of a node: a Python with ray comes first, and no other cluster is found."""
        return plain_environment() | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "OMP_NUM_THREADS": "1",
        }


def plain_environment() -> dict[str, str]:
    """This process's, without what it has set for a Ray of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def ray_head(num_cpus: int = 2) -> Iterator[Head]:
    port, dashboard_port, client_port, agent_port = free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="gd-", dir="/tmp"))
    head = Head(port, dashboard_port, secrets.token_hex(32), folder, None)
    head.token_file.write_text(head.token)
    command = f"""ray start --head --block --port {port} --num-cpus {num_cpus} --include-dashboard=true
        --dashboard-host 127.0.0.1 --dashboard-port {dashboard_port} --dashboard-agent-listen-port {agent_port}
        --ray-client-server-port {client_port} --min-worker-port 0 --max-worker-port 0
        --object-store-memory 200000000 --temp-dir {folder} --disable-usage-stats"""
    head.process = start(command, head.environment(), folder / "head.log")
    try:
        _wait_until_it_answers(head)
        yield head
    finally:
        end(head.process)
        shutil.rmtree(folder, ignore_errors=True)


def start(command: str, environment: dict[str, str], log: Path) -> subprocess.Popen:
    with open(log, "wb") as out:
        program = [str(Path(sys.executable).parent / "ray"), *command.split()[1:]]
        return subprocess.Popen(program, env=environment, stdout=out, stderr=out, start_new_session=True)


def end(process: subprocess.Popen) -> None:
    """All that `ray start --block` has started is of its process group; asked kindly, it takes half a minute."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_until_it_answers(head: Head) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            head.get("/api/jobs/")
            return
        except OSError:
            log = (head.folder / "head.log").read_text()
            assert head.process.poll() is None and time.monotonic() < deadline, log
            time.sleep(0.3)
