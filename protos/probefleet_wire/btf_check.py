"""Proves that an object's types hold together before libbpf follows them. Pure.

libbpf checks BTF's types for itself from 1.3 on; before, as in Debian 12, a type that refers to one that is not there
ends the process (seen in ``bpf_object__load``, from a CO-RE relocation), and typedefs in a circle keep it for ever. The
operator asks before it makes a plan of somebody's object, the agent before it gives one to libbpf.
"""

from __future__ import annotations

from collections.abc import Iterator

from probefleet_wire import btf_ext
from probefleet_wire.btf import Btf
from probefleet_wire.btf_types import (
    Array,
    BtfError,
    Datasec,
    DeclTag,
    Func,
    FuncProto,
    Kind,
    Modifier,
    Ptr,
    Struct,
    Type,
    Typedef,
    TypeTag,
    Union,
    Var,
)
from probefleet_wire.elf import Elf


def check(elf: Elf) -> None:
    """BtfError unless every type refers to types that are there, and every CO-RE record to one of them."""
    section, ext = elf.section(".BTF"), elf.section(".BTF.ext")
    if section is None:
        return
    btf = Btf.parse(section.data)
    for type_id in range(1, btf.type_count):
        found = btf.type(type_id)
        for target in _targets(found):
            _require(btf, type_id, target)
        for target, kind in _of_kind(found):
            if btf.kind_of(target) != kind:
                raise BtfError(f"type {type_id} needs a {kind.name.lower()}, and type {target} is none")
        if isinstance(found, Typedef | Modifier | TypeTag):
            btf.resolve(type_id)  # says where it goes round
    for record in btf_ext.records(ext.data, btf) if ext else ():
        if record.table == "core":
            wanted = btf_ext.CoreRelocation.of(record, btf)
            _require(btf, 0, wanted.type_id)
            btf.resolve(wanted.type_id)


def _require(btf: Btf, whose: int, target: int) -> None:
    if not 0 <= target < btf.type_count:
        who = f"type {whose}" if whose else "a CO-RE record"
        raise BtfError(f"{who} refers to type {target}; the highest is {btf.type_count - 1}")


def _targets(found: Type) -> Iterator[int]:
    """The ids that a type refers to; 0 is void."""
    match found:
        case Ptr(target=target) | Typedef(target=target) | Modifier(target=target):
            yield target
        case TypeTag(target=target) | DeclTag(target=target):
            yield target
        case Array(element=element, index=index):
            yield from (element, index)
        case Struct(members=members) | Union(members=members):
            yield from (member.type for member in members)
        case FuncProto(returns=returns, parameters=parameters):
            yield from (returns, *(each.type for each in parameters))
        case Func(prototype=prototype):
            yield prototype
        case Var(type=of):
            yield of
        case Datasec(variables=variables):
            yield from (each.type for each in variables)


def _of_kind(found: Type) -> Iterator[tuple[int, Kind]]:
    """What must be of one kind: readers cast it without a look. (An extern function stands in a section as well.)"""
    if isinstance(found, Func):
        yield found.prototype, Kind.FUNC_PROTO
