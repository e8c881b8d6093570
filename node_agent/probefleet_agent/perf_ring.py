"""Records that the kernel forgets when they are read, read like a ring buffer: positions, a cursor, and ``commit``.

Perf buffers, queues and stacks. Records are kept here until the operator has them. With the agent's process they end,
and the next one counts positions anew: its ``incarnation`` makes that another epoch.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from probefleet_agent.kernel import map_storage
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.perf import PerfBufferReader
from probefleet_agent.kernel.rings import Records
from probefleet_agent.kernel.syscall import MapInfo

#: Records kept for an operator that is away; what comes after is dropped and counted.
MAX_BYTES = 16 << 20


class KeptRing(abc.ABC):
    """What was taken out of one map; the engine's counterpart of ``RingReader``."""

    def __init__(self) -> None:
        self._records: list[tuple[int, bytes]] = []
        self._bytes = 0
        self._next = 0
        self._committed = 0
        self.dropped = 0
        self.lost = 0
        self.said: list[str] = []  # losses that nobody counts, in words
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

    @abc.abstractmethod
    def close(self) -> None:
        """What was not read is gone."""

    @abc.abstractmethod
    def _fresh(self) -> Sequence[bytes]:
        """What has come since the last time, taken out of the kernel."""

    def _take(self) -> None:
        for data in self._fresh():
            if self._bytes + len(data) > MAX_BYTES:
                self.dropped += 1
            else:
                self._records.append((self._next, data))
                self._bytes += len(data)
            self._next += 1


class PerfRing(KeptRing):
    """One perf event array."""

    def __init__(self, fd: SupportsIndex) -> None:
        super().__init__()
        # The kernel takes the events out again when the descriptor is closed that they were put in by: an instance that
        # shares the map may go before the others.
        number = Fd(int(fd), "perf buffer")
        try:
            self._fd = number.dup()
        finally:
            number.detach()  # the caller's
        try:
            self._reader = PerfBufferReader(self._fd)
        except BaseException:
            self._fd.close()
            raise

    def close(self) -> None:
        """What was not read is gone."""
        self._reader.close()
        self._fd.close()

    def _fresh(self) -> Sequence[bytes]:
        fresh = self._reader.read()
        self.lost = fresh.lost
        self.said = self._reader.missing()
        return [fresh.bytes_at(index) for index in range(len(fresh))]


class QueueRing(KeptRing):
    """One queue (oldest first) or stack (newest first), emptied at each reading. What finds it full is not counted."""

    def __init__(self, fd: SupportsIndex, info: MapInfo) -> None:
        super().__init__()
        self._fd, self._info = fd, info

    def close(self) -> None:
        """What was not popped stays in the kernel."""

    def _fresh(self) -> Sequence[bytes]:
        fresh = map_storage.pop_all(self._fd, self._info)
        if len(fresh) >= self._info.max_entries:
            self.said = [f"{self._info.name} was full, and nobody counts what finds no room"]
        return fresh
