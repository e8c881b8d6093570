"""Memory that is free goes back to the kernel. Called by ``main`` at the start, and run by ``app`` as a task.

gRPC takes and gives back buffers for each of thousands of connections, in threads of its own. glibc keeps what lies
between pieces that are still in use, in a pool a thread: after a push with a program to 5,000 agents a fifth of the
process. Few pools, trimmed now and then, cost milliseconds. And TLS has two buffers of 17 KiB a connection, of which
small messages use the first page: outside of the pools the rest never becomes memory, in a pool it has been another's.
Other C libraries have no such calls, and are left alone.
"""

from __future__ import annotations

import asyncio
import ctypes

import structlog

log = structlog.get_logger(__name__)

EVERY_SECONDS = 30.0
#: mallopt(3)
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_POOLS = 2
_OUTSIDE_BYTES = 16 << 10  # what is so large is no pool's


def share_pools() -> bool:
    """Let all threads share two pools, of small pieces; before they begin. Whether the C library can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_ARENA_MAX, _POOLS) == 1 == mallopt(_M_MMAP_THRESHOLD, _OUTSIDE_BYTES)


async def give_back() -> None:
    """Again and again, until cancelled."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:
        await asyncio.sleep(EVERY_SECONDS)
        # Pools are locked one after the other, each for as long as it takes: off the main loop.
        await asyncio.to_thread(trim, 0)
