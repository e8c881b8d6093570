"""Static probes of user space (USDT): an ELF file's notes in, places and arguments out. Pure but for the file.

A program's author marks places with DTRACE_PROBE() (<sys/sdt.h>); what is left of one is a nop and a note: where it
lies, which counter (semaphore) says that somebody listens, and where its arguments are, written as the assembler
would ("-4@%eax 8@-20(%rbp)"). ``links_usdt`` attaches there and hands the arguments to the program in the form that
libbpf's usdt.bpf.h reads.
"""

from __future__ import annotations

import enum
import platform
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from probefleet_agent.errors import NoSuchTarget, ObjectError
from probefleet_agent.kernel import elf_file, targets

MAX_ARGUMENTS = 12
MAX_PLACES = 4096
_TYPE = 3
_ADDRESSES = struct.Struct("<QQQ")  # of the probe, of .stapsdt.base when it was linked, of the semaphore


class Where(enum.IntEnum):
    """``enum __bpf_usdt_arg_type`` of usdt.bpf.h."""

    CONSTANT = 0
    REGISTER = 1
    MEMORY = 2


@dataclass(frozen=True, slots=True)
class Argument:
    """Where one argument is: ``value`` is the constant, or the distance from the register's content."""

    where: Where
    size_bytes: int
    signed: bool
    value: int = 0
    register_offset: int = 0  # in struct pt_regs


@dataclass(frozen=True, slots=True)
class Place:
    """One place of a probe in the file; a probe may have many, each with arguments elsewhere."""

    provider: str
    name: str
    address: int  # virtual, as linked
    offset: int
    semaphore_offset: int  # 0: nobody asks whether somebody listens
    arguments: str


def places(elf: elf_file.ElfFile) -> list[Place]:
    """Every probe of a file; empty where it has none."""
    notes = elf.section(".note.stapsdt")
    if notes is None:
        return []
    base = elf.section(".stapsdt.base")
    found: list[Place] = []
    for description in _notes(notes[1]):
        if len(description) < _ADDRESSES.size or len(found) >= MAX_PLACES:
            break
        address, linked, semaphore = _ADDRESSES.unpack_from(description)
        # prelink(8) moves a library without touching its notes; the section tells how far.
        moved = base[0] - linked if base else 0
        provider, name, arguments, *_ = [*description[_ADDRESSES.size :].split(b"\0"), b"", b"", b""]
        offset = elf.offset_of(address + moved)
        if offset is None:
            continue
        counter = elf.offset_of(semaphore + moved) if semaphore else 0
        if counter is None:
            continue
        words = (part.decode("utf-8", "backslashreplace") for part in (provider, name, arguments))
        provider_text, name_text, arguments_text = words
        found.append(Place(provider_text, name_text, address + moved, offset, counter, arguments_text))
    return found


def _notes(data: bytes) -> Iterator[bytes]:
    """Descriptions of the notes that are probes."""
    at = 0
    while at + 12 <= len(data):
        name_bytes, size, kind = struct.unpack_from("<III", data, at)
        body = at + 12 + (name_bytes + 3) // 4 * 4
        if body + size > len(data):
            return
        if kind == _TYPE and data[at + 12 : at + 12 + name_bytes] == b"stapsdt\0":
            yield data[body : body + size]
        at = body + (size + 3) // 4 * 4


def arguments_of(place: Place, machine: str = "") -> tuple[Argument, ...]:
    """Where a place's arguments are; ObjectError for a form that cannot be read by a program."""
    text = place.arguments.strip()
    if not text:
        return ()
    read = _READERS.get(machine or platform.machine(), _x86_64)
    # AArch64 writes "8@[sp, 16]": a blank within brackets does not separate.
    words = re.findall(r"-?\d+f?@(?:\[[^\]]*\]|\S+)", text)
    if len(words) > MAX_ARGUMENTS:
        raise ObjectError(
            f"probe {place.provider}:{place.name} has {len(words)} arguments; {MAX_ARGUMENTS} can be read"
        )
    found = []
    for number, word in enumerate(words, 1):
        size, _, operand = word.partition("@")
        argument = read(abs(int(size)), size.startswith("-"), operand) if not size.endswith("f") else None
        if argument is None or argument.size_bytes not in (1, 2, 4, 8):
            raise ObjectError(
                f"argument {number} of probe {place.provider}:{place.name} is at {word}, a place that a program cannot "
                "read: it reads constants, registers, and memory at a register plus a distance"
            )
        found.append(argument)
    return tuple(found)


def _x86_registers() -> dict[str, int]:
    """Every spelling → offset in struct pt_regs (arch/x86/include/asm/ptrace.h)."""
    order = ("r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di")
    found = {"rip": 128, "eip": 128, "rsp": 152, "esp": 152, "sp": 152, "spl": 152}
    for number, name in enumerate(order):
        if name.startswith("r"):
            spellings = (name, f"{name}d", f"{name}w", f"{name}b")
        else:
            short = f"{name[0]}l" if name.endswith("x") else f"{name}l"
            spellings = (f"r{name}", f"e{name}", name, short)
        found |= dict.fromkeys(spellings, number * 8)
    return found


_X86 = _x86_registers()
_X86_MEMORY = re.compile(r"(-?(?:0x)?[0-9a-fA-F]*)\(%(\w+)\)")
_ARM_MEMORY = re.compile(r"\[\s*(\w+)\s*(?:,\s*#?(-?\d+)\s*)?\]")


def _x86_64(size: int, signed: bool, operand: str) -> Argument | None:
    if operand.startswith("$"):
        return Argument(Where.CONSTANT, size, signed, _number(operand[1:]))
    if operand.startswith("%"):
        register = _X86.get(operand[1:])
        return None if register is None else Argument(Where.REGISTER, size, signed, 0, register)
    found = _X86_MEMORY.fullmatch(operand)
    if found is None or found[2] not in _X86:
        return None
    return Argument(Where.MEMORY, size, signed, _number(found[1]), _X86[found[2]])


def _aarch64(size: int, signed: bool, operand: str) -> Argument | None:
    if found := _ARM_MEMORY.fullmatch(operand):
        register = _arm_register(found[1])
        return None if register is None else Argument(Where.MEMORY, size, signed, int(found[2] or 0), register)
    if re.fullmatch(r"#?-?\d+", operand):
        return Argument(Where.CONSTANT, size, signed, int(operand.removeprefix("#")))
    register = _arm_register(operand)
    return None if register is None else Argument(Where.REGISTER, size, signed, 0, register)


def _arm_register(name: str) -> int | None:
    """Offset in struct user_pt_regs: x0 to x30, then sp."""
    if name == "sp":
        return 31 * 8
    found = re.fullmatch(r"[xw](\d|[12]\d|30)", name)
    return int(found[1]) * 8 if found else None


def _number(text: str) -> int:
    return int(text, 0) if text not in ("", "-") else 0


_READERS = {"x86_64": _x86_64, "aarch64": _aarch64}


def near(all_places: list[Place], provider: str, name: str, path: str) -> NoSuchTarget:
    """The error for a probe that a file does not have."""
    there = sorted({f"{each.provider}:{each.name}" for each in all_places})
    if not there:
        why = "it has no .note.stapsdt: it was built without static probes, or stripped of them"
        return NoSuchTarget(f"probe {provider}:{name}", why=why, where=f"in {path}")
    return NoSuchTarget(f"probe {provider}:{name}", targets.near(f"{provider}:{name}", there), where=f"in {path}")
