"""JSON from strangers: of bounded depth and numbers, with texts that can be written again, and of a known shape."""

import json
import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gist_dist.common.text import SHORT

MAX_LEVELS = 40
LARGEST = 1e100
"""Largest number that counts as finite: sums and squares of such numbers are finite too."""


class Shape(BaseModel):
    """What a mapping must hold; more may be in it. Nothing is converted: what was read stays what it is."""

    model_config = ConfigDict(strict=True)


Number = Annotated[float, Field(allow_inf_nan=False)]


def load_plain_json(text: str) -> Any:
    """ValueError says in one line what is wrong."""
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_plain(tree)
    return tree


def check_plain(tree: Any, levels: int = MAX_LEVELS) -> None:
    """ValueError for values that are nested too deeply, for numbers beyond all measure and for lone surrogates."""
    if not levels:
        raise ValueError("it is nested too deeply")
    if isinstance(tree, dict):
        for key, value in tree.items():
            check_plain(key, levels - 1)
            check_plain(value, levels - 1)
    elif isinstance(tree, list):
        for value in tree:
            check_plain(value, levels - 1)
    elif isinstance(tree, str):
        tree.encode()
    elif isinstance(tree, int | float) and LARGEST < abs(tree) != math.inf:
        raise ValueError(f"a number is larger than {LARGEST:g}")


def problem(shape: Any, tree: Any) -> str | None:
    """Where a tree of plain values is of another shape, in a few words. shape: a TypeAdapter."""
    try:
        shape.validate_python(tree, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(SHORT.repr(part).strip("'") for part in first["loc"])
        message = first["msg"].partition(" or instance of")[0]
        if first["type"] == "missing":
            return f"{where} is missing"
        return f"{where or 'it'} = {SHORT.repr(first['input'])}: {message[0].lower()}{message[1:]}"
    return None
