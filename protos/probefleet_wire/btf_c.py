"""BTF out as one C header in which no offset is left to the compiler.

``emit(btf)`` is called by the agent's BCC header tree. BCC lets clang lay structs out for the host and then hands the
code to BPF's back end with another data layout: where the two differ (runs of bit-fields over 64 bits, 16-byte
integers, implicit padding behind either), a member is silently read at the wrong place. So here

- every struct is ``packed`` with all padding written out, and ``aligned`` to what its members allow, so that loads of
  its members stay single loads;
- bit-fields are cut into runs that end at byte boundaries, integers of 16 bytes are structs of bytes;
- enums have their size written down;
- qualifiers are dropped (BCC declares variables of a member's type and writes to them), and pointers to functions lose
  their parameters (nobody calls them, and they are most of a header's cross-references).

Names that two types share (static structs of different drivers) get ``___2`` like bpftool's. Names that C cannot
say are left out, their bytes are padding.
"""

from __future__ import annotations

import re

from probefleet_wire.btf import Btf
from probefleet_wire.btf_types import (
    Array,
    BtfError,
    Enum,
    Float,
    FuncProto,
    Fwd,
    Int,
    Kind,
    Member,
    Modifier,
    Ptr,
    Struct,
    Type,
    Typedef,
    TypeTag,
    Union,
)

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*\Z", re.ASCII)
_KEYWORDS = frozenset(
    {
        *("asm", "auto", "break", "case", "char", "const", "continue", "default"),
        *("do", "double", "else", "enum", "extern", "float", "for", "goto"),
        *("if", "inline", "int", "long", "register", "restrict", "return", "short"),
        *("signed", "sizeof", "static", "struct", "switch", "typedef", "typeof", "union"),
        *("unsigned", "void", "volatile", "while"),
    }
)
# Typedefs that the compiler has already.
_BUILT_IN = frozenset({"__builtin_va_list"})
_MODES = {1: " __attribute__((mode(QI)))", 2: " __attribute__((mode(HI)))", 4: "", 8: " __attribute__((mode(DI)))"}
PROLOGUE = """\
/* Made from this kernel's BTF; every offset is forced. */
#ifndef __VMLINUX_H__
#define __VMLINUX_H__
#undef linux
#undef unix
#define __pf1 __attribute__((packed))
#define __pf2 __attribute__((packed, aligned(2)))
#define __pf4 __attribute__((packed, aligned(4)))
#define __pf8 __attribute__((packed, aligned(8)))
"""
EPILOGUE = "#endif\n"


def emit(btf: Btf) -> str:
    """The header. Raises ``BtfError`` where the BTF contradicts itself."""
    try:
        return _Emitter(btf).run()
    except RecursionError:
        raise BtfError("types nest too deeply to be written as C") from None


def enumerators(btf: Btf) -> frozenset[str]:
    """Every enumerator's name: who supplies macros leaves these out."""
    return frozenset(
        name
        for type_id in range(1, len(btf))
        if btf.kind_of(type_id) in (Kind.ENUM, Kind.ENUM64)
        for name, _ in _enum(btf.type(type_id)).values
    )


def _enum(found: Type) -> Enum:
    assert isinstance(found, Enum)
    return found


