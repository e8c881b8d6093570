"""Where every scalar of a C type lies: sizes, NumPy dtypes and the flat list of fields that decoders work
from.

Called through the methods of ``btf.Btf``. The rules, once:

- A ``char`` array is text: ``is_char_array``, dtype ``S``*n* (NumPy cuts trailing zero bytes off; view as
  ``u1`` where every byte counts). ``unsigned char`` (``u8``) arrays are numbers: a ``u1`` sub-array.
- Pointers are ``u8``, bool is ``u1`` (a BPF program may store other values than 0 and 1), integers of 16
  bytes ``V16``.
- Anonymous structs and unions lend their members to the struct around them, as in C.
- Arrays of scalars stay one field with a ``shape``; arrays of structs become ``name[0].member``,
  ``name[1].member``, …
- A bit-field has ``bits`` > 0 and its bit position; a dtype cannot express it and leaves it out (itemsize
  and the other offsets stay right).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from probefleet_wire.btf_types import (
    Array,
    BtfError,
    Datasec,
    Enum,
    Float,
    Func,
    FuncProto,
    Fwd,
    Int,
    Modifier,
    Ptr,
    Struct,
    Typedef,
    TypeTag,
    Union,
    Var,
)

if TYPE_CHECKING:
    from probefleet_wire.btf import Btf

POINTER_BYTES = 8
MAX_SIZE_BYTES = 1 << 32
# A report's key or a ring's record has a dozen fields; task_struct has 1,200.
MAX_FIELDS = 8192
MAX_DEPTH = 32

ScalarKind = Literal["int", "bool", "char", "float", "enum", "pointer", "bytes"]


@dataclass(frozen=True, slots=True)
class Field:
    """One scalar, or one array of scalars, at a fixed place in a key, value or record."""

    name: str  #: dotted from the outermost struct; empty where the whole type is one scalar
    offset_bytes: int
    size_bytes: int  #: the whole array, where it is one
    kind: ScalarKind
    signed: bool = False
    type_name: str = ""  #: as C writes the element: ``unsigned int``, ``enum state``, ``struct sock *``
    typedefs: tuple[str, ...] = ()  #: outermost first: ``('pid_t', '__kernel_pid_t')``; an array's, then its element's
    shape: tuple[int, ...] = ()  #: empty for a scalar
    enum_names: tuple[tuple[str, int], ...] = ()
    bit_offset: int = 0  #: from the struct's start, for a bit-field
    bits: int = 0  #: 0: no bit-field
    in_union: bool = False  #: other fields may lie on the same bytes

    @property
    def count(self) -> int:
        """How many scalars lie in it."""
        return math.prod(self.shape)

    @property
    def is_char_array(self) -> bool:
        """Text, zero-terminated or filled to the end."""
        return self.kind == "char" and len(self.shape) == 1

    @property
    def element_bytes(self) -> int:
        """Size of one scalar."""
        return self.size_bytes // self.count if self.count else 0


@dataclass(frozen=True, slots=True)
class _Scalar:
    kind: ScalarKind
    size_bytes: int
    signed: bool
    enum_names: tuple[tuple[str, int], ...] = ()


def size_of(btf: Btf, type_id: int, depth: int = 0) -> int:
    """Size in bytes; arrays multiply, so the product is bounded."""
    found = btf.type(btf.resolve(type_id))
    if isinstance(found, Int | Float | Struct | Union | Enum | Datasec):
        return found.size_bytes
    if isinstance(found, Ptr):
        return POINTER_BYTES
    if isinstance(found, Var):
        return size_of(btf, found.type, _deeper(depth, type_id))
    if isinstance(found, Array):
        size = found.count * size_of(btf, found.element, _deeper(depth, type_id))
        if size > MAX_SIZE_BYTES:
            raise BtfError(f"array type {type_id} has {size} bytes; at most {MAX_SIZE_BYTES} are read")
        return size
    raise BtfError(f"type {type_id} ({c_name_of(btf, type_id)}) has no size")


def dtype_of(btf: Btf, type_id: int) -> np.dtype[np.void] | np.dtype[np.generic]:
    """The dtype of a type; structs with explicit offsets and itemsize, unions with overlapping fields."""
    return _dtype(btf, type_id, 0, [0])


def _dtype(btf: Btf, type_id: int, depth: int, counted: list[int]) -> np.dtype[np.void] | np.dtype[np.generic]:
    depth = _deeper(depth, type_id)
    found = btf.type(btf.resolve(type_id))
    if isinstance(found, Array):
        element = btf.type(btf.resolve(found.element))
        # NumPy holds sizes in 32 bits.
        if size_of(btf, type_id) >= 1 << 31:
            raise BtfError(f"array type {type_id} is too large for NumPy")
        if isinstance(element, Int) and element.is_char and element.size_bytes == 1:
            return np.dtype(f"S{found.count}") if found.count else np.dtype("V0")
        return np.dtype((_dtype(btf, found.element, depth, counted), (found.count,)))
    if isinstance(found, Struct | Union):
        names: list[str] = []
        formats: list[np.dtype[np.void] | np.dtype[np.generic]] = []
        offsets: list[int] = []
        _members(btf, found, 0, depth, counted, (names, formats, offsets))
        if found.size_bytes >= 1 << 31:
            raise BtfError(f"struct {found.name!r} is too large for NumPy")
        if not names:
            return np.dtype(f"V{found.size_bytes}")
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": found.size_bytes})
    scalar = _scalar(btf, type_id)
    return _scalar_dtype(scalar)


def _members(
    btf: Btf,
    record: Struct | Union,
    base: int,
    depth: int,
    counted: list[int],
    out: tuple[list[str], list[np.dtype[np.void] | np.dtype[np.generic]], list[int]],
) -> None:
    names, formats, offsets = out
    for member in record.members:
        counted[0] += 1
        if counted[0] > MAX_FIELDS:
            raise BtfError(f"struct {record.name!r} has more than {MAX_FIELDS} fields")
        if member.bitfield_bits:
            continue
        inner = btf.type(btf.resolve(member.type))
        at = base + member.offset_bytes
        if not member.name and isinstance(inner, Struct | Union):
            _inside(record, member.name, member.offset_bytes, inner.size_bytes)
            _members(btf, inner, at, _deeper(depth, member.type), counted, out)
            continue
        size = size_of(btf, member.type)
        _inside(record, member.name, member.offset_bytes, size)
        name = member.name or f"_{at}"
        if not size or name in names:  # a flexible array or group marker; a name that an anonymous part had already
            continue
        names.append(name)
        formats.append(_dtype(btf, member.type, depth, counted))
        offsets.append(at)


def layout_of(btf: Btf, type_id: int) -> tuple[Field, ...]:
    """Every scalar and array of scalars in a type, in the order of the source; padding is what no field
    covers.
    """
    flat = _Flat([])
    _flatten(btf, type_id, "", 0, 0, False, flat)
    return tuple(flat.fields)


@dataclass(slots=True)
class _Flat:
    """What was found so far, and how many types were visited for it (empty unions can nest without end)."""

    fields: list[Field]
    visited: int = 0


def _flatten(btf: Btf, type_id: int, name: str, base: int, depth: int, in_union: bool, flat: _Flat) -> None:
    depth = _deeper(depth, type_id)
    flat.visited += 1
    if flat.visited > MAX_FIELDS:
        raise BtfError(f"more than {MAX_FIELDS} fields, at {name!r}")
    shape: list[int] = []
    element = type_id
    found = btf.type(btf.resolve(type_id))
    typedefs = btf.typedef_chain(type_id)
    while isinstance(found, Array):
        shape.append(found.count)
        element = found.element
        typedefs += btf.typedef_chain(element)
        found = btf.type(btf.resolve(element))
        if len(shape) > MAX_DEPTH:
            raise BtfError(f"array type {type_id} has more than {MAX_DEPTH} dimensions: a cycle")
    if size_of(btf, type_id) == 0:
        return
    if isinstance(found, Struct | Union):
        for place, index in enumerate(_indices(shape)):
            here = base + place * found.size_bytes
            for member in found.members:
                dotted = ".".join(part for part in (name + index, member.name) if part)
                overlaps = in_union or isinstance(found, Union)
                if member.bitfield_bits:
                    _add_bitfield(btf, member.type, dotted, here * 8 + member.bit_offset, member.bitfield_bits, flat)
                    continue
                _inside(found, member.name, member.offset_bytes, size_of(btf, member.type))
                _flatten(btf, member.type, dotted, here + member.offset_bytes, depth, overlaps, flat)
        return
    scalar = _scalar(btf, element)
    flat.fields.append(
        Field(
            name=name,
            offset_bytes=base,
            size_bytes=scalar.size_bytes * math.prod(shape),
            kind=scalar.kind,
            signed=scalar.signed,
            type_name=c_name_of(btf, btf.resolve(element)),
            typedefs=typedefs,
            shape=tuple(shape),
            enum_names=scalar.enum_names,
            in_union=in_union,
        )
    )


def _indices(shape: list[int]) -> list[str]:
    if math.prod(shape) > MAX_FIELDS:
        raise BtfError(f"an array of {math.prod(shape)} structs has more than {MAX_FIELDS} fields")
    names = [""]
    for count in shape:
        names = [f"{name}[{index}]" for name in names for index in range(count)]
    return names


def _add_bitfield(btf: Btf, type_id: int, name: str, bit: int, bits: int, flat: _Flat) -> None:
    scalar = _scalar(btf, type_id)
    if bits > scalar.size_bytes * 8:
        raise BtfError(f"bit-field {name!r} has {bits} bits in a type of {scalar.size_bytes} bytes")
    flat.visited += 1
    flat.fields.append(
        Field(
            name=name,
            offset_bytes=bit // 8,
            size_bytes=(bit % 8 + bits + 7) // 8,
            kind=scalar.kind,
            signed=scalar.signed,
            type_name=c_name_of(btf, btf.resolve(type_id)),
            typedefs=btf.typedef_chain(type_id),
            enum_names=scalar.enum_names,
            bit_offset=bit,
            bits=bits,
        )
    )


def _scalar(btf: Btf, type_id: int) -> _Scalar:
    found = btf.type(btf.resolve(type_id))
    if isinstance(found, Ptr):
        return _Scalar("pointer", POINTER_BYTES, False)
    if isinstance(found, Enum):
        if found.size_bytes not in (1, 2, 4, 8):
            raise BtfError(f"enum {found.name!r} has {found.size_bytes} bytes")
        return _Scalar("enum", found.size_bytes, found.signed, found.values)
    if isinstance(found, Float):
        return _Scalar("float", found.size_bytes, True)
    if isinstance(found, Int):
        if found.size_bytes > 8:
            return _Scalar("bytes", found.size_bytes, found.signed)
        if found.is_bool:
            return _Scalar("bool", found.size_bytes, False)
        return _Scalar("char" if found.is_char and found.size_bytes == 1 else "int", found.size_bytes, found.signed)
    raise BtfError(f"type {type_id} ({c_name_of(btf, type_id)}) is no number and cannot be decoded")


def _scalar_dtype(scalar: _Scalar) -> np.dtype[np.void] | np.dtype[np.generic]:
    if scalar.kind == "float" and scalar.size_bytes in (2, 4, 8):
        return np.dtype(f"<f{scalar.size_bytes}")
    if scalar.size_bytes not in (1, 2, 4, 8) or scalar.kind == "float":
        return np.dtype(f"V{scalar.size_bytes}")
    return np.dtype(f"<{'i' if scalar.signed else 'u'}{scalar.size_bytes}")


def c_name_of(btf: Btf, type_id: int, depth: int = 0) -> str:
    """The type as C would write it, on one line and without members."""
    depth = _deeper(depth, type_id)
    found = btf.type(type_id)
    if isinstance(found, Struct | Union):
        word = "struct" if isinstance(found, Struct) else "union"
        return f"{word} {found.name}" if found.name else f"{word} {{…}}"
    if isinstance(found, Enum):
        return f"enum {found.name}" if found.name else "enum {…}"
    if isinstance(found, Fwd):
        return f"{'union' if found.is_union else 'struct'} {found.name}"
    if isinstance(found, Ptr):
        target = c_name_of(btf, found.target, depth)
        return target + ("*" if target.endswith("*") else " *")
    if isinstance(found, Array):
        counts, element = [found.count], btf.type(btf.strip_modifiers(found.element))
        inner = found.element
        while isinstance(element, Array) and len(counts) < MAX_DEPTH:
            counts.append(element.count)
            inner = element.element
            element = btf.type(btf.strip_modifiers(inner))
        return c_name_of(btf, inner, depth) + "".join(f"[{count}]" for count in counts)
    if isinstance(found, Modifier):
        return f"{found.kind.name.lower()} {c_name_of(btf, found.target, depth)}"
    if isinstance(found, TypeTag):
        return c_name_of(btf, found.target, depth)
    if isinstance(found, FuncProto):
        return "function"
    if isinstance(found, Typedef | Int | Float | Func | Var | Datasec):
        return found.name
    return "void"


def _inside(record: Struct | Union, member: str, offset_bytes: int, size_bytes: int) -> None:
    if offset_bytes + size_bytes > record.size_bytes:
        raise BtfError(
            f"member {member or 'without a name'} of {record.name or 'an unnamed struct'} ends at byte "
            f"{offset_bytes + size_bytes} of {record.size_bytes}"
        )


def _deeper(depth: int, type_id: int) -> int:
    if depth >= MAX_DEPTH:
        raise BtfError(f"type {type_id} lies more than {MAX_DEPTH} levels deep: a cycle")
    return depth + 1
