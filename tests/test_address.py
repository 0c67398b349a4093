"""An address of another kind, a cluster of other versions: one sentence with the true cause and where it was set."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from facts import assert_tells

from gist_dist.common.errors import UserError
from gist_dist.config import ClusterConfig
from gist_dist.on_ray.cluster import address as addresses
from gist_dist.on_ray.cluster import local_ray
from gist_dist.on_ray.cluster.address import address_of, unreached
from gist_dist.on_ray.cluster.connect import connected


def refused(monkeypatch, variable: str | None = None, **config) -> str:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was asked"))
    with pytest.raises(UserError) as caught, connected(ClusterConfig(**config)):
        pass
    return str(caught.value)


def test_a_dashboard_is_no_cluster_address(monkeypatch):
    remedy = "set it to the head's address, HEAD:6379, or leave it out for a local Ray"
    said = " is a dashboard, to which `gist-dist submit` sends runs; to train from here, " + remedy
    where = "RAY_ADDRESS (an environment variable) = http://head:8265"
    assert refused(monkeypatch, "http://head:8265") == where + said
    assert refused(monkeypatch, address="https://head") == "cluster.address = https://head" + said


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "a b:1", "anyscale://x", "head:1234567"])
def test_what_is_no_address_is_named(monkeypatch, address):
    assert_tells(
        refused(monkeypatch, address), f"RAY_ADDRESS … environment variable … {address} … no address … the head's"
    )
    assert refused(monkeypatch, "other:1", address=address).startswith(f"cluster.address = {address} is no address")


def test_local_and_blank_mean_a_ray_of_our_own(monkeypatch):
    for value in ("local", "", "  "):
        monkeypatch.setenv("RAY_ADDRESS", value)
        assert address_of(ClusterConfig()) is None
    assert address_of(ClusterConfig(address="local")) is None
    monkeypatch.setenv("RAY_ADDRESS", " head:6379 ")
    assert address_of(ClusterConfig()) == "head:6379" and address_of(ClusterConfig(address="a:1")) == "a:1"


def test_the_port_of_a_dashboard_is_found_out(monkeypatch):
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        monkeypatch.setattr(addresses, "DASHBOARD_PORT", port)
        assert_tells(
            refused(monkeypatch, f"127.0.0.1:{port}"), f"RAY_ADDRESS … 127.0.0.1:{port} … a dashboard answers … 6379"
        )
        server.shutdown()


def test_other_versions_are_told_as_such():
    import ray
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "2.9.3", "python_version": "3.9.1"}, "node 10.0.0.7")
    told = str(unreached("head:6379", "cluster.address", caught.value))
    assert_tells(told, "cluster.address = head:6379 … Ray 2.9.3 … Python 3.9.1 … install the same")
    assert f"and this command Ray {ray.__version__} and Python 3." in told
    assert told.endswith("; install the same on both")


def test_what_ray_says_is_told_otherwise():
    told = str(unreached("head:10001", "RAY_ADDRESS", OSError("nobody")))
    assert_tells(told, "RAY_ADDRESS = head:10001 … nobody … 10001 … client … 6379")
    assert_tells(str(unreached("auto", "RAY_ADDRESS", ConnectionError("x"))), "auto … no Ray … start one")


def test_a_machine_without_a_place_for_temporary_files(monkeypatch, tmp_path):
    def full(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_ray.tempfile, "mkdtemp", full)
    with pytest.raises(UserError, match=r"is no place for the local Ray's files \(No space left on device\); make it"):
        with local_ray.temporary_folder():
            pass


def test_uv_does_not_take_the_workers_to_another_environment():
    # In a process of its own: Ray reads the variable when it is imported, here maybe by a test of before.
    program = (
        "import gist_dist.on_ray; from ray._private import ray_constants as c; print(c.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_a_proxy_that_stands_before_a_dashboard_is_named(monkeypatch):
    from gist_dist.on_ray.jobs.client import _by_proxy

    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert _by_proxy("http://head:8265") == ""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    told = "; http_proxy is set in the environment: add head to no_proxy if it is not behind the proxy"
    assert _by_proxy("http://head:8265") == told and _by_proxy("https://head:8265") == ""
    monkeypatch.setenv("no_proxy", "head")
    assert _by_proxy("http://head:8265") == ""
