"""Which network the workers of several nodes talk over: the one by which Ray knows the nodes."""

import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import Any

import ray
from ray.train.torch import TorchConfig

GET_ADDRESS = 0x8915
"""Linux's SIOCGIFADDR."""


class NodeBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Left to itself, gloo listens where the host's name leads: on Debian 127.0.1.1, which no other node reaches."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(set(worker_group.execute(node_address))) > 1:
            worker_group.execute(use_node_address)
        super().on_start(worker_group, backend_config)


class NodeTorchConfig(TorchConfig):
    """TorchConfig whose gloo groups reach over several nodes, whatever their names resolve to."""

    @property
    def backend_cls(self) -> type:
        return NodeBackend


def node_address() -> str:
    return ray.util.get_node_ip_address()


def use_node_address() -> None:
    """Have this process's gloo groups listen at its node's address; GLOO_SOCKET_IFNAME, where it is set, decides."""
    if interface := interface_of(node_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """Name of the network interface that has the IPv4 address; None if none has, or this is no Linux."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # without an address
                found = fcntl.ioctl(probe, GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
