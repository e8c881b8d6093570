"""The one gate to rtnetlink: interfaces with what is attached to their XDP hook, and TC filters of kind bpf.

``interfaces`` lists, ``links_network`` attaches. Every call opens a socket in the network namespace of the calling
thread (``interfaces.entered``) and closes it: nothing is kept between calls. Layouts: include/uapi/linux/rtnetlink.h,
if_link.h, pkt_sched.h and pkt_cls.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import SupportsIndex

from probefleet_agent.errors import KernelError, UnsupportedFeature

_MESSAGE = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_TRAFFIC = struct.Struct("=BxxxiIII")
_ERROR, _DONE = 2, 3
_NEWLINK, _GETLINK = 16, 18
_NEWQDISC = 36
_NEWFILTER, _DELFILTER, _GETFILTER = 44, 45, 46
_REQUEST, _ACK, _EXCLUSIVE, _CREATE, _DUMP = 0x1, 0x4, 0x200, 0x400, 0x300
_IFLA_IFNAME, _IFLA_XDP, _XDP_PROGRAM = 3, 43, 4
_TCA_KIND, _TCA_OPTIONS = 1, 2
_BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_ID = 6, 7, 8, 11
_DIRECT_ACTION = 1
_CLSACT = 0xFFFFFFF1
#: Where filters of an interface hang, without and with clsact: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_…).
_INGRESS, _EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
_ETH_P_ALL = 3
_BUFFER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface; ``xdp_program`` is the id of the program on its XDP hook, 0 where there is none."""

    index: int
    name: str
    xdp_program: int


@dataclass(frozen=True, slots=True)
class Filter:
    """A TC filter of kind bpf."""

    priority: int
    handle: int
    name: str
    program: int


def interfaces() -> list[Interface]:
    """All interfaces of this network namespace, by index."""
    found = []
    body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    for kind, data in _ask(_GETLINK, _REQUEST | _DUMP, body, "list the network interfaces"):
        if kind == _NEWLINK:
            _, _, index, _, _ = _LINK.unpack_from(data)
            attributes = dict(_attributes(data[_LINK.size :]))
            xdp = dict(_attributes(attributes.get(_IFLA_XDP, b"")))
            program = xdp.get(_XDP_PROGRAM, bytes(4))
            name = attributes.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
            found.append(Interface(index, name, int.from_bytes(program[:4], "little")))
    return sorted(found, key=lambda each: each.index)


def add_clsact(index: int) -> None:
    """Give an interface the place where filters hang on both ways; one that is there stays as it is."""
    body = _TRAFFIC.pack(0, index, _CLSACT & 0xFFFF0000, _CLSACT, 0) + _attribute(_TCA_KIND, b"clsact\0")
    try:
        list(_ask(_NEWQDISC, _REQUEST | _ACK | _CREATE | _EXCLUSIVE, body, f"add clsact to interface {index}"))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            why = "its module is missing: modprobe sch_ingress"
            raise UnsupportedFeature("clsact (and no TCX, which needs Linux 6.6)", why=why) from error
        if error.errno != errno.EEXIST:
            raise


def add_filter(index: int, program: SupportsIndex, name: str, *, egress: bool) -> None:
    """Hang a program behind the filters that are there (the kernel gives it a priority of its own)."""
    options = (
        _attribute(_BPF_FD, struct.pack("=I", int(program)))
        + _attribute(_BPF_NAME, name.encode() + b"\0")
        + _attribute(_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
    )
    body = _traffic(index, egress, 0, 0) + _attribute(_TCA_KIND, b"bpf\0") + _attribute(_TCA_OPTIONS, options)
    list(_ask(_NEWFILTER, _REQUEST | _ACK | _CREATE | _EXCLUSIVE, body, f"add a filter to interface {index}"))


def filters(index: int, *, egress: bool) -> list[Filter]:
    """The filters of kind bpf on one way of an interface."""
    found = []
    body = _traffic(index, egress, 0, 0)
    try:
        answer = list(_ask(_GETFILTER, _REQUEST | _DUMP, body, f"list the filters of interface {index}"))
    except KernelError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
            return []  # without clsact there is no place for them
        raise
    for kind, data in answer:
        attributes = dict(_attributes(data[_TRAFFIC.size :]))
        options = dict(_attributes(attributes.get(_TCA_OPTIONS, b"")))
        if kind == _NEWFILTER and attributes.get(_TCA_KIND) == b"bpf\0" and _BPF_NAME in options:
            _, _, handle, _, info = _TRAFFIC.unpack_from(data)
            name = options[_BPF_NAME].rstrip(b"\0").decode(errors="replace")
            program = int.from_bytes(options.get(_BPF_ID, bytes(4))[:4], "little")
            found.append(Filter(info >> 16, handle, name, program))
    return found


def delete_filter(index: int, wanted: Filter, *, egress: bool) -> None:
    """Take a filter away; one that is gone already is fine."""
    body = _traffic(index, egress, wanted.handle, wanted.priority) + _attribute(_TCA_KIND, b"bpf\0")
    try:
        list(_ask(_DELFILTER, _REQUEST | _ACK, body, f"remove a filter of interface {index}"))
    except KernelError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
            raise


def _traffic(index: int, egress: bool, handle: int, priority: int) -> bytes:
    protocol = socket.htons(_ETH_P_ALL)
    return _TRAFFIC.pack(0, index, handle, _EGRESS if egress else _INGRESS, priority << 16 | protocol)


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _ask(kind: int, flags: int, body: bytes, what: str) -> Iterator[tuple[int, bytes]]:
    """Send one request; every message of the answer. KernelError with the kernel's errno."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as line:
        line.bind((0, 0))
        line.send(_MESSAGE.pack(_MESSAGE.size + len(body), kind, flags, 1, 0) + body)
        while True:
            data = line.recv(_BUFFER_BYTES)
            at = 0
            while at + _MESSAGE.size <= len(data):
                length, answer, _, _, _ = _MESSAGE.unpack_from(data, at)
                content = data[at + _MESSAGE.size : at + length]
                if answer == _ERROR:
                    (number,) = struct.unpack_from("=i", content)
                    if number:
                        raise KernelError(-number, what)
                    return
                if answer == _DONE:
                    return
                yield answer, content
                at += (length + 3) & ~3
