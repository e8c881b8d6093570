"""Advice on a program's maps, from its instructions: what was seen, and what would cost less. Pure.

Three kinds: a map that is looked up twice with the same key; a hash whose keys could be an array's indices; a value
that programs only add to, which each CPU could have for itself. What a hint says is so on every path (``map_uses``);
where something cannot be followed there is none. It is advice: `probefleet check` prints it, and fails by none.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from probefleet_wire import bpf_code, map_uses
from probefleet_wire.bpf_code import BYTES, Function
from probefleet_wire.bpf_object import BpfObject, MapDef
from probefleet_wire.elf import Elf
from probefleet_wire.map_types import Flag, MapType
from probefleet_wire.map_uses import ANY, DELETE, Access, Uses
from probefleet_wire.register_values import Value, bound

MAX_INDEX = 4096
MAX_ARRAY_BYTES = 1 << 20
MAX_PER_CPU_VALUE_BYTES = 32 << 10  # PCPU_MIN_UNIT_SIZE: the kernel's own bound
#: Maps that headers bring: nobody who reads the hint wrote them.
_BROUGHT = ("probefleet_", "__bpf_usdt_", "trace_printk")
_HASHES = {MapType.HASH: "An array", MapType.PERCPU_HASH: "A per-CPU array"}
_PER_CPU = {
    MapType.ARRAY: "a per-CPU array",
    MapType.HASH: "a per-CPU hash",
    MapType.LRU_HASH: "a per-CPU LRU hash",
}


class Kind(enum.StrEnum):
    """What a hint advises."""

    FEWER_LOOKUPS = "fewer-lookups"
    INDEX_AN_ARRAY = "index-an-array"
    COUNT_PER_CPU = "count-per-cpu"


@dataclass(frozen=True, slots=True)
class Hint:
    """One piece of advice."""

    kind: Kind
    map: str
    seen: str  #: what is so
    advice: str  #: what would cost less

    def __str__(self) -> str:
        return f"{self.seen}. {self.advice}"


@dataclass(frozen=True, slots=True)
class Body:
    """A function to be looked at. ``lines``: instruction → where in the source, for people."""

    function: Function
    maps: Mapping[int, str]  #: instruction → the map that it loads
    lines: Mapping[int, str] = field(default_factory=dict)


def of_object(data: bytes, *, elsewhere: Iterable[str] = ()) -> tuple[Hint, ...]:
    """Of a compiled object; raises ElfError or BtfError. ``elsewhere``: maps that others use too, or fill."""
    elf, code, parsed = Elf.parse(data), bpf_code.read(data), BpfObject.parse(data)
    sections = {each.index: each.name for each in elf.sections}
    bodies = []
    for (section, begin), function in code.functions.items():
        end = begin + len(function.instructions) * BYTES
        maps = {
            (each.offset_bytes - begin) // BYTES: each.map
            for each in parsed.references
            if each.section == sections[section] and begin <= each.offset_bytes < end and not each.map.startswith(".")
        }
        bodies.append(Body(function, maps, _Lines(parsed, function.name)))
    return of(bodies, parsed.maps, elsewhere=elsewhere)


def of(bodies: Sequence[Body], definitions: Sequence[MapDef], *, elsewhere: Iterable[str] = ()) -> tuple[Hint, ...]:
    """Of all functions of a program together, in the order of its maps."""
    sizes = {each.name: each.key_bytes for each in definitions}
    used = [(body, map_uses.of(body.function, body.maps, sizes)) for body in bodies]
    foreign = {*elsewhere, *(name for each in definitions for _, name in each.slots)}
    found: list[Hint] = []
    for each in definitions:
        if each.name.startswith(_BROUGHT):
            continue
        found += _fewer_lookups(each, used)
        uses = [uses for _, uses in used]
        if each.name in foreign or any({each.name, ANY} & every.others for every in uses):
            continue
        accesses = [access for every in uses for access in every.accesses if access.map == each.name]
        found += _index_an_array(each, accesses)
        found += _count_per_cpu(each, uses)
    return tuple(found)


class _Lines(dict[int, str]):
    """Where in the source an instruction comes from, looked up when it is asked for; "" where nobody knows."""

    def __init__(self, parsed: BpfObject, program: str) -> None:
        super().__init__()
        self._parsed, self._program = parsed, program

    def __missing__(self, number: int) -> str:
        line = self._parsed.line_of(self._program, number)
        return "" if line is None else f"{line.file.rsplit('/', 1)[-1]}:{line.line}"

    def get(self, number: int, default: str = "") -> str:  # type: ignore[override]  # a dict's get() asks no __missing__
        return self[number] or default


def _fewer_lookups(definition: MapDef, used: Sequence[tuple[Body, Uses]]) -> list[Hint]:
    found = []
    for body, uses in used:
        again = [each for each in uses.accesses if each.map == definition.name and each.before >= 0]
        if again:
            places = [(body.lines.get(each.before, ""), body.lines.get(each.instruction, "")) for each in again]
            said = "; ".join(dict.fromkeys(f"{first}, then {then}" for first, then in places if first and then))
            found.append(
                Hint(
                    Kind.FEWER_LOOKUPS,
                    definition.name,
                    f"{body.function.name} looks map {definition.name} up again with a key that it looked up before, "
                    f"and does not change the map in between{f' ({said})' if said else ''}",
                    "The pointer of the first lookup does for both",
                )
            )
    return found


def _index_an_array(definition: MapDef, accesses: Sequence[Access]) -> list[Hint]:
    kind = MapType(definition.type) if definition.type in list(MapType) else None
    if kind not in _HASHES or not accesses or any(each.helper == DELETE for each in accesses):
        return []
    keys = [_only(each, definition.key_bytes) for each in accesses]
    numbers = {each.number for each in keys if each is not None and each.kind == "constant"}
    entries = max((bound(each) for each in keys if each is not None), default=0) + 1
    if definition.key_bytes == 1:
        entries, why = 256, "a key of one byte"
    elif None in keys or entries > MAX_INDEX:
        return []
    elif all(each is not None and each.kind == "constant" for each in keys):
        if entries > max(16, 4 * len(numbers)):
            return []  # far apart: an array would be mostly empty
        why = f"no keys but {', '.join(map(str, sorted(numbers)))}"
    else:
        why = f"no key above {entries - 1}"
    if entries * definition.value_bytes > MAX_ARRAY_BYTES:
        return []
    return [
        Hint(
            Kind.INDEX_AN_ARRAY,
            definition.name,
            f"Map {definition.name} is a hash with {why}",
            f"{_HASHES[kind]} of {entries} entries, indexed by it, needs no hashing; what was never written is 0",
        )
    ]


def _count_per_cpu(definition: MapDef, uses: Sequence[Uses]) -> list[Hint]:
    kind = MapType(definition.type) if definition.type in list(MapType) else None
    plainly = any(definition.name in each.added_plainly for each in uses)
    added = plainly or any(definition.name in each.added for each in uses)
    touched = any({definition.name, ANY} & (each.read | each.stored) for each in uses)
    if kind not in _PER_CPU or not added or touched:
        return []
    if definition.flags & Flag.MMAPABLE or definition.value_bytes > MAX_PER_CPU_VALUE_BYTES:
        return []
    how = "not atomically, so that CPUs lose counts when they meet," if plainly else "atomically,"
    if plainly:
        advice = f"In {_PER_CPU[kind]} each CPU adds to a value of its own"
    elif kind is MapType.ARRAY:
        advice = "In a per-CPU array each CPU adds to a value of its own, which needs no atomic addition"
    else:
        advice = f"Where CPUs add to one entry at once, {_PER_CPU[kind]} spares them to wait for each other"
    return [
        Hint(
            Kind.COUNT_PER_CPU,
            definition.name,
            f"Programs only add to what is in map {definition.name}, {how} and do nothing else with it",
            f"{advice}; reports add the CPUs up. It takes the values' memory once for each CPU",
        )
    ]


def _only(access: Access, key_bytes: int) -> Value | None:
    """The key, where it is one number and something is known of it."""
    if access.key is None or len(access.key) != 1 or key_bytes > 8:
        return None
    value = access.key[0][2]
    return None if bound(value) > MAX_INDEX else value
