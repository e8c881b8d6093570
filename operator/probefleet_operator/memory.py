"""Memory that is free goes back to the kernel. Called by ``main`` at the start, and run by ``app`` as a task.

gRPC takes and gives back buffers for each of thousands of connections, in threads of its own. glibc keeps what lies
between pieces that are still in use, in a pool a thread: after a push with a program to 5,000 agents a fifth of the
process. Few pools, trimmed now and then, cost milliseconds. Other C libraries have no such calls, and are left alone.
"""

from __future__ import annotations

import asyncio
import ctypes

import structlog

log = structlog.get_logger(__name__)

EVERY_SECONDS = 30.0
#: mallopt(3)
_M_ARENA_MAX = -8
_POOLS = 2


def share_pools() -> bool:
    """Let all threads share two pools; before they begin. Whether the C library can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_ARENA_MAX, _POOLS) == 1


async def give_back() -> None:
    """Again and again, until cancelled."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:
        await asyncio.sleep(EVERY_SECONDS)
        # Pools are locked one after the other, each for as long as it takes: off the main loop.
        await asyncio.to_thread(trim, 0)
