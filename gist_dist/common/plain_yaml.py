"""YAML from strangers: plain values only, bounded in size, and no key that silently hides another."""

from typing import Any

import yaml

MAX_CHARACTERS = 2**22
MAX_VALUES = 1_000_000
"""With aliases written out: a kilobyte of them can stand for gigabytes."""
INTEGER_BITS = 64
TAG = "tag:yaml.org,2002:"
MERGE = f"{TAG}merge"
PLAIN = {TAG + kind for kind in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge")}


def load_plain(text: str) -> Any:
    """None, booleans, numbers, texts, dates, and lists and mappings of them.

    ValueError says in one line what is wrong.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _check(node, {}, set())
        return None if node is None else _unshared(loader.construct_document(node))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # PyYAML raises whatever comes of a text that is not of its tag
            kind = node.tag.removeprefix(TAG)
            raise ValueError(f"{_place(node)}: {str(node.value)[:200]!r} is no {kind} that can be read") from error

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if value.bit_length() > INTEGER_BITS:  # such a one can't even be shown
            raise OverflowError
        return value


_Loader.add_constructor(f"{TAG}int", _Loader.construct_yaml_int)


def _check(node: yaml.Node | None, sizes: dict[yaml.Node, int], above: set[yaml.Node]) -> int:
    """How many values a node stands for. ValueError for too many, for what contains itself, for a tag that is not of
    plain values, and for a key that comes twice."""
    if node is None:
        return 0
    if node in sizes:
        return sizes[node]
    if node in above:
        raise ValueError(f"{_place(node)}: a value that contains itself")
    if node.tag not in PLAIN:
        tag = node.tag[:100]
        raise ValueError(f"not valid YAML: {_place(node)}: could not determine a constructor for the tag {tag!r}")
    above.add(node)
    children = []
    if isinstance(node, yaml.MappingNode):
        _refuse_twins(node)
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes[node] = size = 1 + sum(_check(child, sizes, above) for child in children)
    above.discard(node)
    if size > MAX_VALUES:
        raise ValueError(f"{_place(node)}: with its aliases it has {size:.3g} values; at most {MAX_VALUES:,} are read")
    return size


def _unshared(value: Any) -> Any:
    """Aliases written out, so that to change one place changes no other."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _refuse_twins(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            if (key.tag, key.value) in seen:
                raise ValueError(f"{_place(key)}: key {key.value[:200]!r} is there twice; keep one")
            seen.add((key.tag, key.value))


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
