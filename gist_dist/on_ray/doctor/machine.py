"""`gist-dist doctor`: what this machine, or a cluster, has and lacks for training."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gist_dist.common.hub import go_offline_if_unreachable
from gist_dist.common.text import one_line
from gist_dist.common.version import __version__

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

MIN_FREE_GB = 5
MIN_MEMORY_GB = 4
MIN_SHM_GB = 1


@dataclass(frozen=True)
class Finding:
    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""
    """A sentence, where something lacks."""


@dataclass(frozen=True)
class Verdict:
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether training can run: nothing failed."""
        return all(finding.state != "fail" for finding in self.findings)

    def lines(self) -> list[str]:
        width = max(len(finding.name) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.state:<4}  {finding.name:<{width}}  {finding.found}")
            if finding.remedy:
                lines.append(f"{'':<4}  {'':<{width}}  -> {finding.remedy}")
        failures = sum(finding.state == "fail" for finding in self.findings)
        warnings = sum(finding.state == "warn" for finding in self.findings)
        summary = "ready to train" if self.healthy else f"not ready: {failures} failed"
        return [*lines, "", f"{summary}{f', {warnings} to look at' if warnings else ''}"]


def describe_node(folders: Sequence[str]) -> dict[str, Any]:
    """Versions and where they are installed, the folder of models from the Hub, GPUs, gigabytes free: of memory, of
    /dev/shm in all, and on the disks of the folders and of /tmp."""
    packages = ("torch", "ray", "transformers", "sentence-transformers", "datasets", "mteb", "pyarrow", "numpy")
    versions = {"python": platform.python_version(), "gist_dist": __version__}
    return {
        "versions": versions | {package: installed_version(package) for package in packages},
        "prefix": sys.prefix,
        "hub_cache": hub_cache(),
        "gpus": _gpus_of_driver(),
        "memory_gb": _memory_gb()[0],
        "shm_gb": shutil.disk_usage("/dev/shm").total / 1e9 if Path("/dev/shm").is_dir() else None,
        "disk_gb": {folder: _free_gb(folder) for folder in (*folders, tempfile.gettempdir())},
    }


def hub_cache() -> str:
    """As huggingface_hub finds it."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def examine_machine(look_at_ray: Callable[[], list[Finding]]) -> Verdict:
    """Look at everything, also past failures; Ray last."""
    looks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("processor", _processor),
        ("memory", _memory),
        ("GPU", _gpus),
        ("disk", _disk),
        ("shared memory", _shared_memory),
        ("hub", _hub),
        ("process group", _process_group),
        ("Ray", look_at_ray),
    ]
    findings = []
    for name, look in looks:
        try:
            findings += look()
        except Exception as error:
            reason = one_line(error)
            findings.append(Finding(name, "fail", f"{type(error).__name__}: {reason}", "fix this, then look again"))
    return Verdict(findings)


def _python() -> list[Finding]:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    try:
        wanted = metadata.metadata("gist-dist")["Requires-Python"]
    except metadata.PackageNotFoundError:  # its code came along with a job
        return [Finding("python", "ok", version)]
    if version in SpecifierSet(wanted):
        return [Finding("python", "ok", version)]
    return [Finding("python", "fail", version, f"gist_dist needs Python {wanted}")]


def required_packages() -> dict[str, "SpecifierSet"]:
    """Name → versions, as pyproject.toml had them when the package was installed; empty where it only lies around."""
    from packaging.requirements import Requirement

    try:
        requirements = list(map(Requirement, metadata.requires("gist-dist") or []))
    except metadata.PackageNotFoundError:
        return {}
    return {r.name: r.specifier for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})}


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    findings = []
    for name, specifier in required_packages().items():
        version = installed_version(name)
        fits = version is not None and specifier.contains(version, prereleases=True)
        found = f"{version} ({specifier})" if version else "is not installed"
        remedy = "" if fits else f"pip install '{name}{specifier}'"
        findings.append(Finding(name, "ok" if fits else "fail", found, remedy))
    return findings


def _processor() -> list[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [Finding("processor", "ok", f"{usable} usable cores, {platform.machine()}")]


def _memory_gb() -> tuple[float, float]:
    """Free and total."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(fields[name].split()[0]) * 1024 / 1e9 for name in ("MemAvailable", "MemTotal"))
    return free, total


