"""A BPF ring buffer, drained by NumPy: the kernel's memory in, arrays of records out, no loop per record.

``collect`` keeps a *cursor* of its own: it reads ahead, sends records on, and gives the kernel its room back
(``commit``) only when the operator acknowledged them. A record is known by its byte position in the ring, which never
repeats, so what is read twice is known as such.

The ring is mapped twice in a row, so no record is ever cut. Each begins with eight bytes: its length, with a bit BUSY
(reserved, not submitted yet: nobody may pass it) and a bit DISCARD (skip it). ``kernel/bpf/ringbuf.c`` publishes them
with release stores. On x86 loads are not reordered with loads; elsewhere ``_barrier`` keeps them apart.

Wake-ups: the kernel wakes a poller only when a record lands exactly at the consumer's position, so a reader whose
commits lag behind its cursor has to look again by itself (every 100 ms while somebody follows events).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from probefleet_agent.errors import KernelError, ProbefleetError
from probefleet_agent.kernel import syscall
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import MapType

HEADER_BYTES = 8
_BUSY, _DISCARD = 1 << 31, 1 << 30
_LENGTH = _DISCARD - 1
_STRONG_LOADS = platform.machine() == "x86_64"
# How many headers are compared first when a run of equal records is followed; then 8 times more, and so on.
_FIRST_LOOK = 32
_SHORT_RUN, _STEPS = 8, 512


def _barrier() -> None:
    """A full memory barrier: sched_yield(2) goes through schedule(), which has one (smp_mb__after_spinlock)."""
    os.sched_yield()


@dataclass(frozen=True, slots=True)
class Records:
    """Records in order. Valid until their positions are committed: copy (``array``, ``bytes_at``) before that."""

    positions: npt.NDArray[np.uint64]  # byte positions in the ring, of the headers
    data: npt.NDArray[np.uint8]  # what was read, headers and all
    offsets: npt.NDArray[np.int64]  # where in ``data`` each record begins
    lengths: npt.NDArray[np.int64]  # in bytes, as reserved
    end_position: int  # where to read on

    def __len__(self) -> int:
        return len(self.positions)

    def array(self, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        """The records as a structured array (a copy). Programs submit less than the type where its end is not used (a
        text of some length): what a record does not hold is zeros.
        """
        if not len(self):
            return np.empty(0, dtype)
        if int(self.lengths.min()) < dtype.itemsize:
            filled = np.zeros((len(self), dtype.itemsize), np.uint8)
            held = np.minimum(self.lengths, dtype.itemsize)
            for length in np.unique(held).tolist():
                chosen = np.flatnonzero(held == length)
                filled[chosen, :length] = self.data[self.offsets[chosen, None] + np.arange(length)]
            return filled.view(dtype).reshape(len(self))
        steps = np.diff(self.offsets)
        first = int(self.offsets[0])
        if not len(steps) or (steps == steps[0]).all():
            stride = int(steps[0]) if len(steps) else dtype.itemsize
            view: npt.NDArray[np.void] = np.ndarray((len(self),), dtype, self.data, first, (stride,))
            return view.copy()
        rows = self.data[self.offsets[:, None] + np.arange(dtype.itemsize)]
        return np.ascontiguousarray(rows).view(dtype).reshape(len(self))

    def first(self, count: int) -> Records:
        """No more than so many of them; the rest is read next time."""
        if count >= len(self):
            return self
        positions = self.positions[:count]
        return Records(
            positions, self.data, self.offsets[:count], self.lengths[:count], end_position=int(self.positions[count])
        )

    def bytes_at(self, index: int) -> bytes:
        """One record's bytes."""
        start = int(self.offsets[index])
        return self.data[start : start + int(self.lengths[index])].tobytes()


