"""What README and docs tell people to type and to write: every command is run here, or known for why it can't be."""

import argparse
import ast
import contextlib
import importlib
import json
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from ray_head import Head, plain_environment, ray_head
from tiny import save_tiny_model, words

from gist_dist import cli
from gist_dist.recipe import load_recipe, parse_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = ("gist-dist", "make", "python", "pip", "ray", "kubectl", "docker", "git", "sbatch", "tensorboard", "wandb")
ELSEWHERE = {
    "git clone <this repository> gist_dist": "what .ci/run does",
    "docker build": "needs a container runtime",
    "kubectl": "needs a Kubernetes cluster",
    "sbatch": "needs Slurm",
    "ray up": "needs an account in a cloud",
    "ray down": "needs an account in a cloud",
    "ray dashboard": "needs an account in a cloud",
    "pip install 'ray[default]' boto3": "installs into the caller's environment",
    "tensorboard --logdir": "a server",
    "wandb sync": "needs an account",
    "make quickstart": "what the README's reader does; its parts are tested in test_quickstart.py",
    "make setup": "what .ci/run does",
    "make test": "is running",
    "make lint": "a step of its own in CI",
    "python examples/quickstart.py": "test_quickstart.py",
    "python examples/sentence_transformers_trainer.py": "test_drop_in.py runs what it shows",
    "python studies/one_gpu.py": "test_studies.py runs it on a small sweep",
    "gist-dist train quickstart": "the recipe is loaded below; runs for minutes",
    "gist-dist inspect inspect-pack": "the recipe is loaded below; the pack is not everywhere",
    "gist-dist train clustered-intents": "the recipe is loaded below; the pack is not everywhere",
    "gist-dist cotrain a.yaml b.yaml": "test_cotrain.py; sixteen runs",
    "gist-dist train minilm-two-layers": "the recipe is loaded below; runs for half an hour",
}
"""How a command begins that is not run here → why."""


class Command(NamedTuple):
    page: str
    line: int
    text: str
    """Without prompt and comment."""
    comment: str
    status: int | None
    """What a recorded session says."""

    @property
    def words(self) -> list[str]:
        return shlex.split(re.split(r" [|>&] ?| && ", self.text)[0])


