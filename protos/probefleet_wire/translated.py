"""Reads a program's instructions as the kernel shows them after it has loaded and translated it. Pure.

Where an object has a relocation, the kernel shows the id of the map that was put there (``bpf_insn_prepare_dump``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_INSTRUCTION = struct.Struct("<BBhi")
_LOAD_64 = 0x18  # BPF_LD | BPF_IMM | BPF_DW: two instructions long
_MAP, _MAP_VALUE = 1, 2  # BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE


@dataclass(frozen=True, slots=True)
class MapReference:
    """A map in translated instructions; ``is_value``: a place inside its value (a global variable)."""

    offset_bytes: int
    map_id: int
    is_value: bool


def map_references(code: bytes) -> Iterator[MapReference]:
    """Every map in a program's instructions, in their order."""
    at = 0
    while at + _INSTRUCTION.size <= len(code):
        operation, registers, _, number = _INSTRUCTION.unpack_from(code, at)
        if operation == _LOAD_64:
            source = registers >> 4
            if source in (_MAP, _MAP_VALUE):
                yield MapReference(at, number & 0xFFFFFFFF, source == _MAP_VALUE)
            at += _INSTRUCTION.size
        at += _INSTRUCTION.size
