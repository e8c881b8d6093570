"""What each type of map is, by its number in the kernel: its name, how it is read, and what it takes of memory. Pure.

The operator reckons with it before a map exists, the agent when it makes one: one table, so that both say the same.
Sizes follow ``map_mem_usage`` of kernel/bpf/*.c (Linux 6.4 and later) for a map that is full;
``tests/kernel/test_map_types.py`` compares them with what the kernel says.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class MapType(enum.IntEnum):
    """``enum bpf_map_type``."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERF_EVENT_ARRAY = 4
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    STACK_TRACE = 7
    CGROUP_ARRAY = 8
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    HASH_OF_MAPS = 13
    DEVMAP = 14
    SOCKMAP = 15
    CPUMAP = 16
    XSKMAP = 17
    SOCKHASH = 18
    CGROUP_STORAGE = 19
    REUSEPORT_SOCKARRAY = 20
    PERCPU_CGROUP_STORAGE = 21
    QUEUE = 22
    STACK = 23
    SK_STORAGE = 24
    DEVMAP_HASH = 25
    STRUCT_OPS = 26
    RINGBUF = 27
    INODE_STORAGE = 28
    TASK_STORAGE = 29
    BLOOM_FILTER = 30
    USER_RINGBUF = 31
    CGRP_STORAGE = 32
    ARENA = 33


class Read(enum.StrEnum):
    """How user space gets at what a map holds."""

    TABLE = "table"  #: keys and values
    RECORDS = "records"  #: a stream: each record once
    NOT = "not"  #: listed only


class Flag(enum.IntFlag):
    """``map_flags``: how a map is made, and who may read and write it."""

    NO_PREALLOC = 1 << 0
    NO_COMMON_LRU = 1 << 1
    NUMA_NODE = 1 << 2
    RDONLY = 1 << 3  #: user space may only read
    WRONLY = 1 << 4  #: user space may only write
    STACK_BUILD_ID = 1 << 5
    ZERO_SEED = 1 << 6
    RDONLY_PROG = 1 << 7  #: programs may only read
    WRONLY_PROG = 1 << 8  #: programs may only write
    CLONE = 1 << 9
    MMAPABLE = 1 << 10
    PRESERVE_ELEMS = 1 << 11
    INNER_MAP = 1 << 12


