"""Objects from before BTF: ``SEC("maps")`` becomes what libbpf 1 reads, or is refused with the form to write. Pure.

libbpf 1 knows maps only by BTF, and refuses ``struct bpf_map_def`` and iproute2's ``struct bpf_elf_map``. Both begin
with five numbers (type, key size, value size, entries, flags), so ``translate`` writes the BTF that the C would have
had: a definition for each map, and the section's new name. Types of keys and values are those of
``BPF_ANNOTATE_KV_PAIR`` where the object has it, else unsigned integers of these sizes, else bytes without a meaning.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from probefleet_wire import map_types
from probefleet_wire.btf import HEADER, MAGIC, Btf
from probefleet_wire.btf_types import Kind, Struct, Var
from probefleet_wire.elf import SHT_PROGBITS, STT_FUNC, STT_SECTION, Elf
from probefleet_wire.map_types import MapType

LEGACY, CURRENT = "maps", ".maps"
#: Struct bpf_map_def of libbpf; the one of the kernel's samples (an inner map's index and a NUMA node behind it) and
#: iproute2's first one (an id and pinning behind it), of the same size; iproute2's of today (an inner map's id too).
_DEF, _SAMPLES_OR_IPROUTE_DEF, _IPROUTE_DEF = 20, 28, 36
_KV_PAIR = "____btf_map_"
_PINNED_BY_NAME = 1  # LIBBPF_PIN_BY_NAME
_EHDR_SHOFF, _EHDR_SHNUM = 40, 60
_SHDR = struct.Struct("<IIQQQQIIQQ")
_GLOBAL = 1


class LegacyMapsError(ValueError):
    """Maps that cannot be translated; ``write`` is the form that can."""

    def __init__(self, why: str, write: str) -> None:
        self.write = write
        super().__init__(why)


@dataclass(frozen=True, slots=True)
class LegacyMap:
    """One definition in ``SEC("maps")``."""

    name: str
    offset_bytes: int
    size_bytes: int
    type: int
    key_bytes: int
    value_bytes: int
    max_entries: int
    flags: int
    numa_node: int = 0
    id: int = 0  #: iproute2's number of a map, by which sections and inner maps name it
    pinning: int = 0  #: iproute2's: 1 by object, 2 for all (PIN_GLOBAL_NS)

    @property
    def btf_form(self) -> str:
        """As it is written for libbpf 1."""
        kind = MapType(self.type).name if self.type in list(MapType) else str(self.type)
        parts = [f"__uint(type, BPF_MAP_TYPE_{kind})", f"__uint(max_entries, {self.max_entries})"]
        if self.type in map_types.OUTER:
            parts += [f"__uint(key_size, {self.key_bytes})", "__array(values, struct INNER)"]
        else:
            parts += [f"__type({word}, {_c_type(size)})" for word, size in _sides(self) if size]
        parts += [f"__uint(map_flags, {self.flags})"] if self.flags else []
        return f'struct {{ {"; ".join(parts)}; }} {self.name} SEC(".maps");'


def definitions(elf: Elf) -> tuple[LegacyMap, ...]:
    """The maps of ``SEC("maps")``; raises LegacyMapsError for a definition of no known form."""
    section = elf.section(LEGACY)
    if section is None:
        return ()
    symbols = sorted(
        (each for each in elf.symbols if each.section == section.index and each.type not in (STT_SECTION, STT_FUNC)),
        key=lambda each: each.value,
    )
    types = _member_names(elf)
    found = []
    for symbol, end in zip(symbols, [*(each.value for each in symbols[1:]), section.size_bytes], strict=True):
        size = symbol.size_bytes or end - symbol.value
        data = section.data[symbol.value : symbol.value + size]
        if len(data) != size or size < _DEF or size % 4:
            raise LegacyMapsError(
                f'{symbol.name} in SEC("maps") has {len(data)} bytes; a struct bpf_map_def has {_DEF}',
                f'struct {{ … }} {symbol.name} SEC(".maps");',
            )
        found.append(_definition(symbol.name, symbol.value, data, types.get(symbol.name, ())))
    return tuple(found)


def _member_names(elf: Elf) -> dict[str, tuple[str, ...]]:
    """Definition → what its struct's members are called, where BTF tells."""
    section = elf.section(".BTF")
    if section is None:
        return {}
    btf = Btf.parse(section.data)
    there = btf.datasec(LEGACY)
    names = {}
    for each in there.variables if there else ():
        variable = btf.type(each.type)
        record = btf.type(btf.resolve(variable.type)) if isinstance(variable, Var) else None
        if isinstance(variable, Var) and isinstance(record, Struct):
            names[variable.name] = tuple(member.name for member in record.members)
    return names


