"""What tests do without what they need."""

import os
from typing import NoReturn

import pytest


def not_here(reason: str) -> NoReturn:
    """Skip the test; where CI is set, as .ci/run does, fail it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
