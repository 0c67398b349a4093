"""`gist-dist doctor --address`: what it finds on the nodes of real clusters, good ones and bad ones."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import torch
import yaml
from ray_head import Head, end, plain_environment, ray_head
from tiny import recipe, run_group, save_tiny_model, write_jsonl

from gist_dist.on_ray.doctor.bandwidth import gather_seconds
from gist_dist.on_ray.doctor.machine import Finding, Verdict, describe_node
from gist_dist.recipe import parse_config

pytestmark = pytest.mark.ray


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("doctor")
    rows = write_jsonl(folder / "rows.jsonl", [{"anchor": "amber", "positive": "basin"}])
    student, guide = save_tiny_model(folder / "student"), save_tiny_model(folder / "guide", seed=1)
    return recipe(folder / "runs", student, guide, rows, cluster={"num_workers": 1})


@pytest.fixture(scope="module")
def processes(ray_session):
    """On each node one, for all tests: it takes its time to import what loads models."""
    from gist_dist.on_ray.doctor.nodes import Nodes

    nodes = Nodes()
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(processes, monkeypatch):
    monkeypatch.setattr(processes, "findings", [])
    monkeypatch.setattr(processes, "close", lambda: None)
    return processes


def test_a_good_cluster_is_found_ready(nodes, tree, monkeypatch):
    """But for the gathering: a Ray Train run is for the tests of two nodes."""
    from gist_dist.on_ray.doctor import examine as doctor

    asked = []
    monkeypatch.setattr(doctor, "Nodes", lambda: nodes)
    monkeypatch.setattr(doctor, "measure_gather", lambda *arguments: asked.append(arguments[2]) or [])
    findings = doctor.examine_cluster(ray.get_runtime_context().gcs_address, parse_config(tree))
    found = by_name(findings)
    assert Verdict(findings).healthy, Verdict(findings).lines()
    assert "1 node;" in found["Ray"].found
    assert any(name.startswith("node ") and " CPUs" in finding.found for name, finding in found.items())
    assert "equal here and on all nodes: python 3." in found["versions"].found and "torch" in found["versions"].found
    assert re.fullmatch(r"within \d+ ms", found["clocks"].found)
    assert found["output_dir"].found == f"{tree['output_dir']}: is written"
    assert not list(Path(tree["output_dir"]).iterdir())
    assert {"student.model", "guide.model"} <= found.keys() and "evaluate.tasks" not in found
    assert asked == [2]


def test_a_group_gathers_each_size_and_takes_longer_for_more(tmp_path):
    (ours, theirs) = run_group(gather_seconds, 2, tmp_path, torch.device("cpu"), 0.05)
    assert list(ours) == list(theirs) == ["64 kB", "1 MB", "16 MB", "64 MB"]
    assert ours["64 MB"] > ours["16 MB"] > ours["1 MB"] > 0
    assert 0.01 < 64e6 / 2 / ours["64 MB"] / 1e9 < 100


def test_what_a_node_lacks_is_named_with_a_remedy(nodes, tree, tmp_path):
    (tmp_path / "file").write_text("")
    broken = tree | {
        "student": {"model": str(tmp_path / "absent")},
        "evaluate": {"tasks": ["STSBenchmark"]},
    }
    findings = nodes.examine(parse_config(broken), {"output_dir": str(tmp_path / "file" / "runs")})
    failed = {f.name: f for f in findings if f.state == "fail"}
    assert failed.keys() == {"output_dir", "student.model", "evaluate.tasks"}
    assert "can't write: " in failed["output_dir"].found and "Not a directory" in failed["output_dir"].found
    assert "absent" in failed["student.model"].found
    assert failed["evaluate.tasks"].found.split(": ", 1)[1].startswith("STSBenchmark, without the Hub: ")
    assert all(finding.remedy for finding in failed.values())
    assert not Verdict(findings).healthy


def test_versions_clocks_and_gpus_that_differ_are_findings():
    from gist_dist.on_ray.doctor.nodes import Nodes

    nodes = Nodes.__new__(Nodes)  # of nodes that nobody has: described by hand
    nodes.findings, nodes.names = [], {"n1": "10.0.0.1", "n2": "10.0.0.2", "n3": "10.0.0.3"}
    nodes.resources = {"n1": {"CPU": 8, "GPU": 1}, "n2": {"CPU": 8, "GPU": 1}, "n3": {"CPU": 8}}
    good = describe_node(["/"]) | {"memory_gb": 64.0, "shm_gb": 30.0, "gpus": ["H100 80 GB, driver 550"]}
    described = {
        "n1": good,
        "n2": good | {"versions": good["versions"] | {"torch": "2.0.0"}, "gpus": []},
        "n3": good
        | {"versions": good["versions"] | {"mteb": None}, "gpus": [], "memory_gb": 1.0, "disk_gb": {"/": 1.0}},
    }
    nodes._each_node(described)
    nodes._versions(described, good)
    problems = [f"{f.name}: {f.found}" for f in nodes.findings if f.state != "ok"]
    assert problems == [
        "node 10.0.0.2: Ray was told of 1 GPUs and the driver shows 0",
        "node 10.0.0.3: 1.0 GB memory free",
        "node 10.0.0.3: 1.0 GB free in /",
        f"version of torch: {good['versions']['torch']} on 10.0.0.1, 10.0.0.3; 2.0.0 on 10.0.0.2",
        f"version of mteb: {good['versions']['mteb']} on 10.0.0.1, 10.0.0.2; none on 10.0.0.3",
    ]
    nodes.findings.clear()
    nodes._versions({"n1": good}, good | {"versions": good["versions"] | {"datasets": "1.0"}, "prefix": "/opt/conda"})
    told = (
        f"{good['versions']['datasets']} on 10.0.0.1; 1.0 here (Python is in {sys.prefix} on 10.0.0.1; /opt/conda here)"
    )
    assert [f.found for f in nodes.findings if f.state == "fail"] == [told]
    nodes.findings.clear()
    nodes._clocks({"n1": 0.0, "n2": 0.002, "n3": -90.0})
    (clock,) = nodes.findings
    assert (clock.state, clock.found) == ("warn", "90.0 s apart, 10.0.0.3 is furthest from here")


def test_folders_of_models_from_the_hub_that_differ_are_a_finding(tree, monkeypatch):
    from gist_dist.on_ray.doctor.nodes import Nodes

    nodes = Nodes.__new__(Nodes)
    nodes.findings, nodes.names = [], {"n1": "10.0.0.1", "n2": "10.0.0.2"}
    homes = [{"hub_cache": f"/{name}/hub"} for name in ("shared", "home")]
    config = parse_config(tree)
    nodes._hub_caches({"n1": homes[0], "n2": homes[0]}, homes[0], config)
    assert not nodes.findings
    nodes._hub_caches({"n1": homes[0], "n2": homes[0]}, homes[1], config)
    nodes._hub_caches({"n1": homes[0], "n2": homes[1]}, homes[1], None)
    assert [f.found for f in nodes.findings] == [
        "models from the Hub are kept in /shared/hub on 10.0.0.1, 10.0.0.2; /home/hub here",
        "models from the Hub are kept in /shared/hub on 10.0.0.1; /home/hub on 10.0.0.2",
    ]
    assert all(f.state == "warn" and "HF_HOME" in f.remedy for f in nodes.findings)
    nodes.findings.clear()
    given = parse_config(tree | {"cluster": {"runtime_env": {"env_vars": {"HF_HOME": "/shared"}}}})
    nodes._hub_caches({"n1": homes[0], "n2": homes[0]}, homes[1], given)
    assert not nodes.findings, "the recipe sets it for the nodes"
    for names, expected in (
        ({"HF_HOME": "/one"}, "/one/hub"),
        ({"HF_HUB_CACHE": "/two"}, "/two"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
    ):  # fmt: skip
        for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        assert describe_node([])["hub_cache"] == expected


# ------------------------------------------------------------------------------------------------------- two nodes


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """A head, and a second node that has a disk of its own where the head has the folder `private`."""
    folder = tmp_path_factory.mktemp("nodes")
    for name in ("shared", "private"):
        (folder / name).mkdir()
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here (unshare -m): takes root, and a container that may mount")
    with ray_head(num_cpus=1) as head:
        second = _second_node(head, folder)
        try:
            deadline = time.monotonic() + 60
            while head.get("/api/v0/nodes")["data"]["result"]["total"] < 2:
                assert time.monotonic() < deadline, (head.folder / "second.log").read_text()
                time.sleep(0.3)
            yield head, folder
        finally:
            end(second)


def _second_node(head: Head, folder: Path) -> subprocess.Popen:
    mount = f"mount -t tmpfs tmpfs {folder / 'private'}"
    node = f"""{shutil.which("ray", path=str(Path(sys.executable).parent))} start --block --num-cpus 1
        --address $(hostname -i | cut -d' ' -f1):{head.port} --min-worker-port 0 --max-worker-port 0
        --dashboard-agent-listen-port 0 --object-store-memory 100000000 --disable-usage-stats"""
    script = f"{mount} && exec {' '.join(node.split())}"
    with open(head.folder / "second.log", "wb") as log:
        command = ["unshare", "-m", "bash", "-c", script]
        return subprocess.Popen(command, env=head.environment(), stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("name, healthy", [("shared", True), ("private", False)])
def test_a_disk_that_only_one_node_has_is_found_out_from_outside(two_nodes, tree, name, healthy):
    """Over HTTP, as a job: the machine that asks is not part of the cluster."""
    head, folder = two_nodes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | {"output_dir": str(folder / name), "cluster": {"num_workers": 2}}))
    command = [sys.executable, "-m", "gist_dist.cli", "doctor", str(path), "--address", head.address]
    command += ["--token-file", str(head.token_file)]
    done = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == (0 if healthy else 1), done.stdout + done.stderr
    assert "2 nodes; 2 CPUs" in done.stdout
    assert "loads on every node" in done.stdout
    assert "2 workers on 2 nodes, gloo" in done.stdout
    speeds = re.findall(r"(\d+) (?:k|M)B [\d.]+ (?:µs|ms) \(([\d.]+) GB/s\)", done.stdout)
    assert [size for size, _ in speeds] == ["64", "1", "16", "64"] and float(speeds[-1][1]) > 0.001
    if healthy:
        assert "all 2 nodes write it and see each other's files" in done.stdout
        assert "ready to train" in done.stdout
    else:
        assert done.stdout.count("does not see what") == 2 and "mount the same storage" in done.stdout
        assert "not ready: 2 failed" in done.stdout
