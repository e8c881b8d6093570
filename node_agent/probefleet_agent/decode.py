"""From bytes of maps and rings to columns with names: what a field means is said by its type. Pure.

In: keys, values and records as ``uint8`` arrays (``kernel.maps``, ``kernel.rings``) and their ``Layout`` (from BTF, or
BCC's own description). Out: NumPy columns of integers and strings. The decoder of a field is chosen by the name of its
typedef, which BTF keeps (``bpf/include/probefleet.h``), or by the policy's ``decode`` where there is none. Strings are
made once per *distinct* value; nothing here loops over entries. What needs the machine (a process's command, a user's
name, symbols) is asked of ``Lookups``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from probefleet_wire import columns, syscalls
from probefleet_wire.btf_layout import Field
from probefleet_wire.map_layout import LPM_KEY, lpm_address_bytes
from probefleet_wire.map_layout import Layout as Layout

from probefleet_agent import prints

Bytes: TypeAlias = npt.NDArray[np.uint8]
Integers: TypeAlias = npt.NDArray[np.uint64] | npt.NDArray[np.int64]
Column: TypeAlias = Integers | npt.NDArray[np.float64] | npt.NDArray[np.object_]
#: The same, strings in coded form: no loop touches a row.
Coded: TypeAlias = Integers | npt.NDArray[np.float64] | columns.StringColumn


class DecodeError(ValueError):
    """A layout, a field or an output that cannot be read: which, and what would."""


class Lookups(Protocol):
    """What decoding asks of the machine; every answer is a name, or ``""`` where there is none."""

    machine: str
    #: Wall clock minus ktime (CLOCK_MONOTONIC), nanoseconds.
    wall_minus_ktime_ns: int

    def command(self, pid: int) -> str:
        """The command of a process."""

    def learn(self, pid: int, command: str) -> None:
        """A record says itself what a process is called."""

    def user(self, uid: int) -> str:
        """The name of a user."""

    def device(self, number: int) -> str:
        """The name of a block device by the kernel's dev_t (major << 20 | minor)."""

    def function(self, address: int) -> str:
        """The name of the kernel function that an address lies in."""


def find(fields: Sequence[Field], name: str, what: str) -> Field:
    """The field of that name; the only one, where the name is empty."""
    for field in fields:
        if field.name == name:
            return field
    if not name and len(fields) == 1:
        return fields[0]
    names = ", ".join(field.name or "(the whole)" for field in fields) or "none"
    raise DecodeError(f"{what} has no field {name!r}; its fields are: {names}")


def with_typedef(fields: Sequence[Field], *names: str) -> Field | None:
    """The first field whose C type went through one of these typedefs."""
    return next((field for field in fields if set(field.typedefs) & set(names)), None)


def own_command(fields: tuple[Field, ...]) -> tuple[Field, Field] | None:
    """Of a record that holds one command: the process that it is of (the first), and the command.

    The record was written when it happened: short-lived processes are gone when it is read, others are called
    differently by then (execve).
    """
    processes = [field for field in fields if "pid_nr_t" in field.typedefs]
    commands = [field for field in fields if "comm_t" in field.typedefs]
    return (processes[0], commands[0]) if processes and len(commands) == 1 else None


def processes(buffer: Bytes, own: tuple[Field, Field], lookups: Lookups) -> columns.StringColumn:
    """The column of processes with the commands that the records themselves give; ``lookups`` learn them."""
    parts = [buffer[:, field.offset_bytes : field.offset_bytes + field.size_bytes] for field in own]
    both = np.ascontiguousarray(np.concatenate(parts, axis=1)[::-1])  # the newest first
    distinct, newest, index = np.unique(both.view(f"V{both.shape[1]}"), return_index=True, return_inverse=True)
    size = own[0].size_bytes
    pairs = [(int.from_bytes(each[:size], "little"), _text(each[size:])) for each in map(bytes, distinct.tolist())]
    for at in np.argsort(-newest).tolist():
        number, command = pairs[at]
        if number and command:
            lookups.learn(number, command)
    shown = [f"{command}[{number}]" if number and command else _pid(number, lookups) for number, command in pairs]
    return columns.StringColumn(tuple(shown), index.reshape(-1)[::-1].astype(np.uint64))


def raw(buffer: Bytes, field: Field) -> npt.NDArray[Any]:
    """One field of every entry: ``n`` values, or ``(n, *shape)`` for an array; text as ``S``."""
    at = np.ascontiguousarray(buffer[:, field.offset_bytes : field.offset_bytes + field.size_bytes])
    if field.bits:
        word = np.zeros((len(buffer), 16), np.uint8)
        word[:, : at.shape[1]] = at
        low = word[:, :8].copy().view("<u8").reshape(-1)
        value = (low >> np.uint64(field.bit_offset % 8)) & np.uint64((1 << field.bits) - 1)
        if field.signed and field.bits < 64:
            sign = np.uint64(1 << (field.bits - 1))
            return (value ^ sign).astype(np.int64) - np.int64(sign)
        return value
    if field.is_char_array:
        return at.view(f"S{field.size_bytes}").reshape(-1)
    element = field.element_bytes
    if field.kind == "bytes" or element not in (1, 2, 4, 8):
        return at
    letter = "f" if field.kind == "float" else "i" if field.signed else "u"
    values = at.view(f"<{letter}{element}")
    return values.reshape((len(buffer), *field.shape)) if field.shape else values.reshape(-1)


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode("utf-8", "replace")


