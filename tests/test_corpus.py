"""Prepared rows: what the models' own tokenizing gives, each text once, made once, whole or not at all."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from gist_dist.common.errors import UserError
from gist_dist.common.storage import open_store
from gist_dist.data import corpus as corpus_module
from gist_dist.data import merge, shards
from gist_dist.data.corpus import Corpus, open_corpus, prepare, run_in_process
from gist_dist.data.shards import Job
from gist_dist.data.sources import Source
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.tokenizer import TextTokenizer
from gist_dist.recipe import parse_config

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
    calls, tokenize = [], TextTokenizer.__call__
    monkeypatch.setattr(TextTokenizer, "__call__", lambda s, texts: calls.append(len(texts)) or tokenize(s, texts))
    return calls


def files(corpus: Corpus, kind: str) -> list[Path]:
    return sorted(corpus.folder.glob(f"{kind}-*"))


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
    fingerprint, texts = encoder.tokenizer_fingerprint(), ["amber", "", "word " * 100, "é 東京 😀 [MASK]"] * 200
    assert encoder._backend_suffices
    fast = encoder.tokenize(texts)
    del encoder.__dict__["tokenizer"]
    encoder.__dict__["_backend_suffices"] = False
    slow = encoder.tokenize(texts)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(fast, slow, strict=True))
    assert encoder.tokenizer_fingerprint() == fingerprint


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
    assert len(files(whole, "texts")) == 1
    monkeypatch.setattr(shards, "BATCH_TEXTS", 8)
    _, parts = tiny.prepared(tree(tmp_path / "b", models, data))
    assert len(files(parts, "texts")) == 1
    everything = np.arange(whole.num_texts)
    assert texts_of(parts) == texts_of(whole)
    for name in ("anchors", "positives", "identity", "student_lengths", "guide_lengths", "number", "num_negatives"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name)), name
    for name in ("student_tokens", "guide_tokens"):
        pairs = zip(getattr(parts, name)(everything), getattr(whole, name)(everything), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


def many_rows(num_rows: int, seed: int) -> list[dict]:
    """Few distinct texts, so that they recur in every shard; all roles, some texts in several of them."""
    rng = np.random.default_rng(seed)
    text = lambda: f"amber {rng.integers(60)}" if rng.random() < 0.8 else "😀" * int(rng.integers(1, 4))  # noqa: E731
    return [
        {"anchor": text(), "positive": text(), "negatives": [text() for _ in range(rng.integers(4))]}
        for _ in range(num_rows)
    ]


@pytest.mark.parametrize("shard_texts, shard_references", [(2**17, 2**20), (16, 2**20), (1000, 40)])
def test_rows_and_text_numbers_do_not_depend_on_where_shards_end(
    tmp_path, models, monkeypatch, shard_texts, shard_references
):
    """Against a corpus made in the plainest way: texts numbered as rows first use them."""
    rows = many_rows(160, seed=3)
    usable = [row for row in rows if all(t.isascii() for t in (row["anchor"], row["positive"], *row["negatives"]))]
    assert 50 < len(usable) < 130
    expected: dict[str, int] = {}
    for row in usable:
        for text in (row["anchor"], row["positive"], *row["negatives"]):
            expected.setdefault(text, len(expected))
    paths = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", rows[n * 40 : n * 40 + 40]) for n in range(4)]
    monkeypatch.setattr(shards, "SHARD_TEXTS", shard_texts)
    monkeypatch.setattr(shards, "SHARD_REFERENCES", shard_references)
    monkeypatch.setattr(merge, "BUCKET_TEXTS", 5)
    _, corpus = tiny.prepared(tree(tmp_path, models, tmp_path / "*.jsonl"))
    assert len(paths) == 4 and len(files(corpus, "texts")) > (3 if shard_texts == 2**17 else 8)
    assert texts_of(corpus) == list(expected)
    assert corpus.anchors.tolist() == [expected[row["anchor"]] for row in usable]
    assert corpus.positives.tolist() == [expected[row["positive"]] for row in usable]
    every = np.arange(corpus.num_rows)
    assert corpus.negatives_of(every).tolist() == [expected[text] for row in usable for text in row["negatives"]]
    assert corpus.num_negatives.tolist() == [len(row["negatives"]) for row in usable]
    assert [rows[number] for number in corpus.number] == usable
    assert corpus.texts_in_use.tolist() == list(range(corpus.num_texts))
    report = corpus.manifest["sources"][0]
    assert (report["rows_read"], report["rows_used"]) == (160, len(usable))
    assert report["num_texts"] == len(expected)
    student_tokens = corpus.student_tokens(np.arange(corpus.num_texts))
    assert [len(tokens) for tokens in student_tokens] == corpus.student_lengths.tolist()
    whole = contents(tmp_path / "whole", models, tiny.write_jsonl(tmp_path / "whole.txt.jsonl", rows))
    assert corpus.manifest["content"] == whole


def test_guide_keys_are_equal_where_the_guide_sees_the_same(tmp_path, models, data):
    _, corpus = tiny.prepared(tree(tmp_path, models, data, guide={"max_tokens": 3}))
    ids = [tuple(tokens.tolist()) for tokens in corpus.guide_tokens(np.arange(corpus.num_texts))]
    keys = [tuple(key) for key in corpus.guide_keys.tolist()]
    assert len(set(ids)) == len(set(keys)) == len(set(zip(ids, keys, strict=True))) < corpus.num_texts
    assert corpus.guide_keys.dtype == np.uint64
    _, alone = tiny.prepared(tree(tmp_path, (models[0], None), data))
    assert alone.guide_keys.shape == (alone.num_texts, 2) and not alone.guide_keys.any()


@pytest.mark.parametrize("prompt", ["", "wide cold: ", "wide"])
def test_a_row_is_dropped_if_the_student_knows_no_token_of_a_text(tmp_path, models, prompt):
    """The prompt does not make it known."""
    good = {"anchor": "amber", "positive": "cedar 😀"}
    rows = [
        good,
        {"anchor": "😀 😀😀", "positive": "cedar"},
        good | {"negatives": ["delta", "東京", "🚀"]},
        {"anchor": "amber", "positive": "\u200b"},
        {"anchor": "delta", "positive": "fjord"},
    ]
    path = tiny.write_jsonl(tmp_path / "x.jsonl", rows)
    prompts = {role: prompt for role in ("anchor", "positive", "negatives")}
    _, corpus = tiny.prepared(tree(tmp_path, models, path, student={"prompts": prompts}))
    assert corpus.number.tolist() == [0, 4]
    assert set(texts_of(corpus)) == {"amber", "cedar 😀", "delta", "fjord"}
    source = corpus.manifest["sources"][0]
    assert source["dropped"] == {
        f"{role} has no token that the student knows": 1 for role in ("anchor", "negative", "positive")
    }
    assert source["first_dropped"][1] == "x.jsonl row 2: negative has no token that the student knows"
    assert (source["rows_read"], source["rows_used"]) == (5, 2)


def test_a_source_without_any_known_token_is_refused(tmp_path, models):
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{"anchor": "😀", "positive": "🚀"}] * 3)
    with pytest.raises(
        UserError, match=r"x\.jsonl has no usable row; 3 of 3 rows: anchor has no token that the student knows \(3\)"
    ):
        tiny.prepared(tree(tmp_path, models, path))


def test_a_column_splits_a_source(tmp_path, models):
    tasks = ["b", "a", "b", "c", "a", "b"]
    rows = [{"anchor": f"amber {i}", "positive": f"basin {i}", "task": task} for i, task in enumerate(tasks)]
    rows[3]["anchor"] = "😀"  # leaves nothing of c
    paths = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", rows[n * 2 : n * 2 + 2]) for n in range(3)]
    assert len(paths) == 3
    plain = tiny.write_jsonl(tmp_path / "plain.json", [{"anchor": "amber 0", "positive": "delta"}])
    sources = [
        {"path": str(plain), "weight": 2},
        {"path": str(tmp_path / "*.jsonl"), "name": "medi", "split_by": "task"},
    ]
    _, corpus = tiny.prepared(tree(tmp_path, models, data={"sources": sources}))
    assert corpus.source_names == ["plain", "medi/a", "medi/b"]
    assert [source["recipe_source"] for source in corpus.manifest["sources"]] == [0, 1, 1]
    assert [source["rows_used"] for source in corpus.manifest["sources"]] == [1, 2, 3]
    assert corpus.source.tolist() == [0, 2, 1, 2, 1, 2] and corpus.number.tolist() == [0, 0, 1, 2, 4, 5]
    assert [source["num_texts"] for source in corpus.manifest["sources"]] == [2, 4, 5]  # amber 0 counts for the first
    assert corpus.manifest["reports"][1]["dropped"] == {"anchor has no token that the student knows": 1}


def test_texts_that_reach_the_limit_are_counted(tmp_path, models, data):
    recipe = tree(tmp_path, models, data, student={"max_tokens": 6}, guide={"max_tokens": 30})
    _, corpus = tiny.prepared(recipe)
    source = corpus.manifest["sources"][0]
    assert source["num_student_cut"] == (corpus.student_lengths == 6).sum() == 3
    assert source["num_guide_cut"] == 2 and source["num_texts"] == corpus.num_texts


def test_unusable_rows_stop_also_when_they_were_dropped_before(tmp_path, models):
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [*ROWS, {"anchor": "😀", "positive": "p"}])
    sources = [{"path": str(path)}]
    assert tiny.prepared(tree(tmp_path, models, data={"sources": sources}))[1].num_rows == 5
    with pytest.raises(
        UserError, match=r"data.sources\[0\]: unusable 1 of 6 rows: anchor has no token that the student knows .*=drop"
    ):
        tiny.prepared(tree(tmp_path, models, data={"sources": sources, "unusable_rows": "error"}))


def test_a_local_copy_is_read_where_the_recipe_wants_one(tmp_path, models, data):
    config, corpus = tiny.prepared(tree(tmp_path, models, data, data={"local_copy": str(tmp_path / "node")}))
    assert corpus.folder.is_relative_to(tmp_path / "node") and corpus.place.startswith(str(tmp_path / "corpora"))
    texts = texts_of(corpus)
    file = files(corpus, "anchors")[0]
    file.write_bytes(file.read_bytes()[:-8] + b"\1" * 8)  # of the same size
    again = open_corpus(config, corpus.place)
    assert texts_of(again) == texts and again.anchors.tolist() == open_corpus(config, corpus.place).anchors.tolist()
    assert [texts[i] for i in again.anchors] == [row["anchor"] for row in ROWS]


MEASURED = """
import pickle, sys
from gist_dist.data import shards
shards.SHARD_TEXTS, shards.BATCH_TEXTS = 4096, 1024
job = pickle.load(open(sys.argv[1], "rb"))
*_, commit = job.run(0)
assert not {"torch", "transformers", "ray"} & set(sys.modules), "a task needs no more than the tokenizer"
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(commit.report["rows_used"], len(commit.shards), peak)
"""


def test_memory_is_bounded_by_the_shard(tmp_path, models):
    config = parse_config(tree(tmp_path, models, tmp_path / "x.jsonl"))
    student = Student(config.student)
    peaks = []
    for num_rows in (5_000, 25_000):
        rows = [{"anchor": f"amber {i} " * 8, "positive": f"basin {i} " * 8} for i in range(num_rows)]
        path = tiny.write_jsonl(tmp_path / "x.jsonl", rows)
        source = Source(config.data.sources[0], 0, None)
        prompts = shards.Prompts(("", ""), ("", ""), ("", ""))
        job = Job(str(tmp_path / str(num_rows)), [source], [prompts], [(0, source.parts()[0])], student.tokenizer, None)
        (tmp_path / "job").write_bytes(pickle.dumps(job))
        assert (tmp_path / "job").stat().st_size < 2**20, "no weights"
        done = subprocess.run([sys.executable, "-c", MEASURED, tmp_path / "job"], capture_output=True, text=True)
        rows, num_shards, peak = map(int, done.stdout.split())
        assert rows == num_rows and num_shards == -(-2 * num_rows // 4096)
        peaks.append(peak)
    assert path.stat().st_size > 5 * 2**20
    assert peaks[1] - peaks[0] < 4 * 2**10, f"kilobytes: {peaks}"


def test_token_ids_stay_on_disk(tmp_path, models, data):
    _, corpus = tiny.prepared(tree(tmp_path, models, data))
    mapped = str(files(corpus, "texts")[0])
    corpus.text(0)
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

    monkeypatch.setattr(shards, "token_keys", no_space)
    with pytest.raises(
        UserError, match=r"corpora: the prepared corpus can't be written there: .*No space left on device"
    ):
        tiny.prepared(tree(tmp_path, models, data))
    assert [path for path in (tmp_path / "corpora").rglob("*") if not path.is_dir()] == []


def in_process(function, *arguments) -> list[multiprocessing.Process]:
    """Started in a process that is forked with torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "sentence_transformers", "gist_dist.training.trainer"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def three_files(folder: Path) -> list[Path]:
    """Of 40 rows each; half of the texts of a file are in the next one too."""
    return [
        tiny.write_jsonl(
            folder / f"{n}.jsonl",
            [{"anchor": f"amber {n * 20 + i}", "positive": f"basin {n * 20 + i}"} for i in range(40)],
        )
        for n in range(3)
    ]


