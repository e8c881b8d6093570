"""A perf buffer (BPF_MAP_TYPE_PERF_EVENT_ARRAY): a ring a CPU in, records and losses out.

``collect`` uses it for foreign programs that call bpf_perf_event_output(); ours use ring buffers. The rings end with
this reader: between two readers records are lost, and nobody counts them. Within one the kernel counts them, by
PERF_FORMAT_LOST (Linux 6.0) or by PERF_RECORD_LOST, which comes only with the next record that finds room.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from probefleet_agent.errors import KernelError, ProbefleetError
from probefleet_agent.kernel import maps, rings, syscall, uapi
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import MapType

_SOFTWARE, _BPF_OUTPUT = 1, 10
_SAMPLE_RAW, _FORMAT_LOST = 1 << 10, 1 << 4
_RECORD_LOST, _RECORD_SAMPLE = 2, 9
_HEAD, _TAIL = 1024, 1032  # in the first page: data_head, data_tail
_SAMPLE_HEADER_BYTES = 12  # struct perf_event_header, u32 size
_SLOT = np.dtype([("type", "<u4"), ("misc", "<u2"), ("size", "<u2")])


@dataclass(frozen=True, slots=True)
class PerfRecords:
    """Copied records, CPU by CPU, in order within each. The kernel pads a record until its length is 4 modulo 8."""

    sequence: npt.NDArray[np.uint64]  # counts records since the reader was opened
    cpus: npt.NDArray[np.uint16]
    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    lost: int  # cumulative, since the reader was opened

    def __len__(self) -> int:
        return len(self.offsets)

    def array(self, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        """The records as a structured array; each has to be at least as long as ``dtype``."""
        return rings.Records(self.sequence, self.data, self.offsets, self.lengths, 0).array(dtype)

    def bytes_at(self, index: int) -> bytes:
        """One record's bytes, padding included."""
        start = int(self.offsets[index])
        return self.data[start : start + int(self.lengths[index])].tobytes()


class _CpuRing:
    def __init__(self, cpu: int, pages: int) -> None:
        self.cpu = cpu
        self.counts_losses = True
        try:
            self.event = self._open(_FORMAT_LOST)
        except KernelError:
            self.counts_losses = False
            self.event = self._open(0)
        try:
            self.map = mmap.mmap(self.event.fileno(), (1 + pages) * mmap.PAGESIZE, mmap.MAP_SHARED)
        except OSError as error:
            self.event.close()
            advice = "RLIMIT_MEMLOCK or /proc/sys/kernel/perf_event_mlock_kb limit it."
            raise KernelError(error.errno or 0, f"map {pages} pages of perf buffer", advice) from error
        self.size = pages * mmap.PAGESIZE
        self.head = ctypes.c_uint64.from_buffer(self.map, _HEAD)
        self.tail = ctypes.c_uint64.from_buffer(self.map, _TAIL)
        self.seen_lost = 0

    def _open(self, read_format: int) -> Fd:
        return syscall.perf_event_open(
            _SOFTWARE, _BPF_OUTPUT, cpu=self.cpu, period=1, sample_type=_SAMPLE_RAW, wakeup_events=1,
            read_format=read_format, what=f"perf buffer of CPU {self.cpu}",
        )  # fmt: skip

    def take(self) -> bytes:
        """Copy what is there and give the room back."""
        head, tail = int(self.head.value), int(self.tail.value)
        rings._barrier()
        start, length = tail % self.size, min(head - tail, self.size)
        first = min(length, self.size - start)
        data = self.map[mmap.PAGESIZE + start : mmap.PAGESIZE + start + first]
        data += self.map[mmap.PAGESIZE : mmap.PAGESIZE + length - first]
        rings._barrier()
        self.tail.value = head
        return data

    def lost(self) -> int:
        """Cumulative."""
        if self.counts_losses:
            return int(struct.unpack("<QQ", os.read(self.event.fileno(), 16))[1])
        return self.seen_lost

    def close(self) -> None:
        del self.head, self.tail
        self.map.close()
        self.event.close()


