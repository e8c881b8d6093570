"""What a map held when a policy joined the program that counts in it: taken off at each reading. Pure.

``joining`` takes one for each map and field that a policy's outputs read, and keeps its bytes pinned; ``collect`` hands
every reading through ``subtract``, so that a policy's totals begin when it came and not when the program did. All keys
at once: sorted, found by binary search, subtracted by NumPy.

Keys that go take their baseline with them: an entry that was deleted, or evicted, and came anew holds only what was
counted since. Such a key is *gone* for good, and which ones are is kept beside the numbers (a bit each), so that the
next agent decides alike. A number is never negative and never wraps.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.uint64]

#: A baseline larger than this, unpacked, is not taken: the agent holds it in memory as long as the policy is there.
MAX_BYTES = 32 << 20
_HEADER = struct.Struct("<8sQQ32s")  # magic, bytes of the bits of gone keys, bytes of the packed rest, its sha256
_MAGIC = b"probefb1"
#: Where the bits of gone keys begin in what ``pack`` makes.
GONE_AT = _HEADER.size


@dataclass(frozen=True, slots=True)
class Nature:
    """How entries of a map come and go."""

    fixed: bool  # an array: its entries are always there, so a number that fell has wrapped
    listed: bool  # a hash: a reading shows every key that there is, so one that is not shown is gone
    bits: int = 64  # of the counter


@dataclass(slots=True)
class Baseline:
    """One counting field of one map, as it was when a policy joined."""

    map: str
    value: str  # the field; empty: the whole value
    map_id: int  # the kernel's
    since_ns: int
    nature: Nature
    keys: Bytes  # (n, key bytes), sorted; keys whose count was zero are not in it
    numbers: npt.NDArray[Any]  # (n,) or (n, slots), as narrow as they fit
    gone: npt.NDArray[np.bool_]
    #: Keys went since this was last kept.
    changed: bool = False
    _sorted: npt.NDArray[Any] = field(init=False)

    def __post_init__(self) -> None:
        self._sorted = _void(self.keys)

    @property
    def size_bytes(self) -> int:
        """In memory."""
        return self.keys.nbytes + self.numbers.nbytes + self.gone.nbytes

    def subtract(self, keys: Bytes, numbers: Counts) -> tuple[Bytes, Counts]:
        """Of one whole reading: the keys that have counted since, and how much."""
        if not len(self._sorted) or keys.shape[1] != self.keys.shape[1]:
            return _counted(keys, numbers)
        void = _void(keys)
        place = np.minimum(np.searchsorted(self._sorted, void), len(self._sorted) - 1)
        known = self._sorted[place] == void
        if self.nature.listed:
            seen = np.zeros(len(self._sorted), bool)
            seen[place[known]] = True
            self._forget(np.flatnonzero(~seen))
        rows = np.flatnonzero(known & ~self.gone[place])
        now, before = numbers[rows], self.numbers[place[rows]].astype(np.uint64)
        fell, since = now < before, now - before
        if self.nature.fixed and self.nature.bits < 64:
            since[fell] &= np.uint64((1 << self.nature.bits) - 1)
        else:
            anew = _any(fell)
            since[anew] = now[anew]
            self._forget(place[rows[anew]])
        found = numbers.copy()
        found[rows] = since
        return _counted(keys, found)

    def _forget(self, places: npt.NDArray[np.int64]) -> None:
        if len(places) and not self.gone[places].all():
            self.gone[places] = True
            self.changed = True


def take(
    *, map_name: str, value: str, map_id: int, since_ns: int, nature: Nature, keys: Bytes, numbers: Counts
) -> Baseline:
    """From one reading. Of a key that it shows twice, the last is newest."""
    there = np.flatnonzero(_any(numbers))
    _, newest = np.unique(_void(keys[there])[::-1], return_index=True)
    chosen = there[::-1][newest]
    kept = numbers[chosen]
    narrow = np.min_scalar_type(int(kept.max(initial=0)))
    return Baseline(
        map_name, value, map_id, since_ns, nature, keys[chosen], kept.astype(narrow), np.zeros(len(chosen), bool)
    )


def gone_bits(baselines: Iterable[Baseline]) -> bytes:
    """Which keys are gone, a bit each, each baseline's beginning with a byte of its own."""
    return b"".join(np.packbits(each.gone).tobytes() for each in baselines)


