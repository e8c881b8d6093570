"""BTF: bytes in, C types out. Pure: no files, no ctypes.

The bytes are the ``.BTF`` section of a compiled object, ``/sys/kernel/btf/vmlinux``, or what the kernel
returns for a map or program. Decoders read columns with the layout found here, the C emitter makes a header
of it, the planner reads map definitions from it. The kernel's own BTF has some 130,000 types, so
``Btf.parse`` only finds where each type starts (about 0.1 s); a type becomes an object when it is asked
for. Bytes may come from a user's object: everything is bounded and checked, and what does not hold raises
``BtfError``.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from probefleet_wire import btf_layout
from probefleet_wire.btf_types import (
    VOID,
    Array,
    BtfError,
    Datasec,
    DeclTag,
    Enum,
    Float,
    Func,
    FuncProto,
    Fwd,
    Int,
    Kind,
    Member,
    Modifier,
    Parameter,
    Ptr,
    SectionVariable,
    Struct,
    Type,
    Typedef,
    TypeId,
    TypeTag,
    Union,
    Var,
    Void,
)

MAGIC = 0xEB9F
HEADER = struct.Struct("<HBBIIIII")
# A kernel's BTF is 5 to 10 MB; a user's object has kilobytes.
MAX_BYTES = 64 << 20
# No type in a kernel is wrapped more than a dozen times; a longer chain is a cycle.
MAX_CHAIN = 64
# The kernel's own limit for a symbol is 512; source lines (.BTF.ext) are longer.
MAX_NAME_BYTES = 512
MAX_TEXT_BYTES = 4096
_MODIFIERS = frozenset({Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})
_TRANSPARENT = _MODIFIERS | {Kind.TYPEDEF}
# How many 32-bit words a type takes, and each of its ``vlen`` elements more, by kind.
_WORDS = (0, 4, 3, 6, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3, 4, 3, 3)
_WORDS_EACH = (0, 0, 0, 0, 3, 3, 2, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 0, 0, 3)


class Btf:
    """The types of one BTF blob, numbered from 1; with a ``base`` (a module's BTF) numbers go on where it
    ends.
    """

    __slots__ = (
        "_base",
        "_cache",
        "_first_id",
        "_info",
        "_layouts",
        "_name_offsets",
        "_starts",
        "_string_base",
        "_strings",
        "words",
    )

    def __init__(self, words: npt.NDArray[np.uint32], strings: bytes, base: Btf | None) -> None:
        self._base = base
        self._first_id = base.type_count if base else 1
        self._string_base = base.strings_bytes if base else 0
        self._strings = strings
        #: The type section as native 32-bit words, for readers that must be quick (the C emitter).
        self.words: memoryview = np.require(words, requirements=["C", "A"]).data
        starts = _scan(self.words)
        self._starts = np.frombuffer(starts, np.uint32) if len(starts) else np.zeros(0, np.uint32)
        self._name_offsets = words[self._starts]
        self._info = words[self._starts + 1]
        self._cache: dict[int, Type] = {0: Void()}
        self._layouts: dict[int, tuple[btf_layout.Field, ...]] = {}

    @classmethod
    def parse(cls, data: bytes, base: Btf | None = None) -> Btf:
        """Read a BTF blob; raises ``BtfError`` where it is not one."""
        if len(data) > MAX_BYTES:
            raise BtfError(f"BTF of {len(data)} bytes; at most {MAX_BYTES} are read")
        if len(data) < HEADER.size:
            raise BtfError(f"BTF ends within its header: {len(data)} bytes of {HEADER.size}")
        magic, version, _, header_bytes, type_offset, type_bytes, string_offset, string_bytes = HEADER.unpack_from(data)
        if magic == 0x9FEB:
            raise BtfError("BTF is big-endian; only little-endian nodes and objects are supported")
        if magic != MAGIC:
            raise BtfError(f"not BTF: it starts with {magic:#06x} instead of {MAGIC:#06x}")
        if version != 1:
            raise BtfError(f"BTF version {version} is not known; 1 is")
        if header_bytes < HEADER.size:
            raise BtfError(f"BTF header says {header_bytes} bytes; it has at least {HEADER.size}")
        types = _part(data, "type", header_bytes + type_offset, type_bytes)
        strings = _part(data, "string", header_bytes + string_offset, string_bytes)
        if type_bytes % 4:
            raise BtfError(f"BTF type section is {type_bytes} bytes, no multiple of 4")
        if strings and strings[-1]:
            raise BtfError("BTF string section does not end in a zero byte")
        if base is None and not strings:
            raise BtfError("BTF string section is empty")
        if base is None and strings[0]:
            raise BtfError("BTF string section does not start with the empty string")
        words = np.frombuffer(types, "<u4")
        if sys.byteorder == "big":
            words = words.astype(np.uint32)
        return cls(words, bytes(strings), base)

    # What there is.

    @property
    def type_count(self) -> int:
        """One past the highest type id (void counts)."""
        return self._first_id + len(self._starts)

    @property
    def first_id(self) -> int:
        """The lowest id that is this blob's own, not its base's."""
        return self._first_id

    @property
    def strings_bytes(self) -> int:
        """Length of the strings, those of the base included."""
        return self._string_base + len(self._strings)

    def __len__(self) -> int:
        return self.type_count

    def string(self, offset: int, max_bytes: int = MAX_NAME_BYTES) -> str:
        """The string at an offset of the string section."""
        if offset < self._string_base and self._base is not None:
            return self._base.string(offset, max_bytes)
        start = offset - self._string_base
        if start >= len(self._strings):
            raise BtfError(f"string offset {offset} is past the end of {self.strings_bytes} bytes of strings")
        end = self._strings.find(b"\0", start, start + max_bytes)
        if end < 0:
            raise BtfError(f"string at offset {offset} is longer than {max_bytes} bytes")
        return self._strings[start:end].decode("utf-8", "backslashreplace")

    def kinds(self) -> npt.NDArray[np.uint8]:
        """The kind of every type of this blob itself, from ``first_id`` on."""
        return ((self._info >> np.uint32(24)) & np.uint32(0x1F)).astype(np.uint8)

    def name_offsets(self) -> npt.NDArray[np.uint32]:
        """The string offset of every type's name, from ``first_id`` on."""
        return self._name_offsets

    def starts(self) -> npt.NDArray[np.uint32]:
        """The index in ``words`` of every type, from ``first_id`` on."""
        return self._starts

    def kind_of(self, type_id: int) -> Kind:
        """The kind of a type."""
        if type_id == 0:
            return Kind.VOID
        if self._base is not None and 0 < type_id < self._first_id:
            return self._base.kind_of(type_id)
        return Kind((int(self._info[self._index(type_id)]) >> 24) & 0x1F)

    def name_of(self, type_id: int) -> str:
        """The name of a type, empty where it has none."""
        if type_id == 0:
            return ""
        if self._base is not None and 0 < type_id < self._first_id:
            return self._base.name_of(type_id)
        return self.string(int(self._name_offsets[self._index(type_id)]))

    def type(self, type_id: int) -> Type:
        """The type with that id; raises ``BtfError`` where there is none or it is malformed."""
        if self._base is not None and 0 < type_id < self._first_id:
            return self._base.type(type_id)
        found = self._cache.get(type_id)
        if found is None:
            found = self._cache[type_id] = self._decode(int(self._starts[self._index(type_id)]))
        return found

    def find_all(self, name: str, *kinds: Kind) -> tuple[TypeId, ...]:
        """Ids of all types with that name (of those kinds, if given), lowest first."""
        found = self._base.find_all(name, *kinds) if self._base else ()
        if not name or not len(self._starts):
            return found
        # One plain comparison an offset, and no np.isin: on an emulated CPU (QEMU's, numpy 2) that was seen to add two
        # types of other names, and a wrong struct is the last thing that a decoder should get.
        rows = [np.flatnonzero(self._name_offsets == offset) for offset in self._offsets_of(name)]
        own = sorted(int(index) for row in rows for index in row)
        ids = (TypeId(index + self._first_id) for index in own)
        return found + tuple(each for each in ids if not kinds or self.kind_of(each) in kinds)

    def find(self, name: str, *kinds: Kind) -> TypeId | None:
        """The first type with that name, or ``None``."""
        found = self.find_all(name, *kinds)
        return found[0] if found else None

    def require(self, name: str, *kinds: Kind) -> TypeId:
        """The first type with that name; raises ``BtfError`` where there is none."""
        found = self.find(name, *kinds)
        if found is None:
            what = " or ".join(kind.name.lower() for kind in kinds) or "type"
            raise BtfError(f"there is no {what} {name!r} in this BTF")
        return found

    # What it means.

    def resolve(self, type_id: int) -> TypeId:
        """The type behind typedefs, const, volatile, restrict and type tags."""
        return self._walk(type_id, _TRANSPARENT)[0]

    def strip_modifiers(self, type_id: int) -> TypeId:
        """The type behind const, volatile, restrict and type tags; a typedef stays."""
        return self._walk(type_id, _MODIFIERS)[0]

    def typedef_chain(self, type_id: int) -> tuple[str, ...]:
        """The typedef names passed on the way to ``resolve(type_id)``, outermost first: ``('pid_t',
        '__kernel_pid_t')``.
        """
        return self._walk(type_id, _TRANSPARENT)[1]

    def struct(self, type_id: int) -> Struct | Union:
        """The struct or union behind a type; raises ``BtfError`` where it is something else."""
        found = self.type(self.resolve(type_id))
        if not isinstance(found, Struct | Union):
            raise BtfError(f"type {type_id} is a {type(found).__name__.lower()}, not a struct or union")
        return found

    def datasec(self, name: str) -> Datasec | None:
        """The variables of an ELF section, or ``None``."""
        type_id = self.find(name, Kind.DATASEC)
        found = self.type(type_id) if type_id else None
        return found if isinstance(found, Datasec) else None

    def size_of(self, type_id: int) -> int:
        """Size in bytes; raises ``BtfError`` for what has none (void, functions, forward declarations)."""
        return btf_layout.size_of(self, type_id)

    def dtype_of(self, type_id: int) -> np.dtype[np.void] | np.dtype[np.generic]:
        """The NumPy dtype with the same bytes at the same places: see ``btf_layout.dtype_of``."""
        return btf_layout.dtype_of(self, type_id)

    def layout_of(self, type_id: int) -> tuple[btf_layout.Field, ...]:
        """The scalars that a type consists of, flattened: see ``btf_layout.layout_of``."""
        found = self._layouts.get(type_id)
        if found is None:
            found = self._layouts[type_id] = btf_layout.layout_of(self, type_id)
        return found

    def c_name_of(self, type_id: int) -> str:
        """The type as C would write it, short: ``struct key``, ``u32``, ``char[16]``, ``struct sock *``."""
        return btf_layout.c_name_of(self, type_id)

    # How it is read.

    def _index(self, type_id: int) -> int:
        index = type_id - self._first_id
        if not 0 <= index < len(self._starts):
            raise BtfError(f"type {type_id} does not exist; the highest is {self.type_count - 1}")
        return index

    def _offsets_of(self, name: str) -> Sequence[int]:
        """Every offset at which the strings hold this name, also as the end of a longer one (linkers share
        tails).
        """
        needle = name.encode() + b"\0"
        offsets: list[int] = []
        at = self._strings.find(needle)
        while at >= 0:
            offsets.append(at + self._string_base)
            at = self._strings.find(needle, at + 1)
        return offsets

    def _walk(self, type_id: int, through: frozenset[Kind]) -> tuple[TypeId, tuple[str, ...]]:
        names: list[str] = []
        at = type_id
        for _ in range(MAX_CHAIN):
            found = self.type(at)
            if not isinstance(found, Typedef | Modifier | TypeTag) or self.kind_of(at) not in through:
                return TypeId(at), tuple(names)
            if isinstance(found, Typedef):
                names.append(found.name)
            at = found.target
        raise BtfError(f"type {type_id} goes through more than {MAX_CHAIN} typedefs and modifiers: a cycle")

    def _decode(self, at: int) -> Type:
        words = self.words
        info, word = words[at + 1], words[at + 2]
        kind, vlen, flag = Kind((info >> 24) & 0x1F), info & 0xFFFF, bool(info >> 31)
        body = at + 3
        if kind == Kind.PTR:
            return Ptr(TypeId(word))
        if kind in (Kind.CONST, Kind.VOLATILE, Kind.RESTRICT):
            return Modifier(kind, TypeId(word))
        if kind == Kind.ARRAY:
            return Array(TypeId(words[body]), TypeId(words[body + 1]), words[body + 2])
        name = self.string(words[at])
        if kind == Kind.FUNC_PROTO:
            return self._function_type(body, vlen, TypeId(word))
        if kind in (Kind.STRUCT, Kind.UNION):
            members = tuple(
                Member(
                    self.string(words[each]),
                    TypeId(words[each + 1]),
                    words[each + 2] & 0xFFFFFF if flag else words[each + 2],
                    words[each + 2] >> 24 if flag else 0,
                )
                for each in range(body, body + 3 * vlen, 3)
            )
            return (Struct if kind == Kind.STRUCT else Union)(name, word, members)
        if kind == Kind.INT:
            return _int(name, word, words[body])
        if kind == Kind.ENUM:
            values = tuple(
                (self.string(words[each]), _signed(words[each + 1], 32) if flag else words[each + 1])
                for each in range(body, body + 2 * vlen, 2)
            )
            return Enum(name, word, flag, values)
        if kind == Kind.ENUM64:
            wide = ((each, words[each + 1] | words[each + 2] << 32) for each in range(body, body + 3 * vlen, 3))
            return Enum(
                name,
                word,
                flag,
                tuple((self.string(words[each]), _signed(v, 64) if flag else v) for each, v in wide),
            )
        if kind == Kind.DATASEC:
            return Datasec(
                name,
                word,
                tuple(
                    SectionVariable(TypeId(words[each]), words[each + 1], words[each + 2])
                    for each in range(body, body + 3 * vlen, 3)
                ),
            )
        return self._named(kind, name, word, words[body] if _WORDS[kind] == 4 else 0, vlen, flag)

    def _function_type(self, body: int, vlen: int, returns: TypeId) -> FuncProto:
        words = self.words
        parameters = [
            Parameter(self.string(words[each]), TypeId(words[each + 1])) for each in range(body, body + 2 * vlen, 2)
        ]
        # A last parameter of type void is how BTF writes `...`.
        variadic = bool(parameters) and parameters[-1].type == VOID
        return FuncProto(returns, tuple(parameters[:-1] if variadic else parameters), variadic)

    @staticmethod
    def _named(kind: Kind, name: str, word: int, extra: int, vlen: int, flag: bool) -> Type:
        target = TypeId(word)
        if kind == Kind.TYPEDEF:
            return Typedef(name, target)
        if kind == Kind.TYPE_TAG:
            return TypeTag(name, target)
        if kind == Kind.FWD:
            return Fwd(name, flag)
        if kind == Kind.FUNC:
            return Func(name, target, vlen)
        if kind == Kind.VAR:
            return Var(name, target, extra)
        if kind == Kind.FLOAT:
            return Float(name, word)
        assert kind == Kind.DECL_TAG, kind  # the scan lets no other kind through
        return DeclTag(name, target, _signed(extra, 32))


def _part(data: bytes, what: str, start: int, size: int) -> memoryview:
    if start + size > len(data):
        raise BtfError(f"BTF {what} section ends at byte {start + size}, but there are only {len(data)}")
    return memoryview(data)[start : start + size]


def _scan(words: memoryview) -> array[int]:
    """Where each type starts: the one loop over all of them, kept free of calls."""
    starts = array("I")
    append = starts.append
    each, fixed, end, at = _WORDS_EACH, _WORDS, len(words), 0
    while at < end:
        if at + 3 > end:
            raise BtfError(f"type {len(starts) + 1} is cut off at the end of the type section")
        info = words[at + 1]
        kind = (info >> 24) & 0x1F
        if not 1 <= kind <= 19:
            raise BtfError(f"type {len(starts) + 1} is of kind {kind}, which is not known (1 to 19 are)")
        append(at)
        at += fixed[kind] + each[kind] * (info & 0xFFFF)
    if at != end:
        raise BtfError(f"type {len(starts)} is cut off at the end of the type section")
    return starts


def _int(name: str, size_bytes: int, word: int) -> Int:
    encoding, bit_offset, bits = (word >> 24) & 0xF, (word >> 16) & 0xFF, word & 0xFF
    if not 1 <= size_bytes <= 16 or size_bytes & (size_bytes - 1) or bits > size_bytes * 8:
        raise BtfError(f"integer {name!r} has {bits} bits in {size_bytes} bytes")
    is_char = bool(encoding & 2) or name == "char"
    return Int(name, size_bytes, bits, bit_offset, bool(encoding & 1), is_char, bool(encoding & 4))


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value
