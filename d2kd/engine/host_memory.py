"""What the C library does with the memory that a step on the CPU frees."""

import ctypes
import os
import sys

# parameters of mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MOST = 2**31 - 1  # of an int
_LARGEST_REUSED = 32 * 2**20  # what glibc allows: beyond it a block is a mapping of its own, and goes back when freed
_AT_ONCE = 64 * 2**20


def reuse_freed_memory() -> bool:
    """Has glibc keep the memory that a step frees for the next one, and returns whether it does.

    Otherwise most of it goes back to the system at the end of every step, which gives it anew page by page: 2 to 8 %
    of the time of a training step on the CPU. The process never holds more than at its peak. Where the user has said
    something else (MALLOC_* variables, glibc.malloc in GLIBC_TUNABLES), and with other C libraries, nothing changes.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if tuned or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    values = {_TRIM_THRESHOLD: _MOST, _TOP_PAD: _AT_ONCE, _MMAP_THRESHOLD: _LARGEST_REUSED}
    return all([bool(library.mallopt(parameter, value)) for parameter, value in values.items()])
