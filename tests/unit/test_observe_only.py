"""Programs that could change what they watch are found by their instructions."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from probefleet_wire import observe_only
from probefleet_wire.elf import Elf

NOP = struct.pack("<BBhi", 0xB7, 0, 0, 36)  # r0 = 36: a number is no call
CALL = 0x85


def call(helper: int, source: int = 0) -> bytes:
    return struct.pack("<BBhi", CALL, source << 4, 0, helper)


@pytest.mark.parametrize(("number", "name"), observe_only.REFUSED_HELPERS.items())
def test_every_refused_helper_is_found_by_its_number(number: int, name: str) -> None:
    assert observe_only.refused_helpers(NOP + call(number) + NOP) == [name]


def test_other_helpers_numbers_and_calls_between_functions_are_not_refused() -> None:
    assert observe_only.refused_helpers(NOP + call(1) + call(36, source=1)) == []


def test_functions_of_the_kernel_are_called_by_name_or_not_at_all() -> None:
    assert observe_only.refused_helpers(NOP + call(70123, source=2)) == ["function 70123 of the kernel by its number"]


@pytest.mark.parametrize(
    ("source", "what"), [(1, "a map by a descriptor"), (3, "a variable of the kernel"), (5, "a map by its index")]
)
def test_maps_are_named_by_relocations_or_not_at_all(source: int, what: str) -> None:
    load = struct.pack("<BBhi", 0x18, source << 4, 0, 997) + bytes(8)
    assert observe_only.named_by_number(NOP + load) == [f"{what} (997)"]


@pytest.mark.parametrize("source", [0, 4])  # a number, a relocation to come; a function of the program's own
def test_what_compilers_write_is_not_refused(source: int) -> None:
    assert observe_only.named_by_number(struct.pack("<BBhi", 0x18, source << 4, 0, 997) + bytes(8)) == []


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "build/bpf").glob("*.bpf.o")), ids=lambda p: p.name
)
def test_our_own_objects_name_nothing_by_number(path: Path) -> None:
    for section in Elf.parse(path.read_bytes()).sections:
        if section.executable:
            assert observe_only.named_by_number(section.data) == observe_only.refused_helpers(section.data) == []
