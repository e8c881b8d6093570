"""What bpftrace prints of its maps becomes numbers of ours: each key its own, none counted twice."""

from __future__ import annotations

import errno
import struct
from typing import Any, cast

import pytest
from probefleet_agent import bpftrace_programs
from probefleet_agent.errors import KernelError
from probefleet_agent.loaded import MapHandle
from probefleet_wire.bpftrace_script import Kind, Map


class Table:
    """A table of the agent's with room for so many keys, in place of the kernel's."""

    def __init__(self, spec: Map, monkeypatch: pytest.MonkeyPatch, *, room: int = 9) -> None:
        self.content: dict[bytes, tuple[int, ...]] = {}
        self._room = room
        self.table = bpftrace_programs._Table(spec, cast("MapHandle", self))
        monkeypatch.setattr(bpftrace_programs.syscall, "map_update", self._update)
        self.fd = 3

    def printed(self, **content: int | dict[str, int]) -> dict[str, int]:
        """bpftrace printed this; what the table holds then, by key."""
        kind = "stats" if self.table.spec.kind is Kind.STATS else "map"
        bpftrace_programs._store(self.table, kind, content)
        at = 1 if kind == "stats" else 0  # how often, or what
        return {key[: key.index(0)].decode(): value[at] for key, value in self.content.items()}

    def _update(self, _: Any, key: bytes, value: bytes) -> None:
        if key not in self.content and len(self.content) >= self._room:
            raise KernelError(errno.E2BIG, "set an entry")
        self.content[key] = struct.unpack("<QQQ", value)


COUNTS = Map("a", Kind.COUNTER, True)


def test_keys_that_begin_alike_stay_apart_however_long_they_are() -> None:
    stacks = {"frame;" * 60 + end: count for end, count in (("read", 23), ("write", 29))}
    found = bpftrace_programs._rows(COUNTS, "map", stacks)
    assert [number for _, (number, _, _) in found] == [23, 29]
    first, second = (key for key, _ in found)
    assert first != second
    assert first.startswith(b"frame;frame;") and first.index(0) < bpftrace_programs.KEY_BYTES


def test_what_finds_no_room_ends_nothing_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(COUNTS, monkeypatch, room=1)
    assert table.printed(first=23, second=29) == {"first": 23}
    assert table.printed(first=31, second=29) == {"first": 31}
    table._room = 2
    assert table.printed(first=31, second=29) == {"first": 31, "second": 29}


def test_a_sum_that_falls_is_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(COUNTS, monkeypatch)
    for printed, shown in ((1000, 1000), (989, 989), (-11, 0), (23, 23)):
        assert table.printed(bytes=printed) == {"bytes": shown}


def test_a_key_that_the_script_deletes_keeps_what_it_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(Map("a", Kind.COUNTER, True, deletes=True), monkeypatch)
    assert table.printed(bash=23) == {"bash": 23}
    assert table.printed(bash=7) == {"bash": 30}, "between two prints it went and came anew"
    table.printed()
    assert table.printed(bash=29) == {"bash": 59}


def test_an_average_that_falls_began_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(Map("a", Kind.STATS, True, deletes=True), monkeypatch)
    assert table.printed(bash={"average": 10, "count": 2, "total": 20}) == {"bash": 2}
    assert table.printed(bash={"average": 5, "count": 4, "total": 20}) == {"bash": 4}
    assert table.printed(bash={"average": 9, "count": 1, "total": 9}) == {"bash": 5}, "it was deleted, and came anew"
