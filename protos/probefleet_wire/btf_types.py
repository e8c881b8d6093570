"""What BTF can say, as frozen values: one class a kind, named as the kernel's documentation names them.

``btf.Btf.type(type_id)`` makes these; ``btf_layout`` and the C emitter read them. Type ids are ``TypeId``:
0 is void. The numbers are ABI: Documentation/bpf/btf.rst and include/uapi/linux/btf.h.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType, TypeAlias

TypeId = NewType("TypeId", int)
VOID = TypeId(0)


class BtfError(ValueError):
    """BTF that is cut short, contradicts itself or lacks what was asked for; the text says where and why."""


class Kind(enum.IntEnum):
    """The kinds of type, by their number in the info word."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


@dataclass(frozen=True, slots=True)
class Void:
    """Type id 0."""


@dataclass(frozen=True, slots=True)
class Int:
    """An integer; ``is_char`` also for the plain C type ``char``, for which compilers leave the flag away."""

    name: str
    size_bytes: int
    bits: int
    bit_offset: int
    signed: bool
    is_char: bool
    is_bool: bool


@dataclass(frozen=True, slots=True)
class Float:
    """A floating-point number."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Ptr:
    """A pointer; on BPF's and every supported node's machine eight bytes."""

    target: TypeId


@dataclass(frozen=True, slots=True)
class Array:
    """``count`` elements; 0 for a flexible array."""

    element: TypeId
    index: TypeId
    count: int


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct or union; ``bitfield_bits`` is 0 for a member that is no bit-field."""

    name: str
    type: TypeId
    bit_offset: int
    bitfield_bits: int

    @property
    def offset_bytes(self) -> int:
        """The byte in which the member starts."""
        return self.bit_offset // 8


@dataclass(frozen=True, slots=True)
class Struct:
    """A struct; without a name where C has none."""

    name: str
    size_bytes: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Union:
    """A union: as a struct whose members all start at 0."""

    name: str
    size_bytes: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Enum:
    """An enumeration (ENUM and ENUM64 alike): its values in the order of the source."""

    name: str
    size_bytes: int
    signed: bool
    values: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Fwd:
    """A struct or union that is only declared."""

    name: str
    is_union: bool


@dataclass(frozen=True, slots=True)
class Typedef:
    """A name for another type."""

    name: str
    target: TypeId


@dataclass(frozen=True, slots=True)
class Modifier:
    """``const``, ``volatile`` or ``restrict`` (see ``kind``)."""

    kind: Kind
    target: TypeId


@dataclass(frozen=True, slots=True)
class TypeTag:
    """``__attribute__((btf_type_tag))``, such as ``user`` or ``rcu``."""

    name: str
    target: TypeId


@dataclass(frozen=True, slots=True)
class DeclTag:
    """``__attribute__((btf_decl_tag))`` of a type, or of its member or parameter number ``component`` (else
    -1).
    """

    name: str
    target: TypeId
    component: int


@dataclass(frozen=True, slots=True)
class Func:
    """A function; ``linkage`` 0 static, 1 global, 2 extern."""

    name: str
    prototype: TypeId
    linkage: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A function's parameter."""

    name: str
    type: TypeId


@dataclass(frozen=True, slots=True)
class FuncProto:
    """A function's type; ``variadic`` for one that ends in ``...``."""

    returns: TypeId
    parameters: tuple[Parameter, ...]
    variadic: bool


@dataclass(frozen=True, slots=True)
class Var:
    """A global variable."""

    name: str
    type: TypeId
    linkage: int


@dataclass(frozen=True, slots=True)
class SectionVariable:
    """Where a variable lies in its section. In an object not linked yet, clang leaves offsets of globals at
    0.
    """

    type: TypeId
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Datasec:
    """An ELF section that holds variables, such as ``.maps`` and ``.rodata``."""

    name: str
    size_bytes: int
    variables: tuple[SectionVariable, ...]


Type: TypeAlias = (
    Void
    | Int
    | Float
    | Ptr
    | Array
    | Struct
    | Union
    | Enum
    | Fwd
    | Typedef
    | Modifier
    | TypeTag
    | DeclTag
    | Func
    | FuncProto
    | Var
    | Datasec
)
