"""Finding the files of a source: a file, a folder, a glob, on this machine or behind a URI."""

import fnmatch
import glob
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line
from gist_dist.config import SourceConfig
from gist_dist.data.formats import FORMATS, SourceFile, suffix
from gist_dist.data.judged import JudgedPairs, find_judged

SPLIT_NAMES = {"train", "test", "validation", "valid", "val", "dev", "eval"}
ARROW_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
"""Opened by Arrow; every other scheme by fsspec."""
GCS_PATIENCE = "retry_limit_seconds=30"
"""Without a limit of the user's own; Arrow's would try for a quarter of an hour."""


def find_files(config: SourceConfig, where: str, root: str | None) -> list[SourceFile] | list[JudgedPairs]:
    """The files of a source, sorted; none if it is a Hub dataset."""
    if "://" in config.path:
        return _find_remote(config, where)
    path = Path(root or ".").expanduser() / Path(config.path).expanduser()
    local = pa.fs.LocalFileSystem()
    try:
        if path.exists():
            return _list_files(local, str(path.absolute()), config, where)
        if glob.has_magic(config.path):
            found = [SourceFile(local, file, where) for file in _local_glob(str(path))]
            return _matched(found, str(path), config, where)
    except OSError as error:
        raise _unreachable(str(path), error, where) from error
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", config.path) and suffix(config.path) not in FORMATS
    if root is None and is_hub_id:
        return []
    raise UserError(f"{where}: no file or folder {path}; correct path, or data.root if it is elsewhere")


def _local_glob(pattern: str) -> list[str]:
    """Files that match, sorted; two stars enter no folder twice."""
    if "**" not in pattern:
        return sorted(str(Path(path).absolute()) for path in glob.glob(pattern) if os.path.isfile(path))
    folder, slash, _ = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")
    rest, folder = pattern[len(folder + slash) :], str(Path(folder + slash).absolute())
    fits = re.compile(_glob_regex(rest)).fullmatch
    names = (os.path.relpath(file, folder) for file in _walk(folder))
    # As glob has it: what is hidden is found only where the pattern says so.
    return [f"{folder}/{name}" for name in names if fits(name) and ("/." in f"/{rest}" or "/." not in f"/{name}")]


def _walk(folder: str) -> list[str]:
    """All files below a folder, sorted; links are followed, but no folder is entered twice, however it is linked."""
    found, seen = list[str](), set[tuple[int, int]]()

    def stop(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        found += [path for name in names if os.path.isfile(path := os.path.join(place, name))]
    return sorted(found)


def _find_remote(config: SourceConfig, where: str) -> list[SourceFile] | list[JudgedPairs]:
    """The files behind a URI, which may be a glob and end in options, as s3://…?endpoint_override=host."""
    scheme, uri, options = config.path.split("://")[0].lower(), config.path, ""
    is_web = scheme in ("http", "https")  # where what follows a question mark is part of the address
    if not is_web and (found := re.search(r"\?[a-z_]+=.*$", uri)):
        uri, options = uri[: found.start()], found.group()
    magic = re.search(r"[*\[]" if is_web else r"[*?\[]", uri)
    if magic is None:
        return _list_files(*_open_filesystem(scheme, uri, options, where), config, where)
    folder = uri[: uri.rindex("/", 0, magic.start())]
    pattern = uri[len(folder) + 1 :]
    filesystem, base = _open_filesystem(scheme, folder, options, where)
    paths = _files_below(filesystem, base, "/" in pattern or "**" in pattern, config, where)
    files = [SourceFile(filesystem, path, where) for path in paths]
    fits = re.compile(_glob_regex(pattern)).fullmatch
    return _matched([file for file in files if fits("/".join(_within(file, base)))], config.path, config, where)


def _open_filesystem(scheme: str, uri: str, options: str, where: str) -> tuple[pa.fs.FileSystem, str]:
    try:
        if scheme in ARROW_SCHEMES:
            if scheme in ("gs", "gcs") and "retry_limit_seconds" not in options:
                options = f"{options}&{GCS_PATIENCE}" if options else f"?{GCS_PATIENCE}"
            return pa.fs.FileSystem.from_uri(uri + options)
        import fsspec

        if scheme not in fsspec.available_protocols():
            raise UserError(
                f"{where}: {uri}: unknown scheme '{scheme}' (known: s3, gs, hdfs, hf, https, …); correct path"
            )
        filesystem, path = fsspec.core.url_to_fs(uri + options)
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem)), path
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{where}: {uri} can't be opened: {one_line(error)}") from None
    except Exception as error:  # whatever the libraries below fsspec raise
        raise _unreachable(uri, error, where) from error


