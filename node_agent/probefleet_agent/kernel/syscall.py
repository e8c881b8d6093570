"""The one gate to ``bpf(2)`` and ``perf_event_open(2)``: numbers and bytes in, owned descriptors out.

Everything else in ``kernel/`` goes through here, so that there is one place where a pointer is handed to the kernel and
one place where an errno becomes an error. Sizes are checked before a call: the kernel believes the sizes that a map was
made with, not the length of our buffer. Numbers and layouts are in ``uapi``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from probefleet_wire import map_types

from probefleet_agent.errors import KernelError, ProbefleetError
from probefleet_agent.kernel import uapi, verifier_log
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import AttachType as AttachType
from probefleet_agent.kernel.uapi import Command as Command
from probefleet_agent.kernel.uapi import MapType as MapType
from probefleet_agent.kernel.uapi import ProgramType as ProgramType

_NUMBERS = {"x86_64": (321, 298), "aarch64": (280, 241)}  # bpf, perf_event_open
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
ATTR_BYTES = 152  # the largest bpf_attr that we fill (prog_load of Linux 6.9); the rest is zero
LOG_BYTES = 16 << 20
_TRIES = 32


_NO_RIGHT = "The agent needs CAP_BPF and CAP_PERFMON (CAP_SYS_ADMIN before Linux 5.8); run it as root, or privileged."


def _numbers() -> tuple[int, int]:
    try:
        return _NUMBERS[platform.machine()]
    except KeyError:
        raise ProbefleetError(
            f"machines of kind {platform.machine()} are not supported: x86_64 and aarch64 are"
        ) from None


def _call(command: Command, attr: ctypes.Structure) -> int:
    """``bpf(2)``: the result, or −errno. EINTR and EAGAIN (a signal during verification) are tried again."""
    if ctypes.sizeof(attr) > ATTR_BYTES:
        raise AssertionError("bpf_attr is larger than any kernel knows")
    number, result = _numbers()[0], 0
    for _ in range(_TRIES):
        result = _libc.syscall(
            ctypes.c_long(number), ctypes.c_int(command), ctypes.byref(attr), ctypes.c_uint(ctypes.sizeof(attr))
        )
        if result >= 0:
            return int(result)
        result = -ctypes.get_errno()
        if result not in (-errno.EINTR, -errno.EAGAIN):
            break
    return int(result)


def bpf(command: Command, attr: ctypes.Structure, what: str) -> int:
    """``bpf(2)``, raising KernelError. Before Linux 5.11 maps count against RLIMIT_MEMLOCK: it is lifted on EPERM."""
    result = _call(command, attr)
    if (
        result == -errno.EPERM
        and command in (Command.MAP_CREATE, Command.PROG_LOAD, Command.BTF_LOAD)
        and raise_memlock()
    ):
        result = _call(command, attr)
    if result < 0:
        raise KernelError(-result, what, _NO_RIGHT if result in (-errno.EPERM, -errno.EACCES) else "")
    return result


def raise_memlock() -> bool:
    """True when the limit was there and could be lifted."""
    infinity = resource.RLIM_INFINITY
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == infinity:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (infinity, infinity))
    except (OSError, ValueError):
        return False
    return True


def address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    """Where a ctypes buffer lies; the caller keeps the buffer alive over the call."""
    return ctypes.addressof(buffer)


def _bytes(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, max(len(data), 1))


def kernel_name(name: str) -> bytes:
    """A name as the kernel takes it: 15 characters of letters, digits, ``_`` and ``.``."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.") else "_" for c in name)[:15].encode()


# Maps ---------------------------------------------------------------------------------------------------------------


