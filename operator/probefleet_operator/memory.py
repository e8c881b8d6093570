"""Memory that is free goes back to the kernel, and what nobody writes to never comes. ``main`` settles the heap at the
start, and ``app`` runs ``give_back`` as a task.

gRPC takes and gives back buffers for each of thousands of connections, in threads of its own. glibc keeps what lies
between pieces that are still in use: after a push with a program to 5,000 agents a fifth of the process. Few pools,
trimmed now and then, cost milliseconds. And TLS has two buffers of 17 KiB a connection, of which small messages use the
first page: mapped by themselves the rest never becomes memory, in a pool it has been somebody else's.
"""

from __future__ import annotations

import asyncio
import ctypes

import structlog

log = structlog.get_logger(__name__)

EVERY_SECONDS = 30.0
LARGE_BYTES = 16 << 10


async def give_back() -> None:
    """Again and again, until cancelled."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:
        await asyncio.sleep(EVERY_SECONDS)
        # Pools are locked one after the other, each for as long as it takes: off the main loop.
        await asyncio.to_thread(trim, 0)
