"""Reads ELF: the sections, symbols and relocations of a compiled BPF object. Pure and bounds-checked.

In goes the file's bytes (from a compiler's child, a ConfigMap, an image), out come views of them;
``bpf_object`` says what they mean to BPF. Only what BPF objects are is read: 64 bits, little-endian,
relocatable. The bytes may come from a user: what does not hold raises ``ElfError``, and nothing is read
past the end.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

EM_BPF = 247
SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOBITS, SHT_REL = 1, 2, 3, 4, 8, 9
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR = 1, 2, 4
STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_SECTION = 0, 1, 2, 3
STB_LOCAL, STB_GLOBAL, STB_WEAK = 0, 1, 2

# A catalog probe has 30 KB, Tetragon's largest object 2 MB.
MAX_BYTES = 32 << 20
MAX_NAME_BYTES = 1024
MAX_SYMBOLS = 1 << 16
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_REL = struct.Struct("<QQ")
_RELA = struct.Struct("<QQq")


class ElfError(ValueError):
    """An ELF file that is cut short or contradicts itself; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section; ``data`` is empty for one without bytes in the file (``.bss``), ``size_bytes`` says how
    long it is.
    """

    index: int
    name: str
    type: int
    flags: int
    size_bytes: int
    link: int
    info: int
    data: bytes

    @property
    def executable(self) -> bool:
        """It holds instructions."""
        return bool(self.flags & SHF_EXECINSTR) and self.type == SHT_PROGBITS


@dataclass(frozen=True, slots=True)
class Symbol:
    """A symbol: ``value`` is its offset in section number ``section`` (0: defined elsewhere)."""

    name: str
    value: int
    size_bytes: int
    type: int
    binding: int
    section: int


@dataclass(frozen=True, slots=True)
class Relocation:
    """A place in a section whose bytes the loader has to fill from a symbol."""

    offset_bytes: int
    type: int
    symbol: Symbol
    addend: int


@dataclass(frozen=True, slots=True)
class Elf:
    """One object file."""

    machine: int
    sections: tuple[Section, ...]
    symbols: tuple[Symbol, ...]

    @classmethod
    def parse(cls, data: bytes) -> Elf:
        """Read an object file; raises ``ElfError`` where it is not one."""
        if len(data) > MAX_BYTES:
            raise ElfError(f"object of {len(data)} bytes; at most {MAX_BYTES} are read")
        if len(data) < _HEADER.size or data[:4] != b"\x7fELF":
            raise ElfError("not an ELF file")
        if data[4] != 2 or data[5] != 1:
            raise ElfError("ELF file is not 64-bit little-endian (compile with -target bpfel or bpf)")
        fields = _HEADER.unpack_from(data)
        machine, table, each, count, names = fields[2], fields[6], fields[11], fields[12], fields[13]
        if each != _SECTION.size:
            raise ElfError(f"section headers have {each} bytes instead of {_SECTION.size}")
        if table + count * each > len(data):
            raise ElfError(f"section headers end at byte {table + count * each} of {len(data)}")
        headers = [_SECTION.unpack_from(data, table + index * each) for index in range(count)]
        total = sum(header[5] for header in headers if header[1] not in (0, SHT_NOBITS))
        if total > len(data):
            raise ElfError(f"sections overlap: together they have {total} bytes, the file {len(data)}")
        strings = _bytes_of(data, headers, names, "section names") if count else b""
        sections = tuple(
            Section(
                index=index,
                name=_string(strings, header[0], f"section {index}"),
                type=header[1],
                flags=header[2],
                size_bytes=header[5],
                link=header[6],
                info=header[7],
                data=_bytes_of(data, headers, index, f"section {index}"),
            )
            for index, header in enumerate(headers)
        )
        return cls(machine, sections, _symbols(sections))

    def section(self, name: str) -> Section | None:
        """The first section with that name."""
        return next((each for each in self.sections if each.name == name), None)

    def relocations(self, section: Section) -> tuple[Relocation, ...]:
        """What the loader has to fill in within a section, by offset."""
        found: list[Relocation] = []
        for table in self.sections:
            if table.info != section.index or table.type not in (SHT_REL, SHT_RELA):
                continue
            layout = _REL if table.type == SHT_REL else _RELA
            if len(table.data) % layout.size:
                raise ElfError(f"section {table.name!r} has {len(table.data)} bytes, no multiple of {layout.size}")
            for entry in layout.iter_unpack(table.data):
                offset, info = entry[0], entry[1]
                if info >> 32 >= len(self.symbols):
                    raise ElfError(f"section {table.name!r} names symbol {info >> 32} of {len(self.symbols)}")
                if offset >= section.size_bytes:
                    raise ElfError(f"section {table.name!r} points to byte {offset} of {section.size_bytes}")
                addend = entry[2] if len(entry) > 2 else 0
                found.append(Relocation(offset, info & 0xFFFFFFFF, self.symbols[info >> 32], addend))
        return tuple(sorted(found, key=lambda each: each.offset_bytes))

    def uses(self, symbol: str) -> bool:
        """Does an instruction refer to it? What a header declares is in the symbols of every object."""
        return any(
            relocation.symbol.name == symbol
            for section in self.sections
            if section.executable
            for relocation in self.relocations(section)
        )


def _bytes_of(data: bytes, headers: list[tuple[int, ...]], index: int, what: str) -> bytes:
    if not 0 <= index < len(headers):
        raise ElfError(f"{what}: section {index} does not exist; there are {len(headers)}")
    kind, offset, size = headers[index][1], headers[index][4], headers[index][5]
    if kind in (0, SHT_NOBITS):
        return b""
    if offset + size > len(data):
        raise ElfError(f"{what} ends at byte {offset + size} of {len(data)}")
    return data[offset : offset + size]


def _string(strings: bytes, offset: int, what: str) -> str:
    if offset == 0 and not strings:
        return ""
    end = strings.find(b"\0", offset, offset + MAX_NAME_BYTES)
    if offset >= len(strings) or end < 0:
        raise ElfError(f"{what}: name at byte {offset} of {len(strings)} does not end")
    return strings[offset:end].decode("utf-8", "backslashreplace")


def _symbols(sections: tuple[Section, ...]) -> tuple[Symbol, ...]:
    table = next((each for each in sections if each.type == SHT_SYMTAB), None)
    if table is None:
        return ()
    if table.link >= len(sections):
        raise ElfError(f"symbol table takes its names from section {table.link} of {len(sections)}")
    if len(table.data) % _SYMBOL.size:
        raise ElfError(f"symbol table has {len(table.data)} bytes, no multiple of {_SYMBOL.size}")
    if len(table.data) > MAX_SYMBOLS * _SYMBOL.size:
        raise ElfError(f"{len(table.data) // _SYMBOL.size} symbols; at most {MAX_SYMBOLS} are read")
    strings = sections[table.link].data
    return tuple(
        Symbol(
            name=_string(strings, name, f"symbol {index}"),
            value=value,
            size_bytes=size,
            type=info & 0xF,
            binding=info >> 4,
            section=section,
        )
        for index, (name, info, _, section, value, size) in enumerate(_SYMBOL.iter_unpack(table.data))
    )
