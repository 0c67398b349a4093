"""Which columns hold which role, by the names that the field's tools give them, and the texts in cells of all their
shapes.

anchor, positive, negative_1, …                     sentence-transformers, in any order; positive_1, positive_2, …
query, pos, neg (lists of texts)                    FlagEmbedding
query, positive_passages, negative_passages         Tevatron: lists of {docid, title, text}
query, response, rejected_response                  ms-swift
messages, positive_messages, negative_messages      ms-swift: lists of {role, content}
[instruction, text] in place of every text          MEDI, with columns.instructions
"""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from gist_dist.common.errors import UserError
from gist_dist.config import Columns

ANCHORS = (("anchor",), ("query", "question", "messages"))
POSITIVES = (
    ("positive", "pos", "positives", "positive_passages", "positive_messages"),
    ("answer", "response", "passage", "document"),
)
"""Names that are enough by themselves; those of a later line count where the source has none of an earlier one."""
PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_A", "sentence_B"),
    ("sent0", "sent1"),
    ("text1", "text2"),
)
"""Names that say nothing alone."""
NUMBERED_POSITIVES = ("positive", "pos")
"""These may be several columns: positive_1, positive_2, …"""
NEGATIVES = (
    "negatives",
    "negative",
    "neg",
    "negs",
    "hard_negatives",
    "hard_negative",
    "hard_neg",
    "negative_passages",
    "rejected_response",
    "negative_messages",
)
GRADES = ("label", "labels", "score", "similarity_score", "gold_label")
"""Columns of pairs that need not be positive: STS, NLI, paraphrases."""
OTHER_SENSES = ("images", "image", "videos", "audios")
TEXTS = ("text", "sentence", "sentences")
ROW_PROMPTS = ("prompt", "instruction")
PASSAGE_TEXTS = ("text", "content", "contents")

Instructions = Literal["drop", "prepend"] | None

LIST_KINDS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
TEXT_KINDS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,  # as Spark, Hive and Impala write text
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_null,
)


class Roles(NamedTuple):
    """Column names."""

    anchor: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    prompt: str | None

    @property
    def _columns(self) -> set[str | None]:
        return {self.anchor, *self.positives, *self.negatives, self.prompt}

    def told(self, known: Iterable[str]) -> str:
        """For the plan, of a layout that isn't anchor, positive and negatives, or has columns that one may think are
        used; else empty."""
        known = set(known)
        unread = [name for name in GRADES if name in known and name not in self._columns]
        notes = [f"'{unread[0]}' is not used, and every row is taken as a positive pair"] if unread else []
        notes += [f"'{name}' is not used: only texts are trained" for name in OTHER_SENSES if name in known]
        if (self.anchor, self.positives, self.prompt) == ("anchor", ("positive",), None) and all(
            re.match("negative", name) for name in self.negatives
        ):
            return "; ".join(notes)
        as_positives = "positives" if len(self.positives) > 1 else "positive"
        told = [f"'{self.anchor}' as anchor", f"{', '.join(map(repr, self.positives))} as {as_positives}"]
        told += [f"{', '.join(map(repr, self.negatives))} as negatives"] if self.negatives else []
        told += [f"'{self.prompt}' before the anchor"] if self.prompt else []
        unused = [name for name in ROW_PROMPTS if name in known and name not in self._columns]
        hint = f"; '{unused[0]}' is not used (set columns.prompt to put it before the anchor)" if unused else ""
        return "; ".join([f"reads {', '.join(told)}{hint}", *notes])


@dataclass(frozen=True)
class NoText:
    """What a cell holds in place of a text."""

    reason: str
    """It follows the name of a role."""


NO_PAIR = NoText("is no [instruction, text] pair (columns.instructions)")


def find_roles(columns: Columns, known: Iterable[str], where: str) -> Roles:
    """The columns of each role: what the recipe names, and the others by their usual names.

    A role that isn't found keeps its own name, which the source then misses. UserError where two columns could be one
    role, and for sets that are no pairs.
    """
    names = set(known)
    anchor, positives = columns.anchor, columns.positive
    if anchor is None and positives is None and names & {"messages", "response"} and "label" in names:  # ms-swift
        swift = ("query", "response") if "response" in names else ("messages", "positive_messages")
        _refuse_grades(swift, {"label"}, where)
    if anchor is None and positives is None:
        pair = next((pair for pair in PAIRS if names.issuperset(pair)), None)
        if pair and not names & {"anchor", "positive"}:
            _refuse_grades(pair, names, where)
            anchor, positives = pair[0], (pair[1],)
        elif not names & {"anchor", "positive"}:
            _refuse_classes(names, where)
    anchor = anchor or _find("anchor", ANCHORS, names - set(positives or ()), where)
    if positives is None:
        positives = _find_positives(names - {anchor}, where)
    negatives = _find_columns(NEGATIVES, names) if columns.negatives is None else columns.negatives
    return Roles(anchor, positives, negatives, columns.prompt)


def _find(role: str, groups: tuple[tuple[str, ...], ...], names: set[str], where: str) -> str:
    for group in groups:
        found = [name for name in group if name in names]
        if len(found) > 1:
            listed = " and ".join(f"'{name}'" for name in found)
            raise UserError(f"{where}: columns {listed} could each be the {role}; set columns.{role}")
        if found:
            return found[0]
    return role


def _find_positives(names: set[str], where: str) -> tuple[str, ...]:
    first = _find("positive", POSITIVES, names, where)
    if first in POSITIVES[0] and first not in NUMBERED_POSITIVES:
        return (first,)
    return _find_columns(NUMBERED_POSITIVES, names) or (first,)