def pack(baselines: Sequence[Baseline]) -> bytes:
    """Bytes that ``unpack`` reads; only those from ``GONE_AT`` on change later, to what ``gone_bits`` says then."""
    told = [
        {
            "map": each.map, "value": each.value, "map_id": each.map_id, "since_ns": each.since_ns,
            "nature": [each.nature.fixed, each.nature.listed, each.nature.bits],
            "keys": each.keys.shape, "numbers": each.numbers.shape, "of": each.numbers.dtype.str,
        }
        for each in baselines
    ]  # fmt: skip
    head = json.dumps(told, separators=(",", ":")).encode()
    arrays = [part for each in baselines for part in (each.keys.tobytes(), each.numbers.tobytes())]
    packed = zstandard.ZstdCompressor(level=1).compress(b"".join([struct.pack("<Q", len(head)), head, *arrays]))
    gone = gone_bits(baselines)
    return _HEADER.pack(_MAGIC, len(gone), len(packed), hashlib.sha256(packed).digest()) + gone + packed


def unpack(data: bytes) -> list[Baseline]:
    """What was packed. Raises ValueError where it is damaged."""
    if len(data) < _HEADER.size:
        raise ValueError("too short for a baseline")
    magic, gone_bytes, packed_bytes, digest = _HEADER.unpack_from(data)
    packed = data[GONE_AT + gone_bytes : GONE_AT + gone_bytes + packed_bytes]
    if magic != _MAGIC or len(packed) != packed_bytes or hashlib.sha256(packed).digest() != digest:
        raise ValueError("a baseline is damaged")
    raw = zstandard.ZstdDecompressor().decompress(packed)
    (head_bytes,) = struct.unpack_from("<Q", raw)
    at, bits_at = 8 + head_bytes, GONE_AT
    found: list[Baseline] = []
    for told in json.loads(raw[8:at]):
        count, key_bytes = told["keys"]
        keys = np.frombuffer(raw, np.uint8, count * key_bytes, at).reshape(count, key_bytes)
        at += keys.nbytes
        cells = int(np.prod(told["numbers"]))
        numbers = np.frombuffer(raw, np.dtype(told["of"]), cells, at).reshape(told["numbers"])
        at += numbers.nbytes
        bits = np.frombuffer(data, np.uint8, (count + 7) // 8, bits_at)
        bits_at += len(bits)
        gone = np.unpackbits(bits, count=count).astype(bool)
        fixed, listed, width = told["nature"]
        found.append(
            Baseline(
                told["map"], told["value"], told["map_id"], told["since_ns"], Nature(fixed, listed, width), keys,
                numbers, gone,
            )
        )  # fmt: skip
    return found


def _counted(keys: Bytes, numbers: Counts) -> tuple[Bytes, Counts]:
    """Only what is not zero: the rest is not the policy's, and costs no row, no name and no stack."""
    rows = _any(numbers)
    return keys[rows], numbers[rows]


def _any(numbers: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Of each key: is any of its slots not zero?"""
    filled: npt.NDArray[np.bool_] = numbers.astype(bool)
    return filled if numbers.ndim == 1 else np.logical_or.reduce(filled, axis=1)


def _void(keys: Bytes) -> npt.NDArray[Any]:
    if not keys.shape[1]:
        return np.zeros(0, "V1")
    return np.ascontiguousarray(keys).view(f"V{keys.shape[1]}").reshape(-1)