class _Emitter:
    def __init__(self, btf: Btf) -> None:
        self._btf = btf
        self._out: list[str] = [PROLOGUE]
        self._names: dict[int, str] = {}  # the name that a type has in C
        self._tags: set[str] = set()
        self._identifiers: set[str] = set(_KEYWORDS)
        self._done: set[int] = set()
        self._open: set[int] = set()
        self._alignments: dict[int, int] = {}
        self._odd_sizes: set[int] = set()
        self._pads = 0

    def run(self) -> str:
        kinds = [Kind.VOID, *(Kind(int(kind)) for kind in self._btf.kinds())]
        if self._btf.first_id != 1:
            raise BtfError("only a whole kernel's BTF becomes a header, not a module's alone")
        self._enums(kinds)
        declared = self._declare_names(kinds)
        at = len(self._out)
        for type_id, kind in enumerate(kinds):
            if kind in (Kind.STRUCT, Kind.UNION) and type_id in self._names:
                self._define(type_id)
            elif kind == Kind.TYPEDEF:
                self._typedef(type_id)
        odd = "".join(f"struct __pf_bytes{n} {{ unsigned char bytes[{n}]; }};\n" for n in sorted(self._odd_sizes))
        self._out[at:at] = [odd, *declared]
        self._out.append(EPILOGUE)
        return "".join(self._out)

    # Names.

    def _unique(self, name: str, taken: set[str]) -> str:
        if name not in taken:
            taken.add(name)
            return name
        number = 2
        while f"{name}___{number}" in taken:
            number += 1
        taken.add(f"{name}___{number}")
        return f"{name}___{number}"

    def _enums(self, kinds: list[Kind]) -> None:
        for type_id, kind in enumerate(kinds):
            if kind not in (Kind.ENUM, Kind.ENUM64):
                continue
            found = _enum(self._btf.type(type_id))
            good = bool(_IDENTIFIER.match(found.name))
            tag = self._names[type_id] = self._unique(found.name if good else f"__pf_enum{type_id}", self._tags)
            if found.size_bytes not in _MODES:
                raise BtfError(f"enum {found.name!r} has {found.size_bytes} bytes")
            entries = [
                f"{self._unique(name, self._identifiers)}={_constant(value)}"
                for name, value in found.values
                if _IDENTIFIER.match(name)
            ]
            body = ",".join(entries) or f"__pf_empty{type_id}"
            self._out.append(f"enum {tag} {{{body}}}{_MODES[found.size_bytes]};\n")

    def _declare_names(self, kinds: list[Kind]) -> list[str]:
        """Give every struct, union and typedef its name; returns forward declarations."""
        declared = []
        full = {name for type_id, kind in enumerate(kinds) if kind in (Kind.STRUCT, Kind.UNION)
                if (name := self._btf.name_of(type_id))}  # fmt: skip
        for type_id, kind in enumerate(kinds):
            if kind not in (Kind.STRUCT, Kind.UNION, Kind.FWD, Kind.TYPEDEF):
                continue
            name = self._btf.name_of(type_id)
            if not _IDENTIFIER.match(name):
                continue
            if kind == Kind.TYPEDEF:
                if name not in _BUILT_IN:
                    self._names[type_id] = self._unique(name, self._identifiers)
                else:
                    self._names[type_id] = name
                    self._done.add(type_id)
                continue
            found = self._btf.type(type_id)
            union = kind == Kind.UNION or (isinstance(found, Fwd) and found.is_union)
            if kind == Kind.FWD and name in full:
                self._names[type_id] = name  # declared here, defined elsewhere in the same BTF
                continue
            tag = self._names[type_id] = self._unique(name, self._tags)
            declared.append(f"{'union' if union else 'struct'} {tag};\n")
        return declared

    # Definitions, each after what it needs.

    def _need(self, type_id: int, by_value: bool) -> None:
        """Write what has to stand before a declaration of this type."""
        while True:
            found = self._btf.type(type_id)
            if isinstance(found, Ptr):
                type_id, by_value = found.target, False
            elif isinstance(found, Modifier | TypeTag):
                type_id = found.target
            elif isinstance(found, Array):
                type_id, by_value = found.element, True
            elif isinstance(found, Typedef):
                self._typedef(type_id)
                if not by_value:
                    return
                type_id = found.target
            elif isinstance(found, Struct | Union):
                if type_id not in self._names:
                    for member in found.members:
                        self._need(member.type, True)
                elif by_value:
                    self._define(type_id)
                return
            else:
                return

    def _typedef(self, type_id: int) -> None:
        if type_id in self._done or type_id not in self._names:
            return
        self._done.add(type_id)
        found = self._btf.type(type_id)
        assert isinstance(found, Typedef)
        self._need(found.target, False)
        self._out.append(f"typedef {self._declare(found.target, self._names[type_id])};\n")

    def _define(self, type_id: int) -> None:
        if type_id in self._done:
            return
        if type_id in self._open:
            raise BtfError(f"struct {self._names[type_id]!r} contains itself")
        self._open.add(type_id)
        found = self._btf.struct(type_id)
        for member in found.members:
            self._need(member.type, True)
        self._open.discard(type_id)
        self._done.add(type_id)
        word = "struct" if isinstance(found, Struct) else "union"
        self._out.append(f"{word} {self._names[type_id]} {self._body(type_id, found)};\n")

    # Text.

    def _declare(self, type_id: int, name: str) -> str:
        """A declaration of ``name`` with this type, without the semicolon."""
        inner = name
        while True:
            found = self._btf.type(type_id)
            if isinstance(found, Ptr):
                inner, type_id = "*" + inner, found.target
            elif isinstance(found, Array):
                inner = f"({inner})[{found.count}]" if inner.startswith("*") else f"{inner}[{found.count}]"
                type_id = found.element
            elif isinstance(found, Modifier | TypeTag):
                type_id = found.target
            elif isinstance(found, FuncProto):
                return f"void ({inner})(void)"
            else:
                return f"{self._base(type_id, found)} {inner}"

    def _base(self, type_id: int, found: Type) -> str:
        if isinstance(found, Int):
            return found.name if found.size_bytes <= 8 else self._bytes(found.size_bytes)
        if isinstance(found, Float):
            return self._bytes(found.size_bytes)
        if isinstance(found, Typedef):
            name = self._names.get(type_id)
            return name if name else self._opaque(type_id)
        if isinstance(found, Struct | Union):
            word = "struct" if isinstance(found, Struct) else "union"
            name = self._names.get(type_id)
            if name:
                return f"{word} {name}"
            return f"{word} {self._body(type_id, found)}" if not found.name else self._opaque(type_id)
        if isinstance(found, Enum):
            return f"enum {self._names[type_id]}"
        if isinstance(found, Fwd):
            return f"{'union' if found.is_union else 'struct'} {self._names.get(type_id, '__pf_unnamed')}"
        return "void"

    def _bytes(self, size: int) -> str:
        self._odd_sizes.add(size)
        return f"struct __pf_bytes{size}"

    def _opaque(self, type_id: int) -> str:
        """A type whose name C cannot say (a Rust type): its bytes."""
        return self._bytes(self._btf.size_of(type_id))

    def _body(self, type_id: int, found: Struct | Union) -> str:
        parts: list[str] = []
        at = 0  # in bits
        after_bits = False
        for member in found.members:
            if member.name and (not _IDENTIFIER.match(member.name) or member.name in _KEYWORDS):
                continue
            if isinstance(found, Union):
                parts.append(self._member(member))
                continue
            if member.bit_offset < at:
                raise BtfError(f"member {member.name!r} of {found.name!r} overlaps the one before it")
            self._pad(parts, at, member.bit_offset)
            if member.bitfield_bits:
                if after_bits and member.bit_offset % 8 == 0:
                    parts.append(f"char {self._filler()}[0];")  # ends clang's run of bit-fields
                at = member.bit_offset + member.bitfield_bits
            else:
                at = member.bit_offset + self._btf.size_of(member.type) * 8
            after_bits = bool(member.bitfield_bits)
            parts.append(self._member(member))
        if isinstance(found, Union):
            if found.size_bytes:
                parts.append(f"char {self._filler()}[{found.size_bytes}];")
        else:
            self._pad(parts, at, found.size_bytes * 8)
        return f"{{{''.join(parts)}}} __pf{self._alignment(type_id)}"

    def _member(self, member: Member) -> str:
        bits = f":{member.bitfield_bits}" if member.bitfield_bits else ""
        return f"{self._declare(member.type, member.name)}{bits};"

    def _pad(self, parts: list[str], start: int, end: int) -> None:
        """Cover the bits from ``start`` to ``end``."""
        if start >= end:
            return
        if start % 8:
            bits = min(end, (start + 7) // 8 * 8) - start
            parts.append(f"unsigned char :{bits};")
            start += bits
        if end - start >= 8:
            parts.append(f"char {self._filler()}[{(end - start) // 8}];")
        if (end - start) % 8:
            parts.append(f"unsigned char :{(end - start) % 8};")

    def _filler(self) -> str:
        self._pads += 1
        return f"__pf_pad{self._pads}"

    def _alignment(self, type_id: int) -> int:
        """What a type may be aligned to without moving anything: at most 8, a power of two that divides its size."""
        known = self._alignments.get(type_id)
        if known is not None:
            return known
        found = self._btf.type(type_id)
        alignment = 1
        if isinstance(found, Int | Enum):
            alignment = min(found.size_bytes, 8) if found.size_bytes <= 8 else 1
        elif isinstance(found, Ptr):
            alignment = 8
        elif isinstance(found, Array):
            alignment = self._alignment(found.element)
        elif isinstance(found, Modifier | Typedef | TypeTag):
            alignment = self._alignment(found.target)
        elif isinstance(found, Struct | Union):
            for member in found.members:
                own = self._alignment(member.type)
                while not member.bitfield_bits and member.offset_bytes % own:
                    own //= 2
                alignment = max(alignment, own)
            while found.size_bytes % alignment:
                alignment //= 2
        self._alignments[type_id] = alignment
        return alignment


def _constant(value: int) -> str:
    if value < -(1 << 31):
        return f"(-{-value - 1}LL-1)"
    if value >= 1 << 63:
        return f"{value}ULL"
    if value >= 1 << 31:
        return f"{value}LL" if value >> 32 else f"{value}U"
    return str(value)