def map_create(
    map_type: int, *, key_size: int, value_size: int, max_entries: int, name: str = "", flags: int = 0,
    inner_map_fd: SupportsIndex = 0, btf_fd: SupportsIndex = 0, btf_key_type_id: int = 0, btf_value_type_id: int = 0,
) -> Fd:  # fmt: skip
    """A new map. KernelError E2BIG, EINVAL or ENOMEM where the sizes are not possible."""
    attr = uapi.MapCreate(
        map_type=map_type, key_size=key_size, value_size=value_size, max_entries=max_entries, map_flags=flags,
        map_name=kernel_name(name), inner_map_fd=int(inner_map_fd), btf_fd=int(btf_fd),
        btf_key_type_id=btf_key_type_id, btf_value_type_id=btf_value_type_id,
    )  # fmt: skip
    what = f"create map {name!r} (type {map_type}, key {key_size}, value {value_size} bytes, {max_entries} entries)"
    return Fd(bpf(Command.MAP_CREATE, attr, what), f"map {name}")


def map_lookup(fd: SupportsIndex, key: bytes, value_bytes: int) -> bytes | None:
    """One value (per-CPU maps: all CPUs' values, each rounded up to 8 bytes), or None. Sizes must be the map's own."""
    key_buffer, value = _bytes(key), ctypes.create_string_buffer(value_bytes)
    attr = uapi.Element(map_fd=int(fd), key=address(key_buffer), value=address(value))
    result = _call(Command.MAP_LOOKUP_ELEM, attr)
    if result == -errno.ENOENT:
        return None
    if result < 0:
        raise KernelError(-result, "look up a map's entry")
    return value.raw


def map_update(fd: SupportsIndex, key: bytes, value: bytes, flags: int = uapi.BPF_ANY) -> None:
    """Set one entry. Sizes must be the map's own."""
    key_buffer, value_buffer = _bytes(key), _bytes(value)
    attr = uapi.Element(map_fd=int(fd), key=address(key_buffer), value=address(value_buffer), flags=flags)
    bpf(Command.MAP_UPDATE_ELEM, attr, "set a map's entry")


def map_delete(fd: SupportsIndex, key: bytes) -> bool:
    """Whether there was such an entry."""
    key_buffer = _bytes(key)
    result = _call(Command.MAP_DELETE_ELEM, uapi.Element(map_fd=int(fd), key=address(key_buffer)))
    if result < 0 and result != -errno.ENOENT:
        raise KernelError(-result, "delete a map's entry")
    return result >= 0


def map_get_next_key(fd: SupportsIndex, key: bytes | None, key_size: int) -> bytes | None:
    """The key after ``key`` (None: the first), or None at the end. After a delete it starts again from the first."""
    key_buffer = _bytes(key) if key is not None else None
    following = ctypes.create_string_buffer(key_size)
    attr = uapi.Element(
        map_fd=int(fd), key=address(key_buffer) if key_buffer is not None else 0, value=address(following)
    )
    result = _call(Command.MAP_GET_NEXT_KEY, attr)
    if result == -errno.ENOENT:
        return None
    if result < 0:
        raise KernelError(-result, "go through a map's keys")
    return following.raw


def map_push(fd: SupportsIndex, value: bytes) -> None:
    """Put a value into a queue, stack or bloom filter. KernelError E2BIG where a queue or stack is full."""
    buffer = _bytes(value)
    bpf(Command.MAP_UPDATE_ELEM, uapi.Element(map_fd=int(fd), value=address(buffer)), "push a map's value")


def map_pop(fd: SupportsIndex, value_bytes: int) -> bytes | None:
    """Take the next value out of a queue or stack; None where it is empty."""
    value = ctypes.create_string_buffer(max(value_bytes, 1))
    result = _call(Command.MAP_LOOKUP_AND_DELETE_ELEM, uapi.Element(map_fd=int(fd), value=address(value)))
    if result == -errno.ENOENT:
        return None
    if result < 0:
        raise KernelError(-result, "pop a map's value")
    return value.raw[:value_bytes]


