"""Prepared rows: what the models' own tokenizing gives, each text once, made once, whole or not at all."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from gist_dist.config import parse_config
from gist_dist.data import corpus as module
from gist_dist.data.corpus import Corpus, prepare
from gist_dist.encoder import Guide, Student
from gist_dist.errors import UserError

ROWS = [
    {"anchor": "amber basin", "positive": "cedar delta ember", "negatives": ["fjord", "new new new"]},
    {"anchor": "Amber  Basin", "positive": "amber basin"},
    {"anchor": "cedar delta ember", "positive": "fjord", "negatives": ["a b c 東京 😀"]},
    {"anchor": "amber basin", "positive": "word " * 300 + "x", "negatives": []},
    {"anchor": "word " * 300 + "y", "positive": "fjord"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny.save_tiny_model(folder / "student"), tiny.save_tiny_model(folder / "guide", width=16, seed=1)


@pytest.fixture
def data(tmp_path) -> Path:
    return tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)


def tree(folder: Path, models, *data: Path, **sections) -> dict:
    return tiny.recipe(folder, *models, *data, **({"batch": {"global_size": 2}} | sections))


def count_tokenized(monkeypatch) -> list[int]:
    calls, tokenize = [], Student.tokenize
    monkeypatch.setattr(
        "gist_dist.encoder.Encoder.tokenize", lambda s, texts: calls.append(len(texts)) or tokenize(s, texts)
    )
    return calls


def texts_of(corpus: Corpus) -> list[str]:
    return [corpus.text(i) for i in range(corpus.num_texts)]


def test_rows_and_texts(tmp_path, models, data):
    _, corpus = tiny.prepared(tree(tmp_path, models, data))
    texts = texts_of(corpus)
    assert len(texts) == len(set(texts)) == corpus.num_texts == 8
    assert [texts[i] for i in corpus.anchors] == [row["anchor"] for row in ROWS]
    assert [texts[i] for i in corpus.positives] == [row["positive"] for row in ROWS]
    assert corpus.num_negatives.tolist() == [2, 0, 1, 0, 0]
    assert [texts[i] for i in corpus.negatives_of(np.array([2, 1, 0]))] == ["a b c 東京 😀", "fjord", "new new new"]
    assert corpus.negatives_of(np.array([1, 4])).tolist() == []
    assert corpus.source.tolist() == [0] * 5 and corpus.number.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("max_tokens", [None, 7])
def test_token_ids_are_what_the_models_tokenize(tmp_path, models, data, max_tokens):
    prompts = {"anchor": "red: ", "positive": "wide "}
    config, corpus = tiny.prepared(
        tree(
            tmp_path,
            models,
            data,
            student={"max_tokens": max_tokens, "prompts": prompts},
            guide={"prompts": {"anchor": "cold "}},
        )
    )
    student, guide = Student(config.student), Guide(config.guide)
    checked = set()
    for row, given in enumerate(ROWS):
        for role, number, guide_prompt in (
            ("anchor", corpus.anchors[row], "cold "),
            ("positive", corpus.positives[row], ""),
        ):
            features = student.model.preprocess([prompts[role] + given[role]])
            assert np.array_equal(corpus.student_tokens(np.array([number]))[0], features["input_ids"][0].numpy())
            assert corpus.student_lengths[number] == features["attention_mask"].sum()
            features = guide.model.preprocess([guide_prompt + given[role]])
            assert np.array_equal(corpus.guide_tokens(np.array([number]))[0], features["input_ids"][0].numpy())
            assert corpus.guide_lengths[number] == features["attention_mask"].sum()
            checked.add(int(number))
    assert len(checked) >= 6
    assert corpus.student_lengths.max() == (max_tokens or 64)


def test_both_ways_to_tokenize_agree(models):
    encoder = Student(parse_config(tree(Path("."), models, Path("x"))).student)
    fingerprint, texts = encoder.fingerprint(), ["amber", "", "word " * 100, "é 東京 😀 [MASK]"] * 200
    assert encoder._backend_suffices
    fast = encoder.tokenize(texts)
    encoder.__dict__["_backend_suffices"] = False
    slow = encoder.tokenize(texts)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(fast, slow, strict=True))
    assert encoder.fingerprint() == fingerprint


def test_identity_is_equal_where_the_student_sees_the_same(tmp_path, models, data):
    _, corpus = tiny.prepared(tree(tmp_path, models, data))
    ids = [tuple(tokens.tolist()) for tokens in corpus.student_tokens(np.arange(corpus.num_texts))]
    same = [(i, j) for i in range(len(ids)) for j in range(i) if ids[i] == ids[j]]
    assert len(same) == 2  # case and spaces; two long texts that differ after the limit only
    for i in range(len(ids)):
        for j in range(i):
            assert (corpus.identity[i] == corpus.identity[j]) == (ids[i] == ids[j])


def test_the_same_text_under_another_prompt_is_another_text(tmp_path, models):
    data = tiny.write_jsonl(tmp_path / "x.jsonl", [{"anchor": "amber", "positive": "amber"}] * 2)
    assert tiny.prepared(tree(tmp_path / "a", models, data))[1].num_texts == 1
    for section in ("student", "guide"):
        _, corpus = tiny.prepared(tree(tmp_path / section, models, data, **{section: {"prompts": {"anchor": "red "}}}))
        assert corpus.num_texts == 2
        assert (corpus.identity[0] == corpus.identity[1]) == (section == "guide")
    sources = [{"path": str(data)}, {"path": str(data), "prompts": {"student": {"anchor": "red "}}}]
    _, corpus = tiny.prepared(tree(tmp_path / "c", models, data=dict(sources=sources)))
    assert corpus.num_rows == 4 and corpus.num_texts == 2
    assert corpus.source.tolist() == [0, 0, 1, 1] and corpus.number.tolist() == [0, 1, 0, 1]


def test_several_batches_of_texts_are_one_corpus(tmp_path, models, monkeypatch):
    rows = [
        {"anchor": f"amber {i}", "positive": f"basin {i % 7}", "negatives": [f"cedar {i}"] * (i % 3)} for i in range(50)
    ]
    data = tiny.write_jsonl(tmp_path / "x.jsonl", rows)
    _, whole = tiny.prepared(tree(tmp_path / "a", models, data))
    monkeypatch.setattr(module, "TEXTS_PER_BATCH", 8)
    _, parts = tiny.prepared(tree(tmp_path / "b", models, data))
    monkeypatch.undo()
    assert len(parts._texts) > 5 > len(whole._texts)
    everything = np.arange(whole.num_texts)
    assert texts_of(parts) == texts_of(whole)
    for name in ("anchors", "positives", "identity", "student_lengths", "guide_lengths", "number", "num_negatives"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name)), name
    for name in ("student_tokens", "guide_tokens"):
        pairs = zip(getattr(parts, name)(everything), getattr(whole, name)(everything), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


def test_token_ids_stay_on_disk(tmp_path, models, data):
    _, corpus = tiny.prepared(tree(tmp_path, models, data))
    mapped = str(corpus.folder / "texts.arrow")
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(mapped)
    ]
    tokens = corpus.student_tokens(np.array([0]))[0]
    address = tokens.__array_interface__["data"][0]
    assert any(start <= address < end for start, end in spans)


def test_a_guide_with_the_same_tokenizer_costs_nothing(tmp_path, models, data, monkeypatch):
    calls = count_tokenized(monkeypatch)
    _, corpus = tiny.prepared(tree(tmp_path / "a", models, data))
    assert sum(calls) == corpus.num_texts
    calls.clear()
    _, corpus = tiny.prepared(tree(tmp_path / "b", models, data, guide={"max_tokens": 9}))
    assert sum(calls) == 2 * corpus.num_texts and corpus.guide_lengths.max() == 9


def test_no_guide_has_no_tokens(tmp_path, models, data):
    _, corpus = tiny.prepared(tree(tmp_path, (models[0], None), data))
    assert corpus.guide_lengths.tolist() == [0] * corpus.num_texts


def test_prepared_once_and_again_when_something_changed(tmp_path, models, data, monkeypatch):
    calls = count_tokenized(monkeypatch)
    base = tree(tmp_path, models, data)
    folders = [tiny.prepared(base)[1].folder]
    calls.clear()
    assert tiny.prepared({**base, "seed": 5, "loss": {"margin": 0.1}})[1].folder == folders[0]
    weighted = {"data": {"sources": [{"path": str(data), "weight": 3}]}}
    assert tiny.prepared({**base, **weighted})[1].folder == folders[0]
    assert calls == []
    for sections in (
        {"student": {"max_tokens": 10}}, {"guide": {"max_tokens": 10}}, {"student": {"prompts": {"anchor": "red"}}},
        {"data": {"sources": [{"path": str(data), "max_rows": 3}]}},
    ):  # fmt: skip
        folders.append(tiny.prepared(tree(tmp_path, models, data, **sections))[1].folder)
        assert calls
        calls.clear()
    shutil.copytree(models[0], tmp_path / "other")
    described = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["amber"], vocabulary["basin"] = vocabulary["basin"], vocabulary["amber"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(described))
    folders.append(tiny.prepared(tree(tmp_path, (tmp_path / "other", models[1]), data))[1].folder)
    tiny.write_jsonl(data, [*ROWS, {"anchor": "kelp", "positive": "lagoon"}])
    _, corpus = tiny.prepared(base)
    assert corpus.num_rows == 6
    assert len({*folders, corpus.folder}) == len(folders) + 1


def contents(folder: Path, models, *files: Path, **sections) -> str:
    return tiny.prepared(tree(folder, models, *files, **sections))[1].manifest["content"]


def test_the_content_hash_knows_what_batches_depend_on_and_nothing_else(tmp_path, models, data):
    expected = contents(tmp_path / "a", models, data)
    (tmp_path / "elsewhere").mkdir()
    os.utime(shutil.copy(data, tmp_path / "elsewhere" / "renamed.jsonl"), ns=(1, 1))
    assert contents(tmp_path / "b", models, tmp_path / "elsewhere" / "renamed.jsonl") == expected
    split = tmp_path / "split"
    split.mkdir()
    tiny.write_jsonl(split / "1.jsonl", ROWS[:2])
    tiny.write_jsonl(split / "2.jsonl", ROWS[2:])
    assert contents(tmp_path / "c", models, split) == expected
    swapped = [dict(row) for row in ROWS]
    swapped[0]["negatives"] = swapped[0]["negatives"][::-1]
    moved = [dict(row) for row in ROWS]
    moved[1]["negatives"] = ["fjord"]  # a text that is there already
    others = [
        contents(tmp_path / "d", models, tiny.write_jsonl(tmp_path / "d.jsonl", ROWS[::-1])),
        contents(tmp_path / "e", models, tiny.write_jsonl(tmp_path / "e.jsonl", swapped)),
        contents(tmp_path / "f", models, tiny.write_jsonl(tmp_path / "f.jsonl", moved)),
        contents(tmp_path / "g", models, data, student={"max_tokens": 5}),
        contents(tmp_path / "h", models, split / "1.jsonl", split / "2.jsonl"),
    ]
    assert len({expected, *others}) == 6


def test_an_error_while_writing_leaves_nothing(tmp_path, models, data, monkeypatch):
    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_tokenized", no_space)
    with pytest.raises(
        UserError, match=r"corpora: the prepared corpus can't be written there: .*No space left on device"
    ):
        tiny.prepared(tree(tmp_path, models, data))
    assert list((tmp_path / "corpora").iterdir()) == []


def test_a_killed_preparation_is_not_taken_for_prepared(tmp_path, models, data):
    code = (
        "import sys, json, os, signal, tiny; from gist_dist.data import corpus\n"
        "corpus._rename = lambda aside, folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tiny.prepared(json.loads(sys.argv[1]))"
    )
    recipe = tree(tmp_path, models, data)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(recipe)], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = list((tmp_path / "corpora").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".") and (left[0] / "manifest.json").exists()
    _, corpus = tiny.prepared(recipe)
    assert corpus.num_rows == 5 and corpus.folder != left[0]


def _prepare_together(recipe: dict, barrier) -> tuple[str, str, int]:
    config = parse_config(recipe)
    student, guide = Student(config.student), Guide(config.guide)
    barrier.wait(60)
    corpus = prepare(config, student, guide, progress=lambda message: None)
    return str(corpus.folder), corpus.manifest["content"], len(texts_of(corpus))


def test_two_processes_prepare_the_same_corpus_at_once(tmp_path, models):
    rows = [{"anchor": f"amber {i}", "positive": f"basin {i}"} for i in range(3000)]
    recipe = tree(tmp_path, models, tiny.write_jsonl(tmp_path / "x.jsonl", rows))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "sentence_transformers", "gist_dist.trainer"])
    with context.Manager() as manager, context.Pool(2) as pool:
        first, second = pool.starmap(_prepare_together, [(recipe, manager.Barrier(2))] * 2, chunksize=1)
    assert first == second and first[2] == 6000
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == [Path(first[0]).name]


def test_a_damaged_corpus_is_named(tmp_path, models, data):
    recipe = tree(tmp_path, models, data)
    _, corpus = tiny.prepared(recipe)
    path = corpus.folder / "texts.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"is damaged .*; remove it, and it is prepared again"):
        tiny.prepared(recipe)


def test_dropped_rows_are_told_also_when_nothing_is_prepared_anew(tmp_path, models):
    data = tiny.write_jsonl(tmp_path / "x.jsonl", [*ROWS, {"anchor": "", "positive": "p"}])
    config = parse_config(tree(tmp_path, models, data))
    for _ in range(2):
        told = []
        corpus = prepare(config, Student(config.student), Guide(config.guide), progress=told.append)
        assert (
            "x: dropped 1 of 6 rows: anchor is empty (1); the first (counting from 0): x.jsonl row 5: anchor is empty"
            in told
        )
    assert corpus.manifest["sources"][0]["rows_used"] == 5
