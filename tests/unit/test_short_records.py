"""Records that are shorter than their type: a text of some length at the end, and no more than that is submitted."""

from __future__ import annotations

import numpy as np
from probefleet_agent.kernel.rings import Records

TYPE = np.dtype([("value", "<u4"), ("text", "S6")])


def records(*each: bytes) -> Records:
    lengths = np.array([len(one) for one in each], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64)
    positions = np.arange(len(each), dtype=np.uint64) * np.uint64(16)
    return Records(positions, np.frombuffer(b"".join(each), np.uint8), offsets, lengths, 16 * len(each))


def test_what_a_record_does_not_hold_is_zeros() -> None:
    found = records(b"\x01\0\0\0abcdef", b"\x02\0\0\0gh", b"\x03\0", b"\x04\0\0\0ijklmn-more", b"\x05\0\0\0op").array(
        TYPE
    )
    assert found["value"].tolist() == [1, 2, 3, 4, 5]
    assert found["text"].tolist() == [b"abcdef", b"gh", b"", b"ijklmn", b"op"]


def test_the_rest_is_read_next_time() -> None:
    whole = records(b"\x01\0\0\0a", b"\x02\0\0\0b", b"\x03\0\0\0c")
    some = whole.first(2)
    assert some.array(TYPE)["value"].tolist() == [1, 2]
    assert (len(some), some.end_position) == (2, 32)
    assert whole.first(3) is whole
