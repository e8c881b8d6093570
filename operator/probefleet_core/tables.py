"""The rows of one output of one policy, of all nodes: tables in, merged rows out. Pure.

``aggregate`` hands every ``Table`` of this output here. A row is a number after its first appearance, so
taking in a table is a few NumPy calls: the difference of new and old values is added to the sum of all nodes.
That makes everything else simple: a repeat adds nothing, a new stream takes the node's old rows out of the
sum and puts the new ones in, and an epoch that ended (a reboot) just stays in the sum; so does what a node counted
that has left for good, whose rows go (``fold``). Gauges are not summed over time: they are merged from the nodes'
rows when asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from probefleet_wire import columns, merge
from probefleet_wire.v1 import plan_pb2, stream_pb2

from probefleet_core import departed, keys, result, windows
from probefleet_core.result import Labels, Names, Rows

Counts = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Change: TypeAlias = tuple[Indices, Counts]  # keys and differences

MAX_WIDTH: Final = 1024
#: Values of one output that one node may have, and all keys together (8 bytes each).
MAX_NODE_CELLS: Final = 1 << 20
MAX_CELLS: Final = 1 << 24
MAX_UNCOUNTED: Final = departed.MAX_UNCOUNTED
MAX_TEXT: Final = 200
MAX_GAPS: Final = 16
MAX_ENDED: Final = 64
_MODULUS: Final = 1 << 64  # differences wrap around, as the counts do that they are of
RETURNED: Final = "the node had left the cluster and came back: what it counted meanwhile is in no total"


class ResyncNeeded(Exception):
    """A table builds on rows that this aggregator never saw: the node has to begin a new stream."""


@dataclass(slots=True)
class NodeRows:
    """What one node has said of one output in its newest stream."""

    session: int = 0
    epoch: str = ""
    first_row: int = 0
    keys: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    values: Counts = field(default_factory=lambda: np.zeros((0, 1), np.uint64))
    there: npt.NDArray[np.bool_] = field(
        default_factory=lambda: np.zeros(0, bool)
    )  # of a gauge: rows that hold anything
    distinct: bool = True  # no key twice: then NumPy's fast way to add is right
    window: windows.Windows[Change] = field(default_factory=lambda: windows.Windows(_joined, lambda each: len(each[0])))
    before: Change | None = None  # an older stream's rows of the same epoch, sorted by key
    received_ns: int = 0
    since_ns: int = 0
    lost: int = 0
    uncounted: tuple[str, ...] = ()
    gaps: tuple[tuple[int, int, str], ...] = ()
    entries: int = 0
    max_entries: int = 0  # 0: its map cannot fill up
    ended: list[str] = field(default_factory=list)  # epochs
    counted: int = 0  # what this epoch has in the sum of all nodes, modulo 2^64
    program_epoch: str = ""  # in which ``lost`` is cumulative
    ended_lost: int = 0  # what earlier programs lost
    #: The time of the sample that tells where a node that came back goes on from; 0: that was all said.
    baseline_ns: int = 0
    away: tuple[departed.Gap, ...] = ()  # while it had left


class TableState:
    """One output's rows of all nodes."""

    __slots__ = (
        "_counted",
        "_cumulative",
        "_departed",
        "_departed_lost",
        "_interval_ms",
        "_keys",
        "_lost_before",
        "_output",
        "_retired",
        "_returned",
        "_signed",
        "_sum",
        "_width",
        "nodes",
        "since_ns",
    )

    def __init__(self, output: plan_pb2.Output, *, interval_ms: int) -> None:
        self._output = output
        self._interval_ms = interval_ms
        self._cumulative = output.kind != plan_pb2.Output.GAUGE
        self._keys = keys.Keys(result.group_by(output))
        self._width = 1
        self._signed = False
        self._sum = np.zeros((1, 1), np.uint64)  # by key; retired epochs and departed nodes are in it
        self._departed = departed.Departed()
        self._departed_lost = 0
        self._counted: departed.Remembered[int] = departed.Remembered()  # by epoch: when last heard of; 0: it had ended
        self._lost_before: departed.Remembered[int] = departed.Remembered()  # by a program's epoch
        self._retired = 0  # of the sum: what ended epochs and departed nodes counted, modulo 2^64
        self._returned = False
        self.nodes: dict[str, NodeRows] = {}
        self.since_ns = 0

    def apply(self, node: str, session: int, table: stream_pb2.Table, *, time_ns: int, received_ns: int) -> None:
        """Take in a table of the node's newest stream. Raises ColumnsError and ResyncNeeded, then nothing changed."""
        state = self.nodes.get(node) or NodeRows()
        left_ns = self._counted.get(node, table.epoch)
        if table.epoch in state.ended or (left_ns is not None and (state.epoch or not left_ns)):
            return
        fresh_epoch = table.epoch != state.epoch
        restarted = session != state.session or fresh_epoch
        known = 0 if restarted else len(state.keys)
        first_row = table.first_new_row if restarted else state.first_row
        if restarted and table.first_new_row and session != state.session:
            raise ResyncNeeded(f"the first table of a stream begins with row {table.first_new_row}")
        if table.first_new_row != first_row + known and table.new_rows:
            raise ResyncNeeded(f"row {table.first_new_row} comes after row {first_row + known}")
        width, rows, values = self._read(table, first_row, known + table.new_rows)
        gone = self._rows_of(table.gone, first_row, known + table.new_rows) if table.gone else np.zeros(0, np.int64)
        new_keys = self._keys.intern(node, table)
        # From here on nothing can fail.
        self.nodes[node] = state
        self._grow(width)
        if restarted:
            self._restart(state, session, table, fresh_epoch=fresh_epoch)
            state.first_row = first_row
        if left_ns or (restarted and not fresh_epoch and state.baseline_ns):
            self._return(state, left_ns or state.away[0][0], time_ns=time_ns, received_ns=received_ns)
            self._counted.drop(node, table.epoch)
        elif fresh_epoch or time_ns != state.baseline_ns:
            state.baseline_ns = 0
        if state.baseline_ns:
            state.window.restart(time_ns, 0, interval_ms=self._interval_ms)
        elif fresh_epoch:
            state.window.restart(time_ns, table.since_ns, interval_ms=self._interval_ms)
        elif state.window.sample(time_ns) and not restarted:
            state.before = None
        self._add_rows(state, new_keys)
        self._set(state, rows, values)
        if not self._cumulative:
            state.there[rows], state.there[gone] = True, False
        state.window.settle(interval_ms=self._interval_ms)
        state.received_ns = max(state.received_ns, received_ns)
        # Of a ProbeMap the epoch goes on when its program is loaded anew, and the program counts from zero.
        program_epoch = table.program_epoch or table.epoch
        if program_epoch != state.program_epoch:
            state.ended_lost += state.lost - (self._lost_before.get(node, program_epoch) or 0)
            self._lost_before.drop(node, program_epoch)
            state.program_epoch = program_epoch
        state.since_ns, state.lost = table.since_ns, table.lost
        state.entries, state.max_entries = table.entries, table.max_entries
        state.uncounted, state.gaps = bounded_texts(table.uncounted), state.away + bounded_gaps(table.gaps)
        if table.since_ns > 0:
            self.since_ns = min(self.since_ns or table.since_ns, table.since_ns)

    def touch(self, node: str, *, time_ns: int, received_ns: int) -> None:
        """The node runs the policy, and sent no table because nothing changed."""
        state = self.nodes.get(node)
        if state is None:
            return
        state.received_ns = max(state.received_ns, received_ns)
        if time_ns != state.baseline_ns:
            state.baseline_ns = 0
        state.window.quiet(time_ns, interval_ms=self._interval_ms)

    def forget(self, node: str) -> None:
        """The node has left: what it counted stays; what it held does not."""
        if not self._cumulative:
            self.nodes.pop(node, None)

    def fold(self, node: str) -> None:
        """The node has left for good: its counts are in the sum, and what else is told of it goes to that of others."""
        state = self.nodes.pop(node, None)
        gone, heirs = self._keys.fold(node)
        if self._cumulative:
            np.add.at(self._sum, heirs, self._sum[gone])
            self._sum[gone] = 0
        if state is None:
            return
        self._departed.add(node, state.gaps, state.uncounted)
        self._departed_lost += state.lost + state.ended_lost
        self._retired += state.counted
        for epoch in state.ended:
            self._counted.keep(node, epoch, 0)
        self._counted.keep(node, state.epoch, max(state.received_ns, 1))
        if state.lost:
            self._lost_before.keep(node, state.program_epoch, state.lost)

    def retired(self, here: Set[str]) -> int:
        """Of the total: what nodes counted that are not ``here`` any more, and in epochs that ended (a reboot)."""
        gone = sum(state.counted for node, state in self.nodes.items() if node not in here)
        return (self._retired + gone) % _MODULUS

    @property
    def lost(self) -> int:
        """All that programs could not count, ended epochs and departed nodes included."""
        return self._departed_lost + sum(state.lost + state.ended_lost for state in self.nodes.values())

    def gaps(self) -> Iterable[tuple[str, tuple[tuple[int, int, str], ...]]]:
        """The gaps of each node that has any: ``(start_ns, end_ns, why)``."""
        yield from ((node, state.gaps) for node, state in self.nodes.items() if state.gaps)
        yield from ((node, (gap,)) for node, gap in self._departed.gaps)

    def fullest(self, fresh: Iterable[str]) -> result.MapFill | None:
        """Where the map has least room left; ``None`` where it cannot fill up."""
        here = {node: self.nodes[node] for node in fresh if node in self.nodes}
        fills = [
            result.MapFill(node, state.entries, state.max_entries) for node, state in here.items() if state.max_entries
        ]
        return max(fills, key=lambda fill: (fill.share, fill.node), default=None)

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Losses that nobody counts, in words."""
        words = {text for state in self.nodes.values() for text in state.uncounted}
        words |= {*self._departed.uncounted, *foreign_words(self._keys.foreign)}
        if self._keys.overflowed:
            words.add(f"keys beyond {keys.MAX_KEYS} are counted under {result.OTHER}")
        return tuple(sorted(words)[:MAX_UNCOUNTED])

    @property
    def foreign(self) -> int:
        """Keys that nodes sent of pods which are on other nodes."""
        return sum(self._keys.foreign.values())

    def result(self, names: Names, *, fresh: Iterable[str], qualified: bool) -> result.OutputResult:
        """The merged rows; ``fresh`` nodes' samples are the window."""
        row_of, labels = self._keys.group(names, qualified=qualified)
        used = np.bincount(row_of[1:], minlength=len(labels)) > 0
        used[0] = self._keys.overflowed
        here = [self.nodes[node] for node in fresh if node in self.nodes]
        if self._cumulative:
            # `_sum` has room for keys to come.
            total = merge.sum_by(row_of, self._sum[: len(row_of)], len(labels))
            if self._returned:
                # Of a node that came back, what it counted meanwhile is taken off where it was told first. Counts of
                # "whose is it?" may have moved to a pod since.
                total[total.view(np.int64) < 0] = 0
            # A row of zero is one that has moved to another name.
            used &= total.any(axis=1)
            window, rates = self._window(here, row_of, len(labels))
        else:
            total, used = self._gauges(list(self.nodes.values()), row_of, len(labels))
            window, window_used = self._gauges(here, row_of, len(labels))
            rates = np.zeros(len(labels))
        reduce = _REDUCE.get(self._output.merge, np.add) if not self._cumulative else np.add
        total_rows = self._rows(labels, total, np.zeros(len(labels)), used, reduce=reduce)
        # A row that did not move within the window is none of the window's rows.
        moved = window.any(axis=1) & used if self._cumulative else window_used
        window_rows = self._rows(labels, window, rates, moved, reduce=reduce)
        return result.OutputResult(
            output=self._output,
            window=window_rows,
            total=total_rows,
            rate_per_second=float(rates.sum()),
            since_ns=self.since_ns,
            lost=self.lost,
            uncounted=self.uncounted,
            fullest=self.fullest(fresh),
        )

    def _rows(
        self,
        labels: list[Labels],
        values: Counts,
        rates: npt.NDArray[np.float64],
        used: npt.NDArray[np.bool_],
        *,
        reduce: np.ufunc,
    ) -> Rows:
        """The largest rows, and the rest (with row 0, which is one of keys that found no room) in one."""
        there = np.flatnonzero(used[1:]) + 1
        order = there[merge.top(result.sizes(self._output, values[there]), result.MAX_ROWS)]
        rest = np.setdiff1d(np.flatnonzero(used), order)
        nothing = np.zeros(values.shape[1], values.dtype)
        return Rows(
            labels=tuple(labels[row] for row in order.tolist()),
            values=values[order],
            rates=rates[order],
            sum=reduce.reduce(values[used], axis=0, dtype=values.dtype) if used.any() else nothing,
            other=reduce.reduce(values[rest], axis=0, dtype=values.dtype) if rest.size else None,
            other_count=len(rest),
        )

    def _read(self, table: stream_pb2.Table, first_row: int, row_count: int) -> tuple[int, Indices, Counts]:
        width = table.width or 1
        if width > MAX_WIDTH or (width > 1 and self._output.kind != plan_pb2.Output.HISTOGRAM):
            raise columns.ColumnsError(f"output {self._output.name!r}: {width} values a row")
        if row_count * width > MAX_NODE_CELLS:
            raise columns.ColumnsError(f"output {self._output.name!r}: {row_count} rows of {width} values: too many")
        self._keys.limit = min(keys.MAX_KEYS, MAX_CELLS // max(width, self._width))
        if len(self._keys) > self._keys.limit + 1:
            raise columns.ColumnsError(f"output {self._output.name!r}: {width} values a row are too many for its keys")
        if not table.rows and not table.values:
            return width, np.zeros(0, np.int64), np.zeros((0, width), np.uint64)
        rows = self._rows_of(table.rows, first_row, row_count)
        values = columns.unpack(table.values, limit=row_count * width)
        if values.dtype.kind == "f" or values.size != rows.size * width:
            raise columns.ColumnsError(
                f"output {self._output.name!r}: {values.size} values of {values.dtype} for {rows.size} rows"
            )
        if values.dtype.kind == "i":
            if self._cumulative:
                raise columns.ColumnsError(f"output {self._output.name!r}: counts are unsigned")
            self._signed = True
        return width, rows, values.view(np.uint64).reshape(-1, width)

    def _rows_of(self, data: bytes, first_row: int, row_count: int) -> Indices:
        """Row numbers of this epoch. Raises ColumnsError."""
        rows = columns.unpack_unsigned(data, limit=row_count).astype(np.int64) - first_row
        if rows.size:
            if not bool((rows[1:] > rows[:-1]).all()):
                raise columns.ColumnsError(f"output {self._output.name!r}: changed rows do not ascend")
            if int(rows[0]) < 0 or int(rows[-1]) >= row_count:
                raise columns.ColumnsError(f"output {self._output.name!r}: a value for a row that has no key")
        return rows

    def _grow(self, width: int) -> None:
        """Room for all keys and for the widest table. Keys beyond what fits were refused when they were interned."""
        self._width = max(self._width, width)
        if not self._cumulative:
            return
        have, need = self._sum.shape, (len(self._keys), self._width)
        if need[0] > have[0] or need[1] > have[1]:
            # By half more, so that a policy whose keys trickle in does not copy at each of them.
            grown = np.zeros((max(need[0] + need[0] // 2, have[0]), self._width), np.uint64)
            grown[: have[0], : have[1]] = self._sum
            self._sum = grown

    def _restart(self, state: NodeRows, session: int, table: stream_pb2.Table, *, fresh_epoch: bool) -> None:
        if fresh_epoch:
            if state.epoch:
                state.ended = [*state.ended[1 - MAX_ENDED :], state.epoch]
            state.before = None  # its counts stay in the sum
            self._retired, state.counted = self._retired + state.counted, 0
        else:
            if self._cumulative and not state.baseline_ns:
                self._add(state, state.keys, np.negative(state.values))
            # A window goes on over a change of streams: it is the difference to what the older one said.
            found, place = np.unique(state.keys, return_inverse=True)
            state.before = (found, merge.sum_by(place, state.values, len(found)))
        state.session, state.epoch = session, table.epoch
        state.keys, state.values = np.zeros(0, np.int64), np.zeros((0, self._width), np.uint64)
        state.there = np.zeros(0, bool)
        state.distinct = True

    def _return(self, state: NodeRows, left_ns: int, *, time_ns: int, received_ns: int) -> None:
        """A folded node is back in the same epoch, or in its next stream before it has told all of where it goes on."""
        self._returned = True
        state.baseline_ns = time_ns
        state.away = ((left_ns, received_ns, RETURNED),)

    def _add_rows(self, state: NodeRows, new_keys: Indices) -> None:
        state.values = _widen(state.values, self._width)
        if not new_keys.size:
            return
        state.keys = np.concatenate([state.keys, new_keys])
        if not self._cumulative:
            state.there = np.concatenate([state.there, np.zeros(len(new_keys), bool)])
        state.values = np.concatenate([state.values, np.zeros((len(new_keys), self._width), np.uint64)])
        state.distinct = len(np.unique(state.keys)) == len(state.keys)

    def _set(self, state: NodeRows, rows: Indices, values: Counts) -> None:
        if not rows.size:
            return
        values = _widen(values, self._width)
        if len(rows) == len(state.keys):
            # All of them, in order: nothing to look up.
            at, change = state.keys, values - state.values
            state.values = np.array(values)
        elif self._width == 1:
            # In one dimension NumPy picks and puts three times as fast.
            old = state.values.reshape(-1)
            at, change = state.keys[rows], (values.reshape(-1) - old[rows]).reshape(-1, 1)
            old[rows] = values.reshape(-1)
        else:
            at, change = state.keys[rows], values - state.values[rows]
            state.values[rows] = values
        if self._cumulative and not state.baseline_ns:
            self._add(state, at, change)
            state.window.add((at, self._since_before(state, at, change)))

    def _since_before(self, state: NodeRows, at: Indices, change: Counts) -> Counts:
        if state.before is None or not state.before[0].size:
            return change
        found, old = state.before
        old = _widen(old, self._width)
        place = np.minimum(np.searchsorted(found, at), len(found) - 1)
        # Only on its first appearance in the new stream does a row differ from what the older one said.
        known = found[place] == at
        used = place[known]
        result_change = np.array(change)
        result_change[known] -= old[used]
        old = old.copy()
        old[used] = 0
        state.before = (found, old)
        return result_change

    def _add(self, state: NodeRows, at: Indices, change: Counts) -> None:
        state.counted = (state.counted + int(change.sum(dtype=np.uint64))) % _MODULUS
        change = _widen(change, self._width)
        if not state.distinct:
            self._sum += merge.sum_by(at, change, len(self._sum))
        elif self._width == 1:
            self._sum.reshape(-1)[at] += change.reshape(-1)
        else:
            self._sum[at] += change

    def _window(self, here: list[NodeRows], row_of: Indices, count: int) -> tuple[Counts, npt.NDArray[np.float64]]:
        timed = [node.window for node in here if node.window.seconds]
        parts = [(at, change, window.seconds) for window in timed for at, change in window.changes]
        if not parts:
            return np.zeros((count, self._width), np.uint64), np.zeros(count)
        rows = row_of[np.concatenate([at for at, _, _ in parts])]
        changes = np.concatenate([_widen(change, self._width) for _, change, _ in parts])
        window = merge.sum_by(rows, changes, count)
        # Counts of "whose is it?" move to a pod when that is known: what fell is not part of a window.
        window[window.view(np.int64) < 0] = 0
        per_second = np.repeat([1 / seconds for _, _, seconds in parts], [len(at) for at, _, _ in parts])
        moved = np.maximum(changes.view(np.int64), 0).sum(axis=1).astype(np.float64)
        return window, np.bincount(rows, weights=moved * per_second, minlength=count).astype(np.float64)

    def _gauges(self, here: list[NodeRows], row_of: Indices, count: int) -> tuple[Counts, npt.NDArray[np.bool_]]:
        if not any(node.there.any() for node in here):
            return np.zeros((count, 1), np.uint64), np.zeros(count, bool)
        rows = row_of[np.concatenate([node.keys[node.there] for node in here])]
        values = np.concatenate([node.values[node.there, 0] for node in here])
        if self._signed:
            values = values.view(np.int64)
        times = np.repeat([node.window.time_ns for node in here], [int(node.there.sum()) for node in here])
        merged = merge.combine(rows, values, count, merge=self._output.merge, times_ns=times)
        used = np.bincount(rows, minlength=count) > 0
        merged[~used] = 0
        return merged[:, None], used


def foreign_words(foreign: Iterable[str]) -> list[str]:
    """Said of nodes that speak for pods of others."""
    return [
        f"node {node} sent counts of pods that are not on it: they are under {result.UNKNOWN}"
        for node in sorted(foreign)[:MAX_UNCOUNTED]
    ]


def bounded_texts(texts: Iterable[str]) -> tuple[str, ...]:
    """At most ten, none longer than a line."""
    return tuple(text[:MAX_TEXT] for text, _ in zip(texts, range(MAX_UNCOUNTED), strict=False))


def bounded_gaps(gaps: Iterable[stream_pb2.Gap]) -> tuple[departed.Gap, ...]:
    """The newest ones: ``(start_ns, end_ns, why)``."""
    return tuple((gap.start_ns, gap.end_ns, gap.why[:MAX_TEXT]) for gap in list(gaps)[-MAX_GAPS:])


def _joined(one: Change, other: Change) -> Change:
    """What two samples changed, each key once."""
    keys, place = np.unique(np.concatenate([one[0], other[0]]), return_inverse=True)
    width = max(one[1].shape[1], other[1].shape[1])
    return keys, merge.sum_by(place, np.concatenate([_widen(one[1], width), _widen(other[1], width)]), len(keys))


def _widen(values: Counts, width: int) -> Counts:
    """Histograms of more slots, the new ones empty."""
    if values.shape[1] == width:
        return values
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


#: How rows of one gauge come together in `other`.
_REDUCE: Final = {plan_pb2.Output.MAX: np.maximum, plan_pb2.Output.MIN: np.minimum}
