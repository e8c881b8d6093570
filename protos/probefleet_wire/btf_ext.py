"""Reads ``.BTF.ext``: the records of functions, lines and CO-RE, and where in the bytes they stand. Pure.

``bpf_code`` asks which instructions the loader rewrites for the running kernel; ``verdicts`` moves records along when
it makes a program longer. The bytes may come from a user: what does not hold raises ``BtfError``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from probefleet_wire.btf import MAGIC, Btf
from probefleet_wire.btf_types import BtfError

_HEADER = struct.Struct("<HBBI")
_TABLE = struct.Struct("<II")
_CORE = struct.Struct("<IIII")
_TABLES = ("functions", "lines", "core")  # in the order of the header


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its table, the section and byte of the instruction that it is about, and its own place and bytes."""

    table: str
    section: str
    instruction_byte: int
    place: int  #: in the bytes of .BTF.ext; its first four bytes are ``instruction_byte``
    data: bytes


@dataclass(frozen=True, slots=True)
class CoreRelocation:
    """What a CO-RE record asks the loader: ``kind`` 0 is "put the field's offset here"."""

    type_id: int
    access: str  #: "0:3": the fourth member
    kind: int

    @classmethod
    def of(cls, record: Record, btf: Btf) -> CoreRelocation:
        """Read a record of the table "core"."""
        if len(record.data) < _CORE.size:
            raise BtfError(f".BTF.ext's CO-RE records have {len(record.data)} bytes; they have at least {_CORE.size}")
        _, type_id, access, kind = _CORE.unpack_from(record.data)
        return cls(type_id, btf.string(access), kind)


def records(data: bytes, btf: Btf) -> Iterator[Record]:
    """Every record of all tables."""
    if len(data) < _HEADER.size:
        raise BtfError(f".BTF.ext ends within its header: {len(data)} bytes")
    magic, version, _, header_bytes = _HEADER.unpack_from(data)
    if magic != MAGIC or version != 1:
        raise BtfError(".BTF.ext does not start with BTF's magic number and version 1")
    for number, table in enumerate(_TABLES):
        at = _HEADER.size + number * _TABLE.size
        if at + _TABLE.size <= min(header_bytes, len(data)):
            offset, size = _TABLE.unpack_from(data, at)
            yield from _table(data, btf, table, header_bytes + offset, size)


def _table(data: bytes, btf: Btf, table: str, at: int, size: int) -> Iterator[Record]:
    end = at + size
    if end > len(data):
        raise BtfError(f".BTF.ext's {table} end at byte {end} of {len(data)}")
    if size < 4:
        return
    (each,) = struct.unpack_from("<I", data, at)
    if each < 8 or each % 4:
        raise BtfError(f".BTF.ext's {table} have records of {each} bytes")
    at += 4
    while at + 8 <= end:
        name, count = struct.unpack_from("<II", data, at)
        at += 8
        if at + count * each > end:
            raise BtfError(f".BTF.ext says {count} {table}, more than its bytes can hold")
        section = btf.string(name)
        for _ in range(count):
            (instruction_byte,) = struct.unpack_from("<I", data, at)
            yield Record(table, section, instruction_byte, at, data[at : at + each])
            at += each
