"""Addresses in stacks become names of functions: the kernel's by /proc/kallsyms, a process's by its mapped files.

``decode`` resolves each stack once, here on the node, before stacks are merged. Files are those that the process has
mapped, found by /proc/PID/map_files or below /proc/PID/root, so a container's libraries are its own; so are the files
of symbols (by build id) that belong to stripped ones. What cannot be named is ``[unknown]`` (or ``[libfoo.so]`` where
only the file is known), and counted.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import re
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probefleet_agent.errors import NoSuchTarget
from probefleet_agent.kernel import elf_file, roots

UNKNOWN = "[unknown]"
# Symbol tables are kept for this many bytes from one reading to the next; the agent is to stay small.
CACHE_BYTES = 8 << 20
MAX_MAPS_LINES = 65536
MAX_BUILD_IDS = 1024
_SYMBOL = re.compile(rb"^([0-9a-f]+) [tTwW] (\S+)(?:[ \t]\[(\w+)\])?", re.MULTILINE)
_MODULE = re.compile(r"^\S+ (\d+) .* 0x([0-9a-f]+)", re.MULTILINE)
#: What the kernel lists beside modules and makes at any time: programs, trampolines, kprobes' copies. How long each is,
#: nobody says; a larger one is cut into [unknown].
_MADE = frozenset({b"bpf", b"__builtin__ftrace", b"__builtin__kprobes"})
_MADE_BYTES = 1 << 16
#: What was made since the last reading has no name in it. A new one takes 0.2 s.
_REREAD_SECONDS = 1.0
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) \S+ (\d+) *(.*)$")
_DEBUG = "/usr/lib/debug/.build-id"

_libc = ctypes.CDLL(None)
Addresses = npt.NDArray[np.uint64]
_File = tuple[elf_file.Functions, npt.NDArray[np.uint64]]  # with its segments
#: Device, inode, time of its last change; and the process's mount namespace and root: what a container has under
#: /usr/lib/debug names its own frames, and no other's.
_FileKey = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class KernelSymbols:
    """Text symbols of the running kernel, sorted by address. 120,000 of them in 4 MB: names stay in one ``bytes``."""

    addresses: Addresses
    starts: npt.NDArray[np.uint32]  # where in ``names`` each name begins; it ends at a line feed
    names: bytes
    hidden: bool  # kptr_restrict or missing CAP_SYSLOG: all addresses read as 0
    ends: Addresses  # a place from there on is not of that symbol, though no other begins before it
    lasting: npt.NDArray[np.bool_]  # of the kernel's text and of modules, not made at any time
    read_seconds: float = field(default_factory=time.monotonic)

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
        index, inside = self._places(addresses)
        return [
            self.name_at(at) if there else UNKNOWN for at, there in zip(index.tolist(), inside.tolist(), strict=True)
        ]

    def passing(self, addresses: Addresses) -> set[int]:
        """Those whose name may be another one, or be one, in a later reading: a program may have come there."""
        if self.hidden or not len(self.addresses):
            return set()
        index, inside = self._places(addresses)
        return set(addresses[~(inside & self.lasting[index])].tolist())

    def _places(self, addresses: Addresses) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """For each address the symbol before it, and whether it lies in that."""
        index = np.searchsorted(self.addresses, addresses, side="right").astype(np.int64) - 1
        return index, (index >= 0) & (np.asarray(addresses, np.uint64) < self.ends[index])


@functools.lru_cache(maxsize=1)
def kallsyms() -> KernelSymbols:
    """Read once a process (0.2 s); ``Symbolizer`` reads again for what has been made since."""
    modules = Path("/proc/modules")
    return parse_kallsyms(Path("/proc/kallsyms").read_bytes(), modules.read_text() if modules.exists() else "")


def parse_kallsyms(text: bytes, modules: str = "") -> KernelSymbols:
    """``address type name [module]``, a line a symbol; only functions are kept. Of aliases the first gives the name.

    A name reaches to the next symbol, but not beyond the kernel's own text, the module (``modules`` as in
    /proc/modules) or what the kernel made: a place behind them is nobody's that is listed.
    """
    addresses, starts, owners, names = array("Q"), array("I"), bytearray(), bytearray()
    end_of_text = (1 << 64) - 1
    for found in _SYMBOL.finditer(text):
        addresses.append(int(found[1], 16))
        starts.append(len(names))
        owners.append(0 if found[3] is None else 2 if found[3] in _MADE else 1)
        names += found[2] + b"\n"
        if found[2] == b"_etext":
            end_of_text = addresses[-1]
    numbers, first = np.unique(np.frombuffer(addresses, np.uint64), return_index=True)
    owner = np.frombuffer(bytes(owners), np.uint8)[first]
    ends = np.where(owner == 0, np.uint64(end_of_text), np.where(owner == 1, np.uint64(0), numbers + _MADE_BYTES))
    for size, base in _MODULE.findall(modules):
        start, end = int(base, 16), int(base, 16) + int(size)
        ends[(owner == 1) & (numbers >= start) & (numbers < end)] = end
    hidden = not numbers.any()
    at = np.frombuffer(starts, np.uint32)[first]
    ends = np.maximum(ends, numbers + np.uint64(1))
    return KernelSymbols(numbers, at, bytes(names), hidden, ends, owner != 2)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A file's executable mapping in a process."""

    start: int
    end: int
    offset: int
    inode: int
    path: str

    @property
    def label(self) -> str:
        """What stands for a place in it that has no name: ``[libfoo.so]``."""
        return f"[{Path(self.path.removesuffix(' (deleted)')).name}]"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Addresses (by their place among all) that lie in one mapping of one process."""

    pid: int
    mapping: Mapping
    at: npt.NDArray[np.int64]

    def offsets(self, everything: Addresses) -> Addresses:
        """Where in the file they lie."""
        return everything[self.at] - np.uint64(self.mapping.start) + np.uint64(self.mapping.offset)

    def name_all(self, names: list[str], name: str) -> None:
        """One name for all of them."""
        for place in self.at.tolist():
            names[place] = name

    def path(self) -> Path:
        """Where it is opened: map_files is the file itself, even deleted or hidden below a mount, but needs
        CAP_CHECKPOINT_RESTORE. Raises OSError where links lead in a circle.
        """
        path = Path(f"/proc/{self.pid}/map_files/{self.mapping.start:x}-{self.mapping.end:x}")
        try:
            path.stat()
        except OSError:
            pass
        else:
            return path
        try:
            return Path(roots.in_root(self.mapping.path, self.root()))
        except NoSuchTarget as error:
            raise OSError(errno.ELOOP, str(error)) from error

    def key(self) -> _FileKey | None:
        """Which file it is, whoever maps it and sees the same files; ``None`` where it cannot be found."""
        try:
            status, root = self.path().stat(), Path(self.root()).stat()
            mounts = Path(f"/proc/{self.pid}/ns/mnt").stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_mtime_ns, mounts.st_ino, root.st_ino

    def root(self) -> str:
        """The process's own root."""
        return f"/proc/{self.pid}/root"


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
        self._files: OrderedDict[_FileKey, _File] = OrderedDict()
        self._build_ids: OrderedDict[_FileKey, str] = OrderedDict()
        self._asked: set[int] = set()

    def kernel(self, addresses: Addresses) -> list[str]:
        """Names of kernel addresses."""
        wanted = np.asarray(addresses, np.uint64)
        # A program that was loaded since has no name yet, or that of one which lay there before.
        passing = kallsyms().passing(wanted)
        if not passing <= self._asked and time.monotonic() - kallsyms().read_seconds > _REREAD_SECONDS:
            kallsyms.cache_clear()
            self._asked.clear()
        self._asked |= passing
        return self._counted(kallsyms().resolve(wanted))

    def user(self, pid: int, addresses: Addresses) -> list[str]:
        """Names of a process's addresses; all ``[unknown]`` when it is gone."""
        (names,) = self.users([(pid, np.asarray(addresses, np.uint64))])
        return names

    def users(self, stacks: Sequence[tuple[int, Addresses]]) -> list[list[str]]:
        """Names for the addresses of each (process, stack); all ``[unknown]`` of a process that is gone.

        All stacks of a reading at once, so that each process's mappings and each file's symbols are looked at once: a
        compiler's table alone takes 20 MB and 50 ms.
        """
        lengths = [len(addresses) for _, addresses in stacks]
        everything = np.concatenate([np.zeros(0, np.uint64), *(addresses for _, addresses in stacks)]).astype(np.uint64)
        of_process = np.repeat([pid for pid, _ in stacks] or [0], lengths or [0])
        names = [UNKNOWN] * len(everything)
        files: dict[_FileKey, list[_Wanted]] = {}
        for pid in dict.fromkeys(pid for pid, _ in stacks):
            at = np.flatnonzero(of_process == pid)
            for mapping, inside in _by_mapping(_mappings(pid), everything[at]):
                wanted = _Wanted(pid, mapping, at[inside])
                if not mapping.path.startswith("/"):
                    wanted.name_all(names, mapping.path if mapping.path.startswith("[") else UNKNOWN)
                elif (key := wanted.key()) is None:
                    wanted.name_all(names, mapping.label)
                else:
                    files.setdefault(key, []).append(wanted)
        for key, places in files.items():
            self._name_file(key, places, everything, names)
        if files:
            # What tables of symbols left with the allocator goes back to the kernel.
            _libc.malloc_trim(0)
        ends = np.cumsum(lengths).tolist()
        return [self._counted(names[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    def loaded_at(self, pid: int, places: Sequence[tuple[str, int]]) -> Addresses:
        """Where a process has (build id, offset in the file); 0 where it has no such file, or is gone."""
        found = np.zeros(len(places), np.uint64)
        wanted = {build_id for build_id, _ in places}
        for mapping in _mappings(pid):
            file = _Wanted(pid, mapping, np.zeros(0, np.int64))
            if not mapping.path.startswith("/") or (key := file.key()) is None:
                continue
            if key not in self._build_ids:
                try:
                    self._build_ids[key] = build_id(file.path())
                except OSError:  # it has gone just now
                    continue
                if len(self._build_ids) > MAX_BUILD_IDS:
                    self._build_ids.popitem(last=False)
            its_own = self._build_ids.get(key)
            if its_own not in wanted:
                continue
            for index, (of_file, offset) in enumerate(places):
                at = offset - mapping.offset
                if of_file == its_own and 0 <= at < mapping.end - mapping.start:
                    found[index] = mapping.start + at
        return found

    def _name_file(self, key: _FileKey, places: list[_Wanted], everything: Addresses, names: list[str]) -> None:
        file = self._file(key, places)
        for wanted in places:
            wanted.name_all(names, wanted.mapping.label)
            if file is None:
                continue
            functions, segments = file
            addresses = _virtual(segments, wanted.offsets(everything))
            found = np.searchsorted(functions.starts, addresses, side="right").astype(np.int64) - 1
            known = (found >= 0) & (addresses > 0)
            known[known] = addresses[known] < functions.ends[found[known]]
            texts = {at: functions.name_at(at) for at in np.unique(found[known]).tolist()}
            for place, at in zip(wanted.at[known].tolist(), found[known].tolist(), strict=True):
                names[place] = texts[at] or wanted.mapping.label

    def _counted(self, names: list[str]) -> list[str]:
        unknown = sum(name.startswith("[") and name != "[vdso]" for name in names)
        self.unknown += unknown
        self.resolved += len(names) - unknown
        return names

    def _file(self, key: _FileKey, places: list[_Wanted]) -> _File | None:
        """Symbols of a file, opened by whichever process still has it; ``None`` where none can be read."""
        if key in self._files:
            self._files.move_to_end(key)
            return self._files[key]
        for wanted in places:
            try:
                with elf_file.open_file(wanted.path()) as elf:
                    functions, segments, build_id = elf.functions(), elf.segments(), elf.build_id()
            except (OSError, elf_file.NotElf):
                continue
            self._files[key] = _with_debug_file(functions, build_id, wanted.root()), segments
            while len(self._files) > 1 and sum(each.nbytes for each, _ in self._files.values()) > CACHE_BYTES:
                self._files.popitem(last=False)
            return self._files[key]
        return None


def _with_debug_file(functions: elf_file.Functions, build_id: str, root: str) -> elf_file.Functions:
    """The full table of a stripped file, which debug packages keep under its build id: below the process's own root,
    or in the agent's.
    """
    if len(build_id) < 8:
        return functions
    path = f"{_DEBUG}/{build_id[:2]}/{build_id[2:]}.debug"
    for at in (root, ""):
        try:
            with elf_file.open_file(Path(roots.in_root(path, at))) as elf:
                full = elf.functions() if elf.build_id() == build_id else functions
        except (OSError, elf_file.NotElf, NoSuchTarget):
            continue
        return full if len(full.starts) > len(functions.starts) else functions
    return functions


def _mappings(pid: int) -> list[Mapping]:
    try:
        return executable_mappings(Path(f"/proc/{pid}/maps").read_text(errors="replace"))
    except OSError:
        return []


def _by_mapping(mappings: list[Mapping], addresses: Addresses) -> Iterator[tuple[Mapping, npt.NDArray[np.int64]]]:
    """Each mapping that holds any of the addresses, and which it holds."""
    if not mappings:
        return
    starts = np.array([mapping.start for mapping in mappings], np.uint64)
    ends = np.array([mapping.end for mapping in mappings], np.uint64)
    index = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
    inside = index >= 0
    inside[inside] = addresses[inside] < ends[index[inside]]
    for at in np.unique(index[inside]).tolist():
        yield mappings[at], np.flatnonzero(inside & (index == at))


def _virtual(segments: npt.NDArray[np.uint64], offsets: Addresses) -> Addresses:
    """Virtual addresses of file offsets; 0 where no segment has it."""
    found = np.zeros(len(offsets), np.uint64)
    for start, size, address in segments.astype(np.uint64):
        inside = (offsets >= start) & (offsets < start + size)
        found[inside] = offsets[inside] - start + address
    return found


def build_id(path: Path) -> str:
    """A file's build id in hex; "" where it has none or is no ELF file."""
    try:
        with elf_file.open_file(path) as elf:
            return elf.build_id()
    except (OSError, elf_file.NotElf):
        return ""
