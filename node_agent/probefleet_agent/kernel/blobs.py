"""Bytes of any length in a BPF array: what has to live as long as pins do and is too large for a manifest's one entry.

``joining`` keeps baselines so. In pieces, since kernels copy an entry that is looked up or set through one unbroken
stretch of memory of its size. The array is charged to the agent like any map of its programs.
"""

from __future__ import annotations

from typing import SupportsIndex

from probefleet_agent.kernel import maps, syscall
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import MapType

PIECE_BYTES = 32 << 10


def create(data: bytes, name: str) -> Fd:
    """A new array that holds these bytes, and zeros up to the end of its last piece. KernelError where memory lacks."""
    piece = min(PIECE_BYTES, maps.round_up(max(len(data), 1), 8))
    count = max(-(-len(data) // piece), 1)
    made = syscall.map_create(MapType.ARRAY, key_size=4, value_size=piece, max_entries=count, name=name)
    try:
        for index in range(count):
            syscall.map_update(made, _key(index), data[index * piece : (index + 1) * piece].ljust(piece, b"\0"))
    except BaseException:
        made.close()
        raise
    return made


def read(fd: SupportsIndex) -> bytes:
    """All of its bytes, with the zeros at their end."""
    info = maps.info(fd)
    pieces = (syscall.map_lookup(fd, _key(index), info.value_size) or b"" for index in range(info.max_entries))
    return b"".join(pieces)


def patch(fd: SupportsIndex, at: int, data: bytes) -> None:
    """Put these bytes in place of those from ``at`` on, piece by piece: a reader sees each piece old or new."""
    piece = maps.info(fd).value_size
    done = 0
    while done < len(data):
        index, offset = divmod(at + done, piece)
        part = data[done : done + piece - offset]
        old = syscall.map_lookup(fd, _key(index), piece) or bytes(piece)
        if old[offset : offset + len(part)] != part:
            syscall.map_update(fd, _key(index), old[:offset] + part + old[offset + len(part) :])
        done += len(part)


def _key(index: int) -> bytes:
    return index.to_bytes(4, "little")