class RingReader:
    """Maps one ring buffer; owns a descriptor of its own. One reader a ring: the consumer's position is shared."""

    def __init__(self, fd: SupportsIndex, size: int = 0) -> None:
        info = syscall.map_info(fd)
        if info.type != MapType.RINGBUF:
            raise ProbefleetError(f"map {info.name} (type {info.type}) is not a ring buffer")
        if size and size != info.max_entries:
            raise ProbefleetError(f"ring {info.name} has {info.max_entries} bytes, not {size}")
        self.map_id, self.size = info.id, info.max_entries
        #: How often it was seen without room for one more record: what programs had for it then was not kept.
        self.full = 0
        self._longest_bytes = 0
        number = Fd(int(fd), info.name)
        try:
            self._fd = number.dup()
        finally:
            number.detach()  # the caller's
        page = mmap.PAGESIZE
        try:
            self._consumer_map = mmap.mmap(self._fd.fileno(), page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._ring = mmap.mmap(
                self._fd.fileno(), page + 2 * self.size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
            )
        except OSError as error:
            self._fd.close()
            raise KernelError(error.errno or 0, f"map ring {info.name} of {self.size} bytes") from error
        self._consumer = ctypes.c_uint64.from_buffer(self._consumer_map)
        self._producer = np.frombuffer(self._ring, np.uint64, 1)

    @property
    def poll_fd(self) -> int:
        """Readable when a record was submitted at the consumer's position (see the module's text)."""
        return self._fd.fileno()

    def consumer_position(self) -> int:
        """Up to where the kernel has its room back."""
        return int(self._consumer.value)

    def producer_position(self) -> int:
        """Up to where records were reserved."""
        position = int(self._producer[0])
        if not _STRONG_LOADS:
            _barrier()
        return position

    def read(self, cursor: int, limit_bytes: int = 1 << 62) -> Records:
        """Records from ``cursor`` on, up to the first BUSY one, or the one in which the limit is reached."""
        consumer, producer = self.consumer_position(), self.producer_position()
        if not consumer <= cursor <= producer or cursor % 8:
            raise ProbefleetError(f"position {cursor} is not in the ring: it holds {consumer} to {producer}")
        page, start = mmap.PAGESIZE, cursor & (self.size - 1)
        available = min(producer - cursor, self.size)
        slots = min(available, max(limit_bytes, HEADER_BYTES)) // 8
        data = np.frombuffer(self._ring, np.uint8, available, page + start)
        heads: npt.NDArray[np.uint32] = np.ndarray((slots,), np.uint32, self._ring, page + start, (8,))
        starts, lengths, at = _parse(heads)
        if not _STRONG_LOADS:
            _barrier()
        if at * 8 > available:
            raise ProbefleetError(f"ring record at {cursor + at * 8} reaches beyond the producer's position")
        self._longest_bytes = max(self._longest_bytes, int(lengths.max(initial=0)))
        self._look_for_room(consumer, producer)
        positions = starts.astype(np.uint64) + np.uint64(cursor)
        return Records(positions, data, starts + HEADER_BYTES, lengths, cursor + at * 8)

    def commit(self, position: int) -> int:
        """Give the kernel its room up to there; the producer's position as it is afterwards.

        A producer that filled the ring meanwhile saw no consumer to wake: if the answer is beyond the cursor, read on.
        """
        consumer, producer = self.consumer_position(), self.producer_position()
        if not consumer <= position <= producer or position % 8:
            raise ProbefleetError(f"position {position} cannot be committed: the ring holds {consumer} to {producer}")
        self._look_for_room(consumer, producer)  # the last moment: nobody but us makes room
        if not _STRONG_LOADS:
            _barrier()  # what was read stays before the store
        self._consumer.value = position
        _barrier()  # the store before the load
        return self.producer_position()

    def expect(self, record_bytes: int) -> None:
        """How long a record is, as long as none has come."""
        self._longest_bytes = self._longest_bytes or record_bytes
        self._look_for_room(self.consumer_position(), self.producer_position())

    def _look_for_room(self, consumer: int, producer: int) -> None:
        # As __bpf_ringbuf_reserve() reckons (kernel/bpf/ringbuf.c): the last byte of the ring is never used.
        needed = HEADER_BYTES + (self._longest_bytes + 7) // 8 * 8
        self.full += producer + needed - consumer > self.size - 1

    def close(self) -> None:
        """Unmap. Arrays that still look into the ring keep the mapping until they go."""
        if self._fd.closed:
            return
        del self._consumer, self._producer
        for mapping in (self._consumer_map, self._ring):
            try:
                mapping.close()
            except BufferError:
                pass  # the last view lets it go
        self._fd.close()

    def __enter__(self) -> RingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse(heads: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Follow the headers: where records begin (bytes), how long they are, and the slot of eight bytes to go on at."""
    empty = np.empty(0, np.int64)
    starts, lengths, at, busy = [empty], [empty], 0, False
    while at < len(heads) and not busy:
        head = int(heads[at])
        if head & _BUSY:
            break
        length = head & _LENGTH
        step = 1 + (length + 7) // 8
        count, discarded = _run(heads[at::step], length)
        kept = np.flatnonzero(~discarded) if discarded is not None else np.arange(count)
        starts.append((at + step * kept) * HEADER_BYTES)
        lengths.append(np.full(len(kept), length, np.int64))
        at += step * count
        if count < _SHORT_RUN:  # records of many sizes: one by one is faster
            some_starts, some_lengths, at, busy = _step(heads, at)
            starts.append(some_starts)
            lengths.append(some_lengths)
    return np.concatenate(starts), np.concatenate(lengths), at


def _step(heads: npt.NDArray[np.uint32], at: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int, bool]:
    """The next few hundred records one by one; the last answer says whether a BUSY one stopped it."""
    starts: list[int] = []
    lengths: list[int] = []
    for _ in range(_STEPS):
        if at >= len(heads):
            break
        head = int(heads[at])
        if head & _BUSY:
            return np.array(starts, np.int64), np.array(lengths, np.int64), at, True
        length = head & _LENGTH
        if not head & _DISCARD:
            starts.append(at * HEADER_BYTES)
            lengths.append(length)
        at += 1 + (length + 7) // 8
    return np.array(starts, np.int64), np.array(lengths, np.int64), at, False


def _run(heads: npt.NDArray[np.uint32], length: int) -> tuple[int, npt.NDArray[np.bool_] | None]:
    """How many records in a row have that length and are not BUSY; which of them are discarded (None: none is)."""
    count, look = 0, _FIRST_LOOK
    discarded, any_discarded = [], False
    while count < len(heads):
        some = heads[count : count + look].copy()  # once: the kernel may be writing
        other = (some & np.uint32(_BUSY | _LENGTH)) != length
        same = int(other.argmax()) if other.any() else len(some)
        skip = (some[:same] & np.uint32(_DISCARD)) != 0
        any_discarded = any_discarded or bool(skip.any())
        discarded.append(skip)
        count += same
        if same < len(some):
            break
        look *= 8
    return count, np.concatenate(discarded) if any_discarded else None
