"""How the C library keeps memory, said once at a process's start, before its threads are there.

glibc has a pool for each thread, and gives back of a pool what lies above the last piece in use. Large pieces are
mapped by themselves and go back at once, but what "large" means grows with the largest piece that was ever given back,
from 128 KiB up to 32 MiB: after one reading of /proc/kallsyms all tables of an agent would lie in a pool, and stay.
Other C libraries have no such settings, and are left alone.
"""

from __future__ import annotations

import ctypes

#: mallopt(3)
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_POOLS = 2


def settle(*, large_bytes: int = 128 << 10) -> bool:
    """Let all threads share two pools, and say for good what is mapped by itself. Whether the C library can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_ARENA_MAX, _POOLS) == 1 == mallopt(_M_MMAP_THRESHOLD, large_bytes)
