"""What goes to the operator, and what of it is already there: rows, sequence numbers, acknowledgements. Pure.

``collect`` reads a map and hands its keys and values to a ``Rows``, which knows every raw key that the map has: which
row of the output it adds to, or that it does not count. So only *new* keys are decoded and looped over; known ones
are found by binary search and summed by NumPy. ``Stream`` numbers the batches of one session, keeps what is not
acknowledged yet, and says which ring positions may be given back to the kernel.

Values are cumulative within an epoch, so a batch that comes twice changes nothing; a new stream starts with every key.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from probefleet_wire import columns
from probefleet_wire.v1 import stream_pb2

from probefleet_agent.baseline import Nature
from probefleet_agent.pods import PolicyUid

GroupKey: TypeAlias = tuple[str | int | float, ...]
#: Whose records of which ring: policy, output, epoch.
RingOf: TypeAlias = tuple[PolicyUid, str, str]


class Mark(NamedTuple):
    """How far a ring was read for one output, and what that came to."""

    position: int  # in bytes: everything before it is settled
    counted: int | None  # the policy's records before it; None: nobody knows
    dropped: int  # records before it that the agent could not keep


#: How far a batch read a ring.
Commit: TypeAlias = tuple[RingOf, Mark]

#: Instead of a row number: the key is another's, or nobody knows yet whose it is (asked again at the next reading).
REFUSED = -1
PENDING = -2

#: Groups a node sends of one output; what comes after that goes into the row of ``OVERFLOW``.
MAX_ROWS = 10_000
#: Unacknowledged batches; more would only queue up in memory.
WINDOW = 4


@dataclass(frozen=True, slots=True)
class Classified:
    """What new raw keys are: a group for each that counts, else ``None``; and the answers and histogram slots."""

    groups: Sequence[GroupKey | None]
    pending: npt.NDArray[np.bool_]
    slots: npt.NDArray[np.int64]


Classify: TypeAlias = Callable[[npt.NDArray[np.uint8]], Classified]


@dataclass(slots=True)
class Rows:
    """The rows of one output of one policy within one epoch."""

    width: int
    names: tuple[str, ...]  # of the group's columns
    fold: str = "sum"  # how raw keys of one group come together: sum, max or min
    #: Of counters: how the map's entries come and go. None: what a reading says is all that there is, as of a gauge.
    nature: Nature | None = None
    signed: bool = False  # of a gauge: it may be below zero
    pending_count: int = 0
    overflowed: bool = False
    went: int = 0  # how often a key went, or began anew
    left: bool = False  # keys have counted of which that is not so any more
    _other: int = -1  # the row of groups beyond ``MAX_ROWS``; it is no group's
    _rows: dict[GroupKey, int] = field(default_factory=dict)
    _keys: list[GroupKey] = field(default_factory=list)
    _raw: npt.NDArray[Any] | None = None  # sorted, as void
    _row_of: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _slot_of: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _left: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))  # whose they are counts no more
    #: Of each raw key what it was last read to hold; of each row what keys had counted that went. Only with ``nature``.
    _last: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    _retired: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 0), np.uint64))
    _totals: npt.NDArray[Any] = field(default_factory=lambda: np.zeros((0, 0), np.uint64))
    _there: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))  # rows that hold anything now
    _sent: npt.NDArray[Any] = field(default_factory=lambda: np.zeros((0, 0), np.uint64))
    _sent_there: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    _sent_keys: int = 0

    def update(self, keys: npt.NDArray[np.uint8], values: npt.NDArray[np.uint64], classify: Classify) -> None:
        """Take in one whole reading of the map: ``keys`` ``(n, key_bytes)``, ``values`` ``(n,)`` or ``(n, width)``.

        A key that a reading shows twice (another took its place in a hash while it was read) counts once: what was read
        last is newest. What a counter's key had counted when it went, or began anew, stays counted.
        """
        entry, row, slot = self._locate(keys, classify)
        self.pending_count = int((row == PENDING).sum())
        shown = (row >= 0) & self._last_of_each(entry)
        counted = shown & ~np.append(self._left, False)[entry]
        left, held = entry[shown & ~counted], values[shown & ~counted]
        row, slot, values = row[counted], slot[counted], values[counted]
        if self.nature is None:
            # As bits a sum is the same with and without a sign; what is larger is not.
            values = values.view(np.int64 if self.signed else np.uint64)
            limits = np.iinfo(values.dtype)
            start = {"sum": 0, "max": limits.min, "min": limits.max}[self.fold]
            totals = np.full((len(self._keys), self.width), start, values.dtype)
            self._there = np.zeros(len(self._keys), bool)
            self._there[row] = True
        else:
            self._follow(self.nature, entry[counted], values, left)
            # Their rows stay as they are, whatever they hold by now.
            self._add_to_retired(left, self._last[left] - held)
            self._last[left] = held
            counting = np.flatnonzero(self._row_of >= 0)
            row, slot, values = self._row_of[counting], self._slot_of[counting], self._last[counting]
            totals = self._retired.copy()
            self._there = np.ones(len(self._keys), bool)
        self._fold({"sum": np.add, "max": np.maximum, "min": np.minimum}[self.fold], totals, row, slot, values)
        totals[~self._there] = 0
        self._totals = totals
        if self.nature is None or self.nature.listed:
            seen = np.zeros(len(self._row_of), bool)
            seen[entry[entry >= 0]] = True
            self._keep(seen)  # keys that come and go, of processes say, would fill the agent's memory

    def _fold(
        self,
        target: np.ufunc,
        totals: npt.NDArray[Any],
        row: npt.NDArray[np.int64],
        slot: npt.NDArray[np.int64],
        values: npt.NDArray[Any],
    ) -> None:
        """Put values of raw keys to their rows."""
        if values.ndim == 2:
            target.at(totals, row, values[:, : self.width])
        elif self.width == 1:
            target.at(totals[:, 0], row, values)
        else:
            target.at(totals, (row, np.clip(slot, 0, self.width - 1)), values)

    def _follow(
        self, nature: Nature, place: npt.NDArray[np.int64], now: npt.NDArray[np.uint64], left: npt.NDArray[np.int64]
    ) -> None:
        """Note what raw keys hold now; what those held that went since the last reading, or began anew, is kept."""
        raw_keys, rows = len(self._row_of), len(self._keys)
        if self._last.shape[1:] != now.shape[1:]:
            self._last = np.zeros((raw_keys, *now.shape[1:]), np.uint64)  # the first reading
        self._retired = np.pad(
            self._retired, ((0, rows - len(self._retired)), (0, self.width - self._retired.shape[1]))
        )
        if nature.listed:
            unseen = np.ones(raw_keys, bool)
            unseen[place] = unseen[left] = False
            self._retire(np.flatnonzero(unseen))
        before = self._last[place]
        fell = now < before
        if nature.fixed and nature.bits < 64:
            step = (now - before) & np.uint64((1 << nature.bits) - 1)
            wrapped = fell & (step < np.uint64(1 << nature.bits - 1))
            self._add_to_retired(place, np.where(wrapped, step - (now - before), np.uint64(0)))
            fell &= ~wrapped
        self._retire(place[fell if fell.ndim == 1 else fell.any(axis=1)])
        self._last[place] = now

    def _retire(self, places: npt.NDArray[np.int64]) -> None:
        held = self._last[places]
        self.went += int((held if held.ndim == 1 else held.any(axis=1)).astype(bool).sum())
        self._add_to_retired(places, held)
        self._last[places] = 0

    def _add_to_retired(self, places: npt.NDArray[np.int64], values: npt.NDArray[np.uint64]) -> None:
        there = self._row_of[places] >= 0
        places = places[there]
        self._fold(np.add, self._retired, self._row_of[places], self._slot_of[places], values[there])

    def restart_stream(self) -> None:
        """A new stream knows nothing: all keys and values are due again."""
        self._sent_keys = 0
        self._sent, self._sent_there = np.zeros((0, self.width), np.uint64), np.zeros(0, bool)

    def ask_again(self, refused: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.bool_]]) -> None:
        """Who was refused may count by now: the next reading asks about those keys once more. Who counted may be
        refused by now: what they have counted stays in their rows, and what they count from now on is in none.
        """
        self._keep(self._row_of != REFUSED)
        if self._raw is not None and len(self._raw):
            self._left = refused(self._raw.view(np.uint8).reshape(len(self._raw), -1))
            self.left = self.left or bool(self._left.any())

    def _keep(self, raw_keys: npt.NDArray[np.bool_]) -> None:
        """Only these raw keys; another that comes again is new."""
        if self._raw is None or raw_keys.all():
            return
        self._raw, self._left = self._raw[raw_keys], self._left[raw_keys]
        self._row_of, self._slot_of = self._row_of[raw_keys], self._slot_of[raw_keys]
        self._last = self._last[raw_keys[: len(self._last)]]

    def table(self) -> stream_pb2.Table | None:
        """New keys and changed rows since the last call; ``None`` where nothing changed."""
        total = len(self._keys)
        changed = np.ones(total, bool)
        seen = len(self._sent)
        if seen:
            changed[:seen] = (self._totals[:seen] != self._sent).any(axis=1) | (self._there[:seen] != self._sent_there)
        rows = np.flatnonzero(changed)
        if not len(rows) and self._sent_keys == total:
            return None
        new = self._keys[self._sent_keys :]
        table = stream_pb2.Table(first_new_row=self._sent_keys, new_rows=len(new), width=self.width)
        if self.overflowed and self._other >= self._sent_keys:
            table.other_row = 1 + self._other
        if new:
            for index, name in enumerate(self.names):
                table.keys.append(columns.column(name, _as_column([key[index] for key in new])))
        there = self._there[rows]
        table.rows = columns.pack(rows[there].astype(np.uint32))
        table.values = columns.pack(self._totals[rows[there]])
        if not there.all():
            table.gone = columns.pack(rows[~there].astype(np.uint32))
        self._sent, self._sent_there, self._sent_keys = self._totals, self._there, total
        return table

    def no_table(self) -> stream_pb2.Table:
        """What says that nothing changed, and how many rows the stream has by now: who has not heard of them asks."""
        return stream_pb2.Table(
            first_new_row=self._sent_keys, width=self.width,
            rows=columns.pack(np.zeros(0, np.uint32)), values=columns.pack(np.zeros(0, np.uint64)),
        )  # fmt: skip

    def _last_of_each(self, entry: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Of entries of one raw key, the last; none of those that have no raw key yet."""
        order = np.arange(len(entry))
        last = np.full(len(self._row_of) + 1, -1)  # one place more for entry -1
        np.maximum.at(last, entry, order)
        newest: npt.NDArray[np.bool_] = (last[entry] == order) & (entry >= 0)
        return newest

    def _locate(
        self, keys: npt.NDArray[np.uint8], classify: Classify
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each key: its place among the raw keys (-1: none yet), its row, or why it has none, and its slot."""
        void = np.ascontiguousarray(keys).view(f"V{keys.shape[1]}").reshape(-1)
        if self._raw is None:
            self._raw = void[:0]
        place, known = self._search(void)
        unknown = np.flatnonzero(~known)
        pending = np.zeros(len(keys), bool)
        if len(unknown):
            found = classify(keys[unknown])
            row = np.full(len(unknown), REFUSED, np.int64)
            for index, group in enumerate(found.groups):
                if group is not None:
                    row[index] = self._row(group)
            pending[unknown] = found.pending
            decided = ~found.pending
            self._insert(void[unknown][decided], row[decided], found.slots[decided])
            place, known = self._search(void)
        result = np.full(len(keys), PENDING, np.int64)
        slots = np.zeros(len(keys), np.int64)
        result[known] = self._row_of[place[known]]
        slots[known] = self._slot_of[place[known]]
        return np.where(known, place, -1), result, slots

    def _search(self, void: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        raw = self._raw
        if raw is None or not len(raw):
            return np.zeros(len(void), np.int64), np.zeros(len(void), bool)
        place = np.minimum(np.searchsorted(raw, void), len(raw) - 1)
        return place, raw[place] == void

    def _insert(self, void: npt.NDArray[Any], row: npt.NDArray[np.int64], slot: npt.NDArray[np.int64]) -> None:
        raw = void if self._raw is None else np.concatenate([self._raw, void])
        rows, slots = np.concatenate([self._row_of, row]), np.concatenate([self._slot_of, slot])
        left = np.concatenate([self._left, np.zeros(len(void), bool)])
        # A reading can show a key twice: what is said of it is the same each time.
        self._raw, first = np.unique(raw, return_index=True)
        self._row_of, self._slot_of, self._left = rows[first], slots[first], left[first]
        if self.nature is not None:
            new = np.zeros((len(void), *self._last.shape[1:]), np.uint64)
            self._last = np.concatenate([self._last, new])[first]

    def _row(self, group: GroupKey) -> int:
        row = self._rows.get(group)
        if row is not None:
            return row
        if len(self._keys) < MAX_ROWS:
            row = self._rows[group] = len(self._keys)
            self._keys.append(group)
            return row
        if not self.overflowed:
            self.overflowed, self._other = True, len(self._keys)
            # Of the columns' types; ``other_row`` says what it is.
            self._keys.append(tuple("" if isinstance(part, str) else 0 for part in group))
        return self._other


def _as_column(parts: list[str | int | float]) -> list[str] | list[int] | list[float]:
    """One column's parts are of one type: its decoder's."""
    return cast("list[str] | list[int] | list[float]", parts)


@dataclass(slots=True)
class Stream:
    """The batches of one session: numbered, at most ``WINDOW`` of them unacknowledged."""

    sequence: int = 0
    acknowledged: int = 0
    _commits: deque[tuple[int, tuple[Commit, ...]]] = field(default_factory=deque)

    @property
    def open(self) -> bool:
        """May another batch be sent?"""
        return self.sequence - self.acknowledged < WINDOW

    def number(self, commits: Sequence[Commit]) -> int:
        """The next batch's number; ``commits`` say how far it read which rings."""
        self.sequence += 1
        self._commits.append((self.sequence, tuple(commits)))
        return self.sequence

    def acknowledge(self, sequence: int) -> dict[RingOf, Mark]:
        """All batches up to ``sequence`` are merged: how far each ring may now be given back."""
        if sequence > self.sequence:
            raise ValueError(f"acknowledged batch {sequence}, but only {self.sequence} were sent")
        self.acknowledged = max(self.acknowledged, sequence)
        done: dict[RingOf, Mark] = {}
        while self._commits and self._commits[0][0] <= sequence:
            done.update(self._commits.popleft()[1])
        return done
