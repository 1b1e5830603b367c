"""The C library's memory, set for processes that decode images in threads."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_MMAP_BYTES = 32 * 2**20
_TRIM_BYTES = 2 * _MMAP_BYTES


def keep_freed_pages() -> None:
    """Freed images stay with the process, up to 64 MiB for each thread that decoded them.

    glibc returns them to the kernel otherwise, which clears every page of the next image again: a
    quarter of the time of a small JPEG. These are the values that it takes itself once it has
    freed 32 MiB in one piece. Without effect on other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
