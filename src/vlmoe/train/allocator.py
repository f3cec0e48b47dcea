"""The C library's memory in a training process on the CPU.

A step allocates and frees the same blocks as the step before. By default glibc gives large freed blocks back to the
system, which maps and zeroes their pages anew in the next step.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # M_... of glibc's malloc.h
KEPT, MARGIN = 2**31 - 1, 256 * 2**20  # bytes


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for the next step. Returns whether the C library took it.

    Only addresses change, no number does. Elsewhere than on Linux with glibc nothing happens. The process's memory
    stays at its peak, as that of any loop of equal steps does.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((TRIM_THRESHOLD, KEPT), (TOP_PAD, MARGIN), (MMAP_THRESHOLD, KEPT))
    return all(mallopt(option, value) for option, value in settings)
