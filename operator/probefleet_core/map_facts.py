"""What a map is, by its number in the kernel: which can be counted, which carry records, and what each takes of memory.

Pure. ``planner`` and ``outputs`` ask. Sizes follow the kernel's own accounting (kernel/bpf/hashtab.c, arraymap.c,
ringbuf.c, stackmap.c); they are estimates before a map exists, the agent reads the true ones afterwards.
"""

from __future__ import annotations

from probefleet_wire.bpf_object import MapDef

HASH, ARRAY, PERF_EVENT_ARRAY, PERCPU_HASH, PERCPU_ARRAY, STACK_TRACE, LRU_HASH, LRU_PERCPU_HASH, RINGBUF = (
    1,
    2,
    4,
    5,
    6,
    7,
    9,
    10,
    27,
)
NAMES = {
    HASH: "hash",
    ARRAY: "array",
    PERF_EVENT_ARRAY: "perf-event-array",
    PERCPU_HASH: "percpu-hash",
    PERCPU_ARRAY: "percpu-array",
    STACK_TRACE: "stack-trace",
    LRU_HASH: "lru-hash",
    LRU_PERCPU_HASH: "lru-percpu-hash",
    RINGBUF: "ringbuf",
}
HASHES = frozenset({HASH, PERCPU_HASH, LRU_HASH, LRU_PERCPU_HASH})
ARRAYS = frozenset({ARRAY, PERCPU_ARRAY})
PER_CPU = frozenset({PERCPU_HASH, LRU_PERCPU_HASH, PERCPU_ARRAY})
COUNTABLE = HASHES | ARRAYS
RECORDS = frozenset({RINGBUF, PERF_EVENT_ARRAY})
PAGE_BYTES = 4096
#: Of our own in every program that includes probefleet.h.
OWN = frozenset({"probefleet_lost", "probefleet_filter"})


def is_own(name: str) -> bool:
    """Belongs to Probefleet or to libbpf (.rodata, .bss), not to the program's author."""
    return name in OWN or name.startswith(".")


def type_name(number: int) -> str:
    """As ProbeMaps spell it."""
    return NAMES.get(number, f"type {number}")


def bytes_of(found: MapDef, *, cpus: int, entries: int = 0) -> int:
    """Memory of one map on one node with so many CPUs; ``entries`` in place of what its definition says."""
    count = entries or found.max_entries
    key, value = _round8(found.key_bytes), _round8(found.value_bytes)
    if found.type in HASHES:
        buckets = 16 * _power_of_two(count)
        if found.type in PER_CPU:
            return buckets + count * (48 + key + 8) + count * value * cpus
        # One spare element a CPU, for updates in place.
        return buckets + (count + cpus) * (48 + key + value)
    if found.type == ARRAY:
        return count * value
    if found.type == PERCPU_ARRAY:
        return count * (8 + value * cpus)
    if found.type == RINGBUF:
        return count + 3 * PAGE_BYTES
    if found.type == PERF_EVENT_ARRAY:
        return 8 * (count or cpus)
    if found.type == STACK_TRACE:
        return 8 * _power_of_two(count) + count * (24 + value)
    return count * (64 + key + value)


def _round8(size: int) -> int:
    return (size + 7) // 8 * 8


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
