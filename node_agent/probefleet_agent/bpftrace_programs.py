"""An instance of bpftrace's kind: its maps become tables that are read like any other, its lines events.

Called by ``execute`` for instances with ``bpftrace``. bpftrace loads and keeps its own maps, and prints them once a
second (``bpftrace_script.instrumented``); what it prints is put here into maps of the agent's own, in one format: the
key as text, the slot of a histogram, the number. So readers, batches and reports are those of every other program.
Numbers are of this process: with the next one the maps are new, another epoch, and the time between is a gap.
"""

from __future__ import annotations

import errno
import hashlib
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from probefleet_wire import bpftrace_script
from probefleet_wire.bpftrace_script import Kind
from probefleet_wire.btf_layout import Field
from probefleet_wire.v1 import plan_pb2

from probefleet_agent.decode import Layout
from probefleet_agent.errors import KernelError, ScriptRefused
from probefleet_agent.kernel import bpftrace, maps, syscall
from probefleet_agent.kernel.uapi import MapType
from probefleet_agent.loaded import Loaded, MapHandle
from probefleet_agent.perf_ring import KeptRing

#: An emulated CPU takes tens of seconds to compile a script, and more where many begin at once.
START_SECONDS = 300.0
KEY_BYTES, LINE_BYTES = 240, 512
MAX_ENTRIES = 8192
SLOTS = 64
#: How long a reading that must be complete waits for the next print of all maps.
COMPLETE_SECONDS = 15.0
_GROWS = frozenset({Kind.COUNTER, Kind.HIST, Kind.LHIST, Kind.STATS})
_KEY = struct.Struct(f"<{KEY_BYTES}sIxxxx")
_LINE = struct.Struct(f"<Q{LINE_BYTES}s")
TABLE = Layout(
    key=(
        Field(name="key", offset_bytes=0, size_bytes=KEY_BYTES, kind="char", type_name="char", shape=(KEY_BYTES,)),
        Field(name="slot", offset_bytes=KEY_BYTES, size_bytes=4, kind="int", type_name="u32"),
    ),
    key_bytes=_KEY.size,
    value=tuple(
        Field(name=name, offset_bytes=8 * index, size_bytes=8, kind="int", type_name="s64", signed=True)
        for index, name in enumerate(("value", "count", "total"))
    ),
    value_bytes=24,
)
LINES = Layout(
    key=(),
    key_bytes=0,
    value=(
        Field(name="time", offset_bytes=0, size_bytes=8, kind="int", type_name="u64", typedefs=("ktime_t_ns",)),
        Field(
            name="message", offset_bytes=8, size_bytes=LINE_BYTES, kind="char", type_name="char", shape=(LINE_BYTES,)
        ),
    ),
    value_bytes=_LINE.size,
)


class LineRing(KeptRing):
    """Lines that a process wrote, read as a ring is: they end with the process, as a perf buffer's records do."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[bytes] = []

    def add(self, text: str) -> None:
        """One line more."""
        data = text.rstrip("\n").encode()[:LINE_BYTES]
        self._lines.append(_LINE.pack(time.monotonic_ns(), data))

    def close(self) -> None:
        """Nothing to let go of."""

    def _fresh(self) -> Sequence[bytes]:
        lines, self._lines = self._lines, []
        return lines


@dataclass(slots=True)
class _Table:
    """One of the script's maps: what it held before it was cleared, and what it was last seen to hold."""

    spec: bpftrace_script.Map
    handle: MapHandle
    base: dict[bytes, tuple[int, int, int]] = field(default_factory=dict)
    seen: dict[bytes, tuple[int, int, int]] = field(default_factory=dict)


