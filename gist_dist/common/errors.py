"""The one exception whose message is an answer for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

from gist_dist.common.redact import redact_text

LONGEST = 4000
"""Characters of an answer; what is longer loses its middle."""


class UserError(Exception):
    """A mistake in a recipe, its data or its machine: one sentence that names the value and the remedy.

    It is shown, logged and kept beside results, so secrets are masked and long texts are cut.
    """

    def __init__(self, message: str) -> None:
        text = redact_text(message)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}")


class Damaged(Exception):
    """What is wrong with a file that was written whole: a few words that name it."""


@contextmanager
def in_phase(name: str) -> Iterator[None]:
    """An exception that leaves the block knows in which phase of a step it was raised; of nested ones, the inner."""
    try:
        yield
    except Exception as error:
        if phase_of(error) is None:
            error.gist_dist_phase = name  # type: ignore[attr-defined]
        raise


def phase_of(error: BaseException) -> str | None:
    """None for one that was raised in no phase."""
    return getattr(error, "gist_dist_phase", None)