def _address(data: bytes) -> str:
    if len(data) == 4:
        return str(ipaddress.IPv4Address(data))
    if len(data) != 16:
        return data.hex()
    address = ipaddress.IPv6Address(data)
    return str(address.ipv4_mapped or address)


def _prefix(data: bytes) -> str:
    """An LPM trie's key: ``10.0.0.0/8``; bytes in hex where it holds more than an address."""
    length, rest = int.from_bytes(data[:4], "little"), data[4:]
    if not lpm_address_bytes(len(data)) or length > 8 * len(rest):
        return f"{rest.hex()}/{length}"
    network = ipaddress.ip_network((rest, length), strict=False)
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    return f"{mapped}/{length - 96}" if mapped and length >= 96 else str(network)


#: Decoders from the bytes of one distinct value to its text.
_RENDERED: Mapping[str, Callable[[bytes], str]] = {"ip": _address, "hex": bytes.hex, "prefix": _prefix}


def _pid(value: int, lookups: Lookups) -> str:
    command = lookups.command(value)
    return f"{command}[{value}]" if command else str(value)


ALL_BITS = (1 << 64) - 1
#: Decoders from one distinct number to its name. The operator puts a name to an endpoint, as it does to pod uids.
_NAMES: Mapping[str, Callable[[int, Lookups], str]] = {
    "pid": _pid,
    "uid": lambda value, lookups: lookups.user(value) or str(value),
    "endpoint": lambda value, _: f"endpoint:{value & ALL_BITS:016x}" if value else "(no pod)",
    "syscall": lambda value, lookups: syscalls.name(value, lookups.machine),
    "errno": lambda value, _: syscalls.error_name(value) if value <= 0 else str(value),
    "open_flags": lambda value, lookups: syscalls.open_flags(value, lookups.machine),
    "print_flags": lambda value, _: prints.flags(value),
    "device": lambda value, lookups: lookups.device(value) or f"{value >> 20}:{value & 0xFFFFF}",
    "function": lambda value, lookups: lookups.function(value) or f"{value:#x}",
}

#: typedef → decoder. The right-hand words are also those of a policy's ``decode``.
TYPEDEFS: Mapping[str, str] = {
    "pid_nr_t": "pid",
    "tid_nr_t": "integer",
    "user_id_t": "uid",
    "ipv4_t": "ip",
    "ipv6_t": "ip",
    "ip_t": "ip",
    "port_t": "integer",
    "be_port_t": "big_endian",
    "__be16": "big_endian",
    "__be32": "big_endian",
    "syscall_t": "syscall",
    "endpoint_t": "endpoint",
    "errno_t": "errno",
    "open_flags_t": "open_flags",
    "ktime_t_ns": "ktime",
    "device_t": "device",
    "function_t": "function",
    "comm_t": "text",
    prints.FLAGS: "print_flags",
    LPM_KEY: "prefix",
}
#: Those that a policy may name; "prefix" is chosen by an LPM trie alone.
DECODERS = frozenset({*_NAMES, "integer", "ip", "big_endian", "ktime", "text", "hex"}) - {"print_flags"}
CGROUP = ("cgroup_id_t",)


def decoder_of(field: Field, decode: Mapping[str, str], name: str) -> str:
    """Which decoder reads a field: the policy's word, else the typedef's, else what the C type says.

    A word that does not fit raises DecodeError: it is said when the policy comes, not at the first key.
    """
    said = decode.get(name) or decode.get(field.name)
    if said:
        if said not in DECODERS and said != "cgroup":
            raise DecodeError(f"no decoder {said!r} for {name}; there are: {', '.join(sorted(DECODERS))}")
        _check_fit(field, said)
        return said
    for typedef in field.typedefs:
        if typedef in TYPEDEFS:
            return TYPEDEFS[typedef]
    if field.kind == "char" and len(field.shape) <= 1:
        return "text"
    if field.enum_names:
        return "enum"
    if field.kind == "bool":
        return "bool"
    if field.kind == "float":
        return "float"
    return "hex" if field.shape or field.kind == "bytes" else "integer"


def _check_fit(field: Field, decoder: str) -> None:
    if decoder not in ("ip", "hex", "text") and (field.shape or field.kind in ("char", "bytes")):
        raise DecodeError(
            f"field {field.name} is {field.type_name}{list(field.shape)}: decoder {decoder} reads one number"
        )


