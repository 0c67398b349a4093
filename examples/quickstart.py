"""Prepare the quick start from what is on this machine: ./quickstart/{models,data,eval}.

    python examples/quickstart.py && gist-dist train quickstart

Training rows come from the documentation of installed Python packages: the first sentence of a docstring is
the anchor, the signature and the rest of the docstring the positive. Packages that training never sees are
held out as retrieval tasks: given the sentence, find the documentation. Packages are parsed, never imported.
"""

import ast
import hashlib
import json
import platform
import re
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path

from offline_models import built_aside, minilm, truncated

from gist_dist.common.errors import UserError

STUDENT_LAYERS = 2
SOURCES = ("stdlib", "numpy", "scipy", "sklearn", "pandas", "torch", "transformers", "ray", "sympy")
# Kinds of documentation that training does not see: drawing, and graph algorithms.
HELD_OUT = {"matplotlib": "MatplotlibDocs", "networkx": "NetworkxDocs"}
# Caps, as parsing takes most of the time: three batches of 256 rows from a source, and the held-out tasks.
MAX_ROWS = 768
MAX_DOCUMENTS = 1200
MAX_QUERIES = 400

MIN_SUMMARY_WORDS, MAX_SUMMARY_WORDS = 4, 40
MIN_BODY_WORDS, MAX_BODY_WORDS = 12, 80
# Tests and other people's packages in disguise (and, in the standard library, what isn't part of it).
SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "vendor", "externals", "thirdparty_files"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo", "ensurepip"}
# One signature of an overload, or the setter beside a property, documents nothing of its own.
SKIPPED_DECORATORS = {"overload", "setter", "deleter"}


@dataclass(frozen=True)
class Entry:
    """The documentation of one module, class or function."""

    name: str
    """Dotted, from the package down."""
    signature: str
    """Own name (with its class) and argument names."""
    summary: str
    """The docstring's first sentence."""
    body: str
    """What the docstring says after it, as plain text."""

    @property
    def document(self) -> str:
        # As MTEB puts a title before its text: training and evaluation see the same form.
        return f"{self.signature} {self.body}"

    @property
    def keys(self) -> tuple[str, str]:
        """Summary and body down to letters and digits: what counts as the same text."""
        return _letters(self.summary), _letters(self.body)


@dataclass
class Package:
    """What was read of one package."""

    entries: list[Entry] = field(default_factory=list)
    num_files: int = 0
    unreadable: list[Path] = field(default_factory=list)
    """Files that are not Python, or not in the encoding they claim."""


def main(root: Path = Path("quickstart")) -> None:
    started = time.monotonic()
    guide = minilm(root / "models" / "all-MiniLM-L6-v2")
    student = truncated(guide, STUDENT_LAYERS, root / "models" / f"minilm-{STUDENT_LAYERS}-layers")
    print(f"guide {guide}\nstudent {student}: its first {STUDENT_LAYERS} layers", flush=True)
    prepare(root, package_folders())
    print(f"ready in {time.monotonic() - started:.0f} s; now: gist-dist train quickstart")


def prepare(root: Path, folders: dict[str, tuple[Path, str]]) -> None:
    """Write root/data (training) and root/eval (held out) unless they are there for these package versions.

    `folders` maps each package's name to its folder and version. Raises UserError if no source or no held-out
    package is installed.
    """
    made_from = {
        "quickstart.py": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "packages": {name: version for name, (_, version) in folders.items()},
    }
    stamp = root / "made_from.json"
    complete = all(path.exists() for path in (stamp, root / "data", root / "eval"))
    if complete and json.loads(stamp.read_text()) == made_from:
        print(f"{root}/data and {root}/eval are there already for these package versions")
        return
    absent = [name for name in (*SOURCES, *HELD_OUT) if name not in folders]
    if absent:
        print(f"not installed, left out: {', '.join(absent)}")
    sources = [name for name in SOURCES if name in folders]
    held_out = [name for name in HELD_OUT if name in folders]
    if not sources or not held_out:
        purpose = "evaluate on" if sources else "train on"
        raise UserError(f"nothing to {purpose}: pip install {' '.join(absent)}")

    stamp.unlink(missing_ok=True)
    for part in ("data", "eval"):
        shutil.rmtree(root / part, ignore_errors=True)
    seen: set[str] = set()
    with built_aside(root / "data") as data:
        data.mkdir()
        for name in sources:
            package = read_package(name, *folders[name], seen, MAX_ROWS)
            write_training(data / f"{name}.parquet", package.entries)
    with built_aside(root / "eval") as tasks:
        for name in held_out:
            # `seen` holds every training text by now, so that what occurs there is no test.
            package = read_package(name, *folders[name], seen, MAX_DOCUMENTS)
            write_retrieval(tasks / HELD_OUT[name], package.entries)
    stamp.write_text(json.dumps(made_from, indent=2))


