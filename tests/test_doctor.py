"""`gist-dist doctor`: what it finds, what it says of what lacks, and that it never falls over."""

import shutil
from importlib import metadata

import pytest

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.config import ClusterConfig
from gist_dist.on_ray.doctor import machine as doctor
from gist_dist.on_ray.doctor.machine import Finding, Verdict


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    doctor.go_offline_if_unreachable.cache_clear()


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


@pytest.mark.ray
def test_this_machine_is_healthy(ray_session):
    from gist_dist.on_ray.doctor.examine import examine

    verdict = examine()
    found = states(verdict.findings)
    assert verdict.healthy, verdict.lines()
    assert {"python", "torch", "ray", "processor", "memory", "disk", "shared memory", "process group", "Ray"} <= set(
        found
    )
    assert "ran a task" in next(finding.found for finding in verdict.findings if finding.name == "Ray")
    assert verdict.lines()[-1].startswith("ready to train")


def test_a_cluster_that_is_not_there_fails_at_once():
    from gist_dist.on_ray.cluster.connect import _remote

    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(UserError, match=f"cluster.address = {address}: no Ray cluster answers there: .*refused"):
            next(_remote(address, ClusterConfig(address=address)))


def test_every_line_that_is_not_ok_has_a_remedy(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 0, 10**6))
    findings = [*doctor._disk(), *doctor._shared_memory(), *doctor._hub()]
    assert states(findings) | {"hub cache": "ok"} == {
        "disk": "warn",
        "shared memory": "warn",
        "hub": "warn",
        "hub cache": "ok",
    }
    assert all(finding.remedy for finding in findings if finding.state != "ok")


def test_packages_are_held_against_the_ranges_of_the_project(monkeypatch):
    requires = ["numpy>=999", "pyarrow>=17", "no-such-package>=1", 'tensorboard>=2; extra == "tensorboard"']
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    assert states(doctor._packages()) == {"numpy": "fail", "pyarrow": "ok", "no-such-package": "fail"}
    assert next(finding.remedy for finding in doctor._packages()) == "pip install 'numpy>=999'"


def test_what_breaks_while_looking_is_a_finding_and_the_exit_status(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr("gist_dist.on_ray.doctor.examine.examine_local_ray", broken)
    assert main(["doctor"]) == 1
    page = capsys.readouterr().out
    assert "fail  Ray" in page and "RuntimeError: no such thing" in page and "not ready: 1 failed" in page


def test_the_verdict_counts():
    verdict = Verdict([Finding("a", "ok", "1"), Finding("bb", "warn", "2", "do this")])
    assert verdict.healthy
    assert verdict.lines() == ["ok    a   1", "warn  bb  2", "          -> do this", "", "ready to train, 1 to look at"]
