"""Executables and libraries on this node: names in, file offsets out (uprobes); addresses in, names out (stacks).

``targets`` resolves uprobes here, ``symbols`` stacks. Files belong to anybody: every offset is checked against the
file's length, no table is read that would fill the memory, nothing is mapped that its owner could cut off under our
hands (SIGBUS), and what is no regular file is not opened. Symbol tables are read as NumPy arrays, never symbol by
symbol. (``probefleet_wire.elf`` reads BPF objects, which are small and have no program headers.)
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probefleet_agent.kernel import roots

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = np.dtype(
    [("type", "<u4"), ("flags", "<u4"), ("offset", "<u8"), ("vaddr", "<u8"), ("paddr", "<u8"), ("filesz", "<u8"),
     ("memsz", "<u8"), ("align", "<u8")]
)  # fmt: skip
_SECTION = np.dtype(
    [("name", "<u4"), ("type", "<u4"), ("flags", "<u8"), ("addr", "<u8"), ("offset", "<u8"), ("size", "<u8"),
     ("link", "<u4"), ("info", "<u4"), ("align", "<u8"), ("entsize", "<u8")]
)  # fmt: skip
_SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
_EXEC = 2
_LOAD, _NOTE, _EXECUTABLE = 1, 4, 1
_SYMTAB, _DYNSYM = 2, 11
_FUNC, _IFUNC = 2, 10
MAX_SYMBOLS = 4_000_000
MAX_NAME_BYTES = 4096
MAX_TABLE_BYTES = 128 << 20
MAX_NOTES_BYTES = 1 << 20


class NotElf(Exception):
    """The file is not a 64-bit little-endian ELF file, or contradicts itself."""


@dataclass(frozen=True, slots=True)
class Functions:
    """Functions sorted by address: starts and ends (virtual addresses, u64[n]), and where their names are."""

    starts: npt.NDArray[np.uint64]
    ends: npt.NDArray[np.uint64]
    names: npt.NDArray[np.uint32]
    strings: bytes

    def name_at(self, index: int) -> str:
        """The name of function number ``index``."""
        start = int(self.names[index])
        end = self.strings.find(b"\0", start, start + MAX_NAME_BYTES)
        return self.strings[start : end if end >= 0 else start].decode(errors="replace").partition("@")[0]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.starts.nbytes + self.ends.nbytes + self.names.nbytes + len(self.strings)


class ElfFile:
    """One open file. Use ``open_file``."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        header = os.pread(fd, _HEADER.size, 0)
        if not header:
            raise NotElf("it is empty")
        if len(header) < _HEADER.size or header[:4] != b"\x7fELF":
            raise NotElf("it is not an ELF file")
        if header[4] != 2 or header[5] != 1:
            raise NotElf("it is not a 64-bit little-endian ELF file")
        fields = _HEADER.unpack(header)
        self.machine: int = fields[2]
        #: Loaded where its addresses say (ET_EXEC), not where there is room.
        self.is_fixed: bool = fields[1] == _EXEC
        self._programs = self._table(_PROGRAM, fields[5], fields[10], fields[9])
        self._sections = self._table(_SECTION, fields[6], fields[12], fields[11])
        self._names = fields[13]

    def _table(self, dtype: np.dtype[np.void], offset: int, count: int, each: int) -> npt.NDArray[np.void]:
        if not count:
            return np.empty(0, dtype)
        if each != dtype.itemsize:
            raise NotElf(f"its headers have {each} bytes instead of {dtype.itemsize}")
        return self._array(dtype, offset, count * each)

    def _array(self, dtype: np.dtype[np.void], offset: int, size: int) -> npt.NDArray[np.void]:
        return np.frombuffer(self._bytes(offset, size // dtype.itemsize * dtype.itemsize), dtype)

    def _bytes(self, offset: int, size: int, *, most: int = MAX_TABLE_BYTES) -> bytes:
        there = os.fstat(self._fd).st_size
        if offset + size > there:
            raise NotElf(f"it is cut short: {offset + size} bytes wanted, {there} there")
        if size > most:
            raise NotElf(f"a part of it has {size:,} bytes; at most {most:,} are read")
        found = os.pread(self._fd, size, offset)
        if len(found) < size:
            raise NotElf("it was cut short meanwhile")
        return found

    def _symbol_tables(self) -> Iterator[tuple[npt.NDArray[np.void], bytes]]:
        """Defined functions and the strings with their names; .symtab before .dynsym."""
        for wanted in (_SYMTAB, _DYNSYM):
            for section in self._sections[self._sections["type"] == wanted]:
                if section["size"] // _SYMBOL.itemsize > MAX_SYMBOLS or section["link"] >= len(self._sections):
                    raise NotElf("its symbol table contradicts itself")
                symbols = self._array(_SYMBOL, int(section["offset"]), int(section["size"]))
                strings = self._sections[int(section["link"])]
                kind = symbols["info"] & 0xF
                defined = ((kind == _FUNC) | (kind == _IFUNC)) & (symbols["section"] != 0)
                yield symbols[defined], self._bytes(int(strings["offset"]), int(strings["size"]))

    def functions(self) -> Functions:
        """All functions, each address once. A function without a size reaches to the next."""
        best: Functions | None = None
        for symbols, strings in self._symbol_tables():
            order = np.argsort(symbols["value"], kind="stable")
            values = symbols["value"][order]
            is_first = np.ones(len(values), bool)
            is_first[1:] = values[1:] != values[:-1]
            starts, symbols = values[is_first], symbols[order[is_first]]
            following = np.append(starts[1:], np.uint64(2**64 - 1))
            ends = np.where(symbols["size"] == 0, following[: len(starts)], starts + symbols["size"])
            found = Functions(starts, ends, symbols["name"].copy(), strings)
            if best is None or len(found.starts) > len(best.starts):
                best = found  # a stripped file has only .dynsym
        empty = np.empty(0, np.uint64)
        return best or Functions(empty, empty, np.empty(0, np.uint32), b"")

    def function_names(self) -> list[str]:
        """Names of all functions."""
        found = self.functions()
        return [found.name_at(index) for index in range(len(found.starts))]

    def file_offset(self, symbol: str) -> int | None:
        """Where a function's code begins in the file; None where there is none of that name."""
        wanted = symbol.encode()
        for symbols, strings in self._symbol_tables():
            # Linkers let one name be the tail of another, so every occurrence counts.
            places, at = [], strings.find(wanted)
            while at >= 0:
                if strings[at + len(wanted) : at + len(wanted) + 1] in (b"\0", b"@"):
                    places.append(at)
                at = strings.find(wanted, at + 1)
            hits = symbols[np.isin(symbols["name"], places)]
            if len(hits):
                return self._to_offset(int(hits[0]["value"]))
        return None

    def _loads(self) -> npt.NDArray[np.void]:
        loads: npt.NDArray[np.void] = self._programs[self._programs["type"] == _LOAD]
        return loads

    def _to_offset(self, address: int) -> int | None:
        for load in self._loads():
            if load["vaddr"] <= address < load["vaddr"] + load["filesz"]:
                return int(address - load["vaddr"] + load["offset"])
        return None

    def section(self, name: str) -> tuple[int, bytes] | None:
        """(virtual address, bytes) of the first section of that name."""
        if self._names >= len(self._sections):
            return None
        names = self._sections[self._names]
        strings = self._bytes(int(names["offset"]), int(names["size"]))
        wanted = name.encode() + b"\0"
        for each in self._sections:
            start = int(each["name"])
            if strings[start : start + len(wanted)] == wanted:
                return int(each["addr"]), self._bytes(int(each["offset"]), int(each["size"]))
        return None

    def offset_of(self, address: int) -> int | None:
        """Where in the file lies what is loaded at a virtual address."""
        return self._to_offset(address)

    def segments(self) -> npt.NDArray[np.uint64]:
        """What of the file is mapped where: rows of (file offset, size, virtual address)."""
        loads = self._loads()
        return np.stack([loads["offset"], loads["filesz"], loads["vaddr"]], axis=1).astype(np.uint64)

    def is_code(self, offset: int) -> bool:
        """Whether that place of the file is mapped executable."""
        return any(
            load["flags"] & _EXECUTABLE and load["offset"] <= offset < load["offset"] + load["filesz"]
            for load in self._loads()
        )

    def build_id(self) -> str:
        """The build id in hex; "" where there is none."""
        for note in self._programs[self._programs["type"] == _NOTE]:
            data, at = self._bytes(int(note["offset"]), int(note["filesz"]), most=MAX_NOTES_BYTES), 0
            while at + 12 <= len(data):
                name_size, size, kind = struct.unpack_from("<III", data, at)
                body = at + 12 + (name_size + 3) // 4 * 4
                if kind == 3 and data[at + 12 : at + 16] == b"GNU\0" and body + size <= len(data):
                    return data[body : body + size].hex()
                at = body + (size + 3) // 4 * 4
        return ""


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[ElfFile]:
    """Open a file for reading. FileNotFoundError, OSError, or NotElf."""
    fd = roots.open_regular(path)
    try:
        yield ElfFile(fd)
    finally:
        os.close(fd)
