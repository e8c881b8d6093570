"""What compilers made, kept by the digest of what they were given: a bounded store that counts how often it helped.

The operator's toolchain keeps objects in one, the agent what BCC made. A key names everything that the result depends
on, so what is found is never out of date; the least recently used goes first. One thread at a time. Pure.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, TypeVar

Result = TypeVar("Result")


def digest(parts: Iterable[bytes]) -> str:
    """One key for several parts, whose borders count: ("ab", "c") is not ("a", "bc")."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()


class Kept(Generic[Result]):
    """Results by key, at most ``limit_bytes`` of them; the newest stays, whatever its size."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._found: OrderedDict[str, tuple[Result, int]] = OrderedDict()
        #: How often a result was here when it was asked for, and how often it was not.
        self.hits = 0
        self.misses = 0
        #: What the results take, as they were weighed.
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._found)

    @property
    def hit_rate(self) -> float:
        """Hits of all that were asked for; 0 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    def get(self, key: str) -> Result | None:
        """What was kept under this key; counted as a hit or a miss."""
        found = self._found.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._found.move_to_end(key)
        return found[0]

    def put(self, key: str, result: Result, size_bytes: int) -> None:
        """Keep a result; the least recently used make room."""
        if (old := self._found.pop(key, None)) is not None:
            self.size_bytes -= old[1]
        self._found[key] = result, size_bytes
        self.size_bytes += size_bytes
        while self.size_bytes > self._limit_bytes and len(self._found) > 1:
            _, (_, dropped) = self._found.popitem(last=False)
            self.size_bytes -= dropped
