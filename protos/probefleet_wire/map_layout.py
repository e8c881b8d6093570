"""How the bytes of a map's entries are read: fields of its key and value. Pure.

The planner checks outputs against it, the agent decodes with it, ``probefleet map`` writes with it. For most maps the
fields are those of the C types. Where a key is something else than the program's, it says what a reader makes of it:

- LPM trie: the whole key is one field too, ``10.0.0.0/8``, before the fields of the struct.
- array and hash of maps: the outer key's fields (``outer``, ``outer.x``) stand before the inner map's own key.
- task storage: process and thread; cgroup storage: the cgroup. (The kernel's key is a descriptor.)
- ``.data``, ``.bss``, ``.rodata``: no key, and each variable a field of the value.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace

from probefleet_wire.bpf_object import BpfObject, MapDef
from probefleet_wire.btf import Btf
from probefleet_wire.btf_layout import Field
from probefleet_wire.map_types import ARRAYS, OUTER, MapType

#: The typedef of the field that is an LPM trie's whole key; decoders know it.
LPM_KEY = "lpm_key_t"
OUTER_KEY = "outer"
_LPM_HEAD_BYTES = 4  # u32 prefixlen
_ADDRESS_BYTES = (4, 16)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the bytes of one map, or of one ring's records, are to be read."""

    key: tuple[Field, ...]
    key_bytes: int
    value: tuple[Field, ...]  #: of a ring or queue: the record
    value_bytes: int

    def to_json(self) -> str:
        """For the manifest: an adopted instance is read without its object."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The inverse of ``to_json``."""
        data = json.loads(text)

        def fields(name: str) -> tuple[Field, ...]:
            return tuple(
                Field(
                    **{
                        **item,
                        "typedefs": tuple(item["typedefs"]),
                        "shape": tuple(item["shape"]),
                        "enum_names": tuple((n, v) for n, v in item["enum_names"]),
                    }
                )
                for item in data[name]
            )

        return cls(fields("key"), data["key_bytes"], fields("value"), data["value_bytes"])


def layout_of(parsed: BpfObject, definition: MapDef) -> Layout | None:
    """How a map of the object is read; None where nothing describes its values."""
    btf = parsed.btf
    if btf is None:
        return None
    if definition.is_section:
        return _variables(parsed, btf, definition)
    if definition.type in OUTER:
        return _nested(btf, definition)
    if not definition.value_type:
        return None
    value, value_bytes = btf.layout_of(definition.value_type), btf.size_of(definition.value_type)
    if not value:
        return None
    key, key_bytes = key_of(btf, definition)
    return Layout(key, key_bytes, value, value_bytes)


def key_of(btf: Btf, definition: MapDef) -> tuple[tuple[Field, ...], int]:
    """The fields of a map's key as a reader sees it, and its bytes."""
    if definition.type == MapType.TASK_STORAGE:
        return (_u32("pid", 0, "pid_nr_t"), _u32("tid", 4, "tid_nr_t")), 8
    if definition.type == MapType.CGRP_STORAGE:
        return (Field("", 0, 8, "int", type_name="unsigned long long", typedefs=("cgroup_id_t",)),), 8
    if definition.type in ARRAYS and not definition.key_type:
        return (_u32("", 0),), 4
    if not definition.key_type:
        return (), definition.key_bytes
    fields, size = btf.layout_of(definition.key_type), btf.size_of(definition.key_type)
    if definition.type == MapType.LPM_TRIE:
        whole = Field("", 0, size, "bytes", type_name="prefix", typedefs=(LPM_KEY,))
        return (whole, *(field for field in fields if field.name)), size
    return fields, size


def lpm_address_bytes(key_bytes: int) -> int:
    """How long the address in an LPM trie's key is; 0 where it is none (a struct of more than that)."""
    size = key_bytes - _LPM_HEAD_BYTES
    return size if size in _ADDRESS_BYTES else 0


def variable(layout: Layout, name: str) -> tuple[int, Layout] | None:
    """A global variable of a section's layout: where it begins, and how its own bytes are read; None: there is none."""
    found = [field for field in layout.value if field.name == name or field.name.startswith((f"{name}.", f"{name}["))]
    if not found:
        return None
    start = min(field.offset_bytes for field in found)
    fields = tuple(
        replace(_moved(field, -start), name=field.name.removeprefix(name).removeprefix(".")) for field in found
    )
    return start, Layout((), 0, fields, max(field.offset_bytes + field.size_bytes for field in fields))


def words(size_bytes: int, fields: Sequence[Field], *, without: Collection[str] = ()) -> str:
    """A layout in words: ``8 bytes {0: u32 pid, 4: u32 uid}``; ``without`` these typedefs."""
    inside = ", ".join(
        f"{field.offset_bytes}: {_type_name(field, without)} {field.name}".rstrip()
        + "".join(f"[{count}]" for count in field.shape)
        for field in fields
        if LPM_KEY not in field.typedefs
    )
    return f"{size_bytes} bytes {{{inside}}}" if inside else f"{size_bytes} bytes"


def _type_name(field: Field, without: Collection[str]) -> str:
    said = [name for name in field.typedefs if name not in without]
    return (*said, field.type_name)[0]


def _u32(name: str, offset_bytes: int, typedef: str = "u32") -> Field:
    return Field(name, offset_bytes, 4, "int", type_name="unsigned int", typedefs=(typedef,))


def _nested(btf: Btf, definition: MapDef) -> Layout | None:
    inner = definition.inner
    if inner is None or not inner.value_type:
        return None
    value = btf.layout_of(inner.value_type)
    outer, outer_bytes = key_of(btf, definition)
    if not outer and outer_bytes == 4:
        outer = (_u32("", 0),)
    key, key_bytes = key_of(btf, inner)
    named = tuple(replace(field, name=f"{OUTER_KEY}.{field.name}".rstrip(".")) for field in outer)
    shifted = tuple(_moved(field, outer_bytes) for field in key)
    return Layout((*named, *shifted), outer_bytes + key_bytes, value, btf.size_of(inner.value_type))


def _variables(parsed: BpfObject, btf: Btf, definition: MapDef) -> Layout | None:
    found: list[Field] = []
    for variable in parsed.variables:
        if variable.section != definition.name:
            continue
        for field in btf.layout_of(variable.type):
            name = f"{variable.name}.{field.name}" if field.name else variable.name
            found.append(replace(_moved(field, variable.offset_bytes), name=name))
    return Layout((), 4, tuple(found), definition.value_bytes) if found else None


def _moved(field: Field, by_bytes: int) -> Field:
    return replace(field, offset_bytes=field.offset_bytes + by_bytes, bit_offset=field.bit_offset + 8 * by_bytes)
