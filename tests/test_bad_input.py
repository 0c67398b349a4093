"""What a user may get wrong: one sentence on stderr and exit status 1, before Ray is started."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from facts import assert_tells

from gist_dist.cli import main

ROWS = [{"anchor": f"amber {a} {b}", "positive": f"basin {b} {a}"} for a in tiny.WORDS[:6] for b in tiny.WORDS[:6]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny.save_tiny_model(folder / "student"), tiny.save_tiny_model(folder / "guide", seed=1)


@pytest.fixture
def no_ray(monkeypatch):
    """Training must have been refused before this is reached."""

    def started(*arguments, **keywords):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("gist_dist.on_ray.driver.connected", started)


@pytest.fixture
def run(tmp_path, models, no_ray, capsys):
    """A run of `gist-dist train` with sections of a good recipe replaced: its one sentence."""

    def run(rows=ROWS, path=None, command="train", status=1, **sections) -> str:
        path = path if path is not None else tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
        sections = {"batch": {"global_size": 4}, "cluster": {"address": "127.0.0.1:1"}} | sections
        tree = tiny.recipe(tmp_path / "out", *models, path, **sections)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tree))
        capsys.readouterr()
        assert main([command, str(recipe)]) == status
        return sentence(capsys.readouterr().err) if status else capsys.readouterr().out

    return run


def sentence(stderr: str) -> str:
    said = [line for line in stderr.splitlines() if line.startswith("gist-dist: ")]
    assert len(said) == 1 and stderr.rstrip().endswith(said[0]), stderr
    assert "Traceback" not in stderr
    return said[0].removeprefix("gist-dist: ")


def source(path, **values) -> dict:
    return {"data": {"sources": [{"path": str(path), **values}]}}


def test_unknown_keys_and_missing_recipes(run, tmp_path, capsys):
    assert_tells(run(optim={"learning_rat": 1}), "'optim.learning_rat' … 'learning_rate'")
    capsys.readouterr()
    assert main(["train", "nowhere.yaml"]) == 1
    assert_tells(sentence(capsys.readouterr().err), "nowhere.yaml … packaged … quickstart")


def test_missing_file_column_and_split(run, tmp_path):
    assert_tells(
        run(path=tmp_path / "none.parquet"), f"data.sources[0] … {tmp_path}/none.parquet … correct path … data.root"
    )
    tiny.write_jsonl(tmp_path / "x.jsonl", ROWS)
    assert_tells(
        run(**source(tmp_path / "x.jsonl", columns={"positive": "doc"})),
        "data.sources[0] … 'doc' … x.jsonl … 'anchor', 'positive' … set columns.positive",
    )
    folder = tmp_path / "splits"
    folder.mkdir()
    tiny.write_jsonl(folder / "train.jsonl", ROWS)
    assert_tells(run(**source(folder, split="dev")), f"data.sources[0] … 'dev' … {folder} … train")
    assert_tells(run(**source("nobody/nothing")), "'nobody/nothing' … Hub")


def test_rows_without_a_usable_text(run, tmp_path):
    empty = [{"anchor": "", "positive": "p"}, {"anchor": "a", "positive": 3}, {"anchor": "a"}]
    path = tmp_path / "pairs.jsonl"
    assert_tells(
        run(empty, command="plan"),
        f"data.sources[0] … {path} … 3 of 3 rows … anchor is empty (1) … positive is int … (1) … "
        "positive is missing (1) … pairs.jsonl row 0: anchor is empty",
    )
    assert run([]) == f"data.sources[0]: {path} is empty"
    pq.write_table(
        pa.table({"anchor": pa.array([], pa.string()), "positive": pa.array([], pa.string())}), tmp_path / "e.parquet"
    )
    assert run(path=tmp_path / "e.parquet", command="plan") == f"data.sources[0]: {tmp_path}/e.parquet has no rows"
    fixed = {"data": {"sources": [{"path": str(path)}], "unusable_rows": "error"}}
    assert_tells(
        run([*ROWS, empty[2]], command="plan", **fixed),
        "data.sources[0] … 1 of 37 rows … positive is missing (1) … "
        "pairs.jsonl row 36: positive is missing … data.unusable_rows=drop",
    )


def test_dropped_rows_are_counted_and_named_where_training_goes_on(run, capsys):
    out = run([*ROWS, {"anchor": "a"}, {"anchor": "b", "positive": " "}], command="plan", status=0)
    assert (
        "pairs: dropped 2 of 38 rows: positive is missing (1), positive is empty (1); the first (counting from 0): "
        in out
    )


def test_a_global_size_above_the_data(run):
    assert_tells(run(batch={"global_size": 4096}), "batch.global_size = 4096 … 36 … lower it … add data")


@pytest.mark.parametrize("role", ["student", "guide"])
def test_models_that_cannot_be_loaded(run, tmp_path, role):
    assert_tells(
        run(**{role: {"model": str(tmp_path / "none")}}), f"{role}.model … {tmp_path}/none … SentenceTransformer … Hub"
    )
    (tmp_path / "empty").mkdir()
    assert run(**{role: {"model": str(tmp_path / "empty")}}).startswith(
        f"{role}.model: '{tmp_path}/empty' can't be loaded: "
    )
    assert_tells(
        run(**{role: {"model": "nobody/nothing"}}), f"{role}.model … 'nobody/nothing' … the Hub is out of reach"
    )


def test_damaged_model_weights(run, tmp_path, models):
    shutil.copytree(models[0], tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run(student={"model": str(tmp_path / "damaged")}).startswith(
        f"student.model: '{tmp_path}/damaged' can't be loaded: "
    )


def test_more_tokens_than_the_model_has_positions(run, models):
    assert_tells(run(student={"max_tokens": 5000}), f"student.max_tokens = 5000 … {models[0]} … 64 tokens … lower")


def test_no_right_to_write(run, tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be")
    assert_tells(run(), f"output_dir … {tmp_path}/out/tiny … Not a directory")


def test_no_right_to_write_the_corpora(run, tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    path = tiny.write_jsonl(tmp_path / "x.jsonl", ROWS)
    said = run(data={"sources": [{"path": str(path)}], "cache_dir": str(tmp_path / "file")})
    assert_tells(said, f"{tmp_path}/file … prepared corpus")


def test_no_space(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    assert_tells(run(), f"output_dir … {tmp_path}/out/tiny … 1 MiB … 200 … free some … another output_dir")


def test_damaged_and_foreign_files(run, tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "good.parquet")
    path = tmp_path / "cut.parquet"
    path.write_bytes((tmp_path / "good.parquet").read_bytes()[:-30])
    assert run(path=path).startswith(f"data.sources[0]: {path} can't be read: ")
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{anchor: 1}\n")
    assert_tells(run(path=path), "data.sources[0] … bad.jsonl line 2 … JSON")
    path = tmp_path / "latin.csv"
    path.write_bytes("anchor,positive\namber,café\n".encode("latin-1"))
    assert_tells(run(path=path), f"data.sources[0] … {path} … UTF-8 … convert")
    path.write_bytes("anchor,positive\namber,basin\n".encode("utf-16"))
    assert_tells(run(path=path), "batch.global_size … 1")  # its byte order mark says how it is read
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"anchor": "a", "positive": "caf\xe9"}\n')
    assert_tells(run(path=path), "data.sources[0] … latin.jsonl line 1 … UTF-8 … convert")


def test_a_column_that_changes_type_between_files(run, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "0.parquet")
    pq.write_table(pa.table({"anchor": ["a"], "positive": [1.5]}), folder / "1.parquet")
    assert_tells(run(path=folder), "data.sources[0] … 'positive' … 1.parquet … double … 0.parquet … leave it out")


def test_a_megabyte_is_a_text_and_emoji_alone_are_named(tmp_path, models):
    rows = [
        {"anchor": "amber basin " * 90_000, "positive": "amber 🙂🎉"}, {"anchor": "🙃" * 300, "positive": "basin"},
        {"anchor": "amber\x00basin", "positive": "amber\nbasin\r\n\tcedar"}, {"anchor": "amber", "positive": "🙂🎉"},
        {"anchor": "שלום amber", "positive": "basin"}, {"anchor": "basin " * 30_000, "positive": "\u200b basin \u00ad"},
    ]  # fmt: skip
    started = time.process_time()
    config, corpus = tiny.prepared(
        tiny.recipe(tmp_path, *models, tiny.write_jsonl(tmp_path / "x.jsonl", rows), batch={"global_size": 4})
    )
    assert time.process_time() - started < 10
    (report,) = corpus.manifest["reports"]
    assert report["dropped"] == {
        "anchor has no token that the student knows": 1, "positive has no token that the student knows": 1
    }  # fmt: skip
    assert report["first_dropped"][0] == "x.jsonl row 1: anchor has no token that the student knows"
    assert corpus.num_rows == 4
    assert corpus.student_lengths.max() == 64 and corpus.student_lengths[corpus.texts_in_use].min() >= 2
    from gist_dist.models.encoder import Student

    embeddings = Student(config.student).encode(corpus.student_tokens(corpus.texts_in_use), dropout_seed=(0,))
    assert embeddings.isfinite().all()


def test_one_sentence_from_a_real_process(tmp_path, models):
    path = tiny.write_jsonl(tmp_path / "x.jsonl", ROWS[:3])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.recipe(tmp_path / "out", *models, path)))
    command = [sys.executable, "-m", "gist_dist.cli", "train", str(recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 1 and not done.stdout
    assert_tells(sentence(done.stderr), "batch.global_size = 256 … 3 … lower it … add data")


def test_nothing_of_a_refused_run_is_left(run, tmp_path):
    run(batch={"global_size": 4096})
    assert not (tmp_path / "out" / "tiny" / "checkpoints").exists()
    assert not Path(tmp_path / "out" / "tiny" / "model").exists()
