"""Folders on a shared disk or in object storage behind one set of functions, and verified copies on a node's own disk.

Every write is atomic: a reader sees a file whole or not at all, and of two writers of one name the last wins.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs

from gist_dist.common.errors import Damaged, UserError
from gist_dist.common.text import one_line

LOCAL = pa.fs.LocalFileSystem()
ATOMIC_TYPES = ("s3", "gcs", "abfs")
"""Filesystems where an object appears when it is complete; elsewhere files are written aside and renamed."""
BLOCK_BYTES = 2**22
TRANSFERS = 8
"""Files copied at once."""
STALE_SECONDS = 24 * 3600
"""A temporary file that nobody has touched for so long was left by a process that was killed."""
SCRATCH_PREFIX = ".gist-dist-scratch-"


@dataclass(frozen=True)
class FileInfo:
    size: int
    """Bytes."""
    modified: float
    """Seconds since 1970."""


def join(place: str, *names: str) -> str:
    """A place below another; the options of a URI (``s3://bucket/folder?region=…``) stay behind the path."""
    path, question, options = place.partition("?") if "://" in place else (place, "", "")
    return "/".join((path.rstrip("/"), *names)) + question + options


def open_store(place: str | Path) -> "Store":
    """A folder given as a path or URI, there or not yet. UserError for a URI of no known kind."""
    place = str(place)
    if "://" not in place:
        return Store(place, LOCAL, str(Path(place).expanduser().absolute()))
    try:
        return Store(place, *pa.fs.FileSystem.from_uri(place))
    except (pa.ArrowException, OSError, ImportError) as error:
        unknown = isinstance(error, pa.ArrowInvalid) and "nrecognized filesystem type" in str(error)
        if not unknown:
            raise UserError(f"{place} can't be opened: {one_line(error)}") from error
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(place)
    except Exception as error:  # of whichever package implements the protocol
        raise UserError(f"{place} can't be opened: {one_line(error)}") from error
    return Store(place, pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem)), path)


class Store:
    """Files of one folder; names are relative to it and may have slashes. OSError for what the filesystem refuses."""

    def __init__(self, place: str, filesystem: pa.fs.FileSystem, root: str) -> None:
        self.place, self._filesystem, self._root = place, filesystem, root.rstrip("/")
        self.local = Path(self._root) if isinstance(filesystem, pa.fs.LocalFileSystem) else None
        """The folder, where it is one of this machine's file system."""

    def exists(self, name: str) -> bool:
        return self._filesystem.get_file_info(self._path(name)).type == pa.fs.FileType.File

    def infos(self) -> dict[str, FileInfo]:
        """Size and time of every file here and in folders below, also of what is still being written."""
        selector = pa.fs.FileSelector(self._root, allow_not_found=True, recursive=True)
        files = (i for i in self._filesystem.get_file_info(selector) if i.type == pa.fs.FileType.File)
        start = len(self._root.strip("/")) + 1
        return {i.path.strip("/")[start:]: FileInfo(i.size, _modified(i)) for i in files}

    def folders(self) -> list[str]:
        """Names of the folders directly below, hidden ones too, sorted."""
        selector = pa.fs.FileSelector(self._root, allow_not_found=True)
        found = self._filesystem.get_file_info(selector)
        return sorted(i.base_name for i in found if i.type == pa.fs.FileType.Directory)

    def list(self) -> list[str]:
        """Names of all complete files, sorted."""
        return sorted(name for name in self.infos() if not any(part.startswith(".") for part in name.split("/")))

    def read_bytes(self, name: str) -> bytes:
        with self._filesystem.open_input_stream(self._path(name)) as stream:
            return stream.read()

    def sha256(self, name: str) -> str:
        with self._filesystem.open_input_stream(self._path(name)) as stream:
            return _sha256_of(stream)

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        def write(path: str) -> None:
            with self._filesystem.open_output_stream(path) as stream:
                stream.write(data)

        self._write(name, write)

    def upload(self, source: Path, name: str) -> None:
        """From this machine's disk; linked, not copied, where the store is on the same disk."""

        def write(path: str) -> None:
            if self.local:
                with suppress(OSError):
                    os.link(source, path)
                    return
            pa.fs.copy_files(str(source), path, source_filesystem=LOCAL, destination_filesystem=self._filesystem)

        self._write(name, write)

    def download(self, name: str, target: Path) -> None:
        def copy(aside: str) -> None:
            pa.fs.copy_files(self._path(name), aside, source_filesystem=self._filesystem, destination_filesystem=LOCAL)

        open_store(target.parent)._write(target.name, copy)

    @contextmanager
    def on_disk(self, name: str) -> Iterator[Path]:
        """The file itself where the store is local, else a temporary copy on this machine."""
        if self.local:
            yield self.local / name
            return
        with self.scratch() as folder:
            path = folder / "file"
            self.download(name, path)
            yield path

    def delete(self, name: str) -> None:
        """No error where it is gone already."""
        with suppress(FileNotFoundError):
            self._filesystem.delete_file(self._path(name))

    def delete_folder(self, name: str) -> None:
        """With all that is in it."""
        with suppress(FileNotFoundError):
            self._filesystem.delete_dir(self._path(name))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder of this machine: below the store where that is local, so that upload need not copy."""
        parent = self.local or Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(f"{SCRATCH_PREFIX}*"):
            with suppress(OSError):  # another user's, or gone just now
                if _last_change(old) < time.time() - STALE_SECONDS:
                    shutil.rmtree(old)
        folder = parent / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}"
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _write(self, name: str, write: Callable[[str], None]) -> None:
        path = self._path(name)
        if self._filesystem.type_name in ATOMIC_TYPES:
            write(path)
            return
        folder, _, last = path.rpartition("/")
        aside = f"{folder}/.{last}.{uuid.uuid4().hex}.tmp"
        self._filesystem.create_dir(folder)
        try:
            write(aside)
            if self.local:
                _sync(aside)
                os.replace(aside, path)
            else:
                self._filesystem.move(aside, path)
        except BaseException:
            with suppress(OSError):
                self._filesystem.delete_file(aside)
            raise


def local_copy(store: Store, files: Mapping[str, str], folder: Path) -> Path:
    """Copy files of a store to a folder on this node's own disk, each checked against its SHA-256; gives the folder.

    files: name → SHA-256. What is there and intact stays: a file is read again only if it was changed since it was
    checked. Processes of one node may call this at once: one copies and the others wait. UserError for a file that is
    missing or damaged in the store, and for a full disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system takes it from a process that dies
            marks = _read_marks(folder)
            wanted = [name for name, digest in files.items() if not _is_intact(folder / name, digest, marks.get(name))]
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(lambda name: _fetch(store, name, files[name], folder / name), wanted))
            marks |= {name: [files[name], (folder / name).stat().st_mtime_ns] for name in files}
            open_store(folder).write_bytes(".checked.json", json.dumps(marks).encode())
    except OSError as error:
        raise UserError(f"{store.place} can't be copied to {folder}: {one_line(error)}; see data.local_copy") from error
    return folder