HASHES = frozenset({MapType.HASH, MapType.PERCPU_HASH, MapType.LRU_HASH, MapType.LRU_PERCPU_HASH})
ARRAYS = frozenset({MapType.ARRAY, MapType.PERCPU_ARRAY})
PER_CPU = frozenset({MapType.PERCPU_HASH, MapType.LRU_PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.PERCPU_CGROUP_STORAGE})
LRU = frozenset({MapType.LRU_HASH, MapType.LRU_PERCPU_HASH})
OUTER = frozenset({MapType.ARRAY_OF_MAPS, MapType.HASH_OF_MAPS})
POPPED = frozenset({MapType.QUEUE, MapType.STACK})
#: Found by the task's or cgroup's own descriptor, not by a key.
STORAGE = frozenset({MapType.TASK_STORAGE, MapType.CGRP_STORAGE})
#: Why there is nothing to read in a map.
UNREADABLE: dict[int, str] = {
    MapType.PROG_ARRAY: "it holds programs",
    MapType.CGROUP_ARRAY: "it holds cgroups",
    MapType.DEVMAP: "it holds network devices",
    MapType.DEVMAP_HASH: "it holds network devices",
    MapType.SOCKMAP: "it holds sockets",
    MapType.SOCKHASH: "it holds sockets",
    MapType.REUSEPORT_SOCKARRAY: "it holds sockets",
    MapType.XSKMAP: "it holds sockets",
    MapType.CPUMAP: "it holds queues of CPUs",
    MapType.BLOOM_FILTER: "it only answers whether a value may be in it",
    MapType.SK_STORAGE: "its entries lie in sockets, which cannot be listed",
    MapType.INODE_STORAGE: "its entries lie in inodes, which cannot be listed",
    MapType.USER_RINGBUF: "user space writes it, programs read it",
    MapType.STRUCT_OPS: "it holds functions of the kernel",
    MapType.ARENA: "it is memory without entries",
    MapType.STACK_TRACE: "stacks are read by their ids, which are in another map's keys",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides how much memory a map takes; ``entries`` of a ring are bytes."""

    type: int
    key_bytes: int
    value_bytes: int
    entries: int
    flags: int = 0
    map_extra: int = 0


def name_of(number: int) -> str:
    """As policies, ProbeMaps and reports spell it: ``percpu-hash``."""
    try:
        return MapType(number).name.lower().replace("_", "-")
    except ValueError:
        return f"type {number}"


def read_as(number: int) -> Read:
    """Whether, and how, an output can be made of a map of this type."""
    if number in (MapType.RINGBUF, MapType.PERF_EVENT_ARRAY) or number in POPPED:
        return Read.RECORDS
    if number in UNREADABLE or number not in list(MapType):
        return Read.NOT
    return Read.TABLE


# Bytes of the structures that the kernel keeps around a map's entries (x86_64, Linux 6.18; others differ little).
_POINTER = 8
_ARRAY_HEAD, _HASH_HEAD, _STACK_HEAD, _RING_HEAD, _STORAGE_HEAD, _SOCK_HEAD = 312, 896, 320, 584, 448, 384
_BUCKET, _ELEMENT, _TRIE_NODE, _STACK_BUCKET, _STORAGE_ELEMENT = 16, 48, 40, 16, 80
#: Local storage grows with the tasks or cgroups that are there: reckoned as for so many.
STORAGE_ENTRIES = 1024
#: A bloom filter's hash functions, where map_extra does not say, and bits for one value and function (7/5).
_BLOOM_FUNCTIONS = 5


def bytes_of(sizes: Sizes, *, cpus: int, page_bytes: int = 4096) -> int:
    """Kernel memory of one map that is full, on one node with so many CPUs."""
    kind, count = sizes.type, sizes.entries
    key, value = _round8(sizes.key_bytes), _round8(sizes.value_bytes)
    if kind in HASHES or kind == MapType.HASH_OF_MAPS:
        return _hash_bytes(sizes, key, _POINTER if kind == MapType.HASH_OF_MAPS else value, cpus)
    if kind == MapType.ARRAY:
        if sizes.flags & Flag.MMAPABLE:
            return _pages(_ARRAY_HEAD, page_bytes) + _pages(count * value, page_bytes)
        return _ARRAY_HEAD + count * value
    if kind == MapType.PERCPU_ARRAY:
        return _ARRAY_HEAD + count * (_POINTER + value * cpus)
    if kind in (MapType.RINGBUF, MapType.USER_RINGBUF):
        return _RING_HEAD + count + 3 * page_bytes
    if kind == MapType.STACK_TRACE:
        return _STACK_HEAD + _power_of_two(count) * _POINTER + count * (_STACK_BUCKET + value)
    if kind == MapType.LPM_TRIE:
        return _ARRAY_HEAD + count * (_TRIE_NODE + max(sizes.key_bytes - 4, 0) + sizes.value_bytes)
    if kind in POPPED:
        return _ARRAY_HEAD + (count + 1) * sizes.value_bytes
    if kind == MapType.BLOOM_FILTER:
        functions = sizes.map_extra & 0xF or _BLOOM_FUNCTIONS
        return _ARRAY_HEAD + _power_of_two(count * functions * 7 // 5) // 8
    if kind in (MapType.SK_STORAGE, MapType.INODE_STORAGE, *STORAGE):
        return _STORAGE_HEAD + _power_of_two(cpus) * _BUCKET + STORAGE_ENTRIES * (_STORAGE_ELEMENT + value)
    if kind == MapType.SOCKHASH:
        return _SOCK_HEAD + _power_of_two(count) * _BUCKET + count * (_ELEMENT + key)
    # The rest are arrays of pointers: to programs, events, maps, devices, sockets, cgroups.
    return _ARRAY_HEAD + (count or cpus) * _POINTER


def _hash_bytes(sizes: Sizes, key: int, value: int, cpus: int) -> int:
    fixed = _HASH_HEAD + _power_of_two(sizes.entries) * _BUCKET
    if sizes.type in PER_CPU:
        return fixed + sizes.entries * (_ELEMENT + key + _POINTER + value * cpus)
    # One spare element a CPU, for updates in place.
    spare = cpus if sizes.type == MapType.HASH and not sizes.flags & Flag.NO_PREALLOC else 0
    extra = 0 if sizes.type in LRU else cpus * _POINTER
    return fixed + (sizes.entries + spare) * (_ELEMENT + key + value) + extra


def _round8(size: int) -> int:
    return (size + 7) // 8 * 8


def _pages(size: int, page_bytes: int) -> int:
    return -(-size // page_bytes) * page_bytes


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
