"""What a stranger, a bad disk or a bad day may hand us: recipes, data, stores, evaluation sets; all from a seed."""

import datetime
import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

TEXTS = [
    "", " ", "\0", "a\0b", "../../escaped", "/escaped", "a/../../escaped", ".", "..", "~", "~nobody_here/x", "x" * 300,
    "x" * 100_000, "a\nb", "a\rb", "\x1b[31mred\x07", "\u202eabc", "\ud800", "🙂" * 40, "é", "\ufeff", "%s%n{0}{x.y}",
    "<script>alert(1)</script>", "{{7*7}}", "$(touch EXECUTED)", "`touch EXECUTED`", "null", "NaN",
    "-0", "1e999", "0x", "1_000", "true", "'", '"', ",", "[z-a]", "**", "*", "?", "[", "data:", "file:///etc/passwd",
    "nope://host/x", "://", "s3:/x", "json", "pandas", "evil.py", "!!python/object/apply:os.system ['touch EXECUTED']",
]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 3, 7, 10**6, 10**12, 10**18, -(10**18), 2**63, 10**30, 0.5, 1e-9, 1e-320, 1e300, -1e300, 1e999,
           float("nan"), 0.0, -0.0]  # fmt: skip
OTHERS = [None, True, False, [], {}, [[]], [None], {"a": 1}, {"": {}}, {1: 2}, [1, [2, [3]]], datetime.date(2024, 1, 1)]


MINIMAL = "name: x\nstudent: {model: m}\ndata: {sources: [{path: a}]}\n"
KEPT = ("address", "compile", "output_dir", "cache_dir", "local_copy", "dir")
"""Keys of a recipe that may send us to another machine, to a compiler, or rightly out of the folder."""


def value(rng: random.Random) -> Any:
    return rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS)))


# --------------------------------------------------------------------------------------------------------- recipes


def change(rng: random.Random, tree: Any, protected: tuple[str, ...] = ()) -> None:
    """One value, key or branch of a tree of plain values becomes another."""
    while True:
        keys = [key for key in tree if key not in protected] if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.85:
            tree = tree[key]
            continue
        what = rng.random()
        if what < 0.8:
            tree[key] = value(rng)
        elif what < 0.9:
            del tree[key]
        elif isinstance(tree, dict):
            tree[rng.choice(TEXTS)] = value(rng)
        return


def dump(rng: random.Random, tree: Any) -> str:
    """As YAML or JSON, which is YAML as well."""
    if rng.random() < 0.2:
        return json.dumps(tree, default=str, ensure_ascii=rng.random() < 0.5)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5)


def damage_text(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    lines = text.splitlines(keepends=True)
    line = rng.choice(lines) if lines else ""
    return rng.choice((
        text[:at], text[:at] + rng.choice("\0\t:{}[]&*!|>'\"%@`#-?,\ud800\ufeff\x85") + text[at:],
        text[:at] + rng.choice(TEXTS) + text[at:], text + line, text.replace(line, "", 1), text + yaml_soup(rng),
        text.replace(": ", ": &a ", 1) + "z: *a\n",
    ))  # fmt: skip


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
SOUP = (
    BOMB, MINIMAL, "m: &m {a: 1}\n<<: [*m, *m]\n", "a: &a\n  <<: *a\n", "x: &x [*x]\n", "x: *nope\n", "<<: 1\n",
    "[" * 5000, "{a: " * 800, "- " * 3000, "? " * 3000, "a: 1\na: 2\n", "? [a]\n: b\n", "~: 1\n", "1.5: 2\n",
    "!!python/object/apply:os.system ['touch EXECUTED']\n", "x: !!python/name:os.system\n", "x: !!binary aGk=\n",
    "x: !!set {a, b}\n", "x: !!timestamp nope\n", "x: !!int ''\n", "x: !!float _\n", "x: !!bool x\n",
    "x: 2024-13-45\n", "x: 0x" + "f" * 6000 + "\n", "x: " + "9" * 5000 + "\n", "x: 0b\n", "x: 0o8\n", "x: 1:99:99\n",
    "%YAML 9.9\n---\n", "---\na\n---\nb\n", "\t- a\n", "x: |2\n a\n", "x: " + "a" * 200_000 + "\n", "'", "!", "&", "*",
)  # fmt: skip


def yaml_soup(rng: random.Random) -> str:
    begin = MINIMAL if rng.random() < 0.3 else ""
    return begin + "".join(rng.choice(SOUP) for _ in range(rng.choice((0, 1, 1, 2, 4))))


def override(rng: random.Random, tree: dict[str, Any]) -> str:
    path, node = [], tree
    while isinstance(node, dict | list) and node and rng.random() < 0.9:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append(str(key))
        node = node[key]
    path = path or ["x"]
    if rng.random() < 0.3:
        path[rng.randrange(len(path))] = rng.choice(("", "²", "-1", "99999999999", "0", "__class__", "a" * 300, "é"))
    text = rng.choice((str(value(rng)), yaml_soup(rng)[:5000], "", "[1,", "{a: b}", "1e-5"))
    joined = ".".join(path) + rng.choice(("=", "=", "=", "=", "", "==")) + text
    leads_away = not set(path).isdisjoint(KEPT) or any(f"{key}:" in text for key in KEPT)
    return "name=x" if leads_away or joined.startswith("-") else joined


# ---------------------------------------------------------------------------------------------------------- stores


def damage(rng: random.Random, content: bytes) -> bytes:
    """Truncated, flipped, cut out, doubled, emptied, or something else altogether."""
    at, size = rng.randrange(len(content) + 1), rng.choice((1, 4, 100))
    what = rng.randrange(8)
    if what == 0:
        return content[:at]
    if what == 1:
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 4, 30)) if content else 0):
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if what == 2:
        return content[:at] + content[at + size :]
    if what == 3:
        return content[:at] + rng.randbytes(size) + content[at:]
    if what == 4:
        return content[:at] + content[at : at + size] * 3 + content[at:]
    if what == 5:
        return content[:at] + b"\0" * size + content[at + size :]
    if what == 6:
        return rng.choice(
            (b"", b"\0", b"PAR1", b"PAR1PAR1", b"ARROW1\0\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b", b"[", b"{")
        )
    return rng.randbytes(rng.choice((1, 10, 1000)))


def damage_store(rng: random.Random, folder: Path) -> None:
    """One file of a folder is damaged, gone, a link, a folder, or says something else."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return
    file = rng.choice(files)
    what = rng.randrange(10)
    if what == 0:
        file.unlink()
    elif what == 1:
        file.unlink()
        file.mkdir()
    elif what == 2:
        file.unlink()
        file.symlink_to(rng.choice(("nowhere", file.name, "/etc/hostname")))
    elif what == 3:
        shutil.copy(rng.choice(files), folder / "copied") and (folder / "copied").replace(file)
    elif file.suffix == ".json" and what < 8:
        _edit_json(rng, file)
    else:
        file.write_bytes(damage(rng, file.read_bytes()))


def _edit_json(rng: random.Random, file: Path) -> None:
    """A value becomes another, or a name one that points elsewhere."""
    try:
        tree = json.loads(file.read_bytes())
    except ValueError:  # damaged once already
        tree = None
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.2:
        tree = value(rng)
    else:
        change(rng, tree)
    text = json.dumps(tree, default=str)
    if rng.random() < 0.3:
        text = text.replace('"', '"../../', rng.randrange(1, 9))
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