def column(buffer: Bytes, field: Field, decoder: str, lookups: Lookups) -> Column:
    """One decoded column: integers and floats as arrays, everything else as strings (dtype object), ``n`` long."""
    found = coded(buffer, field, decoder, lookups)
    if isinstance(found, columns.StringColumn):
        return np.array(found.distinct or [""], dtype=object)[found.index]
    return found


def coded(buffer: Bytes, field: Field, decoder: str, lookups: Lookups) -> Coded:
    """The same with strings in coded form; its distinct ones may repeat."""
    if decoder in _RENDERED:
        at = np.ascontiguousarray(buffer[:, field.offset_bytes : field.offset_bytes + field.size_bytes])
        render = _RENDERED[decoder]
        return _each(at.view(f"V{field.size_bytes}").reshape(-1), lambda value: render(bytes(value)))
    _check_fit(field, decoder)
    values = raw(buffer, field)
    if decoder == "text":
        if not field.is_char_array:
            at = np.ascontiguousarray(buffer[:, field.offset_bytes : field.offset_bytes + field.size_bytes])
            values = at.view(f"S{field.size_bytes}").reshape(-1)
        return _each(values, lambda value: _text(bytes(value)))
    if decoder == "float":
        return values.astype(np.float64)
    if decoder == "big_endian":
        return values.view(values.dtype.newbyteorder(">")).astype(np.uint64)
    if decoder == "ktime":
        known = values.astype(np.int64)
        wall: npt.NDArray[np.int64] = np.where(known > 0, known + np.int64(lookups.wall_minus_ktime_ns), np.int64(0))
        return wall
    if decoder == "enum":
        names = {number: text for text, number in field.enum_names}
        return _each(values, lambda value: names.get(int(value), str(int(value))))
    if decoder == "bool":
        return _each(values, lambda value: "true" if value else "false")
    if decoder in _NAMES:
        name = _NAMES[decoder]
        return _each(values, lambda value: name(int(value), lookups))
    if field.signed:
        return values.astype(np.int64)
    return values.astype(np.uint64)


def distinct(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """``np.unique`` with the inverse, faster where equal values come in runs, as records of one task do."""
    if not len(values):
        return values, np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
    found, of_run = np.unique(values[starts], return_inverse=True)
    lengths = np.diff(np.append(starts, len(values)))
    return found, np.repeat(of_run.reshape(-1), lengths)


def _each(values: npt.NDArray[Any], name: Callable[[Any], str]) -> columns.StringColumn:
    found, index = distinct(values)
    return columns.StringColumn(tuple(name(value) for value in found.tolist()), index.astype(np.uint64))


def numbers(values: Bytes | npt.NDArray[np.uint8], layout: Layout, name: str) -> npt.NDArray[np.uint64]:
    """The counting field of every entry, summed over CPUs: ``(n,)``, or ``(n, w)`` for an array of counters.

    ``values`` is ``(n, value_bytes)``, or ``(n, cpus, value_bytes rounded up to 8)`` for per-CPU maps. Narrow counters
    are widened before they are summed.
    """
    field = find(layout.value, name, "the map's value")
    if field.is_char_array or field.kind in ("bytes", "pointer", "float") or len(field.shape) > 1:
        raise DecodeError(f"value field {name or '(the whole)'} is {field.type_name}, which cannot be counted")
    if values.ndim == 2:
        return raw(values, field).astype(np.uint64)
    n, cpus = values.shape[:2]
    each = raw(values.reshape(n * cpus, values.shape[2]), field)
    total: npt.NDArray[np.uint64] = each.astype(np.uint64).reshape(n, cpus, *field.shape).sum(axis=1, dtype=np.uint64)
    return total


def folded(values: npt.NDArray[np.uint8], layout: Layout, name: str, how: str) -> npt.NDArray[np.uint64]:
    """As ``numbers``, for a gauge: CPUs are folded by ``max``, ``min`` or ``sum`` (``latest`` is the largest, too)."""
    field = find(layout.value, name, "the map's value")
    if values.ndim == 2 or how == "sum":
        return numbers(values, layout, name)
    n, cpus = values.shape[:2]
    each = raw(values.reshape(n * cpus, values.shape[2]), field).astype(np.int64 if field.signed else np.uint64)
    each = each.reshape(n, cpus, *field.shape)
    # A CPU that never wrote holds 0, which is no minimum of anything, nor the maximum of what is below zero.
    nothing, limits = each == 0, np.iinfo(each.dtype)
    found = (
        np.where(nothing, limits.max, each).min(axis=1)
        if how == "min"
        else (np.where(nothing, limits.min, each).max(axis=1))
    )
    return np.where(nothing.all(axis=1), each.dtype.type(0), found).view(np.uint64)
