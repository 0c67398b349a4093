"""Stores on a disk, in an S3 server and behind fsspec; copies that are whole, checked and made once for a node."""

import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path

import pyarrow.fs
import pytest
import tiny

from gist_dist.common.errors import UserError
from gist_dist.common.storage import copies_folder, join, local_copy, open_store, sha256
from gist_dist.data.corpus import open_corpus
from gist_dist.recipe import parse_config


@pytest.fixture(scope="module")
def s3():
    """A URI of a bucket in a real S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
            patch.setenv(name, value)
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        options = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
        pyarrow.fs.FileSystem.from_uri(f"s3://bucket?{options}")[0].create_dir("bucket")
        yield f"s3://bucket/runs?{options}"
        server.stop()


@pytest.fixture(params=["path", "file", "s3", "memory"])
def place(request, tmp_path) -> str:
    if request.param == "s3":
        return join(request.getfixturevalue("s3"), tmp_path.name)
    return {"path": str(tmp_path / "x"), "file": f"file://{tmp_path}/x", "memory": f"memory://{tmp_path.name}/x"}[
        request.param
    ]


def test_a_store_keeps_files(place, tmp_path):
    store = open_store(place)
    assert store.list() == [] and not store.exists("a.txt")
    store.write_bytes("a.txt", b"one")
    store.write_bytes("below/b.txt", b"two")
    (tmp_path / "c").write_bytes(b"three" * 2**20)
    store.upload(tmp_path / "c", "c.bin")
    store.write_bytes("a.txt", b"four")
    assert store.list() == ["a.txt", "below/b.txt", "c.bin"] and store.exists("below/b.txt")
    assert store.read_bytes("a.txt") == b"four"
    infos = store.infos()
    assert infos["c.bin"].size == 5 * 2**20 and abs(infos["c.bin"].modified - time.time()) < 600
    assert store.sha256("c.bin") == sha256(tmp_path / "c")
    store.download("c.bin", tmp_path / "copy" / "c")
    assert (tmp_path / "copy" / "c").read_bytes() == (tmp_path / "c").read_bytes()
    assert open_store(join(place, "below")).list() == ["b.txt"]
    store.delete("a.txt")
    store.delete("a.txt")
    store.delete_folder("below")
    store.delete_folder("below")
    assert store.list() == ["c.bin"]
    with pytest.raises(FileNotFoundError):
        store.read_bytes("a.txt")


def test_a_folder_is_local_and_an_object_store_is_not(tmp_path, s3):
    assert open_store(tmp_path).local == open_store(f"file://{tmp_path}").local == tmp_path
    assert open_store(s3).local is None


def test_places_below_a_uri_keep_its_options():
    assert join("s3://bucket/runs/?region=x", "a", "b") == "s3://bucket/runs/a/b?region=x"
    assert join("/data/what?", "a") == "/data/what?/a"


def test_an_unknown_kind_of_uri_is_refused():
    with pytest.raises(UserError, match=r"foo://x/y can't be opened: .*foo"):
        open_store("foo://x/y")


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    store = open_store(tmp_path / "x")
    store.write_bytes("a", b"old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        store.write_bytes("a", b"new")
    assert store.read_bytes("a") == b"old" and [path.name for path in (tmp_path / "x").iterdir()] == ["a"]


def test_readers_never_see_half_a_file(tmp_path):
    store, contents = open_store(tmp_path), [bytes([value]) * 2**20 for value in range(2)]
    store.write_bytes("a", contents[0])
    writers = [
        threading.Thread(target=lambda c=c: [store.write_bytes("a", c) for _ in range(20)], daemon=True)
        for c in contents
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert store.read_bytes("a") in contents
    assert store.list() == ["a"] == [path.name for path in tmp_path.iterdir()]


def test_scratch_is_removed_also_that_of_a_killed_process(tmp_path):
    store = open_store(tmp_path)
    with store.scratch() as old, store.scratch() as young:
        (old / "half").write_bytes(b"x")
        for path in (old / "half", old):
            os.utime(path, (1, 1))
        with store.scratch() as own:
            assert own.is_dir() and young.is_dir() and not old.exists()
            (own / "texts").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def filled(place: str) -> tuple[dict[str, str], dict[str, bytes]]:
    store, contents = open_store(place), {f"{n}.bin": os.urandom(1000 + n) for n in range(5)}
    for name, content in contents.items():
        store.write_bytes(name, content)
    return {name: store.sha256(name) for name in contents}, contents


def count_downloads(monkeypatch) -> list[str]:
    names, download = [], type(open_store("/")).download
    monkeypatch.setattr(
        type(open_store("/")), "download", lambda s, name, path: names.append(name) or download(s, name, path)
    )
    return names


def test_a_copy_is_made_once_and_mended(place, tmp_path, monkeypatch):
    files, contents = filled(place)
    names = count_downloads(monkeypatch)
    folder = tmp_path / "node"
    assert local_copy(open_store(place), files, folder) == folder
    assert sorted(names) == sorted(files)
    local_copy(open_store(place), files, folder)
    assert len(names) == 5
    (folder / "1.bin").write_bytes(contents["1.bin"][:-1] + b"\0")
    (folder / "2.bin").unlink()
    (folder / "3.bin").write_bytes(contents["3.bin"])  # touched, but the same
    (folder / ".checked.json").write_text("{")
    local_copy(open_store(place), files, folder)
    assert sorted(names[5:]) == ["1.bin", "2.bin"]
    assert {name: (folder / name).read_bytes() for name in files} == contents


def test_a_damaged_original_is_named(place, tmp_path):
    files, _ = filled(place)
    open_store(place).write_bytes("4.bin", b"something else")
    with pytest.raises(UserError, match=r"4\.bin.* is damaged \(the checksum of 4\.bin is wrong\)"):
        local_copy(open_store(place), files, tmp_path / "node")
    assert not (tmp_path / "node" / "4.bin").exists()
    open_store(place).delete("4.bin")
    with pytest.raises(UserError, match=r"can't be copied to .*node: .*see data\.local_copy"):
        local_copy(open_store(place), files, tmp_path / "node")


def _copy(place: str, files: dict[str, str], folder: Path, barrier, downloads) -> None:
    with pytest.MonkeyPatch.context() as patch:
        names = count_downloads(patch)
        barrier.wait(60)
        local_copy(open_store(place), files, folder)
    downloads.put(len(names))


def test_processes_of_a_node_copy_once(tmp_path):
    files, contents = filled(str(tmp_path / "x"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "sentence_transformers", "gist_dist.training.trainer"])
    barrier, downloads = context.Barrier(4), context.SimpleQueue()
    arguments = (str(tmp_path / "x"), files, tmp_path / "node", barrier, downloads)
    processes = [context.Process(target=_copy, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    assert sorted(downloads.get() for _ in processes) == [0, 0, 0, 5]
    for process in processes:
        process.join()
    assert {name: (tmp_path / "node" / name).read_bytes() for name in files} == contents


def test_copies_without_a_folder_of_the_users_are_temporary(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert copies_folder(None, "corpora", "k") == tmp_path / f"gist-dist-{os.getuid()}" / "corpora" / "k"
    assert copies_folder("/disk", "corpora") == Path("/disk/corpora")


def test_temporary_copies_are_in_a_folder_of_this_user_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"gist-dist-{os.getuid()}"
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    copies_folder(None, "x")
    assert own.stat().st_mode & 0o777 == 0o700
    own.rmdir()
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"gist-dist-\d+ is not this user's; set data\.local_copy"):
        copies_folder(None, "x")
    own.unlink()
    own.write_text("in the way")
    with pytest.raises(UserError, match=r"gist-dist-\d+ can't be made: .*; set data\.local_copy"):
        copies_folder(None, "x")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder of another user")
def test_a_folder_of_another_user_is_not_written_to(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"gist-dist-{os.getuid()}"
    own.mkdir()
    os.chown(own, 65534, 65534)
    with pytest.raises(UserError, match="is not this user's"):
        copies_folder(None, "x")
    assert list(own.iterdir()) == []


@pytest.mark.parametrize(
    "marks", ["[]", "5", '{"1.bin": 5, "2.bin": [1], "3.bin": null}', "[" * 10**5], ids=lambda marks: marks[:20]
)
def test_marks_that_are_none_are_no_proof(tmp_path, marks):
    files, contents = filled(str(tmp_path / "x"))
    folder = local_copy(open_store(tmp_path / "x"), files, tmp_path / "node")
    (folder / "1.bin").write_bytes(b"other")
    (folder / ".checked.json").write_text(marks)
    local_copy(open_store(tmp_path / "x"), files, folder)
    assert {name: (folder / name).read_bytes() for name in files} == contents


def test_a_corpus_in_object_storage(s3, tmp_path, monkeypatch):
    """Prepared into it, found again, and opened from the node's copy; equal to one on disk."""
    models = [tiny.save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("student", "guide"))]
    rows = [{"anchor": f"amber {i}", "positive": f"basin {i % 7}", "negatives": ["cedar"]} for i in range(30)]
    for n in range(2):
        tiny.write_jsonl(tmp_path / f"{n}.jsonl", rows[n * 15 : n * 15 + 15])
    sections = {"batch": {"global_size": 4}}
    _, on_disk = tiny.prepared(tiny.recipe(tmp_path, *models, tmp_path / "*.jsonl", **sections))
    sections["data"] = {"cache_dir": s3, "local_copy": str(tmp_path / "node")}
    tree = tiny.recipe(tmp_path, *models, tmp_path / "*.jsonl", **sections)
    config, corpus = tiny.prepared(tree)
    assert corpus.place.startswith("s3://bucket/runs/") and corpus.folder.is_relative_to(tmp_path / "node")
    assert corpus.manifest["content"] == on_disk.manifest["content"]
    every = range(corpus.num_texts)
    assert [corpus.text(i) for i in every] == [on_disk.text(i) for i in every]
    assert set(open_store(corpus.place).list()) == {"manifest.json", *corpus.manifest["files"]}
    shutil.rmtree(tmp_path / "node")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    config = parse_config(tree | {"data": tree["data"] | {"local_copy": None}})
    opened = open_corpus(config, corpus.place)
    assert opened.folder.is_relative_to(tmp_path / "tmp") and opened.anchors.tolist() == on_disk.anchors.tolist()
    names = count_downloads(monkeypatch)
    assert tiny.prepared(tree | {"data": tree["data"] | {"local_copy": None}})[1].num_rows == 30 and names == []
    assert not list((tmp_path / "tmp").glob(".gist-dist-scratch-*"))