def _is_iproute(made: LegacyMap, members: tuple[str, ...]) -> bool:
    """Are the last two of seven numbers an id and pinning? Else they are an inner map's index and a NUMA node."""
    if members:
        return members[-1] == "pinning"
    # An index means something for a map of maps only, and a node only with its flag.
    return made.type not in map_types.OUTER and not made.flags & map_types.Flag.NUMA_NODE


def _definition(name: str, offset: int, data: bytes, members: tuple[str, ...]) -> LegacyMap:
    numbers = struct.unpack(f"<{len(data) // 4}I", data)
    made = LegacyMap(name, offset, len(data), *numbers[:5])
    inner = 0
    if len(data) == _SAMPLES_OR_IPROUTE_DEF and _is_iproute(made, members):
        number, pinning = numbers[5:]
        made = replace(made, id=number, pinning=pinning)
    elif len(data) == _SAMPLES_OR_IPROUTE_DEF:
        inner, numa_node = numbers[5:]
        made = replace(made, numa_node=numa_node)
    elif len(data) == _IPROUTE_DEF:
        number, pinning, inner, _ = numbers[5:]
        made = replace(made, id=number, pinning=pinning)
    elif any(numbers[5:]):
        raise LegacyMapsError(f"{name} has {len(data)} bytes, of which only the first {_DEF} are known", made.btf_form)
    if inner or made.type in map_types.OUTER:
        why = f"{name} holds maps, and names them by numbers that only its own loader knows"
        raise LegacyMapsError(why, made.btf_form)
    return made


def translate(data: bytes) -> bytes:
    """The object with its maps as BTF has them; the same bytes where it has no ``SEC("maps")``.

    Raises LegacyMapsError, ElfError or BtfError.
    """
    elf = Elf.parse(data)
    maps = definitions(elf)
    if not maps:
        return data
    current = elf.section(CURRENT)
    if current is not None and current.size_bytes:
        forms = " ".join(each.btf_form for each in maps)
        raise LegacyMapsError('it has maps in SEC("maps") and in SEC(".maps")', forms)
    section = elf.section(".BTF")
    return _rewrite(data, elf, _Types(section.data if section else b"").with_maps(maps, elf))


# BTF.


class _Types:
    """BTF that grows: new types and strings behind the old ones, whose numbers stay."""

    def __init__(self, old: bytes) -> None:
        self._old = Btf.parse(old) if old else None
        self._types, self._strings = bytearray(), bytearray(b"\0")
        if old:
            _, _, _, head, type_at, type_bytes, text_at, text_bytes = HEADER.unpack_from(old)
            self._types += old[head + type_at : head + type_at + type_bytes]
            self._strings = bytearray(old[head + text_at : head + text_at + text_bytes])
        self._count = sum(1 for _ in self._places())
        self._integers: dict[int, int] = {}

    def with_maps(self, maps: tuple[LegacyMap, ...], elf: Elf) -> bytes:
        """The blob with a section of map definitions."""
        section = elf.section(LEGACY)
        assert section is not None
        inside = []
        for each in maps:
            variable = self._add(Kind.VAR, each.name, self._struct(each), extra=[_GLOBAL])
            inside += [variable, each.offset_bytes, each.size_bytes]
        self._hide(LEGACY)
        self._add(Kind.DATASEC, CURRENT, section.size_bytes, vlen=len(maps), extra=inside)
        types, texts = len(self._types), len(self._strings)
        header = HEADER.pack(MAGIC, 1, 0, HEADER.size, 0, types, types, texts)
        return header + bytes(self._types) + bytes(self._strings)

    def _struct(self, found: LegacyMap) -> int:
        """A definition's struct. All members lie at its beginning: the old definition has not room for more."""
        members: list[tuple[str, int]] = [
            (word, self._number(value))
            for word, value in (
                ("type", found.type),
                ("max_entries", found.max_entries),
                ("map_flags", found.flags),
                ("numa_node", found.numa_node),
                ("pinning", _PINNED_BY_NAME if found.pinning else 0),
            )
            if value
        ]
        for word, size in _sides(found):
            if not size:
                continue
            typed = self._side(found, word, size) if map_types.read_as(found.type) is map_types.Read.TABLE else 0
            if typed:
                members.append((word, self._add(Kind.PTR, "", typed)))
            else:
                members.append((f"{word}_size", self._number(size)))
        extra = [part for name, target in members for part in (self._string(name), target, 0)]
        return self._add(Kind.STRUCT, "", 8, vlen=len(members), extra=extra)

    def _side(self, found: LegacyMap, word: str, size: int) -> int:
        """The type of a key or value: as annotated, or an integer of that size; 0 where neither is there."""
        annotated = self._old.find(f"{_KV_PAIR}{found.name}", Kind.STRUCT) if self._old else None
        if annotated and self._old:
            record = self._old.type(annotated)
            for member in record.members if isinstance(record, Struct) else ():
                if member.name == word and self._old.size_of(member.type) == size:
                    return int(member.type)
        return self._integer(size) if size in (1, 2, 4, 8) else 0

    def _number(self, value: int) -> int:
        """``__uint(word, value)``: a pointer to an array that is so long."""
        array = self._add(Kind.ARRAY, "", 0, extra=[self._integer(4), self._integer(4), value])
        return self._add(Kind.PTR, "", array)

    def _integer(self, size: int) -> int:
        names = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "unsigned long long"}
        if size not in self._integers:
            self._integers[size] = self._add(Kind.INT, names[size], size, extra=[size * 8])
        return self._integers[size]

    def _string(self, text: str) -> int:
        at = len(self._strings) if text else 0
        if text:
            self._strings += text.encode() + b"\0"
        return at

    def _add(self, kind: Kind, name: str, word: int, *, vlen: int = 0, extra: list[int] | None = None) -> int:
        parts = extra or []
        self._types += struct.pack(f"<III{len(parts)}I", self._string(name), kind << 24 | vlen, word, *parts)
        self._count += 1
        return self._count

    def _hide(self, name: str) -> None:
        """Take the old section of map definitions away: libbpf would look for it in the file.

        A prototype of a function, which nobody refers to, takes its number.
        """
        for at, kind, vlen in list(self._places()):
            (name_at,) = struct.unpack_from("<I", self._types, at)
            end = self._strings.find(b"\0", name_at)
            if kind == Kind.DATASEC and self._strings[name_at:end] == name.encode():
                self._types[at : at + 12 * (1 + vlen)] = struct.pack("<III", 0, Kind.FUNC_PROTO << 24, 0)
                return

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """(offset, kind, vlen) of every type."""
        at = 0
        while at + 12 <= len(self._types):
            (info,) = struct.unpack_from("<I", self._types, at + 4)
            kind, vlen = info >> 24 & 0x1F, info & 0xFFFF
            yield at, kind, vlen
            at += 12 + _EXTRA.get(Kind(kind), (0, 0))[0] + _EXTRA.get(Kind(kind), (0, 0))[1] * vlen


