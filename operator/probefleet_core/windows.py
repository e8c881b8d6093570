"""What changed at one node, in one output, within its last interval. Pure.

``tables`` and ``events`` keep one for each node: changes in, sample by sample, the newest whole interval's changes out.
A sample that comes early (records each second, tables before each push) does not make a shorter window: what it brings
is part of the one that grows. Times are the node's wall clock, which may be set back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

T = TypeVar("T")

#: A first sample this many intervals after counting began is a window of its own.
FRESH_INTERVALS: Final = 3
#: Samples are taken when an interval is over, give or take how busy the node is.
WHOLE: Final = 0.9


@dataclass(slots=True)
class Windows(Generic[T]):
    """``changes`` are those between ``begin_ns`` and ``end_ns``.

    A node may send as many samples as it likes before its clock says that a window is over: what they bring comes
    together, so that all parts are at most twice as large as one of everything.
    """

    join: Callable[[T, T], T]  # two changes as one
    size: Callable[[T], int]
    time_ns: int = 0  # the newest sample's
    begin_ns: int = 0  # 0: there is no window
    end_ns: int = 0
    changes: list[T] = field(default_factory=list)
    _since_ns: int = 0  # when the one that grows began
    _growing: list[T] = field(default_factory=list)
    _first: bool = False  # nothing but the beginning of the first one is there: it is shown as far as it has grown

    @property
    def seconds(self) -> float:
        """The window's length; 0 where there is none."""
        return (self.end_ns - self.begin_ns) / 1e9 if self.begin_ns else 0.0

    def restart(self, time_ns: int, since_ns: int, *, interval_ms: int) -> None:
        """The first sample of an epoch: it ends a window only if counting began just now."""
        self._first = 0 < since_ns <= time_ns <= since_ns + FRESH_INTERVALS * interval_ms * 1_000_000
        self.time_ns, self._since_ns = time_ns, since_ns if self._first else time_ns
        self.begin_ns, self.end_ns, self.changes, self._growing = 0, 0, [], []

    def sample(self, time_ns: int) -> bool:
        """A sample of this time comes; False where it belongs to the newest."""
        if time_ns == self.time_ns:
            return False
        if time_ns < self.time_ns:
            # Newer by its number, older by its time: the node's clock was set back, so the time between is not known.
            self.begin_ns, self.end_ns, self.changes, self._growing = 0, 0, [], []
            self._since_ns = time_ns
        self.time_ns = time_ns
        return True

    def add(self, change: T) -> None:
        """What the newest sample brings."""
        # More of a sample that has ended a window belongs into that.
        parts = self.changes if self._since_ns == self.time_ns else self._growing
        parts.append(change)
        while len(parts) > 1 and 2 * self.size(parts[-1]) > self.size(parts[-2]):
            parts[-2:] = [self.join(*parts[-2:])]

    def settle(self, *, interval_ms: int) -> None:
        """All of the newest sample is there: show a window that is whole by now."""
        grown_ns = self.time_ns - self._since_ns
        if grown_ns >= WHOLE * interval_ms * 1_000_000:
            self.begin_ns, self.end_ns, self.changes = self._since_ns, self.time_ns, self._growing
            self._since_ns, self._growing, self._first = self.time_ns, [], False
        elif self._first and grown_ns > 0:
            self.begin_ns, self.end_ns, self.changes = self._since_ns, self.time_ns, list(self._growing)

    def quiet(self, time_ns: int, *, interval_ms: int) -> None:
        """The node spoke of other things only: after a whole interval that says that nothing changed here."""
        if not 0 <= time_ns - self.time_ns < WHOLE * interval_ms * 1_000_000:
            self.sample(time_ns)
            self.settle(interval_ms=interval_ms)
