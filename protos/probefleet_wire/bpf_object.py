"""What a compiled CO-RE object holds: programs, maps, parameters, licence and source lines. Pure.

``BpfObject.parse(bytes)`` is used by the operator (which maps and programs has the policy?), by the agent
(what may be set, how are maps decoded, which source line does the verifier mean?) and by ``probefleet
explain``. Loading is not done here: that is libbpf's, or the agent's executor's.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from probefleet_wire.btf import MAGIC, MAX_TEXT_BYTES, Btf
from probefleet_wire.btf_types import VOID, Array, BtfError, Ptr, Struct, TypeId, Var
from probefleet_wire.elf import EM_BPF, SHT_NOBITS, STB_GLOBAL, STB_WEAK, STT_FUNC, STT_SECTION, Elf, ElfError, Symbol
from probefleet_wire.map_types import Flag, MapType

INSTRUCTION_BYTES = 8
MAX_DATA_BYTES = 32 << 20
MAX_INNER_DEPTH = 1  # the kernel has no maps in maps in maps
_EXT_HEADER = struct.Struct("<HBBIIIII")
_LINE = struct.Struct("<IIII")


@dataclass(frozen=True, slots=True)
class MapDef:
    """A map as its definition in ``.maps`` asks for it; sizes and type ids are 0 where it does not say."""

    name: str
    type: int
    key_bytes: int = 0
    value_bytes: int = 0
    key_type: TypeId = VOID
    value_type: TypeId = VOID
    max_entries: int = 0
    flags: int = 0
    pinning: int = 0
    numa_node: int = 0
    map_extra: int = 0
    inner: MapDef | None = None
    #: What ``.values = {[3] = &other}`` puts into slots before the program runs: inner maps, or programs.
    slots: tuple[tuple[int, str], ...] = ()

    @property
    def is_section(self) -> bool:
        """Global variables (``.bss`` and its like), not a map that the C declares."""
        return self.name.startswith(".")


@dataclass(frozen=True, slots=True)
class Reference:
    """A map in a program's instructions: what a loader fills in."""

    section: str
    offset_bytes: int  #: within the section
    program: str  #: "" in a function that is no program (``.text``)
    map: str


@dataclass(frozen=True, slots=True)
class Variable:
    """A global variable: a parameter where it is in ``.rodata`` (``const volatile`` in C)."""

    name: str
    section: str
    type: TypeId
    offset_bytes: int
    size_bytes: int
    initial: bytes
    #: An instruction names it. A compiler writes what is not ``volatile`` into the instructions themselves.
    used: bool


@dataclass(frozen=True, slots=True)
class ProgramDef:
    """A program: ``section`` is what its SEC() says, ``name`` its function."""

    name: str
    section: str
    offset_bytes: int
    instructions: bytes

    @property
    def instruction_count(self) -> int:
        """How many eight-byte instructions."""
        return len(self.instructions) // INSTRUCTION_BYTES


@dataclass(frozen=True, slots=True)
class SourceLine:
    """The C line from which an instruction comes."""

    file: str
    line: int
    column: int
    text: str


class LineRecord(NamedTuple):
    """A source line as .BTF.ext has it: offsets of strings, so that only lines asked for become text."""

    instruction: int  #: number within the program
    file: int
    text: int
    place: int  #: line << 10 | column