#: Bytes behind a type's head: once, and for each of its parts.
_EXTRA = {
    Kind.INT: (4, 0),
    Kind.ARRAY: (12, 0),
    Kind.STRUCT: (0, 12),
    Kind.UNION: (0, 12),
    Kind.ENUM: (0, 8),
    Kind.ENUM64: (0, 12),
    Kind.FUNC_PROTO: (0, 8),
    Kind.VAR: (4, 0),
    Kind.DATASEC: (0, 12),
    Kind.DECL_TAG: (4, 0),
}


def _sides(found: LegacyMap) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("key", found.key_bytes), ("value", found.value_bytes)


def _c_type(size: int) -> str:
    return {1: "u8", 2: "u16", 4: "u32", 8: "u64"}.get(size, f"u8[{size}]")


# ELF.


def _rewrite(data: bytes, elf: Elf, btf: bytes) -> bytes:
    """The file with a new .BTF and a new name for its maps: both, and the headers, go behind what was there."""
    (headers_at,) = struct.unpack_from("<Q", data, _EHDR_SHOFF)
    count, names_index = struct.unpack_from("<HH", data, _EHDR_SHNUM)
    headers = [list(_SHDR.unpack_from(data, headers_at + at * _SHDR.size)) for at in range(count)]
    names = bytearray(elf.sections[names_index].data)
    out = bytearray(data)

    def place(content: bytes) -> tuple[int, int]:
        out.extend(b"\0" * (-len(out) % 8))
        out.extend(content)
        return len(out) - len(content), len(content)

    def named(text: str) -> int:
        names.extend(text.encode() + b"\0")
        return len(names) - len(text) - 1

    for section in elf.sections:
        if section.name == LEGACY:
            headers[section.index][0] = named(CURRENT)
    types = elf.section(".BTF")
    if types is None:
        headers.append([named(".BTF"), SHT_PROGBITS, 0, 0, 0, 0, 0, 0, 8, 0])
    header = headers[types.index] if types else headers[-1]
    header[4], header[5] = place(btf)
    headers[names_index][4], headers[names_index][5] = place(bytes(names))
    at, _ = place(b"".join(_SHDR.pack(*each) for each in headers))
    struct.pack_into("<Q", out, _EHDR_SHOFF, at)
    struct.pack_into("<H", out, _EHDR_SHNUM, len(headers))
    return bytes(out)
