"""A perf buffer that can be read like a ring buffer: positions, a cursor, and room that is given back by ``commit``.

The kernel forgets a perf record when it is read, so records are kept here until the operator has them. With the agent's
process they end, and the next one counts positions anew: its ``incarnation`` makes that another epoch.
"""

from __future__ import annotations

import time
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from probefleet_agent.kernel.perf import PerfBufferReader
from probefleet_agent.kernel.rings import Records

#: Records kept for an operator that is away; what comes after is dropped and counted.
MAX_BYTES = 16 << 20


class PerfRing:
    """One perf event array; the engine's counterpart of ``RingReader``."""

    def __init__(self, fd: SupportsIndex) -> None:
        self._reader = PerfBufferReader(fd)
        self._records: list[tuple[int, bytes]] = []
        self._bytes = 0
        self._next = 0
        self._committed = 0
        self.dropped = 0
        self.lost = 0
        self.incarnation = f":{time.time_ns():x}"

    def read(self, cursor: int, limit_bytes: int) -> Records:
        """Records from ``cursor`` on."""
        self._take()
        chosen = [(position, data) for position, data in self._records if position >= cursor]
        taken: list[tuple[int, bytes]] = []
        size = 0
        for position, data in chosen:
            if size + len(data) > limit_bytes:
                break
            taken.append((position, data))
            size += len(data)
        lengths = np.array([len(data) for _, data in taken], np.int64)
        offsets: npt.NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])[: len(taken)]
        whole = len(taken) == len(chosen)
        return Records(
            positions=np.array([position for position, _ in taken], np.uint64),
            data=np.frombuffer(b"".join(data for _, data in taken), np.uint8),
            offsets=offsets,
            lengths=lengths,
            end_position=self._next if whole else chosen[len(taken)][0],
        )

    def consumer_position(self) -> int:
        """Up to where the operator has everything."""
        return self._committed

    def producer_position(self) -> int:
        """Up to where records have come."""
        self._take()
        return self._next

    def commit(self, position: int) -> None:
        """The operator has everything before ``position``."""
        self._committed = max(self._committed, position)
        self._records = [(at, data) for at, data in self._records if at >= position]
        self._bytes = sum(len(data) for _, data in self._records)

    def close(self) -> None:
        """What was not read is gone."""
        self._reader.close()

    def _take(self) -> None:
        fresh = self._reader.read()
        self.lost = fresh.lost
        for index in range(len(fresh)):
            data = fresh.bytes_at(index)
            if self._bytes + len(data) > MAX_BYTES:
                self.dropped += 1
            else:
                self._records.append((self._next, data))
                self._bytes += len(data)
            self._next += 1
