"""Programs that could change what they watch are found by their instructions."""

from __future__ import annotations

import struct

import pytest
from probefleet_wire import observe_only

NOP = struct.pack("<BBhi", 0xB7, 0, 0, 36)  # r0 = 36: a number is no call
CALL = 0x85


def call(helper: int, source: int = 0) -> bytes:
    return struct.pack("<BBhi", CALL, source << 4, 0, helper)


@pytest.mark.parametrize(("number", "name"), observe_only.REFUSED_HELPERS.items())
def test_every_refused_helper_is_found_by_its_number(number: int, name: str) -> None:
    assert observe_only.refused_helpers(NOP + call(number) + NOP) == [name]


def test_other_helpers_numbers_and_calls_between_functions_are_not_refused() -> None:
    assert observe_only.refused_helpers(NOP + call(1) + call(36, source=1) + call(36, source=2)) == []
