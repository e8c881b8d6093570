"""ProbeMaps: C text for the compiler, and whether a program's own map fits what it is to be replaced by. Pure.

A ProbeMap becomes an object without programs whose one map, ``shared``, has the declared type: so its layout is BTF
like any other, and the agent creates it as it creates every map. Inner maps of a map of maps are made by the agent: the
kernel lets no program put one in.
"""

from __future__ import annotations

import hashlib

from probefleet_wire import encode, map_layout, map_types
from probefleet_wire.bpf_object import BpfObject, MapDef
from probefleet_wire.btf import Btf
from probefleet_wire.btf_layout import Field
from probefleet_wire.btf_types import BtfError
from probefleet_wire.elf import ElfError
from probefleet_wire.map_types import MapType
from probefleet_wire.v1 import plan_pb2

from probefleet_core import c_declaration, errors, map_facts, values

MAP_NAME = "shared"
_PREFIX_BYTES = 4
# The typedefs of probefleet.h, which cannot be included here: it declares maps of its own.
_MEANINGS = """typedef u64 cgroup_id_t;
typedef u32 pid_nr_t;
typedef u32 tid_nr_t;
typedef u32 user_id_t;
typedef u32 syscall_t;
typedef u64 function_t;
typedef s32 errno_t;
typedef u32 open_flags_t;
typedef u32 device_t;
typedef u16 port_t;
typedef __be16 be_port_t;
typedef __be32 ipv4_t;
typedef u8 ipv6_t[16];
typedef u8 ip_t[16];
typedef u64 endpoint_t;
typedef u64 nanoseconds_t;
typedef u64 ktime_t_ns;
typedef s32 stack_id_t;
typedef s32 kernel_stack_id_t;
typedef s32 user_stack_id_t;
typedef char comm_t[16];
"""
#: Not even a size: the kernel wants none, or is given it by a type.
_KEYLESS = (values.MapType.RINGBUF, values.MapType.QUEUE, values.MapType.STACK, values.MapType.BLOOM_FILTER)
_STORAGE = frozenset({MapType.TASK_STORAGE, MapType.CGRP_STORAGE, MapType.SK_STORAGE})
#: No type says how large a place is that holds a program, an event or a map.
_OF_DESCRIPTORS = (values.MapType.PERF_EVENT_ARRAY, values.MapType.PROG_ARRAY)


def source(probe_map: values.ProbeMap) -> str:
    """C text for clang: an object without programs whose one map, ``shared``, is this ProbeMap."""
    lines = ['#include "vmlinux.h"', "#include <bpf/bpf_helpers.h>", "", _MEANINGS]
    definition: list[str] = []
    if inner := probe_map.inner:
        part = values.ProbeMap(
            probe_map.uid, probe_map.namespace, probe_map.name, probe_map.generation, probe_map.deleting, inner.type,
            inner.max_entries, inner.key, inner.value,
        )  # fmt: skip
        lines.append(f"struct shared_inner {{\n{_definition(part, 'inner', lines)}\n}};")
        definition.append("__array(values, struct shared_inner);")
    body = "\n".join([_definition(probe_map, "shared", lines), *(f"\t{line}" for line in definition)])
    return "\n".join(lines) + f'\nstruct {{\n{body}\n}} {MAP_NAME} SEC(".maps");\n'


def _definition(probe_map: values.ProbeMap, prefix: str, lines: list[str]) -> str:
    """The members of a map's definition; the types that they name go into ``lines``."""
    kind = probe_map.type
    definition = [f"__uint(type, BPF_MAP_TYPE_{kind.name});"]
    if probe_map.max_entries:
        definition.append(f"__uint(max_entries, {probe_map.max_entries});")
    if kind is values.MapType.LPM_TRIE or MapType[kind.name] in _STORAGE:
        definition.append("__uint(map_flags, BPF_F_NO_PREALLOC);")
    if probe_map.key:
        lines.append(c_declaration.parse(probe_map.key).typedef(f"{prefix}_key"))
        definition.append(f"__type(key, {prefix}_key);")
    elif MapType[kind.name] in map_types.ARRAYS:
        definition.append("__type(key, u32);")
    elif MapType[kind.name] in _STORAGE:
        definition.append("__type(key, int);")
    elif kind not in _KEYLESS:
        definition.append("__uint(key_size, 4);")
    if kind is values.MapType.STACK_TRACE:
        definition.append("__uint(value_size, 127 * 8);")
    elif probe_map.value:
        lines.append(c_declaration.parse(probe_map.value).typedef(f"{prefix}_value"))
        definition.append(f"__type(value, {prefix}_value);")
    elif kind in _OF_DESCRIPTORS:
        definition.append("__uint(value_size, 4);")
    return "\n".join(f"\t{line}" for line in definition)


def definition_of(probe_map: values.ProbeMap, elf: bytes) -> tuple[MapDef, Btf]:
    """The compiled map; raises ``errors.ProbeMapRefused`` where the object does not hold exactly that."""
    try:
        parsed = BpfObject.parse(elf)
    except (ElfError, BtfError) as error:
        raise errors.ProbeMapRefused([_unusable(str(error))]) from error
    if parsed.btf is None or [each.name for each in parsed.maps] != [MAP_NAME] or parsed.programs:
        raise errors.ProbeMapRefused([_unusable("the declarations made something else than one map of them")])
    found = parsed.maps[0]
    if map_facts.type_name(found.type) != probe_map.type or found.max_entries != probe_map.max_entries:
        raise errors.ProbeMapRefused([_unusable(f"the object's map is {map_facts.type_name(found.type)}")])
    if found.type == MapType.LPM_TRIE and _fields(parsed.btf, found.key_type)[0].size_bytes != _PREFIX_BYTES:
        raise errors.ProbeMapRefused(
            [
                errors.Problem(
                    "spec.key",
                    "the key of an LPM trie",
                    "it begins with the length of the prefix in bits, 32 bits wide",
                    "Write it as struct { u32 prefixlen; ipv4_t address; }.",
                )
            ]
        )
    return found, parsed.btf