class PerfBufferReader:
    """Opens a ring on every online CPU, also on those that come later, and puts them into the map; owns them."""

    def __init__(self, map_fd: SupportsIndex, pages: int = 64) -> None:
        info = syscall.map_info(map_fd)
        if info.type != MapType.PERF_EVENT_ARRAY:
            raise ProbefleetError(f"map {info.name} (type {info.type}) is not a perf event array")
        if pages <= 0 or pages & (pages - 1):
            raise ProbefleetError(f"{pages} pages: a perf buffer has a power of two of them")
        self._map, self._most, self._pages = map_fd, info.max_entries, pages
        self._name = info.name
        self._rings: list[_CpuRing] = []
        self._gone: list[_CpuRing] = []  # of CPUs that came again, still to be read out
        self._online: set[int] = set()
        self._lost_before = 0  # of rings whose CPU went and came again
        self._sequence = 0
        #: CPUs that came online while it read: what they recorded before that was seen found no ring.
        self.came: list[int] = []
        #: CPUs without a ring, and why.
        self.failed: dict[int, KernelError] = {}
        try:
            self._follow()
            for error in self.failed.values():
                raise error
        except BaseException:
            self.close()
            raise
        self.came.clear()

    @property
    def poll_fds(self) -> list[int]:
        """Readable when there is something."""
        return [ring.event.fileno() for ring in self._rings]

    def read(self) -> PerfRecords:
        """Everything that is there now, and how much was lost so far."""
        chunks, offsets, lengths, cpus, base = [], [], [], [], 0
        self._follow()
        for ring in (*self._rings, *self._gone):
            data = ring.take()
            starts, sizes, lost = _parse(data)
            ring.seen_lost += lost
            chunks.append(np.frombuffer(data, np.uint8))
            offsets.append(starts + base)
            lengths.append(sizes)
            cpus.append(np.full(len(starts), ring.cpu, np.uint16))
            base += len(data)
        while self._gone:
            self._lost_before += self._gone[-1].lost()
            self._gone.pop().close()
        all_offsets = np.concatenate(offsets) if offsets else np.empty(0, np.int64)
        sequence = np.arange(self._sequence, self._sequence + len(all_offsets), dtype=np.uint64)
        self._sequence += len(all_offsets)
        return PerfRecords(
            sequence,
            np.concatenate(cpus) if cpus else np.empty(0, np.uint16),
            np.concatenate(chunks) if chunks else np.empty(0, np.uint8),
            all_offsets,
            np.concatenate(lengths) if lengths else np.empty(0, np.int64),
            self._lost_before + sum(ring.lost() for ring in self._rings),
        )

    def _follow(self) -> None:
        """Open rings on CPUs that came. A ring ends with its CPU: those of CPUs that came again are to be read out."""
        online = set(maps.online_cpus())
        self._online &= online
        self.failed.clear()
        for cpu in sorted(online - self._online):
            if cpu < self._most:
                try:
                    ring = self._open(cpu)
                except KernelError as error:
                    self.failed[cpu] = error  # it may have gone again; the next reading tries anew
                    continue
                self._gone += [each for each in self._rings if each.cpu == cpu]
                self._rings = [*(each for each in self._rings if each.cpu != cpu), ring]
                self.came.append(cpu)
            self._online.add(cpu)

    def missing(self) -> list[str]:
        """What of online CPUs is not recorded, in words."""
        words = []
        if came := ", ".join(map(str, sorted(set(self.came)))):
            words.append(f"CPU {came} came online: what it recorded before its perf buffer was opened")
        if beyond := ", ".join(map(str, sorted(cpu for cpu in self._online if cpu >= self._most))):
            words.append(f"{self._name} has {self._most} places: what CPU {beyond} records is lost")
        return words + [f"CPU {cpu} has no perf buffer: {error}" for cpu, error in self.failed.items()]

    def _open(self, cpu: int) -> _CpuRing:
        ring = _CpuRing(cpu, self._pages)
        try:
            syscall.map_update(self._map, struct.pack("<I", cpu), struct.pack("<I", ring.event.fileno()))
            syscall.perf_ioctl(ring.event, uapi.PERF_EVENT_IOC_ENABLE)
        except BaseException:
            ring.close()
            raise
        return ring

    def close(self) -> None:
        """The rings go, and with them what was not read."""
        self._rings += self._gone
        self._gone.clear()
        while self._rings:
            self._rings.pop().close()

    def __enter__(self) -> PerfBufferReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse(data: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Offsets and lengths of samples, and records lost. Runs of equal headers are taken at once."""
    slots = np.frombuffer(data, _SLOT, len(data) // 8)
    words = np.frombuffer(data, np.uint64, len(data) // 8)
    starts, sizes, lost, at = [], [], 0, 0
    while at < len(slots):
        kind, size = int(slots["type"][at]), int(slots["size"][at])
        if size < 8 or size % 8 or at * 8 + size > len(data):
            raise ProbefleetError(f"perf buffer record of {size} bytes at {at * 8} of {len(data)}: it is damaged")
        if kind == _RECORD_LOST and size >= 24:
            lost += int(words[at + 2])
        if kind != _RECORD_SAMPLE:
            at += size // 8
            continue
        count = _run(words[at :: size // 8])
        if at * 8 + count * size > len(data):
            count -= 1
        starts.append((at + size // 8 * np.arange(count)) * 8 + _SAMPLE_HEADER_BYTES)
        sizes.append(np.full(count, size - _SAMPLE_HEADER_BYTES, np.int64))
        at += count * (size // 8)
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *starts]), np.concatenate([empty, *sizes]), lost


def _run(words: npt.NDArray[np.uint64]) -> int:
    """How many in a row equal the first; looks ever further, so that short runs stay cheap."""
    count, look = 0, 32
    while count < len(words):
        same = words[count : count + look] == words[0]
        if not same.all():
            return count + int((~same).argmax())
        count, look = count + len(same), look * 8
    return count