def map_batch(
    command: Command, fd: SupportsIndex, *, keys: int, values: int, count: int, in_batch: int = 0, out_batch: int = 0
) -> tuple[int, int]:
    """One batch call on raw addresses (``maps`` owns the arrays): (entries done, 0 or the errno)."""
    attr = uapi.Batch(in_batch=in_batch, out_batch=out_batch, keys=keys, values=values, count=count, map_fd=int(fd))
    result = _call(command, attr)
    if result == -errno.EFAULT:
        raise KernelError(errno.EFAULT, f"{command.name} of {count} entries")
    if result == -uapi.ENOTSUPP:
        attr.count = 0  # a kernel without this call leaves the number as it was asked
    return int(attr.count), -min(result, 0)


# Programs -----------------------------------------------------------------------------------------------------------


def prog_load(
    instructions: bytes, prog_type: int, *, licence: str = "GPL", name: str = "", expected_attach_type: int = 0,
    attach_btf_id: int = 0, btf_fd: SupportsIndex = 0, func_info: bytes = b"", func_info_record_bytes: int = 0,
    line_info: bytes = b"", line_info_record_bytes: int = 0, kernel_version: int = 0, flags: int = 0,
    log_level: int = 0,
) -> Fd:  # fmt: skip
    """Load a program; where the verifier refuses it, load it again with a log and raise VerifierError."""
    if not instructions or len(instructions) % 8:
        raise ProbefleetError(f"program {name}: {len(instructions)} bytes are not whole instructions of 8 bytes")
    if func_info and (func_info_record_bytes <= 0 or len(func_info) % func_info_record_bytes):
        raise ProbefleetError(f"program {name}: func_info is not whole records")
    if line_info and (line_info_record_bytes <= 0 or len(line_info) % line_info_record_bytes):
        raise ProbefleetError(f"program {name}: line_info is not whole records")
    code, licence_text, functions, lines = (
        _bytes(instructions),
        _bytes(licence.encode() + b"\0"),
        _bytes(func_info),
        _bytes(line_info),
    )
    attr = uapi.ProgLoad(
        prog_type=prog_type, insn_cnt=len(instructions) // 8, insns=address(code), license=address(licence_text),
        prog_name=kernel_name(name), expected_attach_type=expected_attach_type, attach_btf_id=attach_btf_id,
        prog_btf_fd=int(btf_fd), kern_version=kernel_version, prog_flags=flags,
        func_info=address(functions) if func_info else 0, func_info_rec_size=func_info_record_bytes if func_info else 0,
        func_info_cnt=len(func_info) // func_info_record_bytes if func_info else 0,
        line_info=address(lines) if line_info else 0, line_info_rec_size=line_info_record_bytes if line_info else 0,
        line_info_cnt=len(line_info) // line_info_record_bytes if line_info else 0,
    )  # fmt: skip
    what = f"load program {name}"
    if not log_level:
        try:
            return Fd(bpf(Command.PROG_LOAD, attr, what), f"program {name}")
        except KernelError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
    log = ctypes.create_string_buffer(LOG_BYTES)
    attr.log_buf, attr.log_size, attr.log_level = address(log), LOG_BYTES, log_level or 1
    try:
        return Fd(bpf(Command.PROG_LOAD, attr, what), f"program {name}")
    except KernelError as error:
        text = log.value.decode(errors="replace")
        if not text.strip():
            raise KernelError(error.errno, what, error.advice) from None
        raise verifier_log.refusal(text, name) from error


def btf_load(data: bytes) -> Fd:
    """Give the kernel a BTF blob: for maps and programs that are made without libbpf."""
    buffer = _bytes(data)
    attr = uapi.BtfLoad(btf=address(buffer), btf_size=len(data))
    return Fd(bpf(Command.BTF_LOAD, attr, f"load {len(data)} bytes of BTF"), "BTF")


# Pins, links, ids ----------------------------------------------------------------------------------------------------


