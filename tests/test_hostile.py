"""Input from strangers: answered in a sentence or put to use; nothing executed, nothing left outside its folder."""

import ast
import json
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import fuzz
import hostile_data
import pytest
import tiny
import yaml
from facts import assert_tells

from gist_dist.cli import main
from gist_dist.common import redact
from gist_dist.common.errors import UserError
from gist_dist.common.hub import go_offline_if_unreachable
from gist_dist.common.plain_yaml import load_plain
from gist_dist.config import SourceConfig
from gist_dist.data.sources import Source
from gist_dist.models.encoder import Student
from gist_dist.recipe import load_recipe, parse_config
from gist_dist.report import read_run, summarize

CASES = {
    "yaml": 100, "recipes": 40, "sources": 60, "layouts": 40, "corpora": 25, "guide_caches": 60, "tasks": 40,
    "checkpoints": 60, "reports": 4, "runs": 60, "models": 20,
}  # fmt: skip
FIXED = ("guide_caches", "checkpoints", "reports")
"""Where what is damaged is made again, passed over or shown as it is."""
MINIMAL = "name: run\nstudent: {model: m}\ndata: {sources: [{path: a}]}\n"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("target", CASES)
def test_hostile_input_works_or_is_refused_in_a_sentence(target, tmp_path, fuzz_models):
    assert set(CASES) == set(fuzz.TARGETS)
    outcomes = {"worked": 0, "refused": 0}
    for seed in range(CASES[target]):
        outcome = fuzz.run_case(target, seed, tmp_path / str(seed), fuzz_models.student.parent)
        outcomes["refused" if outcome.startswith("refused") else "worked"] += 1
        shutil.rmtree(tmp_path / str(seed))
    assert outcomes["worked"], "nothing but refusals tests little"
    assert outcomes["refused"] or target in FIXED, "none of it was hostile"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "line 2 … 'name' … keep one"),
        ("a: &a [*a]\n", "line 1 … contains itself"),
        ("[" * 5000, "nested"),
        ("seed: 0x" + "f" * 9000, "int"),
        ("seed: " + "9" * 5000, "int"),
        ("name: 2024-99-99", "line 1 … '2024-99-99' … timestamp"),
        ("name: !!timestamp nope", "line 1 … 'nope' … timestamp"),
        ("name: !!bool perhaps", "line 1 … 'perhaps' … bool"),
        ("name: !!int ''", "line 1 … '' … int"),
        ("name: !!binary aGk=", "'tag:yaml.org,2002:binary'"),
        ("a: " + "b" * 2**22, "at most 4,194,304 are read"),
        (MINIMAL + "output_dir: ~nobody_here/x", "output_dir … ~nobody_here"),
        (MINIMAL + 'output_dir: "a\\0b"', "output_dir … NUL"),
        (
            MINIMAL + f"output_dir: {'a' * 300}",
            "output_dir … 4095 bytes … 255",
        ),
        (
            MINIMAL + "batch: {global_size: 1000000000000000000}",
            "batch … global_size = 1000000000000000000 … 1e+12",
        ),
        (MINIMAL + "cluster: {runtime_env: {env_vars: 5}}", "env_vars are names with texts"),
        (MINIMAL.replace("run", "../run"), "name = '../run' … pattern"),
    ],
)
def test_what_is_no_recipe_is_told_in_a_line(tmp_path, capsys, text, expected):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main(["plan", str(recipe)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gist-dist: ")]
    assert_tells(line, expected)
    assert len(line) < 1000


def test_a_bomb_of_aliases_is_refused_before_it_is_built():
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    for text in (
        bomb,
        "x: &x {p: 1}\n" + "y: &y\n  <<: [" + "*x, " * 1100 + "*x]\nz:\n  <<: [" + "*y, " * 1100 + "*y]\n",
    ):
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"aliases .* at most 1,000,000"):
            load_plain(text)
        assert time.monotonic() - started < 3


def test_aliases_share_nothing(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: run\nstudent: &m {model: m}\nguide: *m\ndata: {sources: [{path: a}]}\n")
    config = load_recipe(str(path), ["guide.model=other"])
    assert (config.student.model, config.guide.model) == ("m", "other")


@pytest.mark.parametrize(
    "override", ["data.sources.²=1", "data.sources.99999999999999999999=1", "data.sources.-1.path=x"]
)
def test_indices_that_are_none(tmp_path, override):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(UserError, match="list of 1"):
        load_recipe(str(path), [override])


def test_an_answer_is_no_book(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"{MINIMAL}optim:\n  ? {'x' * 100_000}\n  : 1\n")
    with pytest.raises(UserError, match=r"unknown key 'optim.'xxx.*xxx''; known here: ") as caught:
        load_recipe(str(path))
    assert len(str(caught.value)) < 1000
    assert len(str(UserError("a" * 10**6))) < 5000


def test_options_out_of_range_are_told_like_a_recipe(capsys):
    assert main(["evaluate", "model", "--tasks", "STS12", "--batch-size", "0"]) == 1
    said = capsys.readouterr().err
    assert_tells(said, "gist-dist evaluate … batch_size = 0 … greater than or equal to 1")


def test_a_hub_that_speaks_no_http_is_out_of_reach(monkeypatch):
    for endpoint in ("http://[::1", "https://a b", "nope", "ftp://x\r\ny"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        go_offline_if_unreachable.cache_clear()
        assert go_offline_if_unreachable()
    go_offline_if_unreachable.cache_clear()


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_the_package_unpickles_and_evaluates_nothing():
    """But Ray, for what one of our processes sends another."""
    forbidden = {"eval", "exec", "compile", "pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    package = Path(redact.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {
                    (getattr(node, "module", "") or "").split(".")[0]
                }
                assert not names & forbidden, where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {*forbidden, "yaml.load", "torch.load", "os.system", "os.popen"}, where
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("shell", "False") == given.get("allow_pickle", "False") == "False", where


@pytest.mark.parametrize("attack", ["weights", "auto_map", "module", "tokenizer"])
def test_a_model_runs_no_code_unless_the_recipe_says_so(tmp_path, fuzz_models, attack, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, mark = tmp_path / "model", tmp_path / "EXECUTED"
    shutil.copytree(fuzz_models.student, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")
    if attack == "weights":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    elif attack == "module":
        modules = json.loads((folder / "modules.json").read_text())
        modules[0]["type"] = "evil.Evil"
        (folder / "modules.json").write_text(json.dumps(modules))
    else:
        name = "config.json" if attack == "auto_map" else "tokenizer_config.json"
        described = json.loads((folder / name).read_text())
        described["auto_map"] = {
            "AutoConfig": "evil.Evil",
            "AutoModel": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", None],
        }
        described |= {"model_type": "evil"} if attack == "auto_map" else {"tokenizer_class": "Evil"}
        (folder / name).write_text(json.dumps(described))
    tree = tiny.recipe(tmp_path / "out", folder, None, tmp_path / "x.jsonl")
    try:
        Student(parse_config(tree).student)
    except UserError as error:
        assert str(error).startswith("student.model: ") and "Traceback" not in str(error)
    assert not mark.exists()


def test_a_dataset_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "EXECUTED"
    for name in ("evil.py", "evil"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name.removesuffix('.py')}.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
        with pytest.raises(UserError, match="no arrow, csv, jsonl, parquet file in folder"):
            Source(SourceConfig(path=name), 0, None)
        shutil.rmtree(folder)
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Payload(mark)))
    for path in ("evil.py", "x.pkl", "pandas", "json", "text", "nobody/evil"):
        with pytest.raises(UserError):
            Source(SourceConfig(path=path), 0, None)
    assert not mark.exists()


MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7*7}}"


def test_the_report_and_the_card_escape_what_texts_bring(tmp_path):
    from test_report import make_run, write_result

    from gist_dist.report import build_report
    from gist_dist.report.model_card import write_model_card

    run = make_run(tmp_path / "run", steps=20)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["student"] |= {"model": MARKUP, "prompts": {"anchor": MARKUP}, "trust_remote_code": True}
    config["guide"] |= {"model": MARKUP, "trust_remote_code": True}
    config["data"]["sources"] = [{"name": MARKUP, "path": MARKUP}]
    config["evaluate"]["tasks"] += [MARKUP]
    config["environment"] |= {"platform": MARKUP, "git_commit": MARKUP}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    data = json.loads((run / "data.json").read_text())
    data["sources"] = data["reports"] = [
        {
            "name": MARKUP,
            "path": MARKUP,
            "rows_read": 100,
            "rows_used": 50,
            "dropped": {MARKUP: 50},
            "first_dropped": [MARKUP],
        }
    ]
    (run / "data.json").write_text(json.dumps(data))
    lines = [json.loads(line) | {"sources": {MARKUP: 256}} for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "mteb" / "failures.json").write_text(json.dumps({"trained": {MARKUP: MARKUP}}))
    for label in ("baseline", "trained"):
        write_result(run / "mteb" / label, "Mine", 0.5, MARKUP, MARKUP)
    (run / "masked_examples.json").write_text(json.dumps(examples_of(MARKUP)))
    summary = build_report(run)
    page = (run / "report.html").read_text()
    assert page.count("&lt;script&gt;") > 10
    write_model_card(run)
    whole_card = (run / "model" / "README.md").read_text()
    card = re.sub(r"```.*?```", "", whole_card, flags=re.S)  # code is shown as it is
    for text in (page, card.split("\n---\n", 1)[1]):
        assert "<script>alert" not in text and "<img src=x" not in text
    assert 'onerror="' not in page and "{{" in page
    assert sum("trust_remote_code was on" in warning for warning in summary.warnings) == 2
    assert "trust_remote_code: true" in whole_card


@pytest.mark.parametrize(
    ("file", "keys", "value", "told"),
    [
        ("config.yaml", ("student",), 5, "no recipe … student = 5 … dictionary"),
        ("config.yaml", ("data", "sources", 0, "path"), None, "data.sources.0.path = None"),
        ("config.yaml", ("environment",), [1], "environment = [1] … dictionary"),
        ("config.yaml", ("optim", "max_grad_norm"), "1", "optim.max_grad_norm = '1' … number"),
        ("config.yaml", ("evaluate", "tasks"), {"STS12": 1}, "evaluate.tasks = {'STS12': 1}"),
        ("data.json", ("sources",), None, "damaged … sources = None … list … remove it"),
        ("data.json", ("sources", 1, "rows_read"), "6", "damaged … sources.1.rows_read = '6'"),
        ("data.json", ("sources", 0, "dropped"), [1], "sources.0.dropped = [1] … dictionary"),
        ("data.json", ("steps",), float("nan"), "steps = nan … finite"),
        ("data.json", ("num_rows",), 10**400, "JSON … 1e+100"),
        ("data.json", ("content",), "\ud800", "JSON … utf-8"),
        ("mteb/trained/STS12.json", ("scores",), [], "not an MTEB result … scores = []"),
        ("mteb/trained/STS12.json", ("task_name",), ["a"], "task_name = ['a']"),
        ("mteb/trained/STS12.json", ("scores", "test"), [], "not an MTEB result … no score"),
        ("mteb/guide/details/SciFact.json", ("kind",), {}, "details/SciFact.json … not an MTEB result … kind = {}"),
        ("mteb/failures.json", ("trained",), "no", "damaged … trained = 'no'"),
        ("masked_examples.json", ("examples",), 5, "masked_examples.json … damaged … examples = 5"),
        ("masked_examples.json", ("examples", 3, "row"), None, "examples.3.row = None … number"),
    ],
)  # fmt: skip
def test_a_file_of_a_run_that_is_another_shape_is_told_in_a_sentence(tmp_path, capsys, file, keys, value, told):
    run, good = (hostile_data.plain_run(tmp_path / name, steps=3) for name in ("run", "good"))
    read, write = (yaml.safe_load, yaml.safe_dump) if file.endswith("yaml") else (json.loads, json.dumps)
    node = tree = read((run / file).read_text())
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    (run / file).write_text(write(tree))
    for command in (["report", str(run)], ["report", str(good), str(run)]):
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"gist-dist: {run / file}: ")
        assert_tells(line, told)
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize(
    "line",
    ["{}", "5", "[" * 10**5, '{"step": 4, "loss": ' + "9" * 400 + "}", '{"step": -1}', '{"step": true}',
     '{"step": "4"}', '{"step": 4, "rows": "256"}', '{"step": 4, "epoch": NaN}', '{"step": 4, "sources": 5}',
     '{"step": 4, "seconds": []}', '{"step": 4, "sources": {"\\ud800": 1}}', '{"step": 1' + "0" * 30 + "}"],
    ids=range(13),
)  # fmt: skip
def test_a_step_that_is_none_is_left_out_and_told(tmp_path, line):
    run = hostile_data.plain_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    contents = summarize(read_run(run))
    assert contents["training"]["steps"] == 3
    assert [w["text"] for w in contents["warnings"] if w["code"] == "metrics_damaged"] == [
        "1 line of metrics.jsonl can't be read; what is shown is without them."
    ]


@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, True, float("inf"), 1e99, -1e99, 1e-320, None])
def test_a_measurement_of_any_kind_has_a_page(tmp_path, value):
    """Of every number of a step, and of what it counts by phase and source."""
    run = hostile_data.plain_run(tmp_path / "run", steps=3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line |= dict.fromkeys(line.keys() - {"step", "epoch", "rows", "sources", "seconds"}, value)
        line |= {key: dict.fromkeys(line[key], value) for key in ("sources", "seconds")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(run)]) == 0 and json.loads((run / "report.json").read_text())["training"]["steps"] == 3


def examples_of(text):
    from gist_dist.report.shapes import MaskedExample

    example = dict.fromkeys(MaskedExample.model_fields, 0.5) | dict.fromkeys(
        ("chosen", "source", "anchor", "positive", "candidate"), text
    )
    return {"examples": [example | {"block": "ap", "row": 3}], "step": 1}
