"""A recipe read from YAML, overridden by ``section.key=value`` and validated; a mistake is one sentence.

Like config.py it imports neither torch nor ray.
"""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gist_dist.common.errors import UserError
from gist_dist.common.plain_yaml import MAX_CHARACTERS, load_plain
from gist_dist.common.text import SHORT
from gist_dist.config import RunConfig, SectionType


def load_recipe(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a recipe file, or the packaged recipe of that name, and apply ``section.key=value`` overrides.

    Raises UserError for a missing file, broken YAML, an unknown key or a value out of range.
    """
    text, origin = _read_recipe(recipe)
    try:
        tree = load_plain(text)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: a recipe is a mapping of sections; found {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, origin)


def parse_config(tree: dict[Any, Any], origin: str = "recipe") -> RunConfig:
    """Validate a tree of plain values; UserError has a line for each wrong field (of the first few)."""
    return parse_section(RunConfig, tree, origin)


def parse_section(section: type[SectionType], tree: dict[Any, Any], origin: str) -> SectionType:
    """As parse_config, of one section."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem, origin) for problem in error.errors()[:5])) from None


def recipe_schema() -> str:
    """The JSON schema of a recipe, by which editors complete and check it; recipes/schema.json is it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | RunConfig.model_json_schema()
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def packaged_recipes() -> list[str]:
    return sorted(
        f.name[: -len(".yaml")] for f in resources.files("gist_dist.recipes").iterdir() if f.name.endswith(".yaml")
    )


def _read_recipe(recipe: str) -> tuple[str, str]:
    path = Path(recipe)
    try:
        path = path.expanduser() if recipe.startswith("~") else path
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                return file.read(MAX_CHARACTERS + 1), str(recipe)  # load_plain() refuses more
        if recipe in packaged_recipes():
            return resources.files("gist_dist.recipes").joinpath(f"{recipe}.yaml").read_text("utf-8"), recipe
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # the last: ~ of a user that does not exist
        raise UserError(f"{recipe}: can't be read as UTF-8 text: {error}") from None
    names = ", ".join(packaged_recipes())
    raise UserError(f"{recipe}: no such recipe file, and no packaged recipe of that name (there are: {names})")


def _apply_override(tree: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {SHORT.repr(override)} is not of the form section.key=value")
    try:
        value = load_plain(text)
    except ValueError:
        value = text
    if isinstance(value, str):
        value = _number(value)
    set_value(tree, key, value, f"override {SHORT.repr(override)}")


def set_value(tree: dict[Any, Any], key: str, value: Any, wanted_by: str) -> None:
    """Put a value at a dotted key of a recipe's tree; sections on the way that are not there are made.

    wanted_by: begins the UserError for a key below something that has none, or beyond the end of a list.
    """
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]), wanted_by)
    if isinstance(node, list):
        node[_index(node, last, wanted_by)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, path: str, wanted_by: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, part, wanted_by)]
    else:
        if node.get(part) is None:
            node[part] = {}
        child = node[part]
    if not isinstance(child, dict | list):
        raise UserError(f"{wanted_by}: {path} is {SHORT.repr(child)}, which has no keys")
    return child


def _index(node: list[Any], part: str, wanted_by: str) -> int:
    if not (part.isascii() and part.isdigit() and len(part) < 10) or int(part) >= len(node):
        raise UserError(f"{wanted_by}: {SHORT.repr(part)} is no index of a list of {len(node)}")
    return int(part)


def _number(text: str) -> Any:
    # YAML 1.1 reads 1e-5 as text: it wants a dot in the mantissa.
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def _explain(problem: Any, origin: str) -> str:
    path = ""
    for part in problem["loc"]:
        shown = str(part) if str(part).isidentifier() and len(str(part)) < 100 else SHORT.repr(part)
        path += f"[{part}]" if isinstance(part, int) else f".{shown}" if path else shown
    if problem["type"] == "extra_forbidden":
        keys = _known_keys(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), keys, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(keys)}"
        return f"{origin}: unknown key '{path}'; {hint}"
    if problem["type"] == "missing":
        return f"{origin}: '{path}' is missing; set it in the recipe or as {path}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{origin}: {path}: {message}" if path else f"{origin}: {message}"
    return f"{origin}: {path} = {SHORT.repr(problem['input'])}: {message[0].lower()}{message[1:]}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        model = _section_of(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_of(inner)) is not None:
            return found
    return None