class Running:
    """A script that runs, and the tables that its numbers go to. It begins in its own time: ``started`` says when."""

    def __init__(self, script: str, title: str, tables: dict[str, MapHandle]) -> None:
        self.lines = LineRing()
        self._tables = {
            each.name: _Table(each, tables[each.table]) for each in bpftrace_script.maps(script) if each.table in tables
        }
        self._title = title
        self._marks = self._wanted = 0
        self._deadline = time.monotonic() + START_SECONDS
        self._process = bpftrace.Process(
            bpftrace_script.instrumented(script), includes=bpftrace_script.includes(script)
        )

    @property
    def ended(self) -> str:
        """Why it no longer runs; empty while it does."""
        return self._process.ended

    @property
    def started(self) -> bool:
        """Whether all of its probes are attached. Raises ScriptRefused where they never will be."""
        # bpftrace speaks of its probes before it attaches them; the one that prints the mark is the last.
        if self._marks:
            return True
        if self.ended:
            raise ScriptRefused(f"{self._title}: bpftrace: {self.ended}")
        if time.monotonic() > self._deadline:
            raise ScriptRefused(f"{self._title}: bpftrace has not attached its probes within {START_SECONDS:.0f} s")
        return False

    def ask(self) -> None:
        """From now on, all of its maps printed once more is what ``pump(complete=True)`` waits for."""
        self.pump()
        # The print that is under way may have begun before now: the second mark from here ends one that began after.
        self._wanted = self._marks + 2

    def pump(self, *, complete: bool = False, wait_seconds: float = 0.0) -> None:
        """Take in what it has said; ``complete``: until it has said all that it was asked for."""
        deadline = time.monotonic() + COMPLETE_SECONDS
        while True:
            for said in self._process.messages(0.1 if complete else wait_seconds):
                self._take(said["type"], said.get("data"))
            if not complete or self._marks >= self._wanted or self.ended or time.monotonic() > deadline:
                return

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def _take(self, kind: str, data: Any) -> None:
        if kind in ("printf", "time", "join", "cat", "strftime") and isinstance(data, str):
            if data.startswith(bpftrace_script.MARK):
                self._marks += 1
            elif data.startswith(bpftrace_script.CLEARED):
                _keep(self._tables.get(data.removeprefix(bpftrace_script.CLEARED).strip()))
            else:
                self.lines.add(data)
        elif kind == "lost_events" and isinstance(data, dict):
            self.lines.lost += int(data.get("events", 0))
        elif kind in ("map", "hist", "stats") and isinstance(data, dict):
            for name, content in data.items():
                table = self._tables.get(name.removeprefix("@"))
                if table is not None:
                    _store(table, kind, content)


def _store(table: _Table, kind: str, content: Any) -> None:
    rows = dict(_rows(table.spec, kind, content))
    grows = table.spec.kind in _GROWS
    # Nothing else falls but a sum of negative numbers, which is what it is.
    restarts = grows and table.spec.deletes
    counted = 1 if table.spec.kind is Kind.STATS else 0  # an average may fall
    for key, number in rows.items():
        before = table.seen.get(key)
        if before == number:
            continue
        base = table.base.get(key, (0, 0, 0))
        if restarts and before is not None and number[counted] < before[counted]:
            # It was deleted, and counted anew: what it held stays counted.
            base = (base[0] + before[0], base[1] + before[1], base[2] + before[2])
            table.base[key] = base
        value = tuple((one + other) & 0xFFFF_FFFF_FFFF_FFFF for one, other in zip(base, number, strict=True))
        try:
            syscall.map_update(table.handle.fd, key, struct.pack("<QQQ", *value))
        except KernelError as error:
            if error.errno != errno.E2BIG:
                raise
            continue  # the table is full, as its reports say: other keys, and other policies, go on
        table.seen[key] = number
    for key in [key for key in table.seen if grows and key not in rows]:
        gone = table.seen.pop(key)
        base = table.base.get(key, (0, 0, 0))
        table.base[key] = (base[0] + gone[0], base[1] + gone[1], base[2] + gone[2])