def _killed_after(num_parts: int, recipe: dict) -> None:
    def run(job, tick):
        for number, commit in run_in_process(job, tick):
            yield number, commit
            if number + 1 == num_parts:
                with open_store(job.place).scratch() as folder:
                    (folder / "texts.arrow").write_bytes(b"half")
                    os.kill(os.getpid(), signal.SIGKILL)

    config = parse_config(recipe)
    prepare(config, Student(config.student), Guide(config.guide), progress=lambda message: None, run_parts=run)


def test_a_killed_preparation_goes_on_where_it_was(tmp_path, models, monkeypatch):
    recipe = tree(tmp_path, models, tmp_path / "*.jsonl")
    three_files(tmp_path)
    undisturbed = contents(tmp_path / "other", models, tmp_path / "*.jsonl")
    process = in_process(_killed_after, 2, recipe)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (folder,) = (tmp_path / "corpora").iterdir()
    assert not (folder / "manifest.json").exists()
    assert sorted(path.name for path in folder.glob("part-*")) == ["part-00000.json", "part-00001.json"]
    calls = count_tokenized(monkeypatch)
    _, corpus = tiny.prepared(recipe)
    assert sum(calls) == 80, "the third file's texts only"
    assert corpus.manifest["content"] == undisturbed and corpus.num_texts == 160
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".gist-dist-scratch")}
    assert left == {"manifest.json", *corpus.manifest["files"]}


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "commit"])
@pytest.mark.parametrize("kind", ["texts", "rows"])
def test_a_torn_shard_is_found_and_made_again(tmp_path, models, monkeypatch, damage, kind):
    three_files(tmp_path)
    recipe = tree(tmp_path, models, tmp_path / "*.jsonl")
    expected = contents(tmp_path / "other", models, tmp_path / "*.jsonl")

    def stop(*arguments):
        raise UserError("stopped")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="stopped"):
        patch.setattr(corpus_module, "merge", stop)
        tiny.prepared(recipe)
    (folder,) = (tmp_path / "corpora").iterdir()
    commit = folder / "part-00001.json"
    (shard,) = json.loads(commit.read_text())["shards"]
    file = folder / shard[kind] if damage != "commit" else commit
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "changed":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:middle])
    calls = count_tokenized(monkeypatch)
    _, corpus = tiny.prepared(recipe)
    assert sum(calls) == 80 and corpus.manifest["content"] == expected
    assert corpus.text(int(corpus.anchors[60])) == "amber 40"


