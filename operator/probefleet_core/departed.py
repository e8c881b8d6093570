"""What is kept of nodes that have left the cluster for good. Pure.

A cluster that scales up and down all day has had far more nodes than it has. Once a node is gone and silent,
``tables``, ``events`` and ``costs`` each add what it said to what all departed nodes said, and keep of the node itself
the epochs that were counted: should it come back in one of these, nothing is counted twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, Generic, TypeAlias, TypeVar

Gap: TypeAlias = tuple[int, int, str]  # start_ns, end_ns, why
T = TypeVar("T")

#: Gaps and words as many as a result names: what departed nodes said never changes, so more could never be shown.
MAX_GAPS: Final = 20
MAX_UNCOUNTED: Final = 10
#: Epochs of departed nodes, for each output: 1 MB. One that comes back after so many others have left is counted anew.
MAX_REMEMBERED: Final = 10_000


class Remembered(Generic[T]):
    """What a node had said in an epoch when it left, of those that left last.

    Kept by the hash of the two names, which takes a third of their room. It is of 64 bits and with a secret of the
    process, so that nobody finds two that collide.
    """

    __slots__ = ("_said",)

    def __init__(self) -> None:
        self._said: OrderedDict[int, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._said)

    def keep(self, node: str, epoch: str, said: T) -> None:
        """The node leaves."""
        key = hash((node, epoch))
        self._said[key] = said
        self._said.move_to_end(key)
        if len(self._said) > MAX_REMEMBERED:
            self._said.popitem(last=False)

    def get(self, node: str, epoch: str) -> T | None:
        """What it had said; None where the epoch is new."""
        return self._said.get(hash((node, epoch)))

    def drop(self, node: str, epoch: str) -> None:
        """It is back, and known by itself."""
        self._said.pop(hash((node, epoch)), None)


class Departed:
    """What departed nodes said in words: their newest gaps, and losses that nobody counts."""

    __slots__ = ("gaps", "uncounted")

    def __init__(self) -> None:
        self.gaps: list[tuple[str, Gap]] = []
        self.uncounted: tuple[str, ...] = ()

    def add(self, node: str, gaps: Iterable[Gap], uncounted: Iterable[str]) -> None:
        """One more node has left."""
        both = [*self.gaps, *((node, gap) for gap in gaps)]
        self.gaps = newest_gaps(both)
        self.uncounted = tuple(sorted({*self.uncounted, *uncounted})[:MAX_UNCOUNTED])


def newest_gaps(gaps: Iterable[tuple[str, Gap]]) -> list[tuple[str, Gap]]:
    """The newest, each once, oldest first; one that goes on is as long as it is known to be."""
    ends: dict[tuple[int, str, str], int] = {}
    for node, (start_ns, end_ns, why) in gaps:
        ends[start_ns, node, why] = max(end_ns, ends.get((start_ns, node, why), 0))
    return [(node, (start_ns, ends[start_ns, node, why], why)) for start_ns, node, why in sorted(ends)[-MAX_GAPS:]]
