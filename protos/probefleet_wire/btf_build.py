"""Writes BTF: types in, bytes out. For maps that are made without an object (BCC's, a ProbeMap's), and for
tests.

builder = BtfBuilder()
u32 = builder.integer("unsigned int", 4)
key = builder.struct("key", 4, [("pid", u32, 0)])
data = builder.to_bytes()
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from probefleet_wire.btf import HEADER, MAGIC
from probefleet_wire.btf_types import Kind, TypeId


class BtfBuilder:
    """Collects types, in the order of their ids; identical names share one string."""

    def __init__(self) -> None:
        self._types = bytearray()
        self._strings = bytearray(b"\0")
        self._offsets = {"": 0}
        self._count = 0

    def string(self, text: str) -> int:
        """The offset of a string, added where it is new."""
        if text not in self._offsets:
            self._offsets[text] = len(self._strings)
            self._strings += text.encode() + b"\0"
        return self._offsets[text]

    def add(
        self,
        kind: Kind,
        name: str = "",
        word: int = 0,
        *,
        vlen: int = 0,
        flag: bool = False,
        extra: Sequence[int] = (),
    ) -> TypeId:
        """Any type, as the info word, the size or type word, and what follows them."""
        info = kind << 24 | vlen | flag << 31
        self._types += struct.pack(f"<III{len(extra)}I", self.string(name), info, word, *extra)
        self._count += 1
        return TypeId(self._count)

    def integer(self, name: str, size_bytes: int, *, signed: bool = False, boolean: bool = False) -> TypeId:
        """An integer."""
        encoding = (signed << 0) | (boolean << 2)
        return self.add(Kind.INT, name, size_bytes, extra=[encoding << 24 | size_bytes * 8])

    def pointer(self, target: int) -> TypeId:
        """A pointer."""
        return self.add(Kind.PTR, word=target)

    def array(self, element: int, count: int, *, index: int) -> TypeId:
        """An array; ``index`` is the integer type that counts its elements."""
        return self.add(Kind.ARRAY, extra=[element, index, count])

    def typedef(self, name: str, target: int) -> TypeId:
        """A typedef."""
        return self.add(Kind.TYPEDEF, name, target)

    def struct(
        self, name: str, size_bytes: int, members: Iterable[tuple[str, int, int]], *, union: bool = False
    ) -> TypeId:
        """A struct or union of members (name, type, offset in bytes)."""
        extra = [part for name_, type_, offset in members for part in (self.string(name_), type_, offset * 8)]
        kind = Kind.UNION if union else Kind.STRUCT
        return self.add(kind, name, size_bytes, vlen=len(extra) // 3, extra=extra)

    def enumeration(
        self, name: str, size_bytes: int, values: Iterable[tuple[str, int]], *, signed: bool = False
    ) -> TypeId:
        """An enumeration of 32-bit values."""
        extra = [part for name_, value in values for part in (self.string(name_), value & 0xFFFFFFFF)]
        return self.add(Kind.ENUM, name, size_bytes, vlen=len(extra) // 2, flag=signed, extra=extra)

    def to_bytes(self) -> bytes:
        """The blob, as BPF_BTF_LOAD and ``Btf.parse`` take it."""
        types = len(self._types)
        header = HEADER.pack(MAGIC, 1, 0, HEADER.size, 0, types, types, len(self._strings))
        return header + bytes(self._types) + bytes(self._strings)
