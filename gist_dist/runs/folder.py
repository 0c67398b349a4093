"""A run's folder: who may write there, what was asked, and how far it got."""

import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.redact import redact
from gist_dist.common.version import __version__
from gist_dist.config import RunConfig, computed_values

MIN_FREE_BYTES = 200 * 2**20
PACKAGES = ("torch", "ray", "transformers", "sentence-transformers", "datasets", "mteb", "pyarrow", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """output_dir/name."""

    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    def refuse_other_recipe(self) -> None:
        """UserError if the folder holds a run of another recipe, or can't be written."""
        found = self.recorded()
        if found is not None:
            before, now = (redact(_computed(recipe)) for recipe in (found, self.config))  # one was written
            for key in sorted(before.keys() | now.keys()):
                is_left_open = key.endswith(".precision") and now.get(key) == "auto"
                if before.get(key) != now.get(key) and not is_left_open:
                    raise UserError(
                        f"{self.folder} holds a run with {key} = {before.get(key)!r}, not {now.get(key)!r}; "
                        "choose another name=, or remove the folder to start over"
                    )
        self._check_writable()

    def create(self, config: RunConfig) -> None:
        """config.yaml: the resolved recipe, versions and the git commit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        previous = self._environment()
        environment = describe_environment() | {"started": previous.get("started") or _now(), "finished": None}
        self._write_config(environment)

    def mark_trained(self, last: int) -> None:
        """last: the step after which training ended."""
        write_text(self.folder / "state.json", json.dumps({"state": "trained", "step": last}))

    def mark_finished(self) -> None:
        environment = self._environment()
        environment["finished"] = _now()
        self._write_config(environment)

    def is_trained(self) -> bool:
        try:
            state = json.loads((self.folder / "state.json").read_text())
        except (OSError, ValueError):
            return False
        return isinstance(state, dict) and state.get("state") == "trained" and (self.folder / "model").is_dir()

    def is_finished(self) -> bool:
        """Trained, evaluated without failures, and reported."""
        if not self.is_trained() or (self.folder / "mteb" / "failures.json").exists():
            return False
        return bool(self._environment().get("finished"))

    def write_data_summary(self, summary: dict[str, Any]) -> None:
        """data.json: what became of the data, and what the first epoch does with it (data/statistics.py)."""
        write_text(self.folder / "data.json", json.dumps(summary, indent=1))

    def _check_writable(self) -> None:
        """Leaves no folder behind: a sweep asks for all its runs beforehand."""
        is_new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".writable-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
            free = shutil.disk_usage(self.folder).free
            if is_new:
                self.folder.rmdir()
        except OSError as error:
            raise UserError(f"output_dir: {self.folder} can't be written: {error.strerror or error}") from error
        if free < MIN_FREE_BYTES:
            raise UserError(
                f"output_dir: {self.folder} has {free / 2**20:.0f} MiB free, at least {MIN_FREE_BYTES / 2**20:.0f} are "
                "needed; free some or choose another output_dir"
            )

    def recorded(self) -> RunConfig | None:
        """The recipe that the folder's run began with; None for a new one."""
        path = self.folder / "config.yaml"
        if not path.exists():
            return None
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            tree.pop("environment", None)
            return RunConfig.model_validate(tree)
        except Exception as error:
            raise UserError(f"{path} is not a config.yaml of this version; choose another name=") from error

    def _environment(self) -> dict[str, Any]:
        path = self.folder / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")).get("environment", {}) if path.exists() else {}

    def _write_config(self, environment: dict[str, Any]) -> None:
        tree = redact(self.config.model_dump(mode="json")) | {"environment": environment}
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        write_text(self.folder / "config.yaml", text)


def _computed(recipe: RunConfig) -> dict[str, Any]:
    """The values that decide what a run computes. Null stands for what older versions wrote out: no prompt, and columns
    named after their roles. Where the two differ, token ids do, and the checkpoint is refused."""
    return {key: _with_nulls(value, tuple(key.split("."))) for key, value in computed_values(recipe).items()}


def _with_nulls(value: Any, path: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(inner, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        items = [_with_nulls(item, path) for item in value]
        return None if items == [None] and "columns" in path else items
    was_default = value == "" if "prompts" in path else path[-2:] == ("columns", value)
    return None if was_default else value


def describe_environment() -> dict[str, Any]:
    """Versions, platform and the git commit of the installed code (null outside a checkout)."""
    versions: dict[str, Any] = {
        "gist_dist": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            versions[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package.replace("-", "_")] = None
    return versions | {"platform": platform.platform(), "cores": os.cpu_count()}


def _git_commit() -> str | None:
    here = Path(__file__).parent.parent  # the package's folder, not this room's
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        command = ["git", "-C", str(here), "status", "--porcelain", "--", str(here)]
        changed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-changed" if changed else commit


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
