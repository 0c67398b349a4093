"""Arrays that are made once beside the corpora, and found again by what they were made from.

<corpora_dir>/<kind>/<key>-<sha256>.npy

The key is a hash of what decides the array. The name holds the hash of its content as well, which is what a resumed run
asks for: what comes out of floating point may differ on another machine.
"""

import hashlib
import io
import json
from typing import Any

import numpy as np

from gist_dist.common.errors import UserError
from gist_dist.common.storage import Store, join, open_store
from gist_dist.config import RunConfig


def find_array(config: RunConfig, kind: str, inputs: dict[str, Any]) -> tuple[np.ndarray, str] | None:
    """The array that was made from these inputs, and its name. UserError for a place that can't be read."""
    store = _store(config, kind)
    try:
        found = sorted(name for name in store.list() if name.startswith(f"{_key(inputs)}-"))
    except OSError as error:
        raise UserError(f"{store.place}: {kind} can't be read there: {error}") from error
    return (read_array(config, kind, found[0]), found[0]) if found else None


def keep_array(config: RunConfig, kind: str, inputs: dict[str, Any], array: np.ndarray) -> str:
    """Write it, whole or not at all; gives its name."""
    content = io.BytesIO()
    np.save(content, array)
    name, store = f"{_key(inputs)}-{hashlib.sha256(content.getvalue()).hexdigest()}.npy", _store(config, kind)
    try:
        store.write_bytes(name, content.getvalue())
    except OSError as error:
        raise UserError(f"{store.place}: {kind} can't be kept there: {error}; set data.cache_dir") from error
    return name


def read_array(config: RunConfig, kind: str, name: str) -> np.ndarray:
    """UserError for a file that is gone or damaged."""
    store = _store(config, kind)
    try:
        content = store.read_bytes(name)
    except OSError as error:
        raise UserError(f"{join(store.place, name)}: {kind} can't be read there: {error}") from error
    if hashlib.sha256(content).hexdigest() != digest_of(name):
        raise UserError(f"{join(store.place, name)} is damaged; remove it, and it is made again")
    return np.load(io.BytesIO(content))


def digest_of(name: str) -> str:
    """Digest of the array's content."""
    return name.rpartition("-")[2].removesuffix(".npy")


def _store(config: RunConfig, kind: str) -> Store:
    return open_store(join(config.corpora_dir, kind))


def _key(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:20]
