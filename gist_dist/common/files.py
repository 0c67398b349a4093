"""Files that are whole or not there."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """A reader, also after a crash, sees the file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(aside)
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """UTF-8, atomically."""
    write_atomically(file, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """In place of what is there: written aside, and renamed once it is whole. What a kill has left is no hindrance."""
    aside, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    write(aside)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def sealed(tree: dict[str, Any]) -> bytes:
    """JSON with the SHA-256 of what it says: a damaged or edited one is not taken for what was written."""
    return json.dumps(tree | {"sha256": _digest(tree)}, indent=1).encode()


def unsealed(content: bytes) -> dict[str, Any]:
    """What sealed() was given, as JSON tells it. ValueError for anything else."""
    try:
        tree = json.loads(content)
        digest = tree.pop("sha256")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise ValueError("it is not the JSON that was written") from None
    if digest != _digest(tree):
        raise ValueError("its checksum is wrong")
    return tree


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def json_object(file: Path) -> dict[str, Any]:
    """What another program has left there; {} for a file that is not there, or holds anything else."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def is_lfs_pointer(file: Path) -> bool:
    """Whether it is what git leaves of a large file where git-lfs has not fetched it: about 130 bytes of text."""
    try:
        if file.stat().st_size > 1024:
            return False
        with file.open("rb") as content:
            return content.read(64).startswith(b"version https://git-lfs.github.com/spec/")
    except OSError:
        return False
