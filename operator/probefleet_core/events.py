"""The records of one ring output, of all nodes: counted exactly once, the newest kept. Pure.

A record's identity is its byte position in its node's ring, so a chunk that comes twice, or overlaps the one
before, adds only what is new. Totals are the agents' own counts, cumulative in a ring as a map's values are: they hold
what an earlier operator got, too, whose records nobody can list any more. Chunks stay as columns; a record becomes a
dict when someone reads it. Whoever follows asks with the cursor that the last page gave, and hears how many records
had to go before they were asked for.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2

from probefleet_core import departed, keys, result, tables, windows
from probefleet_core.result import Names, Record

KEEP: Final = 1_000
#: Whole chunks go, and of a chunk at most KEEP records are kept: so many may be there at once.
MOST_KEPT: Final = 2 * KEEP
KEEP_BYTES: Final = 4 << 20
MAX_CHUNK: Final = 1 << 20
MAX_COLUMNS: Final = 64
MAX_FOREIGN: Final = 1_000
#: The columns that become names, and what they become.
_IDENTITIES: Final = ("pod_uid", "container_id")


@dataclass(frozen=True, slots=True)
class Page:
    """Records since a cursor, oldest first; ``missed`` were already gone; ask next with ``cursor``."""

    records: tuple[Record, ...]
    cursor: int
    missed: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Records of one chunk: ``first`` is the number of the first one among all that ever came."""

    first: int
    count: int
    node: str
    columns: dict[str, columns.Array | columns.StringColumn]
    size_bytes: int


@dataclass(slots=True)
class NodeRing:
    """How far one node's ring was read, and its counters."""

    session: int = 0
    epoch: str = ""
    end_position: int = 0
    counted: int = 0  # in this epoch, by whomever they were received
    window: windows.Windows[int] = field(default_factory=lambda: windows.Windows(operator.add, lambda _: 1))  # records
    received_ns: int = 0
    lost: int = 0  # by this ring alone
    program_epoch: str = ""
    submitted: int = 0
    lost_by_program: int = 0
    lost_before_ring: int = 0
    dropped: int = 0
    uncounted: tuple[str, ...] = ()
    gaps: tuple[tuple[int, int, str], ...] = ()
    before: tuple[tuple[int, int, str], ...] = ()  # what an earlier operator has, and this one has not
    ended: list[str] = field(default_factory=list)
    ended_counted: int = 0
    ended_submitted: int = 0
    ended_lost: int = 0
    ended_lost_by_program: int = 0
    ended_lost_before_ring: int = 0
    ended_dropped: int = 0


