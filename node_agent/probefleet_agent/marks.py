"""How far the operator has each ring, and how many records that were: in a pinned map, as all that outlives the agent.

The engine keeps one mark for each (policy, output, ring). It puts one when a reader begins, and one when the operator
acknowledges, *before* the kernel gets its room back: a reader that comes later begins at its mark, so an agent that is
killed in between neither skips a record nor counts one twice. An operator that comes later is told by
``counted_before`` what the one before it had.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import structlog

from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import maps, pins, syscall
from probefleet_agent.kernel.uapi import MapType
from probefleet_agent.samples import Mark, RingOf

_KEY_BYTES = 16
_VALUE = struct.Struct("<QQQ")
_NAME = "marks"
_MAX_MARKS = 4096
_NO_PREALLOC = 1  # BPF_F_NO_PREALLOC: room is taken by marks that are there

log = structlog.get_logger("agent")


class Marks:
    """The pinned map. Belongs to the engine, which closes it."""

    def __init__(self, root: pins.Root) -> None:
        found = root.identity_map(_NAME)
        if found is None:
            found = syscall.map_create(
                MapType.HASH, key_size=_KEY_BYTES, value_size=_VALUE.size, max_entries=_MAX_MARKS, name="pf_marks",
                flags=_NO_PREALLOC,
            )  # fmt: skip
            root.pin_identity(_NAME, found)
        self._map = found

    def get(self, ring: RingOf) -> Mark | None:
        """The mark that this process, or one before it, put."""
        value = syscall.map_lookup(self._map, _key(ring), _VALUE.size)
        return Mark(*_VALUE.unpack(value)) if value else None

    def put(self, ring: RingOf, mark: Mark) -> None:
        """Keep it. Without room the next process begins where the kernel's room ends, and shows a gap."""
        if mark.counted is None:
            return
        try:
            syscall.map_update(self._map, _key(ring), _VALUE.pack(*mark))
        except KernelError as error:
            log.warning("how far a ring was read is not kept across a restart", error=str(error))

    def drop(self, ring: RingOf) -> None:
        """Forget it: its ring, or its policy, is gone."""
        syscall.map_delete(self._map, _key(ring))

    def keep_only(self, rings: Iterable[RingOf]) -> None:
        """Forget all others: of rings that went while no agent was there."""
        kept = {_key(ring) for ring in rings}
        keys, _ = maps.read(self._map, maps.info(self._map))
        for key in (row.tobytes() for row in keys):
            if key not in kept:
                syscall.map_delete(self._map, key)

    def close(self) -> None:
        """Let go of the descriptor; the pin stays."""
        self._map.close()


def _key(ring: RingOf) -> bytes:
    return hashlib.blake2b("\0".join(ring).encode(), digest_size=_KEY_BYTES).digest()
