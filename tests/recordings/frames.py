"""What was recorded of one run: the wire's frames between agents and the operator, and what the agents read before.

recorder.py and agent.py write entries, unit tests read them. A file is one zstd frame of entries, in the order of their
times; an entry is a fixed head (`_HEAD`: kind, stream, wall clock in ns, length) and its content:

    FACTS      JSON: the policies, nodes and pods of the run, and what was counted                    (once, first)
    AGENT      a serialized FromAgent; `stream` numbers the streams of all agents from 1
    OPERATOR   a serialized FromOperator on that stream
    READING    JSON: what an agent's process did before decoding (agent.py says what); `stream` numbers the processes
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import zstandard
from probefleet_wire.v1 import stream_pb2

FOLDER = Path(__file__).resolve().parent
MAX_BYTES = 64 << 20
_HEAD = struct.Struct("<BBqI")


class Kind(enum.IntEnum):
    """Who said it."""

    FACTS = 0
    AGENT = 1
    OPERATOR = 2
    READING = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that was said or read."""

    kind: Kind
    stream: int
    time_ns: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Recording:
    """One run."""

    facts: dict[str, Any]
    entries: tuple[Entry, ...]  # without the facts

    def messages(self) -> Iterator[tuple[Entry, stream_pb2.FromAgent | stream_pb2.FromOperator]]:
        """The wire's messages in the order in which they passed."""
        for entry in self.entries:
            if entry.kind is Kind.AGENT:
                yield entry, stream_pb2.FromAgent.FromString(entry.content)
            elif entry.kind is Kind.OPERATOR:
                yield entry, stream_pb2.FromOperator.FromString(entry.content)

    def hellos(self) -> dict[int, stream_pb2.Hello]:
        """Stream → its Hello."""
        return {e.stream: m.hello for e, m in self.messages() if m.WhichOneof("message") == "hello"}

    def batches(self) -> list[tuple[Entry, stream_pb2.Batch]]:
        """All batches, in order."""
        return [(e, m.batch) for e, m in self.messages() if m.WhichOneof("message") == "batch"]

    def statuses(self) -> list[tuple[Entry, stream_pb2.Status]]:
        """All statuses, in order."""
        return [(e, m.status) for e, m in self.messages() if m.WhichOneof("message") == "status"]

    def pushes(self) -> list[tuple[Entry, stream_pb2.Push]]:
        """All pushes, in order. Their blobs' bytes were left out when they were recorded."""
        return [(e, m.push) for e, m in self.messages() if m.WhichOneof("message") == "push"]

    def readings(self) -> dict[int, list[dict[str, Any]]]:
        """Process → what it read, in order."""
        found: dict[int, list[dict[str, Any]]] = {}
        for entry in self.entries:
            if entry.kind is Kind.READING:
                found.setdefault(entry.stream, []).append(json.loads(entry.content))
        return found


def write(path: Path, entries: Iterable[Entry]) -> int:
    """Write a recording; its size in bytes."""
    parts = []
    for entry in entries:
        parts += [_HEAD.pack(entry.kind, entry.stream, entry.time_ns, len(entry.content)), entry.content]
    return path.write_bytes(zstandard.ZstdCompressor(level=19).compress(b"".join(parts)))


@cache
def read(name: str) -> Recording:
    """The recording tests/recordings/NAME.frames."""
    data = zstandard.ZstdDecompressor().decompress((FOLDER / f"{name}.frames").read_bytes(), max_output_size=MAX_BYTES)
    entries = tuple(entries_of(data))
    assert entries[0].kind is Kind.FACTS
    return Recording(json.loads(entries[0].content), entries[1:])


def entries_of(data: bytes) -> Iterator[Entry]:
    """The entries of unpacked bytes."""
    at = 0
    while at < len(data):
        kind, stream, time_ns, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        yield Entry(Kind(kind), stream, time_ns, data[at : at + length])
        at += length


def names() -> list[str]:
    """All recordings."""
    return sorted(path.stem for path in FOLDER.glob("*.frames"))
