"""The house of shared/design.md: who may import whom, and what answers without torch."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from import_graph import circles, floors, module_graph, report, room_graph

PACKAGE = Path(__file__).parent.parent / "gist_dist"

LAW = {
    "common": set(), "config": {"common"}, "recipe": {"config", "common"},
    "core": {"config", "common"}, "models": {"core", "config", "common"},
    "data": {"models", "config", "common"}, "runs": {"config", "common"}, "evaluation": {"config", "common"},
    "training": {"core", "models", "data", "runs", "config", "common"},
    "planning": {"core", "models", "data", "config", "common"},
    "report": {"evaluation", "runs", "config", "common"},
    "drop_in": {"core", "models", "config"}, "live": {"runs", "common"},
}  # fmt: skip
"""What a room may import beside itself. cli, __init__ and on_ray may import all."""


def modules() -> dict[str, Path]:
    """Dotted name within the package → file."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imports(path: Path, at_module_level: bool = False) -> set[str]:
    """Dotted names that a file imports; at module level, leaving out functions and `if TYPE_CHECKING`."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        for child in ast.iter_child_nodes(node):
            lazy = isinstance(child, ast.FunctionDef) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            )
            if not (at_module_level and lazy):
                visit(child)

    visit(ast.parse(path.read_text()))
    return found


def packages(path: Path, at_module_level: bool = False) -> set[str]:
    """Top-level names of what a file imports from elsewhere than itself and the standard library."""
    return {name.split(".")[0] for name in imports(path, at_module_level)} - set(sys.stdlib_module_names)


def test_walk_sees_the_package():
    assert {"core.loss", "core.step", "training.trainer", "data.corpus", "on_ray.driver"} <= modules().keys()
    assert "torch" in packages(modules()["core.loss"]) and "gist_dist" in packages(modules()["core.step"])


def test_only_on_ray_imports_ray():
    users = {name for name, path in modules().items() if "ray" in packages(path)}
    outside = {name for name in users if not name.startswith("on_ray.")}
    assert not outside and users


def test_only_collectives_imports_torch_distributed():
    users = {n for n, path in modules().items() if any(i.startswith("torch.distributed") for i in imports(path))}
    assert users == {"core.collectives"}
    spelled_out = {name for name, path in modules().items() if "torch.distributed." in path.read_text()}
    assert spelled_out <= {"core.collectives"}


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("core.")])
def test_the_mathematics_imports_torch_and_config_only(module):
    """What it takes of ours is for test_every_import_obeys_the_law."""
    of_kernels = {"triton"} if module == "core.loss_kernel" else set()
    assert packages(modules()[module]) <= {"torch", "numpy", "jaxtyping", "gist_dist"} | of_kernels


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_import_obeys_the_law():
    rooms = {room(name) for name in modules()}
    assert rooms - LAW.keys() == {"__init__", "cli", "on_ray", "recipes"}
    broken = set()
    for name, path in modules().items():
        if room(name) not in LAW:
            continue
        for imported in imports(path):
            target = room(imported.removeprefix("gist_dist."))
            if imported.startswith("gist_dist.") and target in rooms and target != room(name):
                if target not in LAW[room(name)]:
                    broken.add((name, target))
    assert not broken


def test_the_house_has_floors_and_no_circle():
    rooms = room_graph(module_graph(PACKAGE))
    assert not circles(rooms)
    levels = floors(rooms)
    assert "common" in levels[0] and "core" in levels[2] and set(levels[-1]) <= {"__init__", "cli"}


def test_import_graph_sees_circles_and_floors(tmp_path):
    """A face that hands out what imports it, two rooms, and a lazy arrow back from the lower one."""
    package = tmp_path / "gist_dist"
    (package / "low").mkdir(parents=True)
    for name, text in (
        ("__init__.py", ""),
        ("top.py", "import json\nfrom gist_dist.low.a import f\nfrom gist_dist.low import b"),
        ("low/__init__.py", ""),
        ("low/a.py", "import numpy\nfrom gist_dist.low.b import g"),
        ("low/b.py", ""),
    ):
        (package / name).write_text(text)
    modules = module_graph(package)
    assert modules == {"__init__": set(), "top": {"low.a", "low.b"}, "low": set(), "low.a": {"low.b"}, "low.b": set()}
    assert not circles(modules) and floors(room_graph(modules)) == [["__init__", "low"], ["top"]]
    (package / "low" / "b.py").write_text("def h():\n    from gist_dist import top")
    rooms = room_graph(module_graph(package))
    assert circles(rooms) == [["low", "top"]] and floors(rooms) == [["__init__", "low", "top"]]
    assert "circles of rooms: low ↔ top" in report(package)


def test_nothing_imports_the_tests():
    for name, path in modules().items():
        assert not packages(path) & {"tests", "reference", "tiny", "conftest"}, name


@pytest.mark.parametrize("module", ["cli", "config", "recipe", "common.errors"])
def test_parsing_costs_no_torch_and_no_ray(module):
    allowed = {"yaml", "pydantic", "gist_dist"}
    assert packages(modules()[module], at_module_level=True) <= allowed


@pytest.mark.parametrize("module", ["core.candidates", "core.loss"])
def test_rules_and_arithmetic_of_the_loss_are_files_under_250_lines(module):
    assert len(modules()[module].read_text().splitlines()) < 250


def test_step_is_one_function_under_60_lines():
    functions = [n for n in ast.walk(ast.parse(modules()["core.step"].read_text())) if isinstance(n, ast.FunctionDef)]
    (train_step,) = [function for function in functions if function.name == "train_step"]
    assert train_step.end_lineno - train_step.lineno + 1 < 60


RECIPE = """
name: tiny
student: {model: nowhere}
data: {sources: [{path: nowhere.jsonl}]}
optim: {learnin_rate: 0.1}
"""


@pytest.mark.parametrize("case", ["help", "schema", "mistyped key", "mistyped override", "missing file"])
def test_command_line_answers_at_once(tmp_path, case):
    """In under a second where nothing else runs, without torch or ray."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE if case == "mistyped key" else RECIPE.replace("learnin_", "learning_"))
    arguments, answer = {
        "help": (["--help"], "usage: gist-dist"),
        "schema": (["schema"], '"additionalProperties": false'),
        "mistyped key": (
            ["train", str(recipe)],
            "unknown key 'optim.learnin_rate'; did you mean 'learning_rate'?",
        ),
        "mistyped override": (
            ["train", str(recipe), "bacth.global_size=8"],
            "unknown key 'bacth'; did you mean 'batch'?",
        ),
        "missing file": (["plan", str(tmp_path / "absent.yaml")], "no such recipe file"),
    }[case]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = run_cli(arguments)
        seconds.append(time.perf_counter() - started)
        assert answer in done.stdout + done.stderr
        assert done.returncode == (0 if case in ("help", "schema") else 1)
        loaded = done.stdout.rsplit("LOADED", 1)[1].split()
        assert "pydantic" in loaded and not {"torch", "ray", "transformers", "datasets", "numpy"} & set(loaded)
    assert min(seconds) < 2, seconds  # a busy machine is given twice the second


def run_cli(arguments: list[str]) -> subprocess.CompletedProcess:
    """The command in a fresh interpreter, which says at the end what it has imported."""
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('LOADED', *sys.modules))\n"
        "from gist_dist.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
