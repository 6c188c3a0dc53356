"""The C library's heap, where one variant's memory becomes another's."""

from __future__ import annotations

import ctypes

# Of <malloc.h>. From how many bytes on a block is mapped by itself is where glibc's own adjustment ends, at its most.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_MAPPED, _NEVER = 2**25, 2**31 - 1


def keep_freed_memory() -> None:
    """No call gives freed memory back to the system, for most of that may be another variant's.

    glibc trims its heap in whatever call happens to free a block near the end: milliseconds, where temporaries of
    16 MiB lie there, and their pages are new ones the next time. A variant that runs alone pays for neither.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MOST_MAPPED)
        mallopt(_TRIM_THRESHOLD, _NEVER)