def _unreachable(path: str, error: Exception, where: str) -> UserError:
    advice = "check the address, the network and your credentials" if "://" in path else "check its permissions"
    return UserError(f"{where}: {path} can't be reached: {one_line(error)}; {advice}")


def _file_info(filesystem: pa.fs.FileSystem, what: Any, config: SourceConfig, where: str) -> Any:
    try:
        return filesystem.get_file_info(what)
    except Exception as error:  # Arrow's are OSErrors, fsspec's those of the libraries below it
        raise _unreachable(config.path, error, where) from error


def _files_below(
    filesystem: pa.fs.FileSystem, folder: str, is_deep: bool, config: SourceConfig, where: str
) -> list[str]:
    """Paths, sorted; none where there is no such folder. is_deep: also of the folders within."""
    if is_deep and isinstance(filesystem, pa.fs.LocalFileSystem):  # whose links may lead in circles
        try:
            return _walk(folder) if os.path.isdir(folder) else []
        except OSError as error:
            raise _unreachable(folder, error, where) from error
    infos = _file_info(filesystem, pa.fs.FileSelector(folder, recursive=is_deep, allow_not_found=True), config, where)
    return sorted(info.path for info in infos if info.is_file)


def _list_files(
    filesystem: pa.fs.FileSystem, path: str, config: SourceConfig, where: str
) -> list[SourceFile] | list[JudgedPairs]:
    info = _file_info(filesystem, path, config, where)
    if info.type == pa.fs.FileType.NotFound:
        raise UserError(f"{where}: no file or folder {config.path}")
    if info.is_file:
        return _matched([SourceFile(filesystem, path, where)], config.path, config, where)
    files = [SourceFile(filesystem, found, where) for found in _files_below(filesystem, path, True, config, where)]
    if judged := find_judged([("/".join(_within(file, path)), file) for file in files], config, where):
        return judged
    files = sorted((f for f in files if f.format and _is_data(_within(f, path))), key=lambda f: f.path)
    if not files:
        raise UserError(f"{where}: no {', '.join(sorted(set(FORMATS.values())))} file in folder {config.path}")
    splits = sorted({_split_of(f, path) for f in files})
    split = config.split or ("train" if {"train"} < set(splits) <= SPLIT_NAMES else None)
    if split and split not in splits:
        raise UserError(f"{where}: no split '{split}' in {config.path} (has: {', '.join(splits)})")
    return _of_one_format([f for f in files if split is None or _split_of(f, path) == split], config, where)


def _matched(files: list[SourceFile], pattern: str, config: SourceConfig, where: str) -> list[SourceFile]:
    """Files that were asked for by name or by a glob."""
    if not files:
        raise UserError(f"{where}: no file matches {pattern}")
    for file in files:
        if file.format is None:
            raise UserError(f"{where}: {file.name} is of no known format (known: {', '.join(FORMATS)})")
    if config.split is not None:
        what = f"{files[0].name} is one file" if len(files) == 1 else f"{pattern} names files"
        raise UserError(f"{where}: split = {config.split}: {what} and has no splits; remove split")
    return _of_one_format(files, config, where)


def _of_one_format(files: list[SourceFile], config: SourceConfig, where: str) -> list[SourceFile]:
    """UserError where formats are mixed: often the same rows twice, or notes beside the data."""
    examples = {file.format: file for file in reversed(files)}
    if len(examples) > 1:
        listed = ", ".join(f"{file.name}" for _, file in sorted(examples.items()))
        raise UserError(
            f"{where}: {config.path} has files of {len(examples)} formats ({listed}); name those of one with a glob, "
            f"such as *{suffix(max(files, key=lambda file: file.num_bytes).name)}"
        )
    return files


def _glob_regex(pattern: str) -> str:
    """A star stays within a folder, two stars and a slash are any number of folders."""
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^]]+\])", pattern)
    return "".join(
        special.get(token)
        or (fnmatch.translate(token)[4:-3] if token.startswith("[") and len(token) > 2 else re.escape(token))
        for token in tokens
    )


def _within(file: "SourceFile", folder: str) -> list[str]:
    return file.path[len(folder) :].lstrip("/").split("/")


def _is_data(parts: list[str]) -> bool:
    """Not hidden, and not one of the descriptions that datasets.save_to_disk puts beside the data."""
    hidden = any(part.startswith((".", "_")) for part in parts)
    return not hidden and parts[-1] not in ("dataset_info.json", "state.json", "dataset_dict.json")


def _split_of(file: SourceFile, folder: str) -> str:
    """data/train-00000.parquet, train/part-0.parquet and train.jsonl are all of split train."""
    first, *rest = _within(file, folder)
    name = first if rest and first != "data" else file.name
    return re.split(r"[-.]|_\d", name)[0]