def inner_keys(probe_map: values.ProbeMap, elf: bytes) -> list[bytes]:
    """The keys of a map of maps that have an inner map; raises ``errors.ProbeMapRefused`` where one does not fit."""
    if probe_map.inner is None:
        return []
    if probe_map.type is values.MapType.ARRAY_OF_MAPS:
        return [place.to_bytes(4, "little") for place in range(probe_map.max_entries)]
    found, btf = definition_of(probe_map, elf)
    problems, made = errors.Problems(), dict[bytes, int]()
    for index, given in enumerate(probe_map.inner.keys):
        path = f"spec.inner.keys[{index}]"
        try:
            raw = encode.encode(_fields(btf, found.key_type), found.key_bytes, given, whole=True, what="key")
        except encode.EncodeError as error:
            problems.add(path, "does not fit", why=str(error), write="Write what the key's type takes.")
            continue
        if made.setdefault(raw, index) != index:
            problems.add(path, "there twice", why=f"item {made[raw]} is the same key", write="Keep one of them.")
    if problems:
        raise errors.ProbeMapRefused(problems.found)
    return list(made)


def bytes_of(probe_map: values.ProbeMap, elf: bytes, *, cpus: int) -> int:
    """Memory of it on one node with so many CPUs, with its inner maps."""
    found, _ = definition_of(probe_map, elf)
    whole = map_facts.bytes_of(found, cpus=cpus)
    if found.inner is not None:
        whole += len(inner_keys(probe_map, elf)) * map_facts.bytes_of(found.inner, cpus=cpus)
    return whole


def _unusable(why: str) -> errors.Problem:
    return errors.Problem("spec", "key and value do not make a map", why, "Write C declarations of plain data.")


def to_wire(probe_map: values.ProbeMap, elf: bytes) -> plan_pb2.ProbeMap:
    """The wire's ProbeMap; raises ``errors.ProbeMapRefused`` where the object's map is not what was asked for."""
    definition_of(probe_map, elf)
    keys = inner_keys(probe_map, elf)
    return plan_pb2.ProbeMap(
        uid=probe_map.uid,
        namespace=probe_map.namespace,
        name=probe_map.name,
        generation=probe_map.generation,
        sha256=hashlib.sha256(elf).hexdigest(),
        map=MAP_NAME,
        inner_keys=b"".join(keys),
    )


def misfit(own: MapDef, own_btf: Btf, shared: MapDef, shared_btf: Btf) -> str:
    """Why a program's map cannot be replaced by a ProbeMap, with both layouts; empty where it can."""
    if own.type != shared.type:
        return f"it is of type {map_facts.type_name(own.type)}, the ProbeMap of {map_facts.type_name(shared.type)}"
    if own.type in map_facts.STREAMS or own.type == MapType.STACK_TRACE:
        return ""
    if own.slots:
        return "its .values fill it, and who fills a shared one says so in tailCalls, or in the ProbeMap's inner"
    if own.type in map_types.OUTER:
        if own.inner is None or shared.inner is None:
            return "it does not say what its inner maps are: __array(values, struct …)"
        if why := misfit(own.inner, own_btf, shared.inner, shared_btf):
            return f"of its inner maps {why}"
    for part, mine, theirs in (
        (
            "key",
            (own.key_bytes, _fields(own_btf, own.key_type)),
            (shared.key_bytes, _fields(shared_btf, shared.key_type)),
        ),
        (
            "value",
            (own.value_bytes, _fields(own_btf, own.value_type)),
            (shared.value_bytes, _fields(shared_btf, shared.value_type)),
        ),
    ):
        if part == "key" and own.type in _STORAGE:
            continue  # the owner's descriptor, whatever the C calls it
        if mine[0] != theirs[0] or not _same(mine[1], theirs[1]):
            return f"its {part} is {show(*mine)}, the ProbeMap's {show(*theirs)}"
    return ""


def _fields(btf: Btf, type_id: int) -> tuple[Field, ...]:
    return btf.layout_of(type_id) if type_id else ()


def _same(mine: tuple[Field, ...], theirs: tuple[Field, ...]) -> bool:
    """The same numbers at the same places under the same names; a definition that gives only sizes fits by size."""
    if not mine or not theirs:
        return True

    def shape(field: Field) -> tuple[object, ...]:
        return field.name, field.offset_bytes, field.size_bytes, field.shape, field.signed, field.bits

    return [shape(field) for field in mine] == [shape(field) for field in theirs]


def show(size_bytes: int, fields: tuple[Field, ...]) -> str:
    """A layout in words: ``8 bytes {0: u32 pid, 4: u32 uid}``, as the declaration says it, not as ``source`` does."""
    own = ("shared_key", "shared_value", "inner_key", "inner_value")
    return map_layout.words(size_bytes, fields, without=own)
