"""Addresses in stacks become names of functions: the kernel's by /proc/kallsyms, a process's by its mapped files.

``decode`` resolves each stack once, here on the node, before stacks are merged. Files are opened through
/proc/PID/root, so a container's libraries are its own. What cannot be named is ``[unknown]`` (or ``[libfoo.so]`` where
only the file is known), and counted.
"""

from __future__ import annotations

import functools
import re
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probefleet_agent.kernel import elf_file

UNKNOWN = "[unknown]"
# Symbol tables are kept for this many bytes; the agent is to stay small.
CACHE_BYTES = 24 << 20
MAX_MAPS_LINES = 65536
_SYMBOL = re.compile(rb"^([0-9a-f]+) [tTwW] (\S+)", re.MULTILINE)
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) \S+ (\d+) *(.*)$")
_DEBUG = Path("/usr/lib/debug/.build-id")

Addresses = npt.NDArray[np.uint64]
_File = tuple[elf_file.Functions, npt.NDArray[np.uint64]]  # with its segments


@dataclass(frozen=True, slots=True)
class KernelSymbols:
    """Text symbols of the running kernel, sorted by address. 120,000 of them in 4 MB: names stay in one ``bytes``."""

    addresses: Addresses
    starts: npt.NDArray[np.uint32]  # where in ``names`` each name begins; it ends at a line feed
    names: bytes
    hidden: bool  # kptr_restrict or missing CAP_SYSLOG: all addresses read as 0

    def functions(self) -> frozenset[str]:
        """All names, aliases too. Made anew for each call: it is large and seldom wanted."""
        return frozenset(self.names.decode(errors="replace").split())

    def name_at(self, index: int) -> str:
        """The name of symbol number ``index``."""
        start = int(self.starts[index])
        return self.names[start : self.names.index(b"\n", start)].decode(errors="replace")

    def resolve(self, addresses: Addresses) -> list[str]:
        """A name for each address, ``[unknown]`` for those outside."""
        if self.hidden or not len(self.addresses):
            return [UNKNOWN] * len(addresses)
        index = np.searchsorted(self.addresses, addresses, side="right").astype(np.int64) - 1
        kernel_half = np.asarray(addresses, np.uint64) >= np.uint64(1 << 63)
        return [
            self.name_at(at) if at >= 0 and inside else UNKNOWN
            for at, inside in zip(index.tolist(), kernel_half.tolist(), strict=True)
        ]


@functools.lru_cache(maxsize=1)
def kallsyms() -> KernelSymbols:
    """Read once a process (0.2 s); ``kallsyms.cache_clear()`` after modules were loaded."""
    return parse_kallsyms(Path("/proc/kallsyms").read_bytes())


def parse_kallsyms(text: bytes) -> KernelSymbols:
    """``address type name [module]``, a line a symbol; only functions are kept. Of aliases the first gives the name."""
    addresses, starts, names, length = array("Q"), array("I"), [], 0
    for found in _SYMBOL.finditer(text):
        addresses.append(int(found[1], 16))
        starts.append(length)
        names.append(found[2])
        length += len(found[2]) + 1
    numbers, first = np.unique(np.frombuffer(addresses, np.uint64), return_index=True)
    hidden = not numbers.any()
    return KernelSymbols(numbers, np.frombuffer(starts, np.uint32)[first], b"\n".join([*names, b""]), hidden)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A file's executable mapping in a process."""

    start: int
    end: int
    offset: int
    inode: int
    path: str


def executable_mappings(text: str) -> list[Mapping]:
    """From /proc/PID/maps, in order of address."""
    found = []
    for line in text.splitlines()[:MAX_MAPS_LINES]:
        match = _MAPPING.match(line)
        if match and "x" in match[3]:
            start, end, offset = (int(match[group], 16) for group in (1, 2, 4))
            found.append(Mapping(start, end, offset, int(match[5]), match[6]))
    return found


