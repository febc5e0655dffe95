"""Memory that is freed is kept for the next batch.

glibc gives it back to the system and takes it anew, page by page: for batches and tiles of some
megabytes that is 5–15 % of the time. In one arena, what one thread frees serves the others.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

KEPT = {  # the environment's spelling: for processes that are started with it
    "MALLOC_TRIM_THRESHOLD_": "536870912",
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_ARENA_MAX": "1",
}
_NUMBERS = {  # mallopt's, of malloc.h
    "MALLOC_TRIM_THRESHOLD_": -1,
    "MALLOC_MMAP_THRESHOLD_": -3,
    "MALLOC_ARENA_MAX": -8,
}


@cache
def keep_freed() -> None:
    """From here on in this process; not where its environment says something else, or no glibc."""
    libc = _glibc()
    if libc is None or any(name in os.environ for name in KEPT):
        return
    for name, value in KEPT.items():
        libc.mallopt(_NUMBERS[name], int(value))


def give_back() -> None:
    """What is free now, to the system: after work that took more than what follows it will."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
