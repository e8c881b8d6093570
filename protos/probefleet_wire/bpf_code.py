"""A compiled object's functions as instructions, with the calls between them as the loader will resolve them. Pure.

``verdicts`` and ``packet_writes`` prove things about what will run. So beside the instructions this says which of them
the loader fills in (relocations, CO-RE): of these the bytes in the file prove nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from probefleet_wire import btf_ext
from probefleet_wire.btf import Btf
from probefleet_wire.btf_types import BtfError, Struct
from probefleet_wire.elf import STT_FUNC, Elf, ElfError

BYTES = 8
_LAYOUT = struct.Struct("<BBhi")
LOAD_IMM64, CALL, EXIT, JUMP, JUMP_LONG = 0x18, 0x85, 0x95, 0x05, 0x06
FROM_HELPER, FROM_FUNCTION, FROM_KERNEL = 0, 1, 2  #: ``src`` of a CALL: include/uapi/linux/bpf.h
_T = TypeVar("_T")
#: (section number, byte in it): where a function begins.
Place = tuple[int, int]


class Instruction(NamedTuple):
    """Eight bytes of BPF."""

    code: int
    dst: int
    src: int
    offset: int
    imm: int

    @property
    def kind(self) -> int:
        """BPF_CLASS."""
        return self.code & 7


@dataclass(frozen=True, slots=True)
class CoreField:
    """The field whose offset CO-RE puts into an instruction."""

    struct_name: str
    field_name: str


@dataclass(frozen=True, slots=True)
class Function:
    """One function; numbers are those of instructions within it."""

    name: str
    place: Place
    instructions: tuple[Instruction, ...]
    calls: Mapping[int, Place] = field(default_factory=dict)  #: calls of functions of the same object
    addresses: Mapping[int, Place] = field(default_factory=dict)  #: functions handed on, as to bpf_loop()
    externals: Mapping[int, str] = field(default_factory=dict)  #: functions of the kernel that are called
    filled: Mapping[int, CoreField | None] = field(default_factory=dict)  #: what the loader changes; None: by no field

    def targets(self, number: int) -> tuple[int, ...]:
        """Where execution goes on after an instruction, within this function."""
        it = self.instructions[number]
        if it.code == EXIT:
            return ()
        if it.code == JUMP:
            return (number + 1 + it.offset,)
        if it.code == JUMP_LONG:
            return (number + 1 + it.imm,)
        if it.code == LOAD_IMM64:
            return (number + 2,)
        if it.kind in (5, 6) and it.code != CALL:
            return (number + 1, number + 1 + it.offset)
        return (number + 1,)


@dataclass(frozen=True, slots=True)
class Code:
    """All functions of an object: programs (those with a SEC()), and the functions that they call."""

    functions: Mapping[Place, Function]
    programs: Mapping[str, Place]

    def reached(self, program: str) -> list[Function]:
        """The program, and every function that it can come to."""
        seen: dict[Place, Function] = {}
        waiting = [self.programs[program]]
        while waiting:
            place = waiting.pop()
            if place in seen:
                continue
            if place not in self.functions:
                raise ElfError(f"{program} calls byte {place[1]} of section {place[0]}, where no function begins")
            found = seen[place] = self.functions[place]
            waiting += [*found.calls.values(), *found.addresses.values()]
        return list(seen.values())


def decode(data: bytes) -> tuple[Instruction, ...]:
    """Bytes into instructions."""
    return tuple(
        Instruction(code, registers & 15, registers >> 4, offset, imm)
        for code, registers, offset, imm in _LAYOUT.iter_unpack(data[: len(data) // BYTES * BYTES])
    )


def encode(instruction: Instruction) -> bytes:
    """An instruction into bytes."""
    it = instruction
    return _LAYOUT.pack(it.code, it.dst | it.src << 4, it.offset, it.imm)


def read(data: bytes) -> Code:
    """The functions of an object; raises ``ElfError`` or ``BtfError``."""
    elf = Elf.parse(data)
    core = _core(elf)
    functions: dict[Place, Function] = {}
    programs: dict[str, Place] = {}
    for section in elf.sections:
        if not section.executable:
            continue
        code = decode(section.data)
        filled: dict[int, CoreField | None] = dict(core.get(section.name, {}))
        calls: dict[int, Place] = {}
        addresses: dict[int, Place] = {}
        externals: dict[int, str] = {}
        for each in elf.relocations(section):
            number = each.offset_bytes // BYTES
            if number >= len(code):
                raise ElfError(f"section {section.name!r}: a relocation lies behind its last instruction")
            filled[number] = None
            to, it = each.symbol.section, code[number]
            if not to and it.code == CALL:
                externals[number] = each.symbol.name
            if not to or to >= len(elf.sections) or not elf.sections[to].executable:
                continue
            # libbpf's bpf_object__reloc_code(): a call's immediate counts instructions, an address's bytes.
            if it.code == CALL and it.src == FROM_FUNCTION:
                calls[number] = (to, each.symbol.value + (it.imm + 1) * BYTES)
            elif it.code == LOAD_IMM64:
                addresses[number] = (to, each.symbol.value + it.imm)
        for number, it in enumerate(code):
            if it.code == CALL and it.src == FROM_FUNCTION and number not in calls and number not in externals:
                calls[number] = (section.index, (number + 1 + it.imm) * BYTES)
        for symbol in elf.symbols:
            if symbol.type != STT_FUNC or symbol.section != section.index:
                continue
            first, end = symbol.value // BYTES, (symbol.value + symbol.size_bytes) // BYTES
            if end > len(code) or symbol.value % BYTES:
                raise ElfError(f"function {symbol.name!r} lies outside its section {section.name!r}")
            place = (section.index, symbol.value)
            functions[place] = Function(
                symbol.name,
                place,
                code[first:end],
                _within(calls, first, end),
                _within(addresses, first, end),
                _within(externals, first, end),
                _within(filled, first, end),
            )
            if section.name != ".text":
                programs[symbol.name] = place
    return Code(functions, programs)


def _within(numbered: Mapping[int, _T], first: int, end: int) -> dict[int, _T]:
    """A function's part of what is known of its section, by its own numbers."""
    return {number - first: value for number, value in numbered.items() if first <= number < end}


def _core(elf: Elf) -> dict[str, dict[int, CoreField | None]]:
    """By section's name: the instructions that CO-RE rewrites."""
    btf_section, ext = elf.section(".BTF"), elf.section(".BTF.ext")
    if btf_section is None or ext is None:
        return {}
    btf = Btf.parse(btf_section.data)
    found: dict[str, dict[int, CoreField | None]] = {}
    for record in btf_ext.records(ext.data, btf):
        if record.table == "core":
            wanted = btf_ext.CoreRelocation.of(record, btf)
            found.setdefault(record.section, {})[record.instruction_byte // BYTES] = _field(wanted, btf)
    return found


def _field(wanted: btf_ext.CoreRelocation, btf: Btf) -> CoreField | None:
    """The member that a relocation of the simplest kind names: ``ctx->data``."""
    parts = wanted.access.split(":")
    if wanted.kind != 0 or len(parts) != 2 or parts[0] != "0" or not parts[1].isdigit():
        return None
    try:
        record = btf.type(btf.resolve(wanted.type_id))
    except BtfError:
        return None
    if not isinstance(record, Struct) or int(parts[1]) >= len(record.members):
        return None
    return CoreField(record.name, record.members[int(parts[1])].name)
