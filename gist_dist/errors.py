"""The one exception whose message is an answer for the user."""


class UserError(Exception):
    """A mistake in a recipe, its data or its machine: one sentence that names the value and the remedy."""
