"""Tokens and passwords are in nothing that is kept, logged or said."""

import logging
import pickle
import sys
import time

import pytest
import tiny
import yaml

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.common.redact import MASK, Redacting, printable, redact, redact_text
from gist_dist.config import SourceConfig
from gist_dist.recipe import load_recipe, parse_config
from gist_dist.runs.folder import RunFolder

ROWS = [{"anchor": f"amber {word}", "positive": f"basin {word}", "task": "a"} for word in tiny.WORDS[:8]]
SECRETS = ("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG", "hunter2hunter2", "hf_" + "a" * 34)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://AKIA:wJal/rX+U@bucket/a@b", "s3://***@bucket/a@b"),
        ("s3://user:p@ss@host/a", "s3://***@host/a"),
        ("s3://b/p?access_key=AK&secret_key=a/b&region=eu", "s3://b/p?access_key=***&secret_key=***&region=eu"),
        ("s3://b/p?region=eu&session_token=x;", "s3://b/p?region=eu&session_token=***;"),
        ("https://h/f?X-Amz-Signature=aa&x=1&sig=b", "https://h/f?X-Amz-Signature=***&x=1&sig=***"),
        ("https://token@github.com/x", "https://***@github.com/x"),
        ("abfs://container@account.dfs.core.windows.net/p", "abfs://container@account.dfs.core.windows.net/p"),
        ("hf://datasets/user/repo@main/a.parquet", "hf://datasets/user/repo@main/a.parquet"),
        ("ray://head:10001 and http://localhost:8265/a@b", "ray://head:10001 and http://localhost:8265/a@b"),
        ("HF_TOKEN=abc, secret: 'a b' and Bearer abcdefgh", "HF_TOKEN=***, secret: '***' and Bearer ***"),
        (f"401 for {SECRETS[3]}", "401 for ***"),
        ("student.max_tokens = 5000: at most 64 tokens", "student.max_tokens = 5000: at most 64 tokens"),
        (
            "column 'token' not in x (has: 'a'); set columns.anchor",
            "column 'token' not in x (has: 'a'); set columns.anchor",
        ),
        ("no token that the student knows (3)", "no token that the student knows (3)"),
    ],
)
def test_texts_are_told_without_secrets(text, expected):
    assert redact_text(text) == expected
    assert redact_text(expected) == expected


def test_trees_are_kept_without_secrets():
    tree = {
        "env_vars": {"OMP_NUM_THREADS": "1"}, "max_tokens": 5, "hfToken": "x", "AWS_ACCESS_KEY_ID": "x", "token": None,
        "secret": {"a": ["b"]}, "paths": ["s3://a:b@c/d", "plain"], "tokens": [1, 2], "prompt": "password: said she",
    }  # fmt: skip
    assert redact(tree) == {
        "env_vars": {"OMP_NUM_THREADS": MASK}, "max_tokens": 5, "hfToken": MASK, "AWS_ACCESS_KEY_ID": MASK,
        "token": None,
        "secret": {"a": [MASK]}, "paths": ["s3://***@c/d", "plain"], "tokens": [1, 2], "prompt": "password: said she",
    }  # fmt: skip
    assert redact(redact(tree)) == redact(tree)


def test_values_of_this_process_are_masked_wherever_they_turn_up(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_PASSWORD", "short")
    assert redact_text("login 0123456789abcdef failed, in short") == "login *** failed, in short"
    assert str(UserError("0123456789abcdef")) == MASK
    assert str(pickle.loads(pickle.dumps(UserError("a sentence: token=x")))) == "a sentence: token=***"


def test_redacting_takes_no_time():
    for text in (
        "a" * 200_000,
        "a.b-" * 50_000,
        "://:" * 20_000,
        "token" * 40_000,
        "?" * 100_000,
        "s3://a:" + "@" * 50_000,
    ):
        started = time.monotonic()
        redact_text(text)
        assert time.monotonic() - started < 3, text[:10]


def test_a_terminal_is_shown_no_control_characters():
    assert printable("a\x1b[2J\x07\u202eb\ud800\r\nc\té") == r"a\x1b[2J\x07\u202eb\ud800\r" + "\nc\té"


def test_logs_hold_no_secrets(caplog):
    record = logging.LogRecord("gist_dist", logging.INFO, "f", 1, "reading %s", ("s3://k:hunter2hunter2@b",), None)
    assert Redacting("%(message)s").format(record) == "reading s3://***@b"
    try:
        raise OSError("secret_key=hunter2hunter2")
    except OSError:
        record.exc_info = sys.exc_info()
    assert "hunter2" not in Redacting("%(message)s").format(record)


def test_nothing_that_a_run_keeps_or_says_holds_a_secret(tmp_path, fuzz_models, capfd, monkeypatch):
    """Credentials in addresses, as S3 takes them, and in the variables of the workers."""
    key, secret, password, token = SECRETS
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", [*ROWS, {"anchor": ""}])
    address = f"file://{path}?access_key={key}&secret_key={secret}"
    tree = tiny.recipe(
        tmp_path / "out", fuzz_models.student, fuzz_models.guide, batch={"global_size": 4}, guide={"mode": "cache"}
    )
    tree["data"] = {"sources": [{"path": address}], "cache_dir": f"file://{tmp_path}/corpora?secret_key={secret}"}
    tree["cluster"] = {
        "runtime_env": {"env_vars": {"HF_TOKEN": token, "X": password}, "working_dir": f"s3://a:{password}@b"}
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    assert main(["plan", str(recipe)]) == 0
    assert main(["plan", str(recipe), "data.sources.0.columns.anchor=nope"]) == 1
    assert main(["plan", str(recipe), f"data.cache_dir=nope://u:{password}@host/x"]) == 1
    assert main(["plan", str(recipe), f"student.token={token}", f"seed={token}"]) == 1
    config = load_recipe(str(recipe))
    run = RunFolder(config)
    run.create(config)
    _, corpus = tiny.prepared(tree)
    assert corpus.source_names == ["pairs"]
    said = "".join(capfd.readouterr())
    recipe.unlink()
    kept = "".join(file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file())
    for text in (said, kept):
        assert MASK in text
        for hidden in (*SECRETS, *secret.split("/")):
            assert hidden not in text
    # Rotated credentials make neither another run nor another corpus.
    changed = yaml.safe_load(yaml.safe_dump(tree).replace(secret, "another/secret").replace(password, "another"))
    RunFolder(parse_config(changed)).refuse_other_recipe()
    assert tiny.prepared(changed)[1].manifest == corpus.manifest
    with pytest.raises(UserError, match="holds a run with"):
        RunFolder(parse_config(changed | {"seed": 5})).refuse_other_recipe()


def test_a_label_is_no_part_of_a_secret():
    for path, label in (
        ("s3://bucket/x.parquet?access_key=a&secret_key=b/c", "x"),
        ("s3://key:secret@bucket", "***@bucket"),
        ("https://host/f.jsonl?token=a/b", "f"),
        ("data/*.jsonl", "*.jsonl"),
        ("a" * 250, "a" * 200),
    ):
        assert SourceConfig(path=path).label == label