def obj_pin(fd: SupportsIndex, path: str) -> None:
    """Give a map, program or link a name in bpffs; it lives as long as the name."""
    pathname = _bytes(path.encode() + b"\0")
    bpf(Command.OBJ_PIN, uapi.Object(pathname=address(pathname), bpf_fd=int(fd)), f"pin {path}")


def obj_get(path: str, *, read_only: bool = False) -> Fd:
    """Open what is pinned there."""
    pathname = _bytes(path.encode() + b"\0")
    attr = uapi.Object(pathname=address(pathname), file_flags=int(map_types.Flag.RDONLY) if read_only else 0)
    return Fd(bpf(Command.OBJ_GET, attr, f"open the pin {path}"), path)


def raw_tracepoint_open(name: str | None, prog_fd: SupportsIndex) -> Fd:
    """Attach to a raw tracepoint; ``None`` where the program itself knows it (tp_btf). The result is a link."""
    text = _bytes((name or "").encode() + b"\0")
    attr = uapi.RawTracepoint(name=address(text) if name is not None else 0, prog_fd=int(prog_fd))
    what = f"attach to raw tracepoint {name}" if name is not None else "attach a tp_btf program"
    return Fd(bpf(Command.RAW_TRACEPOINT_OPEN, attr, what), f"link {name or 'tp_btf'}")


def link_create(
    prog_fd: SupportsIndex, target_fd: SupportsIndex, attach_type: int, *, flags: int = 0, cookie: int = 0
) -> Fd:
    """A link between a program and, for AttachType.PERF_EVENT, an event. The link keeps the event alive."""
    attr = uapi.LinkCreate(
        prog_fd=int(prog_fd), target_fd=int(target_fd), attach_type=attach_type, flags=flags, cookie=cookie
    )
    return Fd(bpf(Command.LINK_CREATE, attr, "create a link"), "link")


def link_functions(prog_fd: SupportsIndex, names: Sequence[str], *, on_return: bool) -> Fd:
    """One link on many functions of the kernel (kprobe.multi, Linux 5.18)."""
    texts = [name.encode() for name in names]
    pointers = (ctypes.c_char_p * len(texts))(*texts)
    attr = uapi.KprobeMulti(
        prog_fd=int(prog_fd), attach_type=AttachType.TRACE_KPROBE_MULTI, count=len(texts),
        flags=uapi.BPF_F_MULTI_RETURN if on_return else 0, symbols=ctypes.addressof(pointers),
    )  # fmt: skip
    return Fd(bpf(Command.LINK_CREATE, attr, f"probe {len(texts)} functions"), "link kprobe.multi")


def link_places(
    prog_fd: SupportsIndex, path: str, places: Sequence[tuple[int, int, int]], *, pid: int = 0, on_return: bool = False
) -> Fd:
    """One link on many places of a file (uprobe.multi, Linux 6.6): (offset, offset of the semaphore or 0, cookie)."""
    count, file = len(places), _bytes(path.encode() + b"\0")
    offsets, counters, cookies = ((ctypes.c_uint64 * count)(*column) for column in zip(*places, strict=True))
    attr = uapi.UprobeMulti(
        prog_fd=int(prog_fd), attach_type=AttachType.TRACE_UPROBE_MULTI, path=address(file), count=count, pid=pid,
        offsets=ctypes.addressof(offsets), ref_ctr_offsets=ctypes.addressof(counters),
        cookies=ctypes.addressof(cookies), flags=uapi.BPF_F_MULTI_RETURN if on_return else 0,
    )  # fmt: skip
    return Fd(bpf(Command.LINK_CREATE, attr, f"probe {count} places of {path}"), "link uprobe.multi")


def enable_stats() -> Fd:
    """Program run counts and times are kept as long as this is open. Needs CAP_SYS_ADMIN; costs about 20 ns a run."""
    return Fd(bpf(Command.ENABLE_STATS, uapi.Stats(type=0), "turn on program statistics"), "bpf stats")


