"""The one exception whose message is an answer for the user, and other errors as part of an answer."""

from gist_dist.common.redact import redact_text

LONGEST = 4000
"""Characters of an answer; what is longer loses its middle."""


def in_one_line(error: object, limit: int = 300) -> str:
    """What a library's error says, as part of a sentence."""
    return " ".join(str(error).split())[:limit]


class UserError(Exception):
    """A mistake in a recipe, its data or its machine: one sentence that names the value and the remedy.

    It is shown, logged and kept beside results, so it holds no secret and no book, whatever it was given.
    """

    def __init__(self, message: str) -> None:
        told = redact_text(message)
        super().__init__(told if len(told) <= LONGEST else f"{told[: LONGEST // 2]} … {told[-LONGEST // 2 :]}")
