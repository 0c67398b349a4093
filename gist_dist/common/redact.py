"""Secrets stay out of everything that is written or shown: recipes as they are kept, messages, logs.

What is a secret follows from its name (HF_TOKEN, secret_key, a header's Authorization), from its place in an address
(user:password@host, ?access_key=…), from its form (hf_…, AKIA…), or from being the value of such a variable of this
process. The mask is always the same, so that what was masked before compares equal to what is masked now.
"""

import logging
import os
import re
from typing import Any

MASK = "***"
HIDDEN_SECTIONS = ("env_vars",)
"""Sections of a recipe of which nothing is shown, whatever its name."""
SHORTEST_VALUE = 8
"""Fewest characters of a variable's value that is looked for in texts: shorter ones are words."""

NAME = (
    r"(?:token|secret|passwd|password|pwd|passphrase|credentials?|authorization|signature|sig"
    r"|(?:api|access|account|private|secret|shared|storage|encryption|signing)[-_ ]?key(?:[-_ ]?id)?)"
)
SECRET_NAME = re.compile(rf"(?:^|[-_.])(?:{NAME})$", re.IGNORECASE)
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# user:password@host, but not host:8265/path@2; a lone name before the @ is a secret on the web (a token), and a
# container's name in object storage.
USER = re.compile(r"(://)[^\s/:@'\"]{0,200}:(?!\d+(?:[/?,;\s]|$))[^\s@'\"]{0,1000}(?:@[^\s/@'\"]{0,200}){0,9}@")
WEB_USER = re.compile(r"((?:https?|ftps?|git|ssh)(?:\+\w+)?://)[^\s/@'\"]+@", re.IGNORECASE)
OPTION = re.compile(rf"([?&;][\w.-]{{0,60}}?{NAME}=)[^\s&;#'\"]+", re.IGNORECASE)
SETTING = re.compile(
    rf"((?<![\w.?&-])[\w.-]{{0,200}}?{NAME}['\"]?\s*(?:=|:(?!//))\s*)(?!null\b|None\b)('[^']+'|\"[^\"]+\"|[^\s,;'\"}})\]]+)",
    re.IGNORECASE,
)
BEARER = re.compile(r"\b((?:Bearer|Basic)\s+)[\w.~+/=-]{8,}")
FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{40,}|sk-(?:[a-z]+-)?[A-Za-z0-9]{24,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|xox[a-z]-[\w-]{10,})"
)


def redact(tree: Any) -> Any:
    """The same tree of plain values, with every secret masked."""
    if isinstance(tree, dict):
        return {key: _hidden(value) if _is_secret(key) else redact(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(value) for value in tree]
    return redact_address(tree) if isinstance(tree, str) else tree


def redact_text(text: str) -> str:
    """A message without secrets: those in addresses, behind their names, of a known form, or of this process."""
    text = SETTING.sub(_masked_setting, BEARER.sub(rf"\1{MASK}", redact_address(text)))
    for value in _own_secrets():
        text = text.replace(value, MASK)
    return text


def redact_address(text: str) -> str:
    """A path or URI (or a text with some) without passwords and keys; any other text stays as it is."""
    text = FORMS.sub(MASK, text)
    if "://" not in text and "?" not in text:
        return text
    return OPTION.sub(rf"\1{MASK}", WEB_USER.sub(rf"\1{MASK}@", USER.sub(rf"\1{MASK}@", text)))


def printable(text: str) -> str:
    """For a terminal: without secrets, and without characters that would move its cursor or hide what is said."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in redact_text(text))
    return shown.encode("utf-8", "backslashreplace").decode()


class Redacting(logging.Formatter):
    """Formats records as printable(), what libraries and exceptions say included."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _is_secret(key: Any) -> bool:
    return isinstance(key, str) and (key in HIDDEN_SECTIONS or bool(SECRET_NAME.search(CAMEL.sub("_", key))))


def _hidden(value: Any) -> Any:
    """Masked, with the names below still to be seen. Empty values stay."""
    if isinstance(value, dict):
        return {key: _hidden(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(inner) for inner in value]
    return value if value in (None, "") or isinstance(value, bool) else MASK


def _masked_setting(found: re.Match[str]) -> str:
    name, value = found.groups()
    return f"{name}{MASK}" if value[0] not in "'\"" else f"{name}{value[0]}{MASK}{value[0]}"


def _own_secrets() -> list[str]:
    """Longest first: one may be part of another."""
    names = [name for name in os.environ if _is_secret(name) and name != "PWD"]  # that is a folder, whatever it sounds
    values = {os.environ[name] for name in names if len(os.environ[name]) >= SHORTEST_VALUE}
    return sorted(values, key=len, reverse=True)
