"""All that imports ray."""

import os

# Read when ray is imported. Under `uv run` Ray would package the working directory and start workers by another
# `uv run` there; ours run in the environment that the command runs in.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