def _free_gb(folder: str) -> float:
    """On the disk where the folder is or would be."""
    path = Path(folder)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9


def _gpus_of_driver() -> list[str]:
    """All GPUs of the machine, as the driver lists them: torch sees only those that a process was given."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(", ") for line in told.splitlines() if line.count(", ") == 2)
    return [f"{name} {float(mib) * 2**20 / 1e9:.0f} GB, driver {driver}" for name, mib, driver in rows]


def _memory() -> list[Finding]:
    if not Path("/proc/meminfo").exists():
        return [Finding("memory", "warn", "unknown on this system", "have a few GB free for each worker")]
    free, total = _memory_gb()
    remedy = "a worker with a small model takes 1 to 2 GB; end other programs" if free < MIN_MEMORY_GB else ""
    return [Finding("memory", "warn" if remedy else "ok", f"{free:.1f} GB free of {total:.1f} GB", remedy)]


def _gpus() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [
            Finding(
                f"GPU {i}", "ok", f"{d.name}, {d.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}, {_driver()}"
            )
            for i, d in enumerate(devices)
        ]
    if torch.version.cuda is None:
        has_one = Path("/proc/driver/nvidia/version").exists()
        remedy = "there is an NVIDIA driver: install a CUDA build of torch" if has_one else ""
        found = f"none: torch {torch.__version__} is a CPU build"
        return [Finding("GPU", "warn" if has_one else "ok", found, remedy)]
    remedy = f"install a driver for CUDA {torch.version.cuda}, or train on CPU, which is slow"
    return [Finding("GPU", "warn", f"none visible to torch ({_driver()})", remedy)]


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("Module", 1)[1].split()
        return f"driver {next(word for word in words if word[0].isdigit())}"
    except (OSError, IndexError, StopIteration):
        return "no NVIDIA driver"


def _disk() -> list[Finding]:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free / 1e9
    remedy = (
        f"runs are kept under output_dir: have {MIN_FREE_GB} GB there, or set it elsewhere"
        if free < MIN_FREE_GB
        else ""
    )
    findings = [Finding("disk", "warn" if remedy else "ok", f"{free:.1f} GB free in {folder}", remedy)]
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        remedy = "set output_dir to a folder that you may write to"
        findings.append(Finding("disk", "warn", f"{folder} can't be written: {error.strerror}", remedy))
    return findings


def _shared_memory() -> list[Finding]:
    if not Path("/dev/shm").is_dir():
        return [Finding("shared memory", "ok", "no /dev/shm on this system; Ray keeps its objects in files")]
    total = shutil.disk_usage("/dev/shm").total / 1e9
    remedy = (
        "give a container more: docker run --shm-size=4g, or a Memory emptyDir in Kubernetes"
        if total < MIN_SHM_GB
        else ""
    )
    return [Finding("shared memory", "warn" if remedy else "ok", f"{total:.1f} GB in /dev/shm", remedy)]


def _hub() -> list[Finding]:
    was_set = bool(os.environ.get("HF_HUB_OFFLINE"))
    offline = go_offline_if_unreachable()
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if offline:
        found = "HF_HUB_OFFLINE is set" if was_set else "out of reach"
        remedy = "only folders and what is in the cache can be used: give models and data as paths"
        findings = [Finding("hub", "warn", found, remedy)]
    else:
        findings = [Finding("hub", "ok", "can be asked")]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
        findings.append(Finding("hub cache", "ok", str(cache)))
    except OSError as error:
        remedy = "set HF_HOME to a folder that you may write to"
        findings.append(Finding("hub cache", "warn", f"{cache} can't be written: {error.strerror or error}", remedy))
    return findings


def _process_group() -> list[Finding]:
    """Gloo, which CPU workers talk through and GPU workers start with."""
    from gist_dist.core.collectives import try_backends

    return [Finding("process group", "ok", f"torch.distributed works ({', '.join(try_backends())})")]
