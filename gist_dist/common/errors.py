"""The one exception whose message is an answer for the user."""

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