def _find_columns(stems: tuple[str, ...], names: set[str]) -> tuple[str, ...]:
    """One column, or those that are numbered: negative_1, negative_2, …"""
    for stem in stems:
        numbered = [(int(found[1]), name) for name in names if (found := re.fullmatch(rf"{stem}_?(\d{{1,4}})", name))]
        if stem in names or numbered:
            return (*((stem,) if stem in names else ()), *(name for _, name in sorted(numbered)))
    return ()


def _refuse_grades(pair: tuple[str, str], names: set[str], where: str) -> None:
    if grade := next((name for name in GRADES if name in names), None):
        raise UserError(
            f"{where}: the source has '{grade}' beside '{pair[0]}' and '{pair[1]}', and training takes every row as a "
            "positive pair; keep only the rows that are, and set columns.anchor and columns.positive"
        )


def _refuse_classes(names: set[str], where: str) -> None:
    text, label = (next((name for name in usual if name in names), None) for usual in (TEXTS, GRADES))
    if text and label and _find("anchor", ANCHORS, names, where) == "anchor":
        raise UserError(
            f"{where}: the source has '{text}' and '{label}' and no pairs; if it is a classification set, set columns: "
            f"{{text: {text}, label: {label}}}"
        )


def texts_of(cell: Any, instructions: Instructions) -> list[Any]:
    """The texts of a cell that may hold several: a list of texts, of passages or of conversations. Each is as in
    ``text_of``."""
    if isinstance(cell, str):
        return [NO_PAIR if instructions else cell]
    if not isinstance(cell, list) or _is_conversation(cell) or (instructions and _is_pair(cell)):
        return [text_of(cell, instructions)]
    return [text_of(text, instructions) for text in cell]


def text_of(cell: Any, instructions: Instructions) -> Any:
    """The text of a cell that holds one; None for null, NoText with the reason for anything else."""
    if isinstance(cell, str):
        return NO_PAIR if instructions else cell
    if cell is None:
        return None
    if _is_conversation(cell):
        return _of_conversation(cell, instructions)
    if instructions:
        return _joined(cell[0], cell[1], instructions) if _is_pair(cell) else NO_PAIR
    if isinstance(cell, dict):
        return _of_passage(cell)
    if isinstance(cell, bytes):
        return _of_bytes(cell)
    if _is_pair(cell):
        return NoText("is a list, not text (if it is [instruction, text], set columns.instructions)")
    return NoText(f"is {'a list' if isinstance(cell, list) else type(cell).__name__}, not text")


def _joined(instruction: str, text: str, instructions: Instructions) -> str:
    both = instructions == "prepend" and instruction.strip() and text.strip()
    return f"{instruction} {text}" if both else text


def _of_passage(passage: dict[str, Any]) -> Any:
    """Title and text, as Tevatron and BEIR join them."""
    text = next((passage[name] for name in PASSAGE_TEXTS if passage.get(name) is not None), None)
    title = passage.get("title")
    if not isinstance(text, str) or not (title is None or isinstance(title, str)):
        return NoText("is an object without a text, not text")
    return f"{title} {text}".strip() if title and title.strip() else text


def _of_conversation(messages: list[dict[str, Any]], instructions: Instructions) -> Any:
    """The one message that isn't the system's; what the system says is an instruction."""
    system = [_of_message(message) for message in messages if message["role"] == "system"]
    others = [_of_message(message) for message in messages if message["role"] != "system"]
    if len(others) != 1:
        return NoText(f"is a conversation of {len(others)} messages, not one text")
    if wrong := next((text for text in (*system, *others) if not isinstance(text, str)), None):
        return wrong
    if not system:
        return others[0]
    if instructions is None:
        return NoText("has a system message (set columns.instructions to prepend, or to drop it)")
    return _joined("\n".join(system), others[0], instructions)


def _of_message(message: dict[str, Any]) -> Any:
    content = message["content"]
    parts = content if isinstance(content, list) else [content]
    found = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    return "".join(texts) if len(texts) == len(found) else NoText("has a message that is not text")


def _of_bytes(cell: bytes) -> Any:
    try:
        return cell.decode()
    except UnicodeDecodeError:
        return NoText("is binary that is not UTF-8, not text")


def read_literal(cell: Any) -> Any:
    """The list of texts that a CSV cell is the text of, as pandas writes lists; any other cell as it is."""
    if not isinstance(cell, str) or not (cell.startswith("[") and cell.endswith("]")):
        return cell
    try:
        texts = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else cell


def holds_text(text: Any) -> bool:
    """False for null and for blanks: in a list of texts they stand for none. What is no text at all is for the
    complaint about it."""
    return not text.isspace() and text != "" if isinstance(text, str) else text is not None


def is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in LIST_KINDS)


def may_hold_text(kind: pa.DataType, lists: int = 0, objects: bool = True) -> bool:
    """Text, or up to so many levels of lists of it. objects: passages and conversations are texts too."""
    if pa.types.is_dictionary(kind):
        return may_hold_text(kind.value_type, lists, objects)
    if pa.types.is_struct(kind):
        return objects and any(kind.get_field_index(name) >= 0 for name in PASSAGE_TEXTS)
    if is_list(kind):
        if not lists:
            return objects and _is_of_messages(kind.value_type)
        return may_hold_text(kind.value_type, lists - 1, objects)
    return any(is_kind(kind) for is_kind in TEXT_KINDS)


def _is_of_messages(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and all(kind.get_field_index(name) >= 0 for name in ("role", "content"))


def _is_pair(cell: Any) -> bool:
    return isinstance(cell, list) and len(cell) == 2 and isinstance(cell[0], str) and isinstance(cell[1], str)


def _is_conversation(cell: Any) -> bool:
    if not isinstance(cell, list) or not cell:
        return False
    return all(isinstance(message, dict) and "role" in message and "content" in message for message in cell)