def package_folders() -> dict[str, tuple[Path, str]]:
    """Folder and version of those of our packages that are installed, found without importing them."""
    folders = {"stdlib": (Path(sysconfig.get_path("stdlib")), platform.python_version())}
    distributions = metadata.packages_distributions()
    for name in (*SOURCES, *HELD_OUT):
        spec = util.find_spec(name)
        if spec and spec.origin and name in distributions:
            folders[name] = (Path(spec.origin).parent, metadata.version(distributions[name][0]))
    return folders


def read_package(name: str, folder: Path, version: str, seen: set[str], max_rows: int) -> Package:
    """The first `max_rows` usable entries whose texts aren't in `seen` yet; adds theirs to it.

    Files are taken in the order of a hash of their names: the same on every machine, and a cap still draws
    from all over the package.
    """
    started = time.monotonic()
    package = Package()
    names: set[str] = set()
    for path in sorted(source_files(folder), key=lambda path: _digest(path.relative_to(folder).as_posix())):
        if len(package.entries) >= max_rows:
            break
        package.num_files += 1
        module = ".".join((name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        try:
            tree = parse(path)
        except (SyntaxError, ValueError):
            package.unreadable.append(path)
            continue
        for entry in entries_of(tree, module):
            if entry.name in names or not seen.isdisjoint(entry.keys):
                continue
            names.add(entry.name)
            seen.update(entry.keys)
            package.entries.append(entry)
    del package.entries[max_rows:]
    broken = f", {len(package.unreadable)} of them unreadable" if package.unreadable else ""
    print(
        f"{name} {version}: {len(package.entries):,} entries from {package.num_files:,} files{broken} "
        f"({time.monotonic() - started:.1f} s)",
        flush=True,
    )
    return package


def source_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.py"):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts):
            yield path


def parse(path: Path) -> ast.Module:
    """Raises SyntaxError or ValueError for what isn't Python. Bytes go in, so that a coding line counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        return ast.parse(path.read_bytes())


def entries_of(tree: ast.Module, module: str) -> Iterator[Entry]:
    """The usable docstrings of a module: its own and those of public classes, functions and methods."""
    for names, node in documented(tree, ()):
        own_name = ".".join(names) or module.rpartition(".")[2]
        summary, body = split_docstring(ast.get_docstring(node) or "")
        words = len(summary.split())
        usable = MIN_SUMMARY_WORDS <= words <= MAX_SUMMARY_WORDS and len(body.split()) >= MIN_BODY_WORDS
        # A private module may be where public things are defined, but its own docstring is for its authors.
        if not usable or own_name.startswith("_"):
            continue
        arguments = f"({', '.join(argument_names(node))})" if hasattr(node, "args") else ""
        body = " ".join(body.split()[:MAX_BODY_WORDS])
        yield Entry(".".join((module, *names)), own_name + arguments, summary, body)


def documented(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
    """A module or class and what is defined in it, nested classes and conditional definitions included."""
    if isinstance(node, ast.Module | ast.ClassDef):
        yield names, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from documented(child, names)
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from documented(child, (*names, child.name))
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            if SKIPPED_DECORATORS.isdisjoint(map(_last_name, child.decorator_list)):
                yield (*names, child.name), child


def argument_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    a = function.args
    arguments = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    return [argument.arg for argument in arguments if argument and argument.arg not in {"self", "cls"}]


def split_docstring(docstring: str) -> tuple[str, str]:
    """First sentence and the rest, both as plain text."""
    first, _, rest = docstring.strip().partition("\n\n")
    first = plain_text(first)
    # A full stop within "e.g. this" or "3.5" ends no sentence: what follows must look like a beginning.
    end = re.search(r"(?<!e\.g|i\.e|etc| vs)[.!?](?=\s+[A-Z`\"'(\[])|[.!?:]?$", first)
    summary = first[: end.end()]
    return summary.strip(), f"{first[end.end() :]} {plain_text(rest)}".strip()


# Sections of numpydoc and Google docstrings that hold code, names or citations rather than sentences.
DROPPED_SECTIONS = r"(?:Examples?|References|See Also|Usage)"
MARKUP = (
    # Whole sections, to the next heading: numpydoc's (underlined), Google's (ending in a colon).
    (rf"(?ms)^{DROPPED_SECTIONS}[ ]*\n[-=~]{{3,}}[ ]*$.*?(?=^[^\n]+\n[-=~]{{3,}}[ ]*$|\Z)", ""),
    (rf"(?m)^{DROPPED_SECTIONS}::?[ ]*\n(?:[ \t]+.*\n?|[ \t]*\n)*", ""),
    (r"(?ms)^[ ]*```.*?(?:```|\Z)", ""),  # Markdown code
    (r"(?m)^[ ]*>>>.*(?:\n[ ]*\S.*)*", ""),  # doctest and its output
    # Directives but notes and warnings, with the block under them.
    (r"(?m)^([ ]*)\.\. (?!note::|warning::).*(?:\n(?:[ ]*\n)*\1[ ]+\S.*)*", ""),
    (r"\.\. (note|warning)::", ""),
    (r"(?m)^([ ]*)(\S.*)?::[ ]*\n(?:[ ]*\n)*(?:\1[ ]+\S.*(?:\n[ ]*$)*\n?)+", r"\1\2:\n"),  # literal blocks
    (r"(?m)^[\s=\-~^+*#|]*$", ""),  # underlines and table borders
    (r":(?:[a-z]+:)?[a-z]+:`([^`]*)`", r"`\1`"),  # :class:`x` -> `x`
    (r"`~?!?([^`<]*?)\s*<[^`>]*>`_*", r"\1"),  # `text <target>`_ -> text
    (r"`+~?([^`]*)`+_*", r"\1"),
    (r"(?m)^[ ]*:(?:param|type|arg|returns?|rtype|raises|var|ivar)\b([^:\n]*):", r"\1:"),
    (r"(?<![\w*])\*(\w[^*\n]*)\*(?![\w*])", r"\1"),  # emphasis
    (r"https?://\S+|\[\d+\]_|%\(\w+\)s|\\\w+\{|[*|]{2,}", ""),
    (r"\s+", " "),
)


def plain_text(docstring: str) -> str:
    """The sentences of a docstring without the markup of reStructuredText, numpydoc and Markdown."""
    for pattern, replacement in MARKUP:
        docstring = re.sub(pattern, replacement, docstring)
    return docstring.strip()


def write_training(path: Path, entries: Iterable[Entry]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("anchor", pa.string()), ("positive", pa.string())])
    rows = [{"anchor": entry.summary, "positive": entry.document} for entry in entries]
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def write_retrieval(folder: Path, entries: list[Entry]) -> None:
    """All entries are the corpus; the summaries of the first MAX_QUERIES are the queries, one answer each."""
    queries = entries[:MAX_QUERIES]
    folder.mkdir(parents=True)
    tables = {
        "corpus": [{"_id": e.name, "title": e.signature, "text": e.body} for e in entries],
        "queries": [{"_id": f"q:{e.name}", "text": e.summary} for e in queries],
        "qrels": [{"query-id": f"q:{e.name}", "corpus-id": e.name, "score": 1} for e in queries],
    }
    for table, rows in tables.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{table}.jsonl").write_text("".join(lines), encoding="utf-8")


def _last_name(decorator: ast.expr) -> str:
    return getattr(decorator, "attr", getattr(decorator, "id", ""))


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text.lower())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
