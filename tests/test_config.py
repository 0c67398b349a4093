"""The recipe: read, overridden, checked; every mistake is one sentence."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from facts import assert_tells

from gist_dist import config as config_module
from gist_dist.common.errors import UserError
from gist_dist.common.text import SHORT
from gist_dist.config import RunConfig, Section, _place_of, paths_of
from gist_dist.recipe import load_recipe, packaged_recipes, parse_config

MINIMAL = {"name": "run", "student": {"model": "m"}, "data": {"sources": [{"path": "pairs.jsonl"}]}}


def changed(**values) -> dict:
    """MINIMAL with dotted keys set ('__' for the dot)."""
    tree = yaml.safe_load(yaml.safe_dump(MINIMAL))
    for key, value in values.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def refused(tree: dict) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(tree, "r.yaml")
    return str(caught.value)


def write(folder: Path, tree: dict) -> str:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optim__learning_rat": 1}, "r.yaml … 'optim.learning_rat' … 'learning_rate'"),
        ({"optin": {}}, "r.yaml … 'optin' … 'optim'"),
        ({"loss__zzz": 1}, "r.yaml … 'loss.zzz' … temperature, margin"),
        ({"guide": {"model": "g", "prompt": {}}}, "r.yaml … 'guide.prompt' … 'prompts'"),
        ({"student": {}}, "r.yaml … 'student.model' … missing … student.model=VALUE"),
        ({"batch__global_size": 1}, "r.yaml … batch.global_size = 1 … greater than or equal to 2"),
        ({"loss__margin_kind": "abs"}, "r.yaml … loss.margin_kind = 'abs' … 'absolute' … 'relative'"),
        ({"loss__margin": float("nan")}, "r.yaml … loss.margin = nan … finite"),
        ({"optim__betas": [0.9, 1.0]}, "r.yaml … optim.betas[1] = 1.0 … less than 1"),
        ({"optim": {"steps": 1, "epochs": 1}}, "r.yaml … optim … steps=1 … epochs=1.0 … keep one"),
        ({"student__model": ""}, "r.yaml … student.model = '' … at least 1"),
        ({"cluster": {"num_workers": 2, "gpus_per_worker": 0.5}},
         "r.yaml … cluster … gpus_per_worker = 0.5 … set it to 1 … num_workers to 1"),
        ({"name": "../up"}, "r.yaml … name = '../up' … pattern"),
        ({"data__sources": []}, "r.yaml … data … sources … empty … at least one"),
        ({"data__sources": [{"path": "a", "columns": {"anchr": "q"}}]},
         "r.yaml … 'data.sources[0].columns.anchr' … 'anchor'"),
        ({"data__sources": [{"path": "a", "prompts": {"student": {"x": ""}}}]},
         "r.yaml … 'data.sources[0].prompts.student.x' … anchor, positive, negatives"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_the_field(values, expected):
    message = refused(changed(**values))
    assert message.startswith("r.yaml: ")
    assert_tells(message, expected)


def test_every_mistake_is_named_but_no_more_than_five():
    assert len(refused(changed(a=1, b=1)).splitlines()) == 2
    assert len(refused(changed(**{f"k{i}": 1 for i in range(30)})).splitlines()) == 5


def test_overrides_are_yaml_and_reach_every_depth(tmp_path):
    overrides = [
        "optim.learning_rate=1e-4", "guide.model=other", "data.sources.0.columns.negatives=[a, b]",
        "batch.global_size=64", "optim.max_grad_norm=null", "evaluate.tasks=[STS12]", "data.sources.0.name=one",
    ]  # fmt: skip
    config = load_recipe(write(tmp_path, MINIMAL), overrides)
    assert config.optim.learning_rate == 1e-4
    assert config.guide is not None and config.guide.model == "other"
    assert config.data.sources[0].columns.negatives == ("a", "b")
    assert config.data.sources[0].label == "one"
    assert config.optim.max_grad_norm is None and config.batch.global_size == 64
    assert config.evaluate.tasks == ("STS12",)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.steps", "'optim.steps' … section.key=value"),
        ("data.sources.4.path=x", "'data.sources.4.path=x' … '4' … list of 1"),
        ("name.deep=x", "'name.deep=x' … name … 'run'"),
        ("batch.globalsize=8", "'batch.globalsize' … 'global_size'"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, expected):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert_tells(str(caught.value), expected)


def test_the_written_recipe_reads_back_equal():
    config = parse_config(changed(guide={"model": "g"}, data__sources=[{"path": "a/b.c.parquet"}, {"path": "x/*.csv"}]))
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    assert [source.label for source in config.data.sources] == ["b", "*.csv"]


def test_a_missing_recipe_is_named_with_the_packaged_ones(tmp_path):
    for recipe in (str(tmp_path / "none.yaml"), str(tmp_path), "quickstrat"):
        with pytest.raises(UserError, match=r"no such recipe file, and no packaged recipe.*quickstart") as caught:
            load_recipe(recipe)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="File name too long"):
        load_recipe("x" * 300)


def test_packaged_recipes_are_valid():
    assert "quickstart" in packaged_recipes()
    for name in packaged_recipes():
        assert isinstance(load_recipe(name), RunConfig)


def test_anchors_work_and_a_yaml_bomb_costs_nothing(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: run\nstudent: &m {model: m}\nguide: *m\ndata: {sources: [{path: a}]}\n")
    assert load_recipe(str(path)).guide.model == "m"
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    path.write_text(bomb + "name: *a11\nstudent: {model: *a11}\ndata: {sources: *a11}\n")
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert time.monotonic() - started < 5
    assert len(str(caught.value)) < 5000


def test_nothing_is_executed_from_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(str(path))
    with pytest.raises(UserError):
        load_recipe(
            write(tmp_path, MINIMAL), [f"student.dropout=!!python/object/apply:os.system ['touch {tmp_path}/ran']"]
        )
    assert not (tmp_path / "ran").exists()


def test_what_is_no_recipe_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    for content, expected in (
        (b"- 1\n", "a recipe is a mapping of sections; found list"),
        (b"", "a recipe is a mapping of sections; found NoneType"),
        (b"a: [1\n", "not valid YAML"),
        ("name: é".encode("latin-1"), "can't be read as UTF-8 text"),
        (b"1: 2\n", "keys should be strings"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_recipe(str(path))
        assert expected in str(caught.value)


def test_long_values_are_shown_short():
    assert len(SHORT.repr("x" * 10_000)) < 300


def test_help_and_typos_answer_without_torch_and_ray():
    code = (
        "import sys; from gist_dist.cli import main; status = main(['train', 'quickstart', 'batch.globalsize=4']); "
        "assert not {'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules), sorted(sys.modules)\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stderr == "gist-dist: quickstart: unknown key 'batch.globalsize'; did you mean 'global_size'?\n"


def test_readers_of_recipes_are_still_found_in_config():
    """Where 0.1 had them."""
    import gist_dist
    from gist_dist import config, recipe

    for name in config.READERS:
        assert getattr(config, name) is getattr(recipe, name)
    assert gist_dist.load_recipe is recipe.load_recipe and gist_dist.__version__
    with pytest.raises(AttributeError, match="no attribute 'load_recipes'"):
        _ = config.load_recipes


def test_every_path_of_a_recipe_is_found_by_its_type(tmp_path, monkeypatch):
    """A field that takes paths and has no Place would stay relative on a worker, and be sent nowhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    config = parse_config(
        {
            "name": "tiny",
            "output_dir": "runs",
            "student": {"model": "student"},
            "guide": {"model": "org/guide", "mode": "cache", "cache_dir": "s3://bucket/guide/"},
            "data": {
                "sources": [{"path": "a.jsonl"}, {"path": "b.jsonl"}],
                "root": "data",
                "cache_dir": "corpora",
                "local_copy": "scratch",
            },
            "checkpoint": {"dir": "kept"},
            "evaluate": {"local_tasks": "tasks"},
        }
    )
    found = {key: (place.name, path) for key, place, path in paths_of(config)}
    assert found == {
        "output_dir": ("WRITTEN", "runs"),
        "student.model": ("MODEL", "student"),
        "guide.model": ("MODEL", "org/guide"),
        "guide.cache_dir": ("WRITTEN", "s3://bucket/guide/"),
        "data.sources[0].path": ("DATA", "a.jsonl"),
        "data.sources[1].path": ("DATA", "b.jsonl"),
        "data.root": ("DATA", "data"),
        "data.cache_dir": ("WRITTEN", "corpora"),
        "data.local_copy": ("NODE", "scratch"),
        "checkpoint.dir": ("WRITTEN", "kept"),
        "evaluate.local_tasks": ("READ", "tasks"),
    }
    absolute = {key: path for key, _, path in paths_of(config.absolute_paths())}
    here = ("output_dir", "student.model", "data.cache_dir", "checkpoint.dir", "evaluate.local_tasks")
    assert absolute == {key: str(tmp_path / path) if key in here else path for key, (_, path) in found.items()}
    assert config.absolute_paths().absolute_paths() == config.absolute_paths()


def test_no_field_takes_a_path_without_saying_which():
    """_usable_path is what checks a path; where it stands, a Place stands too."""

    classes = [found for found in vars(config_module).values() if isinstance(found, type)]
    fields = {
        f"{section.__name__}.{name}": field
        for section in classes
        if issubclass(section, Section)
        for name, field in section.model_fields.items()
    }
    paths = {name for name, field in fields.items() if "_usable_path" in repr((field.annotation, field.metadata))}
    assert "RunConfig.output_dir" in paths and "GuideConfig.model" in paths and len(paths) > 9
    assert not {name for name in paths if _place_of(fields[name]) is None}