def test_what_killed_preparations_left_is_removed_after_a_day(tmp_path, models, data):
    corpora = tmp_path / "corpora"
    old, young, foreign = (corpora / name / "part-00000.json" for name in ("0" * 20, "1" * 20, "my-notes"))
    _, corpus = tiny.prepared(tree(tmp_path, models, data))
    scratch = corpus.folder / ".gist-dist-scratch-x" / "texts.arrow"
    for file in (old, young, foreign, scratch):
        file.parent.mkdir()
        file.write_text("{}")
    for file in (old, foreign, scratch):
        os.utime(file, (1, 1))
    assert tiny.prepared(tree(tmp_path, models, data))[1].num_rows == 5
    assert not scratch.exists()
    tiny.prepared(tree(tmp_path, models, data, student={"max_tokens": 9}))
    assert not old.parent.exists() and young.exists() and foreign.exists()


def _prepare_together(recipe: dict, barrier, results) -> None:
    config = parse_config(recipe)
    student, guide = Student(config.student), Guide(config.guide)
    barrier.wait(60)
    corpus = prepare(config, student, guide, progress=lambda message: None)
    results.put((str(corpus.folder), corpus.manifest["content"], len(texts_of(corpus))))


def test_two_processes_prepare_the_same_corpus_at_once(tmp_path, models, monkeypatch):
    for n in range(6):
        rows = [{"anchor": f"amber {i}", "positive": f"basin {i}"} for i in range(n * 250, n * 250 + 500)]
        tiny.write_jsonl(tmp_path / f"{n}.jsonl", rows)
    recipe = tree(tmp_path, models, tmp_path / "*.jsonl")
    context = multiprocessing.get_context("forkserver")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    processes = [in_process(_prepare_together, recipe, barrier, results) for _ in range(2)]
    first, second = results.get(), results.get()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert first == second and first[2] == 2 * 1750
    (folder,) = (tmp_path / "corpora").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *manifest["files"]}