def fd_by_id(kind: str, object_id: int) -> Fd:
    """Open a "map", "program", "link" or "btf" by its kernel id. Needs CAP_SYS_ADMIN. KernelError ENOENT when gone."""
    command = {
        "map": Command.MAP_GET_FD_BY_ID, "program": Command.PROG_GET_FD_BY_ID, "link": Command.LINK_GET_FD_BY_ID,
        "btf": Command.BTF_GET_FD_BY_ID,
    }[kind]  # fmt: skip
    return Fd(bpf(command, uapi.ById(id=object_id), f"open {kind} {object_id} by its id"), f"{kind} {object_id}")


def ids(kind: str) -> list[int]:
    """The kernel ids of all maps, programs or links. Needs CAP_SYS_ADMIN."""
    command = {"map": Command.MAP_GET_NEXT_ID, "program": Command.PROG_GET_NEXT_ID, "link": Command.LINK_GET_NEXT_ID}[
        kind
    ]
    found: list[int] = []
    attr = uapi.ById(id=0)
    while True:
        result = _call(command, attr)
        if result == -errno.ENOENT:
            return found
        if result < 0:
            raise KernelError(-result, f"list {kind} ids", _NO_RIGHT)
        found.append(attr.next_id)
        attr = uapi.ById(id=attr.next_id)


@dataclass(frozen=True, slots=True)
class MapInfo:
    """``struct bpf_map_info``, what we use of it."""

    id: int
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str
    btf_id: int
    btf_key_type_id: int
    btf_value_type_id: int
    map_extra: int = 0


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """``struct bpf_prog_info``, what we use of it; counters are zero while statistics are off."""

    id: int
    type: int
    name: str
    tag: str
    load_time_ns: int  # since boot, CLOCK_BOOTTIME
    map_ids: tuple[int, ...]
    translated_bytes: int
    jited_bytes: int
    run_time_ns: int
    run_count: int
    recursion_misses: int
    verified_instructions: int  # 0 before Linux 5.16
    btf_id: int


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """``struct bpf_link_info``, the common head."""

    id: int
    type: int
    prog_id: int


def _info(fd: SupportsIndex, into: ctypes.Structure, what: str) -> None:
    attr = uapi.Info(bpf_fd=int(fd), info_len=ctypes.sizeof(into), info=ctypes.addressof(into))
    bpf(Command.OBJ_GET_INFO_BY_FD, attr, what)


def map_info(fd: SupportsIndex) -> MapInfo:
    """What a map is, whoever made it."""
    raw = uapi.MapInfoC()
    _info(fd, raw, "ask what a map is")
    return MapInfo(
        id=raw.id, type=raw.type, key_size=raw.key_size, value_size=raw.value_size, max_entries=raw.max_entries,
        flags=raw.map_flags, name=raw.name.decode(errors="replace"), btf_id=raw.btf_id,
        btf_key_type_id=raw.btf_key_type_id, btf_value_type_id=raw.btf_value_type_id, map_extra=raw.map_extra,
    )  # fmt: skip


def program_info(fd: SupportsIndex) -> ProgramInfo:
    """What a program is, what it has cost so far, and which maps it uses."""
    raw = uapi.ProgInfoC()
    _info(fd, raw, "ask what a program is")
    map_ids = (ctypes.c_uint32 * max(raw.nr_map_ids, 1))()
    again = uapi.ProgInfoC(nr_map_ids=raw.nr_map_ids, map_ids=ctypes.addressof(map_ids))
    _info(fd, again, "ask which maps a program uses")
    return ProgramInfo(
        id=again.id, type=again.type, name=again.name.decode(errors="replace"), tag=bytes(again)[8:16].hex(),
        load_time_ns=again.load_time, map_ids=tuple(map_ids[: min(raw.nr_map_ids, again.nr_map_ids)]),
        translated_bytes=again.xlated_len, jited_bytes=again.jited_len, run_time_ns=again.run_time_ns,
        run_count=again.run_cnt, recursion_misses=again.recursion_misses, verified_instructions=again.verified_insns,
        btf_id=again.btf_id,
    )  # fmt: skip


