"""A network program whose verdict is the one that changes nothing, whatever it computes. Pure.

``fixed`` (the planner calls it) makes every way out of a program lead through two instructions at its end::

    exit   →   goto end             end:  r0 = PASS
                                          exit

Nothing moves inside a program, so jumps stay; what lies behind it in its section does, and with it symbols, relocations
and the records of .BTF.ext. ``pass_proved`` (the agent calls it, before it loads as root) looks whether a program can
return nothing else: every exit follows ``r0 = PASS``, nothing jumps between the two, no loader rewrites them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping

from probefleet_wire import bpf_code, btf_ext
from probefleet_wire.bpf_code import BYTES, EXIT, JUMP, LOAD_IMM64, Code, Function, Instruction
from probefleet_wire.btf import Btf
from probefleet_wire.elf import SHT_REL, SHT_RELA, SHT_SYMTAB, STT_FUNC, Elf, ElfError

_MOV_IMM = frozenset({0xB7, 0xB4})
#: The farthest that a jump reaches, in instructions.
MAX_JUMP = 32_767
_ADDED_BYTES = 2 * BYTES
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")


def pass_proved(code: Code, program: str, verdict: int) -> bool:
    """Whether a program returns ``verdict`` on every way out; False where that cannot be seen."""
    function = code.functions[code.programs[program]]
    exits = [number for number, it in enumerate(function.instructions) if it.code == EXIT]
    jumped_to = {target for number in _starts(function) for target in function.targets(number) if target != number + 1}
    return bool(exits) and all(_passes(function, number, verdict, jumped_to) for number in exits)


def legacy_loads(code: Code, program: str) -> list[tuple[str, int]]:
    """Where it has LD_ABS or LD_IND, which end a program with 0 when they read past the packet: (function, number)."""
    return [
        (function.name, number)
        for function in code.reached(program)
        for number in _starts(function)
        if function.instructions[number].kind == 0 and function.instructions[number].code != LOAD_IMM64
    ]


def _starts(function: Function) -> list[int]:
    """Numbers of instructions, without the second halves of wide ones."""
    found, number = [], 0
    while number < len(function.instructions):
        found.append(number)
        number += 2 if function.instructions[number].code == LOAD_IMM64 else 1
    return found


def _passes(function: Function, number: int, verdict: int, jumped_to: Collection[int]) -> bool:
    if number == 0 or number in jumped_to or {number, number - 1} & function.filled.keys():
        return False
    before = function.instructions[number - 1]
    return before.code in _MOV_IMM and before.dst == 0 and before.imm == verdict and number - 1 in _starts(function)


def fixed(data: bytes, verdicts: Mapping[str, int]) -> bytes:
    """The object with these programs' verdicts fixed; unchanged where all are proved already. Raises ``ElfError``."""
    code = bpf_code.read(data)
    wanted = {name: verdict for name, verdict in verdicts.items() if not pass_proved(code, name, verdict)}
    for section in sorted({code.programs[name][0] for name in wanted}):
        here = [
            (code.functions[code.programs[name]], verdict)
            for name, verdict in wanted.items()
            if code.programs[name][0] == section
        ]
        data = _lengthened(data, section, here)
    return data


def _lengthened(data: bytes, section: int, wanted: list[tuple[Function, int]]) -> bytes:
    """Append the two instructions to these functions of one section, and move what lies behind them."""
    elf = Elf.parse(data)
    name = elf.sections[section].name
    if sum(each.name == name and each.executable for each in elf.sections) > 1:
        raise ElfError(f"two sections are called {name!r}: their records cannot be told apart")
    ends = sorted(function.place[1] + len(function.instructions) * BYTES for function, _ in wanted)

    def moved(byte: int) -> int:
        return byte + _ADDED_BYTES * sum(end <= byte for end in ends)

    content, at = bytearray(), 0
    old = elf.sections[section].data
    for function, verdict in sorted(wanted, key=lambda each: each[0].place):
        start = function.place[1]
        content += old[at:start] + _with_end(function, verdict)
        at = start + len(function.instructions) * BYTES
    content += old[at:]

    table = _HEADER.unpack_from(data)[6]
    made = bytearray(data) + bytes(-len(data) % 8)
    place = len(made)
    made += content
    header = list(_SECTION.unpack_from(made, table + section * _SECTION.size))
    header[4], header[5] = place, len(content)
    _SECTION.pack_into(made, table + section * _SECTION.size, *header)
    changed = {function.place[1] for function, _ in wanted}
    for each in elf.sections:
        offset = _SECTION.unpack_from(data, table + each.index * _SECTION.size)[4]
        if each.type in (SHT_REL, SHT_RELA) and each.info == section:
            step = 16 if each.type == SHT_REL else 24
            for entry in range(offset, offset + each.size_bytes, step):
                struct.pack_into("<Q", made, entry, moved(struct.unpack_from("<Q", made, entry)[0]))
        elif each.type == SHT_SYMTAB:
            _move_symbols(made, offset, each.size_bytes, section, len(old), moved, changed)
        elif each.name == ".BTF.ext":
            btf = elf.section(".BTF")
            for record in btf_ext.records(each.data, Btf.parse(btf.data)) if btf else ():
                if record.section == name:
                    if record.instruction_byte >= len(old):
                        raise ElfError(f".BTF.ext names byte {record.instruction_byte} of {len(old)} in {name!r}")
                    struct.pack_into("<I", made, offset + record.place, moved(record.instruction_byte))
    return bytes(made)


def _move_symbols(
    made: bytearray,
    offset: int,
    size: int,
    section: int,
    section_bytes: int,
    moved: Callable[[int], int],
    changed: Collection[int],
) -> None:
    for entry in range(offset, offset + size, _SYMBOL.size):
        name, info, other, where, value, length = _SYMBOL.unpack_from(made, entry)
        if where == section:
            if value > section_bytes:
                raise ElfError(f"a symbol lies at byte {value} of a section of {section_bytes}")
            if info & 0xF == STT_FUNC and value in changed:
                length += _ADDED_BYTES
            _SYMBOL.pack_into(made, entry, name, info, other, where, moved(value), length)


def _with_end(function: Function, verdict: int) -> bytes:
    """The function's bytes with its exits led to the end."""
    end = len(function.instructions)
    made = bytearray()
    for number, it in enumerate(function.instructions):
        if it.code == EXIT:
            distance = end - number - 1
            if distance > MAX_JUMP:
                raise ElfError(f"{function.name} is too long ({end:,} instructions) for its verdict to be fixed")
            it = Instruction(JUMP, 0, 0, distance, 0)
        made += bpf_code.encode(it)
    made += bpf_code.encode(Instruction(0xB7, 0, 0, 0, verdict))
    return bytes(made) + bpf_code.encode(Instruction(EXIT, 0, 0, 0, 0))