@dataclass(frozen=True, slots=True)
class BpfObject:
    """One object file; ``btf`` is None for an object compiled without ``-g``."""

    licence: str
    programs: tuple[ProgramDef, ...]
    maps: tuple[MapDef, ...]
    variables: tuple[Variable, ...]
    btf: Btf | None
    lines: dict[str, tuple[LineRecord, ...]]
    #: ``.rodata``, ``.data``, ``.bss`` and their like, as the maps that a loader makes of them.
    sections: tuple[MapDef, ...] = ()
    references: tuple[Reference, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> BpfObject:
        """Read an object; raises ``ElfError`` or ``BtfError`` with the reason."""
        elf = Elf.parse(data)
        if elf.machine != EM_BPF:
            raise ElfError(f"ELF file is for machine {elf.machine}, not BPF ({EM_BPF}): compile with -target bpf")
        licence = elf.section("license")
        btf_section, ext = elf.section(".BTF"), elf.section(".BTF.ext")
        btf = Btf.parse(btf_section.data) if btf_section else None
        programs = _programs(elf)
        maps = map_definitions(btf) if btf else ()
        places = _places(elf)
        return cls(
            licence=licence.data.split(b"\0")[0].decode("utf-8", "backslashreplace") if licence else "",
            programs=programs,
            maps=tuple(replace(each, slots=_slots(elf, btf, each, places)) for each in maps) if btf else (),
            variables=_variables(elf, btf) if btf else (),
            btf=btf,
            lines=_lines(ext.data, btf, programs) if btf and ext else {},
            sections=_sections(elf),
            references=_references(elf, programs, places),
        )

    @property
    def all_maps(self) -> tuple[MapDef, ...]:
        """Every map that loading it makes."""
        return (*self.maps, *self.sections)

    def map(self, name: str) -> MapDef | None:
        """The map, or section of variables, of that name."""
        return next((each for each in self.all_maps if each.name == name), None)

    def callers(self, map_name: str) -> tuple[ProgramDef, ...]:
        """The programs that have a map in their instructions (what lies in ``.text`` belongs to all)."""
        users = {each.program for each in self.references if each.map == map_name}
        return self.programs if "" in users else tuple(each for each in self.programs if each.name in users)

    def program(self, name: str) -> ProgramDef:
        """The program of that name; raises ``ElfError`` where there is none."""
        for program in self.programs:
            if program.name == name:
                return program
        there = ", ".join(each.name for each in self.programs) or "none"
        raise ElfError(f"there is no program {name!r} in this object; there is: {there}")

    def parameters(self) -> tuple[Variable, ...]:
        """The variables that may be set before loading: those in ``.rodata``."""
        return tuple(each for each in self.variables if each.section == ".rodata")

    def line_of(self, program: str, instruction: int) -> SourceLine | None:
        """The source line of a program's instruction: the last one noted at or before it."""
        lines = self.lines.get(program, ())
        at = bisect_right(lines, instruction, key=lambda each: each.instruction)
        if not at or self.btf is None:
            return None
        record = lines[at - 1]
        return SourceLine(
            file=self.btf.string(record.file, MAX_TEXT_BYTES),
            line=record.place >> 10,
            column=record.place & 0x3FF,
            text=self.btf.string(record.text, MAX_TEXT_BYTES).strip(),
        )


def map_definitions(btf: Btf) -> tuple[MapDef, ...]:
    """The maps that a CO-RE object defines by ``SEC(".maps")``, in the order of the source."""
    section = btf.datasec(".maps")
    if section is None:
        return ()
    found = []
    for each in section.variables:
        variable = btf.type(each.type)
        if not isinstance(variable, Var):
            raise BtfError(f".maps holds type {each.type}, which is no variable")
        if not variable.name:
            raise BtfError(f".maps holds a map without a name (type {each.type})")
        found.append(_map(btf, variable.name, variable.type, 0))
    return tuple(found)


def _map(btf: Btf, name: str, type_id: int, depth: int) -> MapDef:
    record = btf.struct(type_id)
    made = MapDef(name, 0)
    for member in record.members:
        word = member.name
        if word in ("key", "value"):
            target = _pointed(btf, name, word, member.type)
            size = btf.size_of(target)
            sizes = (made.key_bytes if word == "key" else made.value_bytes, size)
            if sizes[0] not in (0, size):
                raise BtfError(f"map {name!r}: {word}_size says {sizes[0]} bytes, its type has {size}")
            if word == "key":
                made = replace(made, key_type=target, key_bytes=size)
            else:
                made = replace(made, value_type=target, value_bytes=size)
        elif word == "values":
            made = replace(made, inner=_inner(btf, name, member.type, depth), value_bytes=4)
        elif word in _NUMBERS:
            change: dict[str, Any] = {_NUMBERS[word]: _number(btf, name, word, member.type)}
            made = replace(made, **change)
        else:
            raise BtfError(f"map {name!r}: {word!r} is not a known part of a definition")
    if not made.type:
        raise BtfError(f"map {name!r} does not say its type: __uint(type, BPF_MAP_TYPE_…)")
    return made


_NUMBERS = {
    "type": "type",
    "max_entries": "max_entries",
    "map_flags": "flags",
    "numa_node": "numa_node",
    "key_size": "key_bytes",
    "value_size": "value_bytes",
    "pinning": "pinning",
    "map_extra": "map_extra",
}


def _pointed(btf: Btf, name: str, word: str, type_id: int) -> TypeId:
    pointer = btf.type(btf.resolve(type_id))
    if not isinstance(pointer, Ptr):
        raise BtfError(f"map {name!r}: {word!r} is no pointer; write __type({word}, …)")
    return pointer.target


def _number(btf: Btf, name: str, word: str, type_id: int) -> int:
    """``__uint(word, n)`` is ``int (*word)[n]``: the number is an array's length."""
    array = btf.type(btf.resolve(_pointed(btf, name, word, type_id)))
    if not isinstance(array, Array):
        raise BtfError(f"map {name!r}: {word!r} is not written as __uint({word}, …)")
    return array.count


def _inner(btf: Btf, name: str, type_id: int, depth: int) -> MapDef | None:
    """``__array(values, struct …)``: the inner map's definition, or None for an array of programs."""
    array = btf.type(btf.resolve(type_id))
    pointer = btf.type(btf.resolve(array.element)) if isinstance(array, Array) else None
    if not isinstance(pointer, Ptr):
        raise BtfError(f"map {name!r}: values is not written as __array(values, …)")
    if not isinstance(btf.type(btf.resolve(pointer.target)), Struct):
        return None
    if depth >= MAX_INNER_DEPTH:
        raise BtfError(f"map {name!r} lies in a map in a map; the kernel knows one level")
    return _map(btf, f"{name}.inner", pointer.target, depth + 1)


# Sections in which maps are defined: BTF's, and the one before it.
MAP_SECTIONS = (".maps", "maps")
_DATA = (".rodata", ".data", ".bss")
_POINTER_BYTES = 8


def _places(elf: Elf) -> dict[tuple[int, int], str]:
    """(section number, offset) → the map that is defined there."""
    numbers = {each.index for each in elf.sections if each.name in MAP_SECTIONS}
    return {
        (symbol.section, symbol.value): symbol.name
        for symbol in elf.symbols
        if symbol.section in numbers and symbol.type != STT_SECTION and symbol.name
    }


def _references(
    elf: Elf, programs: tuple[ProgramDef, ...], places: dict[tuple[int, int], str]
) -> tuple[Reference, ...]:
    """Every map relocation, in the order of the file."""
    found = []
    variables = {each.index: each.name for each in elf.sections if each.name.startswith(_DATA)}
    for section in elf.sections:
        if not section.executable:
            continue
        inside = [each for each in programs if each.section == section.name]
        for relocation in elf.relocations(section):
            at = relocation.offset_bytes
            place = relocation.symbol.value
            if relocation.symbol.type == STT_SECTION:  # a static map: the instruction itself says where in the section
                place = int.from_bytes(section.data[at + 4 : at + 8], "little")
            name = places.get((relocation.symbol.section, place)) or variables.get(relocation.symbol.section)
            if name is None:
                continue
            owner = next((p.name for p in inside if 0 <= at - p.offset_bytes < len(p.instructions)), "")
            found.append(Reference(section.name, at, owner, name))
    return tuple(found)


def _sections(elf: Elf) -> tuple[MapDef, ...]:
    """Sections of variables: arrays of one entry, mapped into memory."""
    found = []
    for section in elf.sections:
        stem = "." + section.name.split(".")[1] if section.name.startswith(".") else ""
        if stem not in _DATA or not section.size_bytes or not (section.data or section.type == SHT_NOBITS):
            continue
        flags = Flag.MMAPABLE | (Flag.RDONLY_PROG if stem == ".rodata" else 0)
        found.append(
            MapDef(section.name, MapType.ARRAY, key_bytes=4, value_bytes=section.size_bytes, max_entries=1, flags=flags)
        )
    return tuple(found)


def _slots(elf: Elf, btf: Btf, definition: MapDef, places: dict[tuple[int, int], str]) -> tuple[tuple[int, str], ...]:
    """The initial entries of an array of maps or programs: pointers that lie behind its definition's members."""
    if definition.type not in (MapType.ARRAY_OF_MAPS, MapType.HASH_OF_MAPS, MapType.PROG_ARRAY):
        return ()
    section = elf.section(".maps")
    variable = btf.datasec(".maps")
    place = next((at for at, name in places.items() if name == definition.name), None)
    if section is None or variable is None or place is None:
        return ()
    record = next(
        btf.struct(found.type)
        for each in variable.variables
        if isinstance(found := btf.type(each.type), Var) and found.name == definition.name
    )
    values = next((member for member in record.members if member.name == "values"), None)
    if values is None:
        return ()
    start = place[1] + values.offset_bytes
    # The array is the definition's last member: the next map begins behind it.
    after = min((at for number, at in places if number == place[0] and at > place[1]), default=section.size_bytes)
    return tuple(
        ((relocation.offset_bytes - start) // _POINTER_BYTES, relocation.symbol.name)
        for relocation in elf.relocations(section)
        if start <= relocation.offset_bytes < after and relocation.symbol.name
    )


def _programs(elf: Elf) -> tuple[ProgramDef, ...]:
    by_section: dict[int, list[Symbol]] = {}
    for symbol in elf.symbols:
        if symbol.type == STT_FUNC and symbol.binding in (STB_GLOBAL, STB_WEAK):
            by_section.setdefault(symbol.section, []).append(symbol)
    found: list[ProgramDef] = []
    for section in elf.sections:
        if not section.executable or section.name == ".text":
            continue
        if section.size_bytes % INSTRUCTION_BYTES:
            raise ElfError(f"section {section.name!r} has {section.size_bytes} bytes, no multiple of 8")
        end = 0
        for symbol in sorted(by_section.get(section.index, ()), key=lambda each: each.value):
            if not symbol.name:
                raise ElfError(f"a function in {section.name!r} has no name")
            if symbol.value % INSTRUCTION_BYTES or symbol.size_bytes % INSTRUCTION_BYTES:
                raise ElfError(f"function {symbol.name!r} does not start and end at an instruction")
            if symbol.value < end:
                raise ElfError(f"function {symbol.name!r} overlaps the one before it in {section.name!r}")
            end = symbol.value + symbol.size_bytes
            if end > section.size_bytes:
                raise ElfError(f"function {symbol.name!r} lies outside its section {section.name!r}")
            found.append(ProgramDef(symbol.name, section.name, symbol.value, section.data[symbol.value : end]))
    return tuple(found)


def _variables(elf: Elf, btf: Btf) -> tuple[Variable, ...]:
    """Variables by section. BTF's own offsets are 0 for globals until an object is linked: the symbols
    know.
    """
    offsets = {(symbol.section, symbol.name): symbol.value for symbol in elf.symbols}
    named = _named_places(elf)
    found = []
    for section in elf.sections:
        if not section.name.startswith((".rodata", ".data", ".bss")):
            continue
        if section.size_bytes > MAX_DATA_BYTES:
            raise ElfError(f"section {section.name!r} has {section.size_bytes} bytes; at most {MAX_DATA_BYTES}")
        datasec = btf.datasec(section.name)
        initial = section.data or bytes(section.size_bytes)
        taken = 0
        for each in datasec.variables if datasec else ():
            variable = btf.type(each.type)
            if not isinstance(variable, Var):
                raise BtfError(f"{section.name} holds type {each.type}, which is no variable")
            offset = offsets.get((section.index, variable.name), each.offset_bytes)
            size = btf.size_of(variable.type)
            taken += size
            if offset + size > section.size_bytes or taken > section.size_bytes:
                raise ElfError(f"variable {variable.name!r} ends past its section {section.name!r}")
            found.append(
                Variable(
                    name=variable.name,
                    section=section.name,
                    type=variable.type,
                    offset_bytes=offset,
                    size_bytes=size,
                    initial=initial[offset : offset + size],
                    used=bisect_left(named, (section.index, offset + size))
                    > bisect_left(named, (section.index, offset)),
                )
            )
    return tuple(found)


def _named_places(elf: Elf) -> list[tuple[int, int]]:
    """(section, byte) of all that instructions refer to, in order: the symbol's place and what the instruction adds."""
    found = set()
    for code in elf.sections:
        for each in elf.relocations(code) if code.executable else ():
            added = code.data[each.offset_bytes + 4 : each.offset_bytes + 8]
            found.add((each.symbol.section, each.symbol.value + int.from_bytes(added, "little")))
    return sorted(found)


def _lines(data: bytes, btf: Btf, programs: tuple[ProgramDef, ...]) -> dict[str, tuple[LineRecord, ...]]:
    """Read .BTF.ext's line information and sort it by program."""
    if len(data) < _EXT_HEADER.size:
        raise BtfError(f".BTF.ext ends within its header: {len(data)} bytes of {_EXT_HEADER.size}")
    magic, version, _, header_bytes, _, _, line_offset, line_bytes = _EXT_HEADER.unpack_from(data)
    if magic != MAGIC or version != 1:
        raise BtfError(".BTF.ext does not start with BTF's magic number and version 1")
    at, end = header_bytes + line_offset, header_bytes + line_offset + line_bytes
    if end > len(data):
        raise BtfError(f".BTF.ext's lines end at byte {end} of {len(data)}")
    if line_bytes < 4:
        return {}
    (record_bytes,) = struct.unpack_from("<I", data, at)
    if record_bytes < _LINE.size:
        raise BtfError(f".BTF.ext's line records have {record_bytes} bytes; they have at least {_LINE.size}")
    at += 4
    by_section: dict[str, list[tuple[int, int, int, int]]] = {}
    while at + 8 <= end:
        name_offset, count = struct.unpack_from("<II", data, at)
        at += 8
        if at + count * record_bytes > end:
            raise BtfError(f".BTF.ext says {count} lines, more than its bytes can hold")
        rows = by_section.setdefault(btf.string(name_offset), [])
        rows += [_LINE.unpack_from(data, at + index * record_bytes) for index in range(count)]
        at += count * record_bytes
    for rows in by_section.values():
        rows.sort()
    return {each.name: _program_lines(each, by_section.get(each.section, [])) for each in programs}


def _program_lines(program: ProgramDef, rows: list[tuple[int, int, int, int]]) -> tuple[LineRecord, ...]:
    first = program.offset_bytes
    start, end = bisect_left(rows, (first,)), bisect_left(rows, (first + len(program.instructions),))
    return tuple(
        LineRecord((offset - first) // INSTRUCTION_BYTES, file, text, place)
        for offset, file, text, place in rows[start:end]
    )
