"""Numbers and texts as people read them: on the page, in warnings, in the log and on the terminal."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

SHORT = reprlib.Repr()  # a few kilobytes of YAML aliases can stand for gigabytes
"""repr() of values from strangers, within a line."""
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 200, 200


def signed(change: int | float) -> str:
    return f"{change:+.2f}".replace("-", "−")


def percent(fraction: int | float) -> str:
    return f"{100 * fraction:.0f} %" if fraction >= 0.1 else f"{100 * fraction:.2g} %"


def plural(count: int, noun: str, many: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def listed(items: list[Any], limit: int = 5) -> str:
    """a, b, c and 7 more."""
    named = ", ".join(str(item) for item in items[:limit])
    return named if len(items) <= limit else f"{named} and {len(items) - limit:,} more"


def near(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """At most three of the known names that are spelled alike, whatever their case; the closest first."""
    by_lower_case = {one.lower(): one for one in known}
    return [by_lower_case[one] for one in difflib.get_close_matches(name.lower(), by_lower_case, 3, cutoff)]


def did_you_mean(names: list[str]) -> str:
    """The end of a sentence; empty where nothing is near."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def one_line(error: object, limit: int = 300) -> str:
    """What an error or a text says, as part of a sentence; an error without a message says its type."""
    text = " ".join(str(error).split()) or (type(error).__name__ if isinstance(error, BaseException) else "")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def duration(seconds: int | float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def clock(seconds: int | float) -> str:
    """1:05, or 2:01:05 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def gigabytes(num_bytes: int | float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def plain(text: str) -> str:
    """For a terminal of any encoding."""
    for char, ascii_form in {"−": "-", "→": "->", "×": "x", "–": "-", "…": "..."}.items():
        text = text.replace(char, ascii_form)
    return text


def text_table(rows: list[list[str]], num_text_columns: int = 1) -> list[str]:
    """Lines of equal length; the first columns to the left, those of numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < num_text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


FILTERS = {
    "points": lambda value: "–" if value is None else f"{value:.2f}",
    "signed": lambda value: "–" if value is None else signed(value),
    "percent": lambda value: "–" if value is None else percent(value),
    "count": lambda value: "–" if value is None else f"{value:,.0f}",
    "number": lambda value: "–" if value is None else f"{value:.4g}",
    "cosine": lambda value: "–" if value is None else f"{value:.3f}".replace("-", "−"),
    "duration": lambda value: "–" if value is None else duration(value),
    "gigabytes": lambda value: "–" if value is None else gigabytes(value),
}
"""Filters of the templates; a value that is not known is a dash."""
