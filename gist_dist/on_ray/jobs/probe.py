"""What `gist-dist submit` asks a cluster before it sends anything.

Its text is run there by `python -c`, where gist_dist may not be installed: only ray and the standard library.
"""

import glob
import json
import logging
import os
import platform
import shutil
import sys
from importlib import metadata
from typing import Any

MARK = "GIST_DIST_FOUND "
"""Begins the line of the log that holds the answer."""


def look(wanted: dict[str, list[str]]) -> dict[str, Any]:
    """wanted: packages; places (paths and globs to read), folders (to be written). Of the node that jobs start on."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in wanted["packages"]},
        "places": {place: measure(place) for place in wanted["places"]},
        "folders": {folder: _refusal(folder) for folder in wanted["folders"]},
        **_nodes(),
    }


def measure(place: str) -> list[int]:
    """Number of files of a path or glob, folders with all that is below, and their bytes together."""
    files = set()
    for path in [place] if os.path.lexists(place) else glob.glob(place, recursive=True):
        files.add(path)
        for folder, _, names in os.walk(path):
            files.update(os.path.join(folder, name) for name in names)
    sizes = [os.path.getsize(path) for path in files if os.path.isfile(path)]
    return [len(sizes), sum(sizes)]


def _refusal(folder: str) -> str | None:
    """Why nothing can be written there, or None."""
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} can't be written"
    free = shutil.disk_usage(folder).free
    return None if free > 2**28 else f"{folder} has {free / 2**20:.0f} MiB free"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nodes() -> dict[str, Any]:
    """Resources of each node, and of the groups of nodes that an autoscaler may start (most: -1 is any number)."""
    import ray

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        config = ray._private.state.state.get_cluster_config()  # private: without it, what there is counts
        groups = [
            {"most": group.max_count, "resources": dict(group.resources)}
            for group in (config.node_group_configs if config else ())
        ]
    except Exception:
        groups = []
    return {
        "ray": ray.__version__,
        "nodes": [node["Resources"] for node in ray.nodes() if node["Alive"]],
        "groups": groups,
    }


if __name__ == "__main__":
    print(MARK + json.dumps(look(json.loads(sys.argv[1]))), flush=True)