class EventState:
    """One output's records of all nodes."""

    __slots__ = (
        "_departed",
        "_foreign",
        "_interval_ms",
        "_kept",
        "_kept_bytes",
        "_kept_count",
        "_output",
        "_programs_before",
        "_rings_before",
        "_told",
        "base",
        "nodes",
        "received",
        "since_ns",
    )

    def __init__(self, output: plan_pb2.Output, *, interval_ms: int) -> None:
        self._output = output
        self._interval_ms = interval_ms
        self._kept: deque[Kept] = deque()
        self._kept_count = self._kept_bytes = 0
        self._foreign: set[str] = set()  # nodes that were found to speak for pods of others: MAX_FOREIGN
        self.nodes: dict[str, NodeRing] = {}
        self._departed = NodeRing()  # what all of them counted, as of epochs that ended
        self._told = departed.Departed()
        # Position, and counters of the ring: none for an epoch that had ended; counters of the program.
        self._rings_before: departed.Remembered[tuple[int, ...]] = departed.Remembered()
        self._programs_before: departed.Remembered[tuple[int, int, int]] = departed.Remembered()
        self.received = 0
        #: The number of the first record. Later states begin with larger ones, so that a cursor says whose it is.
        self.base = 1
        self.since_ns = 0

    def apply(self, node: str, session: int, chunk: stream_pb2.EventChunk, *, time_ns: int, received_ns: int) -> None:
        """Take in a chunk of the node's newest stream. Raises ColumnsError, then nothing changed."""
        state = self.nodes.get(node) or NodeRing()
        ring = self._rings_before.get(node, chunk.epoch)
        if chunk.epoch in state.ended or (ring is not None and (state.epoch or not ring)):
            return
        fresh_epoch = chunk.epoch != state.epoch
        positions = (
            columns.unpack_unsigned(chunk.positions, limit=MAX_CHUNK) if chunk.positions else np.zeros(0, np.uint64)
        )
        if positions.size and not bool((positions[1:] > positions[:-1]).all()):
            raise columns.ColumnsError(f"events {self._output.name!r}: positions do not ascend")
        if positions.size and chunk.end_position <= int(positions[-1]):
            raise columns.ColumnsError(f"events {self._output.name!r}: a record begins after the chunk's end")
        counted_before = chunk.counted_before if chunk.HasField("counted_before") else None
        if counted_before is not None and counted_before > chunk.start_position:
            what = f"{counted_before} records before position {chunk.start_position}"
            raise columns.ColumnsError(f"events {self._output.name!r}: {what}, which is too little room for them")
        known = ring[0] if ring else 0 if fresh_epoch else state.end_position
        start = int(np.searchsorted(positions, np.uint64(known)))
        kept = self._decode(node, chunk, start, len(positions))
        # From here on nothing can fail.
        if node not in self.nodes and not ring and chunk.start_position and counted_before is None:
            why = "records of before were delivered to an earlier operator, and are not in this total"
            state.before = ((chunk.since_ns, time_ns, why),)
        self.nodes[node] = state
        program_epoch = chunk.program_epoch or chunk.epoch
        if program_epoch != state.program_epoch:
            self._end_program(state)
            state.program_epoch = program_epoch
            if program := self._programs_before.get(node, program_epoch):
                self._go_on_with_program(state, *program)
                self._programs_before.drop(node, program_epoch)
        if fresh_epoch:
            self._end_epoch(state)
            state.epoch = chunk.epoch
            if ring:
                self._go_on_with_ring(state, *ring[1:])
                self._rings_before.drop(node, chunk.epoch)
            state.window.restart(time_ns, 0 if ring else chunk.since_ns, interval_ms=self._interval_ms)
        else:
            state.window.sample(time_ns)
        state.session = session
        state.end_position = max(known, chunk.end_position)
        state.received_ns = max(state.received_ns, received_ns)
        # Cumulative counters: a chunk that was sent again may be older than what is known.
        state.submitted = max(state.submitted, chunk.submitted)
        own = max(chunk.lost - chunk.lost_by_program, 0)
        state.lost, state.dropped = max(state.lost, own), max(state.dropped, chunk.dropped)
        state.lost_by_program = max(state.lost_by_program, chunk.lost_by_program)
        state.lost_before_ring = max(state.lost_before_ring, chunk.lost_before_ring)
        state.uncounted = tables.bounded_texts(chunk.uncounted)
        state.gaps = state.before + tables.bounded_gaps(chunk.gaps)
        count = len(positions) - start
        if counted_before is None:
            state.counted += count
        else:
            state.counted = max(state.counted, counted_before + len(positions))
        state.window.add(count)
        state.window.settle(interval_ms=self._interval_ms)
        self.received += count
        if chunk.since_ns > 0:
            self.since_ns = min(self.since_ns or chunk.since_ns, chunk.since_ns)
        if kept:
            self._keep(kept)

    def touch(self, node: str, *, time_ns: int, received_ns: int) -> None:
        """The node runs the policy, and sent no chunk because nothing happened."""
        state = self.nodes.get(node)
        if state is None:
            return
        state.received_ns = max(state.received_ns, received_ns)
        state.window.quiet(time_ns, interval_ms=self._interval_ms)

    def fold(self, node: str) -> None:
        """The node has left for good: its numbers go to those of the others that left."""
        state = self.nodes.pop(node, None)
        if state is None:
            return
        for epoch in state.ended:
            self._rings_before.keep(node, epoch, ())
        self._rings_before.keep(node, state.epoch, (state.end_position, state.counted, state.lost, state.dropped))
        program = (state.submitted, state.lost_by_program, state.lost_before_ring)
        if any(program):
            self._programs_before.keep(node, state.program_epoch, program)
        self._told.add(node, state.gaps, state.uncounted)
        self._end_program(state)
        self._end_epoch(state)
        self._departed.ended_counted += state.ended_counted
        self._departed.ended_submitted += state.ended_submitted
        self._departed.ended_lost += state.ended_lost
        self._departed.ended_lost_by_program += state.ended_lost_by_program
        self._departed.ended_lost_before_ring += state.ended_lost_before_ring
        self._departed.ended_dropped += state.ended_dropped

    @property
    def _all(self) -> tuple[NodeRing, ...]:
        return (*self.nodes.values(), self._departed)

    def retired(self, here: Set[str]) -> int:
        """Of the total: records of nodes that are not ``here`` any more, and of epochs that ended (a reboot)."""
        return sum(n.ended_counted for n in self._all) + sum(
            n.counted for name, n in self.nodes.items() if name not in here
        )

    @property
    def lost(self) -> int:
        """Records that found no room in the ring, or came to none, and those that agents could not keep."""
        return self.lost_before_ring + self.lost_by_program + self.lost_by_ring

    @property
    def lost_by_ring(self) -> int:
        """Of ``lost``, what this ring lost, or its reader dropped: only other outputs of the ring have the same."""
        return sum(n.lost + n.ended_lost + n.dropped + n.ended_dropped for n in self._all)

    @property
    def lost_by_program(self) -> int:
        """Of ``lost``, what the program counted for all of its rings together: other outputs have the same."""
        return sum(n.lost_by_program + n.ended_lost_by_program for n in self._all)

    @property
    def lost_before_ring(self) -> int:
        """What the program could not record at all: tables and other outputs have the same."""
        return sum(n.lost_before_ring + n.ended_lost_before_ring for n in self._all)

    @property
    def map(self) -> str:
        """What its records come from."""
        return self._output.map

    def gaps(self) -> Iterable[tuple[str, tuple[tuple[int, int, str], ...]]]:
        """The gaps of each node that has any: ``(start_ns, end_ns, why)``."""
        yield from ((node, state.gaps) for node, state in self.nodes.items() if state.gaps)
        yield from ((node, (gap,)) for node, gap in self._told.gaps)

    @property
    def foreign(self) -> int:
        """Nodes that sent records of pods which are on other nodes, as far as anybody has read them."""
        return len(self._foreign)

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Losses that nobody counts, in words."""
        words = {text for state in self.nodes.values() for text in state.uncounted}
        words |= {*self._told.uncounted, *tables.foreign_words(self._foreign)}
        return tuple(sorted(words)[: tables.MAX_UNCOUNTED])

    def since(self, cursor: int, names: Names, *, limit: int = MOST_KEPT) -> Page:
        """Records from ``cursor`` on (0: all that are kept), at most ``limit``, oldest first."""
        top = self.base + self.received
        oldest = self._kept[0].first if self._kept else top
        if cursor and not self.base <= cursor <= top:
            cursor = self.base  # of an operator before this one, or of before an edit: all are new
        begin = max(cursor, oldest)
        joiner = keys.Joiner(names, qualified=False)
        records: list[Record] = []
        for kept in self._kept:
            low, high = max(begin, kept.first), min(kept.first + kept.count, begin + limit)
            if low < high:
                joiner.node, joiner.foreign = kept.node, False
                records += _records(kept, low - kept.first, high - kept.first, joiner)
                if joiner.foreign and len(self._foreign) < MAX_FOREIGN:
                    self._foreign.add(kept.node)
        return Page(tuple(records), begin + len(records), begin - cursor if cursor else 0)

    def result(self, names: Names, *, fresh: Iterable[str], records: int) -> result.OutputResult:
        """Counts as rows of one, and the newest ``records`` by their time."""
        here = [self.nodes[node] for node in fresh if node in self.nodes]
        timed = [node.window for node in here if node.window.seconds]
        window = sum(sum(each.changes) for each in timed)
        rate = sum(sum(each.changes) / each.seconds for each in timed)
        newest = self.since(self.base + max(self.received - records, 0), names, limit=records).records
        nodes = self._all
        total = sum(node.counted + node.ended_counted for node in nodes)
        counts = result.Events(
            records=tuple(sorted(newest, key=lambda record: record.get("time_ns", 0))),
            received=total,
            submitted=sum(node.submitted + node.ended_submitted for node in nodes),
            lost=self.lost_by_program + sum(node.lost + node.ended_lost for node in nodes),
            dropped=sum(node.dropped + node.ended_dropped for node in nodes),
        )
        return result.OutputResult(
            output=self._output,
            window=_one_row(window, rate),
            total=_one_row(total, 0.0),
            rate_per_second=rate,
            since_ns=self.since_ns,
            lost=self.lost,
            uncounted=self.uncounted,
            events=counts,
        )

    def _decode(self, node: str, chunk: stream_pb2.EventChunk, start: int, count: int) -> Kept | None:
        if len(chunk.columns) > MAX_COLUMNS:
            raise columns.ColumnsError(f"events {self._output.name!r}: {len(chunk.columns)} columns")
        content: dict[str, columns.Array | columns.StringColumn] = {}
        size_bytes = 0
        first = max(start, count - KEEP)
        for column in chunk.columns:
            whole = columns.read_coded(column, count)
            if isinstance(whole, columns.StringColumn):
                # Of a large chunk only the tail is kept, so only the tail's strings are.
                used, index = np.unique(whole.index[first:], return_inverse=True)
                distinct = tuple(whole.distinct[i] for i in used.tolist())
                size_bytes += sum(len(text) for text in distinct) + index.nbytes
                content[column.name] = columns.StringColumn(distinct, index.astype(np.uint64))
            else:
                tail = whole[first:].copy()
                size_bytes += tail.nbytes
                content[column.name] = tail
        if first >= count:
            return None
        return Kept(self.base + self.received + first - start, count - first, node, content, size_bytes + 512)

    def _keep(self, kept: Kept) -> None:
        self._kept.append(kept)
        self._kept_count += kept.count
        self._kept_bytes += kept.size_bytes
        # Whole chunks go; the newest stays, whatever its size (a message is bounded).
        while len(self._kept) > 1 and (self._kept_count - self._kept[0].count >= KEEP or self._kept_bytes > KEEP_BYTES):
            gone = self._kept.popleft()
            self._kept_count -= gone.count
            self._kept_bytes -= gone.size_bytes

    @staticmethod
    def _end_epoch(state: NodeRing) -> None:
        if state.epoch:
            state.ended = [*state.ended[1 - tables.MAX_ENDED :], state.epoch]
        state.ended_counted += state.counted
        state.ended_lost += state.lost
        state.ended_dropped += state.dropped
        state.counted = state.lost = state.dropped = 0

    # A folded node is back in the same epoch: what it said before it left is among the departed, and goes on.

    @staticmethod
    def _go_on_with_ring(state: NodeRing, counted: int, lost: int, dropped: int) -> None:
        state.counted, state.lost, state.dropped = counted, lost, dropped
        state.ended_counted -= counted
        state.ended_lost -= lost
        state.ended_dropped -= dropped

    @staticmethod
    def _go_on_with_program(state: NodeRing, submitted: int, by_program: int, before_ring: int) -> None:
        state.submitted, state.lost_by_program, state.lost_before_ring = submitted, by_program, before_ring
        state.ended_submitted -= submitted
        state.ended_lost_by_program -= by_program
        state.ended_lost_before_ring -= before_ring

    @staticmethod
    def _end_program(state: NodeRing) -> None:
        state.ended_submitted += state.submitted
        state.ended_lost_by_program += state.lost_by_program
        state.ended_lost_before_ring += state.lost_before_ring
        state.submitted = state.lost_by_program = state.lost_before_ring = 0


def _records(kept: Kept, low: int, high: int, joiner: keys.Joiner) -> list[Record]:
    rows: list[Record] = [{"node": kept.node} for _ in range(high - low)]
    if "pod_uid" in kept.columns:
        uids = _part(kept.columns["pod_uid"], low, high)
        for group in ("namespace", "workload", "pod"):
            label = joiner.label(group)
            for row, uid in zip(rows, uids, strict=True):
                row[group] = label(uid)
        if "container_id" in kept.columns:
            label = joiner.label("container")
            for row, uid, each in zip(rows, uids, _part(kept.columns["container_id"], low, high), strict=True):
                row["container"] = label(uid, each)
    field = joiner.label("")
    for name, content in kept.columns.items():
        if name not in _IDENTITIES:
            for row, value in zip(rows, _part(content, low, high), strict=True):
                # A program's field "node" does not take the place of the node's name.
                row.setdefault(name, field(value))
    return rows


def _part(content: columns.Array | columns.StringColumn, low: int, high: int) -> list[result.Label]:
    if isinstance(content, columns.StringColumn):
        return [content.distinct[i] for i in content.index[low:high].tolist()]
    part: list[result.Label] = content[low:high].tolist()
    return part


def _one_row(count: int, rate: float) -> result.Rows:
    value = np.array([[count % (1 << 64)]], np.uint64)
    return result.Rows(labels=((),), values=value, rates=np.array([rate]), sum=value[0])