def _keep(table: _Table | None) -> None:
    """The script cleared the map: what it held stays counted."""
    if table is None or table.spec.kind not in _GROWS:
        return
    for key, gone in table.seen.items():
        base = table.base.get(key, (0, 0, 0))
        table.base[key] = (base[0] + gone[0], base[1] + gone[1], base[2] + gone[2])
    table.seen.clear()


def _rows(spec: bpftrace_script.Map, kind: str, content: Any) -> list[tuple[bytes, tuple[int, int, int]]]:
    """(key, (value, count, total)) of what was printed of one map; text in place of a number gives no row."""
    per_key = content if isinstance(content, dict) and not (kind == "stats" and "count" in content) else {"": content}
    rows = []
    for key, value in per_key.items():
        text = _key_text(str(key).strip())
        if kind == "hist" and isinstance(value, list):
            slots: dict[int, int] = {}
            for bucket in value:
                slot = _slot(spec, bucket)
                slots[slot] = slots.get(slot, 0) + int(bucket.get("count", 0))
            rows += [(_KEY.pack(text, slot), (count, 0, 0)) for slot, count in slots.items()]
        elif isinstance(value, dict) and "count" in value:
            rows.append((_KEY.pack(text, 0), (int(value.get("average", 0)), int(value["count"]), int(value["total"]))))
        elif isinstance(value, int):
            number = max(value, 0) if spec.kind is Kind.COUNTER else value  # sums of errors may be below zero
            rows.append((_KEY.pack(text, 0), (number & 0xFFFF_FFFF_FFFF_FFFF, 0, 0)))
    return rows


def _key_text(text: str) -> bytes:
    """A key as it is stored. Of a long one (a stack) the beginning, and what tells it from others that begin so."""
    data = text.encode()
    if len(data) < KEY_BYTES:
        return data
    mark = f"…#{hashlib.blake2b(data, digest_size=4).hexdigest()}".encode()
    return data[: KEY_BYTES - 1 - len(mark)].decode(errors="ignore").encode() + mark


def _slot(spec: bpftrace_script.Map, bucket: dict[str, int]) -> int:
    """Buckets below zero and below an lhist's range are in the first slot, what lies above in the last."""
    low = int(bucket.get("min", 0))
    if spec.kind is Kind.LHIST:
        return min(max(low, 0) // max(spec.step, 1), SLOTS - 1)
    return min(max(low, 1).bit_length() - 1, SLOTS - 1)


def load(instance: plan_pb2.Instance) -> Loaded:
    """Begin it; ``running.started`` says when its programs are attached. Raises ProbefleetError; then nothing of it is
    left.
    """
    script = instance.bpftrace.script
    loaded = Loaded(instance, {}, {}, {}, pinned_links=False)
    try:
        for each in bpftrace_script.maps(script):
            loaded.maps[each.table] = _table(each.table)
        if bpftrace_script.prints(script):
            loaded.maps[bpftrace_script.LINES] = _lines()
        running = Running(script, instance.title, loaded.maps)
        loaded.running = running
        if bpftrace_script.LINES in loaded.maps:
            loaded.maps[bpftrace_script.LINES].ring = running.lines
    except BaseException:
        loaded.close()
        raise
    return loaded


def _table(name: str) -> MapHandle:
    fd = syscall.map_create(
        MapType.HASH,
        key_size=_KEY.size,
        value_size=24,
        max_entries=MAX_ENTRIES,
        name=name[:15],
        flags=1,  # BPF_F_NO_PREALLOC: most have few keys
    )
    return MapHandle(name, fd, maps.info(fd), TABLE)


def _lines() -> MapHandle:
    """Lines are in the agent's memory; the map stands for them, and its id for the epoch."""
    fd = syscall.map_create(MapType.ARRAY, key_size=4, value_size=8, max_entries=1, name=bpftrace_script.LINES)
    return MapHandle(bpftrace_script.LINES, fd, maps.info(fd), LINES)