def copies_folder(local_folder: str | None, *names: str) -> Path:
    """Where this node keeps its copy of something: below data.local_copy, or else below a folder of this user's that
    is made among the temporary files. UserError if another user has that name."""
    base = Path(local_folder).expanduser() if local_folder else _own_temporary_folder()
    return base.joinpath(*names)


def _own_temporary_folder() -> Path:
    """The same for all processes of this user on this node; nobody else may read or write there."""
    folder = Path(tempfile.gettempdir()) / f"gist-dist-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid():
            raise UserError(f"{folder} is not this user's; set data.local_copy to a folder that is")
        if found.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(f"{folder} can't be made: {one_line(error)}; set data.local_copy to another folder") from error
    return folder


def check_file(path: Path, size: int | None, digest: str | None) -> None:
    """Damaged unless the file is as it was written; None: not looked at."""
    try:
        if size is not None and (found := path.stat().st_size) != size:
            raise Damaged(f"{path.name} has {found:,} bytes and was written with {size:,}")
        if digest is not None and sha256(path) != digest:
            raise Damaged(f"the checksum of {path.name} is wrong")
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{path.name} is missing") from None


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return _sha256_of(stream)


def _fetch(store: Store, name: str, digest: str, target: Path) -> None:
    store.download(name, target)
    try:
        check_file(target, None, digest)
    except Damaged as damage:
        target.unlink(missing_ok=True)
        raise UserError(f"{join(store.place, name)} is damaged ({damage}); remove it, and it is made again") from None


def _is_intact(path: Path, digest: str, mark: Any) -> bool:
    if not path.exists():
        return False
    return mark == [digest, path.stat().st_mtime_ns] or sha256(path) == digest


def _read_marks(folder: Path) -> dict[str, Any]:
    """Name → SHA-256 and time of change of the file when it was checked; nothing unless all of it can be read."""
    try:
        marks = json.loads((folder / ".checked.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return marks if isinstance(marks, dict) else {}


def _sha256_of(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _modified(info: pa.fs.FileInfo) -> float:
    return info.mtime_ns / 1e9 if info.mtime_ns else time.time()


def _last_change(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
