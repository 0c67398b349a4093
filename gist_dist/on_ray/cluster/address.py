"""The address of a Ray cluster: where it was set, whether it is one, and why nobody answers there, in sentences."""

import http.client
import os
import platform
import re
import socket

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line
from gist_dist.config import ClusterConfig

DASHBOARD_PORT, CLIENT_PORT = 8265, 10001
REACH_SECONDS, DASHBOARD_SECONDS = 10.0, 3.0


def address_of(config: ClusterConfig) -> str | None:
    """None: a local Ray of our own."""
    address = config.address or os.environ.get("RAY_ADDRESS", "").strip()
    return address if address and address != "local" else None


def setting_of(config: ClusterConfig) -> str:
    """What to change for another address."""
    return "cluster.address" if config.address else "RAY_ADDRESS (an environment variable)"


def check_address(address: str, setting: str) -> None:
    """UserError for what is of another kind."""
    where = f"{setting} = {address}"
    remedy = "set it to the head's address, HEAD:6379, or leave it out for a local Ray"
    if address.startswith(("http://", "https://")):
        raise UserError(f"{where} is a dashboard, to which `gist-dist submit` sends runs; to train from here, {remedy}")
    if address != "auto" and not re.fullmatch(r"(ray://)?(\[[0-9a-fA-F:.]+\]|[^\s:/]+):\d{1,5}", address):
        raise UserError(f"{where} is no address of a Ray cluster; {remedy}")


def reach(address: str) -> None:
    """OSError if nothing listens there: Ray would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    host = host.strip("[]")
    socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    if int(port) == DASHBOARD_PORT and _speaks_http(host, int(port)):
        raise OSError("a dashboard answers there, not the head; its port is 6379 by default")


def _speaks_http(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=DASHBOARD_SECONDS)
    try:
        connection.request("GET", "/api/version")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def unreached(address: str, setting: str, error: Exception) -> UserError:
    """What Ray says, with its cause first."""
    where, said = f"{setting} = {address}", str(error)
    if "Version mismatch" in said:
        versions = re.findall(r"(Ray|Python): (\S+)", said)
        theirs = " and ".join(f"{name} {version}" for name, version in versions[:2]) or "other versions"
        ours = " and ".join(f"{name} {version}" for name, version in versions[2:4]) or _own_versions()
        return UserError(f"{where}: the cluster runs {theirs}, and this command {ours}; install the same on both")
    if address == "auto":
        return UserError(f"{where}: no Ray runs on this machine; start one, or leave it out for a local Ray")
    hint = ""
    if address.endswith(f":{CLIENT_PORT}") and not address.startswith("ray://"):
        hint = f" ({CLIENT_PORT} is the port of Ray's client; the head's is 6379 by default)"
    return UserError(f"{where}: no Ray cluster answers there: {one_line(error, 200)}{hint}")


def _own_versions() -> str:
    import ray

    return f"Ray {ray.__version__} and Python {platform.python_version()}"
