"""Whether maps may be made and shared: within the budget, and alike on both sides. Asked before anything is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from probefleet_wire import map_types
from probefleet_wire.bpf_object import MapDef
from probefleet_wire.btf_layout import Field

from probefleet_agent import pinned_by_others
from probefleet_agent.decode import Layout
from probefleet_agent.errors import BudgetExceeded, LayoutMismatch, ObjectError
from probefleet_agent.kernel import maps
from probefleet_agent.kernel.uapi import MapType, ProgramType
from probefleet_agent.loaded import FILTER, LOST, MapHandle

_STREAMS = frozenset({MapType.RINGBUF, MapType.PERF_EVENT_ARRAY})


def check_budget(
    definitions: Sequence[MapDef], sizes: Mapping[str, int], shared: frozenset[str], budget_bytes: int
) -> None:
    """Raise BudgetExceeded before anything is created, where the maps would take more than the policy allows."""
    estimates = {
        each.name: estimate(each, sizes.get(each.name, 0))
        for each in definitions
        if each.name not in shared and each.name not in (FILTER, LOST)
    }
    total = sum(estimates.values())
    if budget_bytes and total > budget_bytes:
        worst = max(estimates, key=lambda name: estimates[name])
        raise BudgetExceeded(
            f"its maps would take {total:,} bytes on this node, the budget is {budget_bytes:,}; the largest is {worst} "
            f"with {estimates[worst]:,}. Give it fewer entries (maps[].maxEntries) or raise budget.mapMemory.",
            reason="MapTooLarge",
        )


def check_numa(definitions: Sequence[MapDef]) -> None:
    """Raise ObjectError where a map is to lie on a NUMA node that this machine has not: the kernel says EINVAL only."""
    nodes = maps.numa_nodes()
    for each in definitions:
        if each.flags & map_types.Flag.NUMA_NODE and each.numa_node not in nodes:
            there = ", ".join(map(str, nodes))
            raise ObjectError(
                f"map {each.name} asks for NUMA node {each.numa_node}, and this machine has {there}. "
                "Write one of these as numa_node, or leave BPF_F_NUMA_NODE away."
            )


def estimate(definition: MapDef, max_entries: int = 0) -> int:
    """Bytes that a map will take, from its definition."""
    cpus = maps.possible_cpus()
    entries = max_entries or definition.max_entries or cpus
    sizes = map_types.Sizes(
        definition.type, definition.key_bytes, definition.value_bytes, entries, definition.flags, definition.map_extra
    )
    return map_types.bytes_of(sizes, cpus=cpus)


def check_fit(definition: MapDef | None, wanted: Layout | None, handle: MapHandle, title: str) -> None:
    """Raise LayoutMismatch, with both layouts, where a program's map is not what the ProbeMap is."""
    if definition is None:
        raise ObjectError(f"{title} has no map that could be shared under that name")
    info = handle.info
    if definition.type == info.type and info.type in _STREAMS:
        return  # what a record is, each program says for itself
    asked = (definition.type, definition.key_bytes, definition.value_bytes)
    same_fields = wanted is None or handle.layout is None or _shape(wanted) == _shape(handle.layout)
    if asked == (info.type, info.key_size, info.value_size) and same_fields:
        return
    others = handle.probe_map_uid.startswith(pinned_by_others.MARK)
    whose = f"the map at {handle.probe_map_uid.removeprefix(pinned_by_others.MARK)}" if others else "the ProbeMap"
    mine = describe(definition.type, definition.key_bytes, definition.value_bytes, wanted)
    theirs = describe(info.type, info.key_size, info.value_size, handle.layout)
    raise LayoutMismatch(
        f"{title}: map {definition.name} does not fit {whose}. The program has {mine}; {whose} is {theirs}. "
        "Declare the map with the same key and value."
    )


def check_jumps(array: str, handle: MapHandle, callers: Mapping[str, int], title: str) -> None:
    """Raise LayoutMismatch where programs are to jump through a shared array that is of another type's programs.

    The kernel binds an array to the type of the first program that uses it, for good (``bpf_prog_map_compatible``).
    """
    owner = maps.program_array_type(handle.fd) if handle.info.type == MapType.PROG_ARRAY else 0
    for name, kind in callers.items():
        if owner and kind != owner:
            raise LayoutMismatch(
                f"{title}: {name} jumps through {array} and is a program of type {_program_type(kind)}; the ProbeMap "
                f"is for programs of type {_program_type(owner)}, as the first was that used it, for the kernel jumps "
                "only between programs of one type. Give it the same SEC(), or share another ProbeMap."
            )


def _program_type(number: int) -> str:
    return ProgramType(number).name.lower() if number in list(ProgramType) else str(number)


def same_entries(one: MapHandle, other: MapHandle) -> bool:
    """Are both of one type, with the same keys and values?"""
    sizes = [(each.info.type, each.info.key_size, each.info.value_size) for each in (one, other)]
    known = one.layout is not None and other.layout is not None
    return sizes[0] == sizes[1] and (not known or one.layout == other.layout)


def describe(kind: int, key_bytes: int, value_bytes: int, layout: Layout | None) -> str:
    """A map's type and both layouts, on one line."""
    name = MapType(kind).name.lower() if kind in list(MapType) else f"type {kind}"
    if layout is None:
        return f"a {name} of {key_bytes} → {value_bytes} bytes"

    def fields(part: Sequence[Field]) -> str:
        return "; ".join(f"{f.type_name} {f.name}".strip() for f in part) or "nothing"

    return f"a {name} of {key_bytes} bytes {{{fields(layout.key)}}} → {value_bytes} bytes {{{fields(layout.value)}}}"


def _shape(layout: Layout) -> object:
    """What has to agree: places, sizes and signs; names and typedefs may differ between dialects."""

    def fields(part: Sequence[Field]) -> list[tuple[object, ...]]:
        return [(f.offset_bytes, f.size_bytes, f.signed, f.shape) for f in part]

    return fields(layout.key), layout.key_bytes, fields(layout.value), layout.value_bytes