@pytest.mark.parametrize("moment", ["run", "merge"])
def test_another_run_finishes_first(tmp_path, models, monkeypatch, moment):
    """In the middle of the parts, or when the files that are merged are gone already."""
    three_files(tmp_path)
    recipe = tree(tmp_path, models, tmp_path / "*.jsonl")
    real = Job.run if moment == "run" else corpus_module.merge
    finished = []

    def meanwhile(*arguments):
        if not finished and (moment == "merge" or arguments[1] == 1):
            finished.append(True)
            finished.append(tiny.prepared(recipe)[1])
        return real(*arguments)

    monkeypatch.setattr(*((Job, "run") if moment == "run" else (corpus_module, "merge")), meanwhile)
    _, corpus = tiny.prepared(recipe)
    assert corpus.manifest == finished[1].manifest and corpus.num_rows == 120
    assert {path.name for path in corpus.folder.iterdir()} == {"manifest.json", *corpus.manifest["files"]}


def test_a_damaged_corpus_is_named(tmp_path, models, data):
    recipe = tree(tmp_path, models, data)
    _, corpus = tiny.prepared(recipe)
    path = files(corpus, "texts")[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"is damaged .*; remove it, and it is prepared again"):
        tiny.prepared(recipe)


def test_dropped_rows_are_told_also_when_nothing_is_prepared_anew(tmp_path, models, caplog):
    caplog.set_level(logging.INFO)
    data = tiny.write_jsonl(tmp_path / "x.jsonl", [*ROWS, {"anchor": "", "positive": "p"}])
    config = parse_config(tree(tmp_path, models, data))
    for _ in range(2):
        caplog.clear()
        corpus = prepare(config, Student(config.student), Guide(config.guide))
        assert (
            "x: dropped 1 of 6 rows: anchor is empty (1); the first (counting from 0): x.jsonl row 5: anchor is empty"
            in caplog.messages
        )
    assert corpus.manifest["sources"][0]["rows_used"] == 5
