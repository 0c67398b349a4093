"""Memory that a CPU's steps use again."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""mallopt's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD."""


def keep_freed_memory() -> bool:
    """From now on this process keeps what tensors free, up to its peak; whether that could be set (glibc only).

    glibc hands large blocks back to the system at the end of a step, and the next step then waits for the system to
    clear the same gigabytes page by page: up to a tenth of a step that keeps its graphs.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(MMAP_THRESHOLD, 2**30))
