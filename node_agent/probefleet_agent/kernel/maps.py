"""Maps in bulk: a descriptor in, NumPy arrays of raw keys and values out; and back.

``collect`` reads with ``read`` every interval; ``execute`` fills filters and parameters with ``update_many``. The
kernel copies thousands of entries a call (BPF_MAP_LOOKUP_BATCH, Linux 5.6; per-CPU arrays 5.13); kernels and types
without that are read entry by entry. What the bytes mean is ``decode``'s business.
"""

from __future__ import annotations

import errno
import functools
import mmap
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt
from probefleet_wire import map_types
from probefleet_wire.map_types import Read

from probefleet_agent.errors import KernelError, ProbefleetError
from probefleet_agent.kernel import map_storage, syscall, uapi
from probefleet_agent.kernel.syscall import MapInfo as MapInfo
from probefleet_agent.kernel.uapi import HASH_TYPES, PER_CPU_TYPES, Command, MapType

Bytes = npt.NDArray[np.uint8]
# A batch of at most this many bytes of values: bounds memory while a large map is read.
CHUNK_BYTES = 16 << 20
MIN_BATCH = 64
_NO_BATCH = frozenset({errno.EINVAL, errno.EOPNOTSUPP, uapi.ENOTSUPP})
_BATCHED = frozenset({MapType.ARRAY, MapType.PERCPU_ARRAY, MapType.LPM_TRIE, *HASH_TYPES})


def info(fd: SupportsIndex) -> MapInfo:
    """What the map is."""
    return syscall.map_info(fd)


def cpu_list(text: str) -> list[int]:
    """``0-3,8`` as the kernel writes sets of CPUs."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if found := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            cpus.extend(range(int(found[1]), int(found[2] or found[1]) + 1))
    return cpus


@functools.cache
def possible_cpus() -> int:
    """How many values a per-CPU entry has: CPUs that could ever be plugged in (num_possible_cpus). Numbers may be left
    out, and then a value's place is not its CPU's number.
    """
    return len(cpu_list(Path("/sys/devices/system/cpu/possible").read_text()))


def online_cpus() -> list[int]:
    """The CPUs that run now."""
    return cpu_list(Path("/sys/devices/system/cpu/online").read_text())


def write_variables(fd: SupportsIndex, info: MapInfo, values: Mapping[int, bytes]) -> None:
    """Global variables by their place in a section (``.data``, ``.bss``). What lies beside them is left alone.

    By memory that is shared with the kernel: an update of the section's one entry would write back what a program has
    changed meanwhile. A variable of up to eight bytes changes at once.
    """
    if any(offset + len(value) > info.value_size for offset, value in values.items()):
        raise ProbefleetError(f"global variables of {info.name} end at byte {info.value_size}")
    length = round_up(info.value_size, mmap.PAGESIZE)
    try:
        with mmap.mmap(operator.index(fd), length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
            for offset, value in values.items():
                if len(value) in (1, 2, 4, 8) and not offset % len(value):
                    kind = f"<u{len(value)}"
                    np.frombuffer(memory, kind, 1, offset)[0] = np.frombuffer(value, kind)[0]
                else:
                    memory[offset : offset + len(value)] = value
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "write global variables") from error


def numa_nodes() -> list[int]:
    """The NUMA nodes that are online; 0 alone on a kernel that knows of none."""
    try:
        return cpu_list(Path("/sys/devices/system/node/online").read_text())
    except FileNotFoundError:
        return [0]


def value_bytes(info: MapInfo) -> int:
    """What the kernel copies for one entry."""
    if info.type in PER_CPU_TYPES:
        return round_up(info.value_size, 8) * possible_cpus()
    return info.value_size


def round_up(number: int, to: int) -> int:
    """The next multiple of ``to``."""
    return (number + to - 1) // to * to


def read(fd: SupportsIndex, info: MapInfo) -> tuple[Bytes, Bytes]:
    """All entries: keys ``u1[n, key_size]``; values ``u1[n, value_size]``, per-CPU ``u1[n, cpus, rounded up to 8]``.

    While programs write, a hash's key that stays is seen exactly once, words do not tear, fields of one value may be
    of different moments. Maps of maps: outer and inner key side by side; ``u1[0, 0]`` where no inner map is there.
    Storage: its owners as keys. Raises KernelError, and ProbefleetError for a map that holds nothing to read.
    """
    if info.type in map_types.OUTER:
        return _read_inner(fd, info)
    if info.type in map_types.STORAGE:
        return map_storage.read_storage(fd, info)
    drained = map_types.read_as(info.type) is Read.RECORDS
    if drained or (info.type != MapType.STACK_TRACE and why_not_read(info)):
        why = why_not_read(info) or "reading takes its entries out; an output with events: {} does"
        raise ProbefleetError(f"map {info.name} is of type {map_types.name_of(info.type)}, which is not read: {why}")
    if info.type not in _BATCHED:
        keys, values = _read_each(fd, info)
    else:
        batched = _read_batches(fd, info)
        keys, values = batched if batched is not None else _read_each(fd, info)
    if info.type in PER_CPU_TYPES:
        values = values.reshape(len(values), possible_cpus(), round_up(info.value_size, 8))
    return keys, values


def why_not_read(info: MapInfo) -> str:
    """Why no output can be made of it; empty where one can."""
    if info.flags & map_types.Flag.WRONLY:
        return "its flags say that user space may not read it"
    if map_types.read_as(info.type) is not Read.NOT:
        return ""
    return map_types.UNREADABLE.get(info.type, "nothing is known of its type")


def _read_inner(fd: SupportsIndex, info: MapInfo) -> tuple[Bytes, Bytes]:
    keys: list[Bytes] = []
    values: list[Bytes] = []
    for outer, inner in map_storage.inner_maps(fd, info):
        with inner:
            some_keys, some_values = read(inner, syscall.map_info(inner))
        repeated = np.broadcast_to(np.frombuffer(outer, np.uint8), (len(some_keys), len(outer)))
        keys.append(np.concatenate([repeated, some_keys], axis=1))
        values.append(some_values)
    if not keys:
        return np.empty((0, 0), np.uint8), np.empty((0, 0), np.uint8)
    return np.concatenate(keys), np.concatenate(values)


def lookup_many(fd: SupportsIndex, info: MapInfo, keys: Bytes) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Values of these keys as ``u1[n, bytes]`` and which were there; for stack traces, a handful of ids."""
    _check_shape("keys", keys, info.key_size)
    size = value_bytes(info)
    values, there = np.zeros((len(keys), size), np.uint8), np.zeros(len(keys), np.bool_)
    for row, key in enumerate(keys):
        value = syscall.map_lookup(fd, key.tobytes(), size)
        if value is not None:
            values[row], there[row] = np.frombuffer(value, np.uint8), True
    return values, there


