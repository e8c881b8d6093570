"""Memory that was taken and given back: the process has it no longer."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from probefleet_operator import memory
from probefleet_wire import heap

# As gRPC's threads do: many pieces are taken, of which one in sixteen stays.
_PROCESS = """
import asyncio, ctypes, sys, threading
from probefleet_operator import memory
from probefleet_wire import heap

memory.EVERY_SECONDS = 0.0
assert heap.settle(large_bytes=memory.LARGE_BYTES)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

all_taken = threading.Barrier(4)

def churn():
    pieces = [libc.malloc(4096) for _ in range(4096)]
    for piece in pieces:
        ctypes.memset(ctypes.c_void_p(piece), 1, 4096)
    all_taken.wait()  # else one may take what another has just given back
    for index, piece in enumerate(pieces):
        if index % 16:
            libc.free(piece)

def resident_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

async def main():
    task = asyncio.create_task(memory.give_back())
    async with asyncio.timeout(30):
        while resident_kib() > before - 4 * 12 * 1024:
            await asyncio.sleep(0.01)
    task.cancel()

threads = [threading.Thread(target=churn) for _ in range(4)]
for each in threads:
    each.start()
for each in threads:
    each.join()
before = resident_kib()
asyncio.run(main())
"""


# As an agent: it reads the kernel's symbols once, and after that has tables of some MiB, and small things between them.
_TABLES = """
import ctypes
from probefleet_wire import heap

assert heap.settle()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def taken(size):
    piece = ctypes.c_void_p(libc.malloc(size))
    ctypes.memset(piece, 1, size)
    return piece

def resident_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

libc.free(taken(20 << 20))
before = resident_kib()
tables, between = zip(*[(taken(1 << 20), taken(4096)) for _ in range(20)])
for each in tables:
    libc.free(each)
assert resident_kib() < before + 2 * 1024, (before, resident_kib())
"""


def test_tables_go_back_at_once_though_a_larger_piece_went_before() -> None:
    done = subprocess.run([sys.executable, "-c", _TABLES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_lies_between_pieces_in_use_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", _PROCESS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_it_ends_at_once_where_the_c_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """Has neither mallopt nor malloc_trim."""

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Other())
    assert not heap.settle()
    asyncio.run(memory.give_back())
