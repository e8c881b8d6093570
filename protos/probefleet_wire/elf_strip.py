"""Takes DWARF out of a compiled object: BTF and its line information say all that the kernel and we read. Pure.

``clang.compile_core`` calls it: every node gets the object, and two thirds of what clang writes are ``.debug_*``
sections that nothing reads. The compiler ran over a user's text, so its file is read bounds-checked, by ``elf``.
"""

from __future__ import annotations

import struct

from probefleet_wire.elf import MAX_BYTES, SHT_NOBITS, SHT_REL, SHT_RELA, SHT_SYMTAB, Elf, ElfError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_DROPPED = (".debug_", ".rel.debug_", ".rela.debug_", ".llvm_addrsig")
#: Section numbers from here on say something else (absolute, common): SHN_LORESERVE.
_RESERVED = 0xFF00


def without_debug(data: bytes) -> bytes:
    """The object without debug sections; what stays has the same bytes, in the same order. ElfError for no ELF."""
    elf = Elf.parse(data)
    header = list(_HEADER.unpack_from(data))
    raw = [_SECTION.unpack_from(data, header[6] + index * _SECTION.size) for index in range(len(elf.sections))]
    kept = [each for each in elf.sections if not each.name.startswith(_DROPPED)]
    if len(kept) == len(elf.sections):
        return data
    numbers = {each.index: new for new, each in enumerate(kept)}
    symbols = _symbols(elf, numbers)
    out = bytearray(_HEADER.size)
    table = bytearray()
    for section in kept:
        name, kind, flags, address, _, size, link, info, alignment, entry = raw[section.index]
        content = section.data
        if kind == SHT_SYMTAB:
            content, info = _symbol_table(content, numbers, symbols)
        elif kind in (SHT_REL, SHT_RELA):
            content, info = _relocations(content, entry, symbols), _moved(numbers, info)
        size = size if kind == SHT_NOBITS else len(content)
        out += bytes(-len(out) % min(max(alignment, 1), 4096))
        table += _SECTION.pack(
            name, kind, flags, address, len(out) if kind else 0, size, _moved(numbers, link), info, alignment, entry
        )
        out += content
    out += bytes(-len(out) % 8)
    header[6], header[12], header[13] = len(out), len(kept), _moved(numbers, header[13])
    out[: _HEADER.size] = _HEADER.pack(*header)
    if len(out) > MAX_BYTES:
        raise ElfError(f"object of {len(out)} bytes; at most {MAX_BYTES} are read")
    return bytes(out + table)


def _moved(numbers: dict[int, int], index: int) -> int:
    if index and index not in numbers:
        raise ElfError(f"a section that stays refers to section {index}, which is for debuggers only")
    return numbers.get(index, 0)


def _symbols(elf: Elf, numbers: dict[int, int]) -> dict[int, int]:
    """Old number → new number of the symbols whose sections stay."""
    there = (at for at, each in enumerate(elf.symbols) if each.section >= _RESERVED or each.section in {0, *numbers})
    return {at: new for new, at in enumerate(there)}


def _symbol_table(content: bytes, numbers: dict[int, int], symbols: dict[int, int]) -> tuple[bytes, int]:
    """The table with the symbols that stay, and how many of them are local."""
    made = bytearray()
    local = 0
    for at in symbols:
        name, info, other, section, value, size = _SYMBOL.unpack_from(content, at * _SYMBOL.size)
        local += not info >> 4
        made += _SYMBOL.pack(name, info, other, section if section >= _RESERVED else numbers[section], value, size)
    return bytes(made), local


def _relocations(content: bytes, entry_bytes: int, symbols: dict[int, int]) -> bytes:
    if entry_bytes < 16 or len(content) % entry_bytes:
        raise ElfError(f"relocations of {entry_bytes} bytes in a section of {len(content)}")
    made = bytearray(content)
    for at in range(0, len(made), entry_bytes):
        (info,) = struct.unpack_from("<Q", made, at + 8)
        if info >> 32 not in symbols:
            raise ElfError(f"a relocation needs symbol {info >> 32}, which is not there or for debuggers only")
        struct.pack_into("<Q", made, at + 8, symbols[info >> 32] << 32 | info & 0xFFFFFFFF)
    return bytes(made)
