"""What a job takes along to a cluster: the code of gist_dist, the recipe, and small data files that are only here.

Everything else has to be where the nodes see it: on shared storage, behind a URI, or on the Hub.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.config import Place, RunConfig, SourceConfig, paths_of
from gist_dist.data.places import find_files
from gist_dist.data.sources import Source
from gist_dist.on_ray.jobs.probe import measure

MAX_DATA_BYTES = 64 * 2**20
"""Ray takes 100 MiB for a package; and so much the driver still prepares itself, on the node that has the files."""
RECIPE_NAME = "recipe.yaml"
SENT, ROOT = "sent", "data-root"
"""Folders of a job for data whose place here can't be kept, and in place of data.root."""
SHOWN_FILES = 3


@dataclass(frozen=True)
class LocalSource:
    """One of data.sources that is on this machine."""

    number: int
    place: str
    """Path or glob."""
    head: Path
    """The folder that place starts from; the rest is a name, or a pattern."""
    files: list[Path]
    is_absolute: bool
    """In the recipe: it may then mean the same on the cluster."""

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def local_sources(config: RunConfig) -> list[LocalSource]:
    """The sources that are files here, looked into. UserError for one that is neither here nor can be elsewhere."""
    found = []
    for number, source in enumerate(config.data.sources):
        if "://" in source.path:
            continue
        place = _place(config, source)
        is_absolute = place.is_absolute()
        if is_absolute and not measure(str(place))[0]:
            continue  # the cluster may have it
        files = find_files(source, f"data.sources[{number}]", config.data.root)
        if not files:
            continue  # a Hub dataset
        Source(source, number, config.data.root)  # looks into them
        head = _head(place).absolute()
        found.append(
            LocalSource(
                number, str(place.absolute()), head, [Path(path) for f in files for path in f.paths], is_absolute
            )
        )
    return found


def check_places(config: RunConfig) -> None:
    """UserError for a folder that a job can't use wherever the cluster keeps its things."""
    for key, folder in written_folders(config).items():
        if "://" not in folder and not Path(folder).is_absolute():
            raise UserError(
                f"{key} = {folder}: a job's own folder goes with the job; set {key} to an absolute path on storage "
                "that all nodes of the cluster share, such as /mnt/shared/runs"
            )
    for key, place in read_folders(config).items():
        if not Path(place).is_absolute() and Path(place).expanduser().exists():
            raise UserError(
                f"{key} = {place} is a folder of this machine, and only data files are sent along; put it on storage "
                f"that all nodes of the cluster share and set {key} to its absolute path there"
            )
    for key in ("working_dir", "py_modules"):
        if key in config.cluster.runtime_env:
            raise UserError(f"cluster.runtime_env: {key} is what submit sends the code with; leave it out")


def written_folders(config: RunConfig) -> dict[str, str]:
    """Recipe key → path or URI."""
    return {key: path for key, place, path in paths_of(config) if place is Place.WRITTEN}


def read_folders(config: RunConfig) -> dict[str, str]:
    """Recipe key → path, or what is a Hub id if there is no such path."""
    read = (Place.MODEL, Place.READ)
    return {key: path for key, place, path in paths_of(config) if place in read and "://" not in path}


def asked_places(config: RunConfig) -> list[str]:
    """Absolute paths and globs that the cluster may have."""
    sources = [_place(config, source) for source in config.data.sources if "://" not in source.path]
    read = [Path(place) for place in read_folders(config).values()]
    return sorted({str(place) for place in (*sources, *read) if place.is_absolute()})


def choose_sent(
    config: RunConfig, local: Sequence[LocalSource], theirs: Mapping[str, Sequence[int]]
) -> list[LocalSource]:
    """The sources that the cluster does not have. UserError for what is nowhere, or too large to be sent.

    theirs: number of files and bytes of asked_places, on the cluster.
    """
    for key, place in read_folders(config).items():
        if Path(place).is_absolute() and not theirs[place][0]:
            raise UserError(
                f"{key} = {place} is not on the head of the cluster; put it on storage that all its nodes share"
            )
    here = {source.number for source in local}
    for number, source in enumerate(config.data.sources):
        place = str(_place(config, source))
        if number not in here and not theirs.get(place, [1])[0]:
            raise UserError(f"data.sources[{number}]: {place} is neither here nor on the head of the cluster")
    sent = [s for s in local if not (s.is_absolute and list(theirs.get(s.place, ())) == measure(s.place))]
    total = sum(source.num_bytes for source in sent)
    if total > MAX_DATA_BYTES:
        raise UserError(_too_large(max(sent, key=lambda source: source.num_bytes), total))
    return sent


def _too_large(source: LocalSource, total: int) -> str:
    files = sorted(source.files, key=lambda file: file.stat().st_size, reverse=True)
    shown = ", ".join(f"{file.name} {_size(file.stat().st_size)}" for file in files[:SHOWN_FILES])
    more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
    together = "" if total == source.num_bytes else f", {_size(total)} with the other sources"
    key = f"data.sources[{source.number}]"
    return (
        f"{key}: {source.place} has {_size(source.num_bytes)} ({shown}{more}){together}, and a job takes along at most "
        f"{_size(MAX_DATA_BYTES)}; put it on storage that all nodes of the cluster share (NFS, s3://…, gs://…) and set "
        f"{key}.path to its place there"
    )


def pack(config: RunConfig | None, sent: Sequence[LocalSource], folder: Path) -> dict[str, Any]:
    """Put together a job's files in an empty folder; gives the working_dir and py_modules of a Ray runtime environment.

    Relative paths stay as they are in the recipe, so that it is the same run however often it is submitted.
    """
    code, work = folder / "code" / "gist_dist", folder / "work"
    shutil.copytree(Path(str(resources.files("gist_dist"))), code, ignore=shutil.ignore_patterns("__pycache__"))
    work.mkdir()
    if config:
        job = _with_data(config, sent, work).model_dump(mode="json")
        (work / RECIPE_NAME).write_text(json.dumps(job), encoding="utf-8")
    return {"working_dir": str(work), "py_modules": [str(code)]}


def _with_data(config: RunConfig, sent: Sequence[LocalSource], work: Path) -> RunConfig:
    """Copy the sources that are sent, and give the recipe with their places in the job."""
    base = work / ROOT if sent and config.data.root else work
    sources = list(config.data.sources)
    if sent and config.data.root:  # the root that is sent has only what is sent
        sources = [s.model_copy(update={"path": str(_place(config, s))}) for s in sources]
    for source in sent:
        path = config.data.sources[source.number].path
        head = _head(Path(path))
        if head.is_absolute() or ".." in head.parts or path.startswith("~"):
            path = str(Path(SENT, str(source.number), Path(source.place).relative_to(source.head)))
            head = Path(SENT, str(source.number))
        sources[source.number] = sources[source.number].model_copy(update={"path": path})
        for file in source.files:
            target = base / head / file.relative_to(source.head)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    data = {"sources": tuple(sources)} | ({"root": ROOT} if base != work else {})
    cluster = config.cluster.model_copy(update={"address": None})
    return config.model_copy(update={"data": config.data.model_copy(update=data), "cluster": cluster})


def _place(config: RunConfig, source: SourceConfig) -> Path:
    return Path(config.data.root or "").expanduser() / Path(source.path).expanduser()


def _head(place: Path) -> Path:
    """The folder before the name, or before the first part of a pattern."""
    parts = place.parts[:-1]
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return Path(*parts[:fixed])


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.1f} GiB"