def program_instructions(fd: SupportsIndex) -> bytes:
    """A program as the kernel translated it: map ids stand where the object had relocations. Needs CAP_SYS_ADMIN."""
    raw = uapi.ProgInfoC()
    _info(fd, raw, "ask how long a program is")
    code = ctypes.create_string_buffer(max(raw.xlated_len, 1))
    again = uapi.ProgInfoC(xlated_len=raw.xlated_len, xlated=address(code))
    _info(fd, again, "read a program's instructions")
    if not again.xlated:
        raise KernelError(errno.EPERM, "read a program's instructions", "It hides them: kernel.kptr_restrict.")
    return code.raw[: again.xlated_len]


def link_info(fd: SupportsIndex) -> LinkInfo:
    """What a link is; ``prog_id`` 0 where its program is gone."""
    raw = uapi.LinkInfoC()
    _info(fd, raw, "ask what a link is")
    return LinkInfo(id=raw.id, type=raw.type, prog_id=raw.prog_id)


def btf_bytes(fd: SupportsIndex) -> bytes:
    """The BTF blob behind a descriptor of ``fd_by_id("btf", …)`` or ``btf_load``."""
    raw = uapi.BtfInfoC()
    _info(fd, raw, "ask the size of a BTF")
    data = ctypes.create_string_buffer(max(raw.btf_size, 1))
    _info(fd, uapi.BtfInfoC(btf=address(data), btf_size=raw.btf_size), "read a BTF")
    return data.raw[: raw.btf_size]


# Events -------------------------------------------------------------------------------------------------------------


def perf_event_open(
    event_type: int, config: int, *, pid: int = -1, cpu: int = -1, config1: int | bytes = 0, config2: int = 0,
    frequency_hz: int = 0, period: int = 0, sample_type: int = 0, wakeup_events: int = 0,
    read_format: int = 0, disabled: bool = False,
    what: str = "event",
) -> Fd:  # fmt: skip
    """An event. ``config1`` may be a name or path (bytes): the kernel gets a pointer to it. KernelError otherwise."""
    if frequency_hz and period:
        raise ProbefleetError("an event has a frequency or a period, not both")
    text = _bytes(config1 + b"\0") if isinstance(config1, bytes) else None
    attr = uapi.PerfAttr(
        type=event_type, size=ctypes.sizeof(uapi.PerfAttr), config=config, sample=frequency_hz or period,
        sample_type=sample_type,
        flags=(uapi.PERF_FREQ if frequency_hz else 0) | (uapi.PERF_DISABLED if disabled else 0),
        wakeup_events=wakeup_events, config2=config2, read_format=read_format,
        config1=address(text) if text is not None else config1,
    )  # fmt: skip
    for _ in range(_TRIES):
        result = _libc.syscall(
            ctypes.c_long(_numbers()[1]), ctypes.byref(attr), ctypes.c_int(pid), ctypes.c_int(cpu), ctypes.c_int(-1),
            ctypes.c_ulong(uapi.PERF_FLAG_FD_CLOEXEC),
        )  # fmt: skip
        if result >= 0:
            return Fd(int(result), what)
        if (number := ctypes.get_errno()) not in (errno.EINTR, errno.EAGAIN):
            break
    raise KernelError(number, f"open the perf event {what}", _NO_RIGHT if number in (errno.EPERM, errno.EACCES) else "")


def perf_ioctl(fd: SupportsIndex, request: int, argument: SupportsIndex = 0) -> None:
    """``ioctl`` on an event."""
    if _libc.ioctl(ctypes.c_int(int(fd)), ctypes.c_ulong(request), ctypes.c_ulong(int(argument))) < 0:
        number = ctypes.get_errno()
        raise KernelError(number, f"ioctl {request:#x} on a perf event: {os.strerror(number)}")