class Symbolizer:
    """Names for stacks; keeps symbol tables of files it has seen, up to a limit. One thread at a time."""

    def __init__(self) -> None:
        self.resolved = 0
        self.unknown = 0
        self._files: OrderedDict[tuple[int, int, int], _File] = OrderedDict()

    def kernel(self, addresses: Addresses) -> list[str]:
        """Names of kernel addresses."""
        return self._counted(kallsyms().resolve(np.asarray(addresses, np.uint64)))

    def user(self, pid: int, addresses: Addresses) -> list[str]:
        """Names of a process's addresses; all ``[unknown]`` when it is gone."""
        addresses = np.asarray(addresses, np.uint64)
        names = [UNKNOWN] * len(addresses)
        try:
            mappings = executable_mappings(Path(f"/proc/{pid}/maps").read_text(errors="replace"))
        except OSError:
            mappings = []
        for mapping in mappings:
            inside = np.flatnonzero((addresses >= mapping.start) & (addresses < mapping.end))
            if len(inside):
                offsets = addresses[inside] - np.uint64(mapping.start) + np.uint64(mapping.offset)
                for at, name in zip(inside.tolist(), self._in_file(pid, mapping, offsets), strict=True):
                    names[at] = name
        return self._counted(names)

    def _counted(self, names: list[str]) -> list[str]:
        unknown = sum(name.startswith("[") and name != "[vdso]" for name in names)
        self.unknown += unknown
        self.resolved += len(names) - unknown
        return names

    def _in_file(self, pid: int, mapping: Mapping, offsets: Addresses) -> list[str]:
        if not mapping.path.startswith("/"):
            return [mapping.path if mapping.path.startswith("[") else UNKNOWN] * len(offsets)
        label = f"[{Path(mapping.path.removesuffix(' (deleted)')).name}]"
        try:
            functions, segments = self._functions(pid, mapping)
        except (OSError, elf_file.NotElf):
            return [label] * len(offsets)
        names = []
        for offset in offsets.tolist():
            address = _address(segments, offset)
            at = int(np.searchsorted(functions.starts, np.uint64(address), side="right")) - 1 if address >= 0 else -1
            known = at >= 0 and address < int(functions.ends[at])
            names.append((functions.name_at(at) or label) if known else label)
        return names

    def _functions(self, pid: int, mapping: Mapping) -> _File:
        # map_files is the file itself, even deleted or hidden below a mount; it needs CAP_CHECKPOINT_RESTORE.
        path = Path(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")
        try:
            status = path.stat()
        except OSError:
            path = Path(f"/proc/{pid}/root{mapping.path}")
            status = path.stat()
        key = (status.st_dev, status.st_ino, status.st_mtime_ns)
        if key in self._files:
            self._files.move_to_end(key)
            return self._files[key]
        with elf_file.open_file(path) as elf:
            functions, segments, build_id = elf.functions(), elf.segments(), elf.build_id()
        functions = self._with_debug_file(functions, build_id)
        self._files[key] = functions, segments
        while len(self._files) > 1 and sum(each.nbytes for each, _ in self._files.values()) > CACHE_BYTES:
            self._files.popitem(last=False)
        return functions, segments

    @staticmethod
    def _with_debug_file(functions: elf_file.Functions, build_id: str) -> elf_file.Functions:
        """Debian's -dbgsym packages keep the full table of a stripped file under its build id."""
        path = _DEBUG / build_id[:2] / f"{build_id[2:]}.debug"
        if len(build_id) < 8 or not path.exists():
            return functions
        try:
            with elf_file.open_file(path) as elf:
                full = elf.functions()
        except (OSError, elf_file.NotElf):
            return functions
        return full if len(full.starts) > len(functions.starts) else functions


def _address(segments: npt.NDArray[np.uint64], offset: int) -> int:
    """Virtual address of a file offset; −1 where no segment has it."""
    for start, size, address in segments.tolist():
        if start <= offset < start + size:
            return int(offset - start + address)
    return -1


def build_id(path: Path) -> str:
    """A file's build id in hex; "" where it has none or is no ELF file."""
    try:
        with elf_file.open_file(path) as elf:
            return elf.build_id()
    except (OSError, elf_file.NotElf):
        return ""
