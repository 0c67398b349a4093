"""How a task, or a part of one, is written: ``Tatoeba``, ``Tatoeba[deu-eng, fra-eng]``, ``MSMARCO@dev``."""

import re
from typing import NamedTuple

from gist_dist.common.errors import UserError

SUITES = "benchmarks.json"
"""In a folder of results: which tasks make which benchmark."""
WRITTEN = re.compile(r"(?P<name>[^\[\]]+?)\s*(\[(?P<subsets>[^\[\]]*)\])?\s*(@(?P<splits>[^\[\]@]+))?")


class TaskName(NamedTuple):
    """A task of MTEB's or one of the user's, and what of it is meant."""

    name: str
    subsets: tuple[str, ...] = ()
    """As MTEB calls its parts, often pairs of languages; (): all of them."""
    splits: tuple[str, ...] = ()
    """(): those that MTEB scores."""

    @property
    def part(self) -> str:
        """The same text for the same part in any order; "" for the whole task."""
        subsets = f"[{', '.join(sorted(self.subsets))}]" if self.subsets else ""
        return subsets + (f"@{','.join(sorted(self.splits))}" if self.splits else "")

    @property
    def text(self) -> str:
        return self.name + self.part


def parse_task(text: str) -> TaskName:
    """UserError for what is no name of a task."""
    found = WRITTEN.fullmatch(text.strip())
    if not found or (found["subsets"] is not None and not _listed(found["subsets"])):
        raise UserError(f"evaluate.tasks: {text!r} is no name of a task; write Name, Name[part, part] or Name@split")
    return TaskName(found["name"], _listed(found["subsets"]), _listed(found["splits"]))


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part for each in (text or "").split(",") if (part := each.strip())))
