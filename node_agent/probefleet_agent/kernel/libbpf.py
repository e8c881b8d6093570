"""CO-RE objects by libbpf: an object's bytes in, loaded maps and programs out as owned descriptors.

``execute`` opens an object, sets parameters, sizes, shared maps and program types, loads it, takes the descriptors it
wants and closes it; nothing of libbpf outlives the ``with`` block. Works with libbpf 1.1 (Debian 12) and 1.5 (13).
libbpf talks through one callback a process: what it says is kept for the object that this thread works on, and never
reaches stderr. Programs are attached by ``links``, not by libbpf, so that links can be pinned the same way for all.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import re
import threading
from collections.abc import Iterator
from typing import SupportsIndex

from probefleet_wire.bpf_object import BpfObject
from probefleet_wire.btf import Btf
from probefleet_wire.btf_types import BtfError
from probefleet_wire.elf import ElfError

from probefleet_agent.errors import KernelError, ObjectError, ProbefleetError, UnsupportedFeature, VerifierError
from probefleet_agent.kernel import btf_kernel, targets, verifier_log
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import MapType

# The verifier writes its log here; untouched pages cost nothing.
LOG_BYTES = 16 << 20
MAX_SAID = 2000
_INFO = 1
_VA_LIST_BYTES = 32  # 24 on x86_64, 32 on aarch64: both hand the callback a pointer to it
_FAILED = re.compile(r"prog '([^']+)': (?:BPF program load failed|failed to load)")
_NO_TRACEPOINT = re.compile(r"failed to find kernel BTF type ID of '([^']+)'")
_NO_BTF = "failed to find valid kernel BTF"
_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said = threading.local()
_libc = ctypes.CDLL(None)


class _OpenOptions(ctypes.Structure):
    """``struct bpf_object_open_opts``, its first members; ``size`` tells libbpf where it ends."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("object_name", ctypes.c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", ctypes.c_char_p),
        ("unused", ctypes.c_uint32),
        ("kconfig", ctypes.c_char_p),
        ("btf_custom_path", ctypes.c_char_p),
    ]


def _print(level: int, template: bytes, arguments: int) -> int:
    """libbpf's warnings, formatted by libc; debug lines are not asked for."""
    lines = getattr(_said, "lines", None)
    if level > _INFO or lines is None or len(lines) >= MAX_SAID:
        return 0
    # vsnprintf uses the list up, and libbpf may have more use for it: a copy.
    copy = ctypes.create_string_buffer(ctypes.string_at(arguments, _VA_LIST_BYTES), _VA_LIST_BYTES)
    text = ctypes.create_string_buffer(4096)
    _libc.vsnprintf(text, ctypes.c_size_t(len(text)), template, ctypes.byref(copy))
    lines.append(text.value.decode(errors="replace").rstrip("\n"))
    return 0


_print_callback = _PRINT(_print)  # libbpf keeps the pointer: it must not be collected

# name → (result, arguments); "p" pointer, "i" int, "u" uint32, "s" text, "z" size, "b" bool
_SIGNATURES = {
    "bpf_object__open_mem": "ppzp",
    "bpf_object__load": "ip",
    "bpf_object__close": "-p",
    "bpf_object__btf": "pp",
    "btf__raw_data": "ppp",
    "bpf_object__next_map": "ppp",
    "bpf_map__name": "sp",
    "bpf_map__type": "ip",
    "bpf_map__fd": "ip",
    "bpf_map__value_size": "up",
    "bpf_map__set_value_size": "ipu",
    "bpf_map__max_entries": "up",
    "bpf_map__set_max_entries": "ipu",
    "bpf_map__reuse_fd": "ipi",
    "bpf_map__map_flags": "up",
    "bpf_map__set_map_flags": "ipu",
    "bpf_map__set_pin_path": "ips",
    "bpf_map__is_internal": "bp",
    "bpf_map__initial_value": "ppp",
    "bpf_map__set_autocreate": "ipb",
    "bpf_object__next_program": "ppp",
    "bpf_program__name": "sp",
    "bpf_program__section_name": "sp",
    "bpf_program__fd": "ip",
    "bpf_program__type": "ip",
    "bpf_program__set_type": "ipi",
    "bpf_program__expected_attach_type": "ip",
    "bpf_program__set_expected_attach_type": "ipi",
    "bpf_program__set_attach_target": "ipis",
    "bpf_program__autoload": "bp",
    "bpf_program__set_autoload": "ipb",
    "bpf_program__set_log_buf": "ippz",
    "libbpf_major_version": "u",
    "libbpf_minor_version": "u",
}
_TYPES = {
    "-": None, "p": ctypes.c_void_p, "i": ctypes.c_int, "u": ctypes.c_uint32, "s": ctypes.c_char_p,
    "z": ctypes.c_size_t, "b": ctypes.c_bool,
}  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """libbpf.so.1, its functions declared; UnsupportedFeature where it is not installed."""
    try:
        loaded = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise UnsupportedFeature(
            "libbpf.so.1", why=f"{error}; install Debian's package libbpf1 (or libbpf0 1.x)"
        ) from error
    for name, letters in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype = _TYPES[letters[0]]
        function.argtypes = [_TYPES[letter] for letter in letters[1:]]
    loaded.libbpf_set_print.argtypes = [_PRINT]
    loaded.libbpf_set_print.restype = ctypes.c_void_p
    loaded.libbpf_set_print(_print_callback)
    return loaded