def _read_batches(fd: SupportsIndex, info: MapInfo) -> tuple[Bytes, Bytes] | None:
    """By BPF_MAP_LOOKUP_BATCH; None where the kernel has none for this type."""
    size = value_bytes(info)
    count = max(min(info.max_entries, max(CHUNK_BYTES // (size + info.key_size), MIN_BATCH)), 1)
    # The kernel's position: a bucket's number for hashes, a key for arrays.
    position = np.zeros(max(info.key_size, 8), np.uint8)
    keys: list[Bytes] = []
    values: list[Bytes] = []
    started = False
    while True:
        some_keys, some_values = np.empty((count, info.key_size), np.uint8), np.empty((count, size), np.uint8)
        done, error = syscall.map_batch(
            Command.MAP_LOOKUP_BATCH, fd, keys=some_keys.ctypes.data, values=some_values.ctypes.data, count=count,
            in_batch=position.ctypes.data if started else 0, out_batch=position.ctypes.data,
        )  # fmt: skip
        if error == errno.ENOSPC:  # a bucket with more entries than asked for: ask for more
            if count > 4 * max(info.max_entries, 64):
                raise KernelError(error, f"read map {info.name}")
            count *= 2
            continue
        if error in _NO_BATCH and not started:
            return None
        if error not in (0, errno.ENOENT):
            raise KernelError(error, f"read map {info.name}")
        done = min(done, count)
        if done:
            # Keeping a view of a chunk that is nearly empty would hold the whole of it.
            whole = done * 4 >= count
            keys.append(some_keys[:done] if whole else some_keys[:done].copy())
            values.append(some_values[:done] if whole else some_values[:done].copy())
        if error == errno.ENOENT:
            break
        started = True
    if len(keys) == 1:
        return keys[0], values[0]
    empty_keys, empty_values = np.empty((0, info.key_size), np.uint8), np.empty((0, size), np.uint8)
    return np.concatenate([empty_keys, *keys]), np.concatenate([empty_values, *values])


def _read_each(fd: SupportsIndex, info: MapInfo) -> tuple[Bytes, Bytes]:
    """Key by key. After a delete the kernel starts again at the first key, hence ``seen`` and the bound."""
    seen: dict[bytes, bytes] = {}
    size, key = value_bytes(info), None
    for _ in range(4 * info.max_entries + 64):
        key = syscall.map_get_next_key(fd, key, info.key_size)
        if key is None:
            break
        value = syscall.map_lookup(fd, key, size)
        if value is not None:  # it may have been deleted in between
            seen[key] = value
    keys = np.frombuffer(b"".join(seen), np.uint8).reshape(len(seen), info.key_size)
    return keys, np.frombuffer(b"".join(seen.values()), np.uint8).reshape(len(seen), size)


def update_many(fd: SupportsIndex, keys: Bytes, values: Bytes) -> None:
    """Set entries: keys ``u1[n, key_size]``, values ``u1[n, bytes]`` or ``u1[n, cpus, bytes]``. E2BIG: it is full."""
    told = info(fd)
    _check_shape("keys", keys, told.key_size)
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    _check_shape("values", flat, value_bytes(told))
    if len(keys) != len(flat):
        raise ProbefleetError(f"{len(keys)} keys and {len(flat)} values for map {told.name}")
    done, error = _batch(Command.MAP_UPDATE_BATCH, fd, np.ascontiguousarray(keys), flat)
    if error in _NO_BATCH and not done:
        try:
            for key, value in zip(keys, flat, strict=True):
                syscall.map_update(fd, key.tobytes(), value.tobytes())
        except KernelError as failure:
            error = failure.errno
        else:
            error = 0
    if error:
        advice = f"It has room for {told.max_entries} entries: give it more." if error == errno.E2BIG else ""
        raise KernelError(error, f"write {len(keys)} entries to map {told.name}", advice)


def delete_many(fd: SupportsIndex, keys: Bytes) -> int:
    """Delete entries; how many were there. Hash maps only."""
    told = info(fd)
    _check_shape("keys", keys, told.key_size)
    keys = np.ascontiguousarray(keys)
    at = deleted = 0
    while at < len(keys):
        done, error = _batch(Command.MAP_DELETE_BATCH, fd, keys[at:], None)
        if error in _NO_BATCH and not done:
            return deleted + sum(syscall.map_delete(fd, key.tobytes()) for key in keys[at:])
        if error not in (0, errno.ENOENT):
            raise KernelError(error, f"delete {len(keys)} entries of map {told.name}")
        deleted += done
        at += done + (error == errno.ENOENT)  # it stops at a key that is not there: go on behind it
    return deleted


def _batch(command: Command, fd: SupportsIndex, keys: Bytes, values: Bytes | None) -> tuple[int, int]:
    if not len(keys):
        return 0, 0
    return syscall.map_batch(
        command, fd, keys=keys.ctypes.data, values=values.ctypes.data if values is not None else 0, count=len(keys)
    )


def _check_shape(what: str, array: Bytes, width: int) -> None:
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != width:
        raise ProbefleetError(f"{what} have shape {array.shape} of {array.dtype}; the map wants (n, {width}) bytes")


def sum_lost(fd: SupportsIndex) -> npt.NDArray[np.uint64]:
    """A ``probefleet_lost`` map over all CPUs: u64[4] = failed updates, ring full, records submitted, other."""
    told = info(fd)
    if told.value_size != 8 or told.key_size != 4 or told.type not in (MapType.PERCPU_ARRAY, MapType.ARRAY):
        raise ProbefleetError(f"map {told.name} is not an array of 64-bit counters")
    _, values = read(fd, told)
    counts: npt.NDArray[np.uint64] = np.ascontiguousarray(values).view(np.uint64).reshape(len(values), -1).sum(axis=1)
    return counts


def wait_for_programs() -> None:
    """Return when every (not sleepable) program that was running has ended.

    Replacing an inner map waits for that: maybe_wait_bpf_programs (commit 1ae80cf31938, Linux 4.20).
    """
    with (
        syscall.map_create(MapType.ARRAY, key_size=4, value_size=4, max_entries=1, name="pf_inner") as inner,
        syscall.map_create(
            MapType.ARRAY_OF_MAPS, key_size=4, value_size=4, max_entries=1, name="pf_outer", inner_map_fd=inner
        ) as outer,
    ):
        syscall.map_update(outer, bytes(4), int(inner).to_bytes(4, "little"))


def memory_bytes(info: MapInfo) -> int:
    """Kernel memory that a map of these sizes takes when it is full: an estimate, before it is made."""
    sizes = map_types.Sizes(info.type, info.key_size, info.value_size, info.max_entries, info.flags, info.map_extra)
    return map_types.bytes_of(sizes, cpus=possible_cpus(), page_bytes=os.sysconf("SC_PAGESIZE"))


def memory_used_bytes(fd: SupportsIndex) -> int:
    """What the kernel says a map takes: ``memlock`` of its fdinfo, exact from Linux 6.4 on.

    Older kernels guess from the sizes of key and value, which for a ring buffer is nothing: then our estimate counts.
    """
    return _said_of(fd, "memlock") or memory_bytes(info(fd))


def memory_with_inner_bytes(fd: SupportsIndex) -> int:
    """The same; of a map of maps with the maps that lie in it."""
    told, whole = info(fd), memory_used_bytes(fd)
    for _, inner in map_storage.inner_maps(fd, told) if told.type in map_types.OUTER else ():
        with inner:
            whole += memory_used_bytes(inner)
    return whole


def program_array_type(fd: SupportsIndex) -> int:
    """The ``enum bpf_prog_type`` of the programs that a program array is for; 0: no program uses it yet."""
    return _said_of(fd, "owner_prog_type")


def _said_of(fd: SupportsIndex, what: str) -> int:
    """A number of the descriptor's fdinfo; 0 where it is not said."""
    for line in Path(f"/proc/self/fdinfo/{int(fd)}").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1])
    return 0
