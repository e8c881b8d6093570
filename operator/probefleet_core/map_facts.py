"""What a map of a program is to a plan: our own or the author's, read as numbers, as records or not at all, how large.

Pure. ``planner`` and ``outputs`` ask; the facts about types themselves are the wire's (``map_types``).
"""

from __future__ import annotations

from probefleet_wire import map_types
from probefleet_wire.bpf_object import MapDef
from probefleet_wire.map_types import Flag, MapType, Read

#: Of our own in every program that includes probefleet.h; and libbpf's in those that include usdt.bpf.h.
OWN = frozenset(
    {
        "probefleet_lost", "probefleet_filter", "probefleet_endpoints", "__bpf_usdt_specs", "__bpf_usdt_ip_to_spec_id",
    }
)  # fmt: skip
#: Records that become an output by themselves: reading them takes them from nobody else.
STREAMS = frozenset({MapType.RINGBUF, MapType.PERF_EVENT_ARRAY})
MIN_RING_BYTES = 4096


def is_own(name: str) -> bool:
    """Belongs to Probefleet, or to libbpf, not to the program's author."""
    return name in OWN


def type_name(number: int) -> str:
    """As ProbeMaps spell it."""
    return map_types.name_of(number)


def read_as(found: MapDef) -> Read:
    """How an output can read it."""
    return Read.NOT if found.flags & Flag.WRONLY else map_types.read_as(found.type)


def why_not_read(found: MapDef) -> str:
    """Why no output can read it; empty where one can."""
    if found.flags & Flag.WRONLY:
        return "its flag BPF_F_WRONLY keeps user space from reading it"
    if map_types.read_as(found.type) is not Read.NOT:
        return ""
    return map_types.UNREADABLE.get(found.type, "nothing is known of its type")


def is_ring_size(entries: int) -> bool:
    """Can a ring buffer have so many bytes?"""
    return entries >= MIN_RING_BYTES and not entries & (entries - 1)


def bytes_of(found: MapDef, *, cpus: int, entries: int = 0) -> int:
    """Memory of one map on one node with so many CPUs; ``entries`` in place of what its definition says."""
    count = entries or found.max_entries or (cpus if found.type == MapType.PERF_EVENT_ARRAY else 0)
    sizes = map_types.Sizes(found.type, found.key_bytes, found.value_bytes, count, found.flags, found.map_extra)
    return map_types.bytes_of(sizes, cpus=cpus)
