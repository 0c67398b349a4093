"""A local Ray comes up on a busy machine, and what killed ones have left is removed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gist_dist.on_ray.cluster.local_ray import (
    OWNER,
    PREFIX,
    SETTLED_SECONDS,
    end_processes,
    remove_left_folders,
    temporary_folder,
)

HOLD = """
import sys, time
from pathlib import Path
import tempfile
from gist_dist.on_ray.cluster import local_ray
local_ray.Path = lambda *parts: Path(*parts) if parts != ("/tmp",) else Path(sys.argv[1])
with local_ray.temporary_folder() as folder:
    folder.mkdir()
    print(folder.parent, flush=True)
    time.sleep(600)
"""


def age(folder: Path) -> None:
    then = time.time() - 2 * SETTLED_SECONDS
    os.utime(folder, (then, then))


def test_folders_of_killed_processes_are_removed_and_those_of_live_ones_are_not(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        killed, live = (Path(process.stdout.readline().strip()) for process in processes)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert killed.parent == live.parent == tmp_path and live.stat().st_mode & 0o777 == 0o700
        remove_left_folders(tmp_path)
        assert killed.exists()  # too young: its owner might be about to lock it
        unlocked, other_users = tmp_path / f"{PREFIX}of-an-older-version", tmp_path / f"{PREFIX}foreign"
        for folder in (unlocked, other_users):
            folder.mkdir()
        (other_users / OWNER).touch()
        (tmp_path / f"{PREFIX}link").symlink_to(killed)
        for folder in (killed, live, unlocked, other_users):
            age(folder)
        if os.getuid() == 0:
            os.chown(other_users, 65534, 65534)
        remove_left_folders(tmp_path)
        assert not killed.exists() and live.exists() and unlocked.exists()
        assert other_users.exists() == (os.getuid() == 0)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_folder_goes_with_its_block():
    with temporary_folder() as folder:
        assert len(str(folder)) < 40 and folder.parent.is_dir()
    assert not folder.parent.exists()


def test_only_processes_of_the_folder_are_ended(tmp_path):
    program = [sys.executable, "-c", "import time; time.sleep(600)"]
    ours = subprocess.Popen([*program, f"--session-dir={tmp_path / 'ray' / 'session_1'}"])
    other = subprocess.Popen([*program, f"--session-dir={tmp_path / 'other'}"])
    try:
        end_processes(tmp_path / "ray")
        assert ours.poll() is not None and other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


SLOW_START = """
import json, os, sys, types, time
import ray._private.node as node, ray._private.services as services
from gist_dist.config import ClusterConfig
from gist_dist.common.errors import UserError
from gist_dist.on_ray.cluster.connect import connected

late, tries, get_node = int(sys.argv[1]), [], services.get_node
clock = iter(range(0, 10**6, 20))  # seconds pass quickly while Ray waits for its processes

def get_node_late(*arguments):
    if len(tries) < late:
        raise RuntimeError("not registered yet")
    return get_node(*arguments)

init = node.Node.__init__
def counted(self, *arguments, **options):
    try:
        init(self, *arguments, **options)
    except Exception as error:
        tries.append(str(error))
        raise

node.Node.__init__, services.get_node = counted, get_node_late
node.time = types.SimpleNamespace(monotonic=lambda: next(clock), sleep=time.sleep, time=time.time)
folders = []
try:
    with connected(ClusterConfig()) as resources:
        import psutil
        mine = psutil.Process().children(recursive=True)
        servers = [child for child in mine if "gcs_server" in child.name()]
        said = {"cpus": resources["CPU"], "servers": len(servers)}
except UserError as error:
    said = {"error": str(error)}
print(json.dumps(said | {"failed": tries}))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("late", [1, 2])
def test_a_ray_that_comes_up_too_late_is_started_once_more(late, tmp_path):
    """What the first try has started is ended; after the second there is a sentence."""
    command = [sys.executable, "-c", SLOW_START, str(late)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said["failed"]) == late and all("timed out during startup" in error for error in said["failed"])
    if late == 1:
        assert said["cpus"] >= 1 and said["servers"] == 1
    else:
        assert said["error"].startswith("the local Ray did not start: The current node timed out during startup")
        assert said["error"].endswith("or set cluster.address to a Ray that runs") and "\n" not in said["error"]
