"""Who imports whom in gist_dist/, drawn from the source: rooms, floors, arrows and circles.

    python tests/import_graph.py [FOLDER]       FOLDER: the package of another checkout

A room is a folder or file right below the package. Every import counts, those within functions and for types too. A
room's floor is one above the highest of those that it imports; rooms that import each other in a circle share one.
"""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

Graph = dict[str, set[str]]
"""Who imports → what."""

PACKAGE = "gist_dist"
FACE = "__init__"
"""The package's own file: `from gist_dist import name`."""


def module_graph(folder: Path) -> Graph:
    """By dotted name within the package."""
    files = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    names = {name if name == FACE else name.removesuffix(f".{FACE}") for name in files}
    graph: Graph = {}
    for name, path in files.items():
        found = {_module(imported, names) for imported in _imported(ast.parse(path.read_text(encoding="utf-8")))}
        importer = name if name == FACE else name.removesuffix(f".{FACE}")
        graph[importer] = {module for module in found if module and module != importer}
    return graph


def _imported(tree: ast.Module) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module(imported: str, names: set[str]) -> str | None:
    """The module that an imported name is, or is in; None for one of another package."""
    package, *parts = imported.split(".")
    if package != PACKAGE:
        return None
    while parts and ".".join(parts) not in names:
        parts.pop()
    return ".".join(parts) or FACE


def room_graph(modules: Graph) -> Graph:
    """The same by room, without the arrows within one."""
    rooms: Graph = {room_of(module): set() for module in modules}
    for module, imported in modules.items():
        rooms[room_of(module)] |= {room_of(other) for other in imported} - {room_of(module)}
    return rooms


def room_of(module: str) -> str:
    return module.split(".")[0]


def circles(graph: Graph) -> list[list[str]]:
    """Sets of nodes that reach each other, of at least two."""
    reached = {node: _reachable(graph, node) for node in graph}
    groups = {frozenset({other for other in reached[node] if node in reached[other]} | {node}) for node in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += graph[node]
    return seen


def floors(graph: Graph) -> list[list[str]]:
    """Lowest first."""
    circle_of = {node: tuple(circle) for circle in circles(graph) for node in circle}
    floor: dict[str, int] = {}

    def of(node: str) -> int:
        if node not in floor:
            own = circle_of.get(node, (node,))
            below = {other for member in own for other in graph[member]} - set(own)
            height = 1 + max(map(of, below), default=-1)
            floor.update(dict.fromkeys(own, height))
        return floor[node]

    for node in graph:
        of(node)
    return [sorted(n for n in graph if floor[n] == height) for height in range(max(floor.values()) + 1)]


def report(folder: Path) -> list[str]:
    modules = module_graph(folder)
    rooms = room_graph(modules)
    levels = floors(rooms)
    lines = [f"{len(modules)} modules in {len(rooms)} rooms on {len(levels)} floors"]
    lines += [
        f"{sum(map(len, rooms.values()))} arrows between rooms, {sum(map(len, modules.values()))} between modules"
    ]
    for graph, what in ((rooms, "rooms"), (modules, "modules")):
        found = [" ↔ ".join(circle) for circle in circles(graph)]
        lines.append(f"circles of {what}: {'; '.join(found) or 'none'}")
    return lines + [f"  {height:2}  {', '.join(level)}" for height, level in reversed(list(enumerate(levels)))]


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / PACKAGE
    if not (given / f"{FACE}.py").is_file():
        sys.exit(f"{given} is no package: there is no {FACE}.py; give the folder gist_dist of a checkout")
    print("\n".join(report(given)))
