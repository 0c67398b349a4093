"""What a type checker sees of the package from outside, in a script that uses it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gist_dist

PACKAGE = Path(gist_dist.__file__).parent

SCRIPT = """
from gist_dist import CachedGISTEmbedLoss, RunConfig, UserError, load_recipe, parse_config, train

reveal_type(train(load_recipe("r.yaml", ["seed=1"])))
reveal_type(parse_config)
reveal_type(CachedGISTEmbedLoss)
reveal_type(UserError)
config: RunConfig = parse_config({})
reveal_type(config.guide)
config.batch.global_sise
train("r.yaml")
load_recipe(1)
from gist_dist import evaluate_everything
"""
FOUND = {
    4: "gist_dist.report.Summary",
    5: "gist_dist.config.RunConfig",
    6: "gist_dist.drop_in.CachedGISTEmbedLoss",
    7: "gist_dist.common.errors.UserError",
    9: "gist_dist.config.GuideConfig | None",
    10: '"BatchConfig" has no attribute "global_sise"; maybe "global_size"?',
    11: 'Argument 1 to "train_and_evaluate" has incompatible type "str"; expected "RunConfig"',
    12: 'Argument 1 to "load_recipe" has incompatible type "int"; expected "str"',
    13: 'Module "gist_dist" has no attribute "evaluate_everything"',
}
"""Line → part of what is said of it."""

# Nobody's types but ours and pydantic's: to read those of torch and Ray takes a minute or two.
OURS = "[mypy]\nfollow_imports = skip\n[mypy-gist_dist.*,pydantic.*]\nfollow_imports = silent\n"
ALL = "[mypy]\nignore_missing_imports = true\n[mypy-gist_dist.*]\nfollow_imports = silent\n"


@pytest.mark.parametrize("settings", [OURS, pytest.param(ALL, marks=pytest.mark.slow)], ids=["ours", "all"])
def test_a_script_sees_the_types_of_the_package(tmp_path, settings):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(settings)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "script.py"]
    environment = os.environ | {"MYPYPATH": str(PACKAGE.parent)}  # it does not find what was installed with -e
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    told = {int(line): text for line, text in re.findall(r"^script\.py:(\d+): (.*)$", done.stdout, re.MULTILINE)}
    assert told.keys() == FOUND.keys(), done.stdout + done.stderr
    for line, text in FOUND.items():
        assert text in told[line]


def test_an_installed_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").exists()
    assert '"py.typed"' in (PACKAGE.parent / "pyproject.toml").read_text()
