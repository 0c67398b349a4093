"""The JSON schema that editors complete and check recipes by."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from gist_dist.cli import main
from gist_dist.config import RunConfig
from gist_dist.recipe import packaged_recipes

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "gist_dist" / "recipes"
MARK = re.compile(r"^# yaml-language-server: \$schema=(\S+)$")


@pytest.fixture(scope="module")
def schema():
    schema = json.loads((RECIPES / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_beside_the_recipes_is_what_the_command_writes(capsys, tmp_path):
    """If not: gist-dist schema --output gist_dist/recipes/schema.json"""
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert main(["schema", "--output", str(tmp_path / "schema.json")]) == 0
    assert printed == (tmp_path / "schema.json").read_text() == (RECIPES / "schema.json").read_text()
    assert main(["schema", "--output", str(tmp_path / "absent" / "schema.json")]) == 1
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_name_the_schema_and_are_of_it(schema, name):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert (RECIPES / MARK.match(text.splitlines()[0])[1]).is_file()
    schema.validate(yaml.safe_load(text))


def test_editors_see_mistakes_and_no_others(schema):
    good = {"name": "a", "student": {"model": "m"}, "data": {"sources": [{"path": "p"}]}}
    for section, value in (
        ("cluster", {"num_workers": [1, 4]}),
        ("cluster", {"num_workers": 2}),
        ("tracking", {"profile_steps": 5, "hub": {"language": "en"}}),
        ("tracking", {"profile_steps": [5, 6], "hub": {"language": ["en", "de"]}}),
        ("data", {"sources": [{"path": "p", "columns": {"negatives": "hard"}}]}),
        ("guide", {"model": "g", "refresh": 10}),
    ):
        tree = good | {section: value}
        schema.validate(tree)
        RunConfig.model_validate(tree)
    for section, value in (
        ("optim", {"learnin_rate": 0.1}),
        ("optim", {"learning_rate": 0}),
        ("optim", {"schedule": "step"}),
        ("batch", {"global_size": 1}),
        ("bacth", {}),
    ):
        assert not schema.is_valid(good | {section: value}), (section, value)


def test_every_field_tells_what_it_is_where_the_config_does(schema):
    rate = schema.schema["$defs"]["OptimConfig"]["properties"]["learning_rate"]
    assert rate["description"] == "Peak rate of AdamW." and rate["default"] == 2e-5