def code_blocks(page: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Language ("" for an indented block), number of the first line, lines."""
    language, first, block = None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                language, first, block = line[3:].strip() or "text", number + 1, []
            else:
                yield language, first, block
                language, block = None, []
        elif language is not None:
            block.append(line)
        elif line.startswith("    "):
            yield "", number, [line[4:]]


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for language, first, block in code_blocks(page):
            if language not in ("", "console", "bash"):
                continue
            for number, line in enumerate(block, first):
                recorded = line.startswith("$ ")
                for part in line.removeprefix("$ ").split(" && "):
                    text, comment = re.match(r"(.*?)((?:  +| +# ).*)?$", squeezed(part.strip())).groups()
                    if text.split(" ")[0] in TOOLS:
                        status = recorded_status(page, number) if recorded else None
                        found.append(Command(page.name, number, text.strip(), comment or "", status))
    return found


def squeezed(line: str) -> str:
    """The padding that lines up options (`--logs   my-model`) is no beginning of a comment."""
    return re.sub(r"(--(?:logs|stop|status|resume)) +", r"\1 ", line)


def recorded_status(page: Path, number: int) -> int:
    rest = "\n".join(page.read_text(encoding="utf-8").splitlines()[number:])
    return int(re.search(r"\[exit status (\d+)\]", rest).group(1))


COMMANDS = commands()


def reason_elsewhere(command: Command) -> str | None:
    return next((reason for start, reason in ELSEWHERE.items() if command.text.startswith(start)), None)


HERE = [c for c in COMMANDS if reason_elsewhere(c) is None]
LOCAL = [c for c in HERE if c.words[0] == "gist-dist" and "head:8265" not in c.text and c.words[1] != "submit"]
SUBMITTED = [c for c in HERE if c.words[0] == "gist-dist" and c not in LOCAL]


def each(chosen: list[Command]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("command", chosen, ids=[f"{c.page}:{c.line}" for c in chosen])


def test_commands_are_found_and_each_is_run_somewhere():
    assert len(COMMANDS) > 60 and len(LOCAL) > 12 and len(SUBMITTED) > 12
    unknown = [c for c in HERE if not c.text.startswith(("gist-dist ", "python benchmarks/", "make "))]
    assert not unknown, "neither run here nor known for why not"
    for start in ELSEWHERE:
        assert any(c.text.startswith(start) for c in COMMANDS) or start.split()[0] in ("wandb", "tensorboard"), start


# ------------------------------------------------------------------------------------- what is only parsed


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return furnished(tmp_path_factory.mktemp("reader"))


def furnished(folder: Path) -> Path:
    """A reader's folder: pairs.csv, my.yaml with the README's and the first recipe's fields, an evaluation set."""
    rng = random.Random(3)
    pairs = [(words(rng, 2, 6), words(rng, 3, 9)) for _ in range(700)]
    (folder / "pairs.csv").write_text("question,answer\n" + "".join(f"{a},{b}\n" for a, b in pairs))
    (folder / "large.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 3_000_000)
    (folder / "studies").mkdir()
    shutil.copy(ROOT / "studies" / "recipe.yaml", folder / "studies")
    held_out = folder / "my-eval" / "MyFaq"
    held_out.mkdir(parents=True)
    for name, line in (
        ("corpus", lambda i, a, b: {"_id": f"d{i}", "text": b}),
        ("queries", lambda i, a, b: {"_id": f"q{i}", "text": a}),
        ("qrels", lambda i, a, b: {"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1}),
    ):
        lines = (json.dumps(line(i, *pair)) for i, pair in enumerate(pairs[:20]))
        (held_out / f"{name}.jsonl").write_text("\n".join(lines))
    models = save_tiny_model(folder / "student"), save_tiny_model(folder / "guide", seed=1)
    (blocks,) = [b for language, _, b in code_blocks(ROOT / "docs" / "first-recipe.md") if language == "yaml"]
    tree = yaml.safe_load("\n".join(blocks))
    tree["student"]["model"], tree["guide"]["model"] = map(str, models)
    tree["student"]["max_tokens"] = tree["guide"]["max_tokens"] = 64
    tree["evaluate"]["local_tasks"] = str(folder / "my-eval")
    tree["output_dir"] = str(folder / "runs")
    tree["cluster"] = {"num_workers": 2, "cpus_per_worker": 0.5}
    (folder / "my.yaml").write_text(yaml.safe_dump(tree))
    return folder


@each([c for c in COMMANDS if c.words[0] == "gist-dist"])
def test_arguments_and_overrides_are_understood(command, place, monkeypatch):
    monkeypatch.chdir(place)
    arguments = cli._parse(command.words[1:])
    if getattr(arguments, "recipe", None) and "globl_size" not in command.text:
        load_recipe(arguments.recipe, getattr(arguments, "overrides", []))


@each([c for c in HERE if c.text.startswith("python ")])
def test_benchmarks_take_these_options(command, monkeypatch):
    """Not run: minutes to hours. test_benchmarks.py runs each at its smallest."""
    parse_args = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser) -> None:
        parse_args(parser)
        raise Parsed

    monkeypatch.setattr(sys, "argv", command.words[1:])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(Parsed):
        importlib.import_module(Path(command.words[1]).stem).main()


class Parsed(Exception):
    """The command line was understood."""


@each([c for c in COMMANDS if c.words[0] == "make"])
def test_make_has_these_targets(command):
    told = subprocess.run(["make", "--dry-run", *command.words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_yaml_on_the_pages_is_understood():
    checked = 0
    for page in PAGES:
        for language, line, block in code_blocks(page):
            if language != "yaml":
                continue
            tree = yaml.safe_load("\n".join(block))
            if isinstance(tree, list):
                tree = {"data": {"sources": tree}}
            whole = {"name": "x", "student": {"model": "m"}, "data": {"sources": [{"path": "p.csv"}]}} | tree
            parse_config(whole, f"{page.name}:{line}")
            checked += 1
    assert checked >= 5


def test_python_on_the_pages_imports_what_there_is():
    checked = 0
    for page in PAGES:
        for language, line, block in code_blocks(page):
            if language != "python":
                continue
            imports = [n for n in ast.walk(ast.parse("\n".join(block))) if isinstance(n, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), f"{page.name}:{line}", "exec"), {})
            checked += 1
    assert checked >= 2


# --------------------------------------------------------------------------------------- what is really run


@pytest.mark.ray
@pytest.mark.slow
def test_local_commands_do_what_the_pages_say(ray_session, tmp_path, monkeypatch, capsys):
    """In the order of first-recipe.md, then the other pages'."""
    place = furnished(tmp_path)
    monkeypatch.chdir(place)
    for command in sorted(LOCAL, key=lambda c: c.page != "first-recipe.md"):
        if "--values mine.yaml" in command.text:
            cli.main(["cluster", "render", "values", "--out", "mine.yaml"])
        assert cli.main(command.words[1:]) == 0, (command, capsys.readouterr().err)
    told = capsys.readouterr().out
    assert "The mean over 1 task" in told and "apiVersion: ray.io/v1" in told and "#SBATCH" in told
    assert (place / "runs" / "my-model-2" / "report.html").is_file() and (place / "mined").is_dir()


@pytest.mark.ray
@pytest.mark.slow
def test_commands_for_a_cluster_end_as_the_pages_say(tmp_path):
    """docs/submit.md's session first, in its order, against a real head; then the other pages' commands."""
    place = furnished(tmp_path)
    shorter = yaml.safe_load((place / "my.yaml").read_text())
    shorter["optim"] = {"steps": 30}
    shorter["data"]["sources"][0]["path"] = "pairs.csv"
    (place / "my.yaml").write_text(yaml.safe_dump(shorter))
    recorded = [c for c in SUBMITTED if c.status is not None]
    others = [c for c in SUBMITTED if c.status is None]
    with ray_head() as head:
        for number, command in enumerate([*recorded, *others]):
            # The page says that the fifth command met a port where nothing listens.
            address = "http://127.0.0.1:9" if number == 4 else head.address
            status, told = run_as_written(command, head, address, place)
            assert status == (command.status or 0), (command, told)
            assert head.token not in told


def run_as_written(command: Command, head: Head, address: str, place: Path) -> tuple[int, str]:
    given = [word for word in command.words if not word.startswith("RAY_AUTH_MODE")]
    words = [re.sub(r"http://(head|localhost):8265", head.address, word) for word in given]
    if "~/.ray/token" in words:
        words[words.index("~/.ray/token")] = str(head.token_file)
    environment = plain_environment() | {
        "RAY_API_SERVER_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token,
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "gist_dist.cli", *words[1:]], cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if "Ctrl-C" in command.comment:
        threading.Thread(target=interrupt_after_start, args=(process, place), daemon=True).start()
    told, _ = process.communicate(timeout=400)
    return process.returncode, told


def interrupt_after_start(process: subprocess.Popen, place: Path) -> None:
    deadline = time.monotonic() + 120
    while not (place / "runs" / "my-model" / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    with contextlib.suppress(OSError):
        process.send_signal(signal.SIGINT)