def version() -> tuple[int, int]:
    """libbpf's own version, e.g. (1, 1)."""
    return int(library().libbpf_major_version()), int(library().libbpf_minor_version())


def _text(name: bytes) -> str:
    """A name of an object's strings, as ``probefleet_wire.elf`` reads it: whoever wrote it need not know UTF-8."""
    return name.decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def open_object(data: bytes, name: str) -> Iterator[Object]:
    """Open a compiled object from memory. ObjectError where it is none; everything is freed at the end."""
    opened = Object(data, name)
    try:
        yield opened
    finally:
        opened.close()


def _awake(data: bytes) -> bytes:
    """``SEC("lsm.s/…")`` written as ``SEC("?lsm//…")``: LSM programs run as fexit of a function that may not sleep (see
    ``links_trampoline``), and libbpf lets nobody take back what ``.s`` says. The name stands in the ELF's strings and
    in BTF's, behind a zero or as the tail of ``.rel…``; it keeps its length.
    """
    return data.replace(b"\0lsm.s/", b"\0?lsm//").replace(b"\0.rellsm.s/", b"\0.rel?lsm//")


class Object:
    """One opened object: settings before ``load``, descriptors after it."""

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        self.said: list[str] = []
        self._data = data
        self._buffer = ctypes.create_string_buffer(_awake(data), max(len(data), 1))
        self._log: mmap.mmap | None = None
        self._loaded = False
        text = ctypes.c_char_p(re.sub(r"\W", "_", name)[:15].encode())
        options = _OpenOptions(size=ctypes.sizeof(_OpenOptions), object_name=text)
        if not btf_kernel.own() and btf_kernel.available():
            btf_kernel.vmlinux()  # UnsupportedFeature where the file is of another kernel
            options.btf_custom_path = os.fsencode(btf_kernel.file())
        with self._listening():
            self._object = library().bpf_object__open_mem(self._buffer, len(data), ctypes.byref(options))
        if not self._object:
            raise ObjectError(f"{name} is not a BPF object that libbpf can open: {self._last_words()}")
        self._maps = dict(self._named("map"))
        self._programs = dict(self._named("program"))
        # libbpf calls them "object.bss"; sections with a longer name (".data.mine") by that.
        self._sections = {
            name[name.index(".") :]: pointer
            for name, pointer in self._maps.items()
            if "." in name and library().bpf_map__is_internal(pointer)
        }
        for map_name, pointer in self._maps.items():
            # `__uint(pinning, LIBBPF_PIN_BY_NAME)` would pin outside our tree.
            library().bpf_map__set_pin_path(pointer, None)
            # `__type(value, struct event)` on a ring tells the record's type; the kernel wants the size to be 0.
            if library().bpf_map__type(pointer) == MapType.RINGBUF and library().bpf_map__value_size(pointer):
                self._check(library().bpf_map__set_value_size(pointer, 0), f"prepare ring buffer {map_name}")

    # What is in it -----------------------------------------------------------------------------------------------

    @property
    def map_names(self) -> tuple[str, ...]:
        """The maps that the C declares; ``.rodata`` and its like are not among them."""
        return tuple(name for name, pointer in self._maps.items() if not library().bpf_map__is_internal(pointer))

    @property
    def section_names(self) -> tuple[str, ...]:
        """``.rodata``, ``.data``, ``.bss`` and their like: the maps that libbpf makes of global variables."""
        return tuple(self._sections)

    @property
    def program_names(self) -> tuple[str, ...]:
        """The functions with a SEC()."""
        return tuple(self._programs)

    def section(self, program: str) -> str:
        """What SEC() says."""
        return _text(library().bpf_program__section_name(self._program(program)))

    def program_type(self, program: str) -> tuple[int, int]:
        """(``enum bpf_prog_type``, ``enum bpf_attach_type``) as SEC() or ``set_type`` say; (0, 0): not known."""
        pointer = self._program(program)
        return library().bpf_program__type(pointer), library().bpf_program__expected_attach_type(pointer)

    def autoload(self, program: str) -> bool:
        """Whether ``load`` will load it."""
        return bool(library().bpf_program__autoload(self._program(program)))

    def max_entries(self, map_name: str) -> int:
        """How many entries the map has or will have."""
        return int(library().bpf_map__max_entries(self._map(map_name)))

    @functools.cached_property
    def btf(self) -> Btf | None:
        """The object's types, with variables laid out; None without ``-g``."""
        size = ctypes.c_uint32()
        pointer = library().bpf_object__btf(self._object)
        raw = library().btf__raw_data(pointer, ctypes.byref(size)) if pointer else None
        return Btf.parse(ctypes.string_at(raw, size.value)) if raw else None

    # Before load -------------------------------------------------------------------------------------------------

    def set_rodata(self, variable: str, value: bytes) -> None:
        """Set a ``const volatile`` variable. ObjectError where there is none, or its size is another."""
        pointer, size = self._maps.get(".rodata"), ctypes.c_size_t()
        if pointer is None:  # libbpf prefixes internal maps' names with the object's
            pointer = next((p for name, p in self._maps.items() if name.endswith(".rodata")), None)
        data = library().bpf_map__initial_value(pointer, ctypes.byref(size)) if pointer is not None else None
        section = self.btf.datasec(".rodata") if self.btf else None
        if data is None or section is None or self.btf is None:
            raise ObjectError(f"{self.name} has no `const volatile` variables, so {variable!r} cannot be set")
        for each in section.variables:
            if self.btf.name_of(each.type) == variable:
                if each.size_bytes != len(value):
                    raise ObjectError(f"{variable} has {each.size_bytes} bytes, the value {len(value)}")
                if each.offset_bytes + each.size_bytes > size.value:
                    raise ObjectError(f"{variable} lies outside .rodata: the object contradicts itself")
                ctypes.memmove(data + each.offset_bytes, value, len(value))
                return
        names = ", ".join(self.btf.name_of(each.type) for each in section.variables)
        raise ObjectError(f"{self.name} has no variable {variable!r}; there is: {names}")

    def set_max_entries(self, map_name: str, count: int) -> None:
        """Another size than the C says."""
        self._check(library().bpf_map__set_max_entries(self._map(map_name), count), f"size {map_name}")

    def add_flags(self, map_name: str, flags: int) -> None:
        """More ``map_flags`` than the C says."""
        pointer = self._map(map_name)
        flags |= library().bpf_map__map_flags(pointer)
        self._check(library().bpf_map__set_map_flags(pointer, flags), f"set the flags of {map_name}")

    def reuse_map(self, map_name: str, fd: SupportsIndex) -> None:
        """Use a map that exists in this one's place; its sizes and type are taken as they are (check them first)."""
        self._check(library().bpf_map__reuse_fd(self._map(map_name), int(fd)), f"share {map_name}")

    def set_autoload(self, program: str, load: bool) -> None:
        """Whether to load it."""
        self._check(library().bpf_program__set_autoload(self._program(program), load), f"choose {program}")

    def set_autocreate(self, map_name: str, create: bool) -> None:
        """Whether to make this map; programs that use one that was not made are refused."""
        self._check(library().bpf_map__set_autocreate(self._map(map_name), create), f"choose {map_name}")

    def set_type(self, program: str, prog_type: int, attach_type: int = 0) -> None:
        """Another kind than SEC() says: `links.program_type` tells which a target needs."""
        pointer = self._program(program)
        self._check(library().bpf_program__set_type(pointer, prog_type), f"set the type of {program}")
        self._check(library().bpf_program__set_expected_attach_type(pointer, attach_type), f"set the type of {program}")

    def set_attach_target(self, program: str, target: str) -> None:
        """tp_btf: which tracepoint, where it is another than SEC() says. NoSuchTarget comes from ``links``."""
        pointer = self._program(program)
        self._check(library().bpf_program__set_attach_target(pointer, 0, target.encode()), f"{program} on {target}")

    # Load and after ----------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Make the maps, load the programs. VerifierError with the log, KernelError, or ObjectError."""
        self._log = mmap.mmap(-1, LOG_BYTES)
        place = ctypes.addressof(ctypes.c_char.from_buffer(self._log))
        for pointer in self._programs.values():
            if library().bpf_program__autoload(pointer):
                self._check(library().bpf_program__set_log_buf(pointer, place, LOG_BYTES), "prepare the log")
        self.said.clear()
        with self._listening():
            result = library().bpf_object__load(self._object)
        if result < 0:
            raise self._failure(-result)
        self._loaded = True

    def map_fd(self, map_name: str) -> Fd:
        """The map, as a descriptor of the caller's own."""
        return self._dup(library().bpf_map__fd(self._map(map_name)), f"map {map_name}")

    def program_fd(self, program: str) -> Fd:
        """The program, as a descriptor of the caller's own."""
        return self._dup(library().bpf_program__fd(self._program(program)), f"program {program}")

    def close(self) -> None:
        """Free what libbpf holds; descriptors that were handed out stay open."""
        if self._object:
            pointer, self._object = self._object, None
            library().bpf_object__close(pointer)
        self._maps, self._programs, self._log = {}, {}, None

    # ---------------------------------------------------------------------------------------------------------------

    def _named(self, kind: str) -> Iterator[tuple[str, int]]:
        following, name = getattr(library(), f"bpf_object__next_{kind}"), getattr(library(), f"bpf_{kind}__name")
        pointer = following(self._object, None)
        while pointer:
            yield _text(name(pointer)), pointer
            pointer = following(self._object, pointer)

    def _map(self, name: str) -> int:
        if name in self._sections:
            return self._sections[name]
        if name not in self._maps:
            raise ObjectError(f"{self.name} has no map {name!r}; there is: {', '.join(self.map_names) or 'none'}")
        return self._maps[name]

    def _program(self, name: str) -> int:
        if name not in self._programs:
            there = ", ".join(self._programs) or "none"
            raise ObjectError(f"{self.name} has no program {name!r}; there is: {there}")
        return self._programs[name]

    def _dup(self, number: int, what: str) -> Fd:
        if not self._loaded or number < 0:
            raise ObjectError(f"{what} of {self.name} is not loaded")
        owner = Fd(number, what)
        try:
            return owner.dup()
        finally:
            owner.detach()  # libbpf closes its own

    def _check(self, result: int, what: str) -> None:
        if result < 0:
            raise KernelError(-result, f"{self.name}: {what}", self._last_words() if self.said else "")

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        before = getattr(_said, "lines", None)
        _said.lines = self.said
        try:
            yield
        finally:
            _said.lines = before

    def _last_words(self) -> str:
        lines = [line.removeprefix("libbpf: ") for line in self.said if line.strip()]
        return "; ".join(lines[-3:]) or "it gave no reason"

    def _failure(self, number: int) -> ProbefleetError:
        """What load()'s errno and libbpf's words mean."""
        for line in self.said:
            if found := _NO_TRACEPOINT.search(line):
                return targets.no_raw_tracepoint(found[1].removeprefix("btf_trace_"), "tp_btf tracepoint")
        if any(_NO_BTF in line for line in self.said) and not btf_kernel.available():
            return btf_kernel.missing()
        program = next((found[1] for line in self.said if (found := _FAILED.search(line))), "")
        log = self._read_log()
        if program and log.strip():
            return self._refusal(log, program)
        if number in (errno.EPERM, errno.EACCES):
            return KernelError(number, f"load {self.name}", f"libbpf says: {self._last_words()}")
        if program:
            return VerifierError(
                f"kernel refused {program} of {self.name}: {self._last_words()}", "\n".join(self.said), program
            )
        return KernelError(number, f"load {self.name}", f"libbpf says: {self._last_words()}")

    def _refusal(self, log: str, program: str) -> VerifierError:
        try:
            parsed = BpfObject.parse(self._data)
        except (ElfError, BtfError):
            return verifier_log.refusal(log, program)

        def line_of(instruction: int) -> tuple[str, int] | None:
            try:
                place = parsed.line_of(program, instruction)
            except BtfError:  # the kernel refused the program before it looked at its lines
                return None
            return (place.file, place.line) if place else None

        return verifier_log.refusal(log, program, line_of)

    def _read_log(self) -> str:
        if self._log is None:
            return ""
        end = self._log.find(b"\0")
        return self._log[: end if end >= 0 else len(self._log)].decode(errors="replace")
