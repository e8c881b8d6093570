"""Baselines: what was counted before a policy joined is in none of its totals, whatever keys do and who restarts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from probefleet_agent import baseline
from probefleet_agent.baseline import Baseline, Nature

HASH, ARRAY = Nature(fixed=False, listed=True), Nature(fixed=True, listed=False)
NARROW_ARRAY = Nature(fixed=True, listed=False, bits=32)
TRIE = Nature(fixed=False, listed=False)
KEYS = st.integers(0, 20)
CONTENT = st.dictionaries(st.integers(0, 2**32 - 1), st.integers(0, 2**62), max_size=40)


def as_keys(numbers: list[int]) -> npt.NDArray[np.uint8]:
    return np.array(numbers, "<u4").view(np.uint8).reshape(len(numbers), 4)


def reading(content: Mapping[int, int]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
    return as_keys(list(content)), np.array(list(content.values()), np.uint64)


def taken(content: Mapping[int, int], nature: Nature = HASH, since_ns: int = 997) -> Baseline:
    keys, numbers = reading(content)
    return baseline.take(
        map_name="calls", value="", map_id=7, since_ns=since_ns, nature=nature, keys=keys, numbers=numbers
    )


def left(one: Baseline, content: Mapping[int, int]) -> dict[int, int]:
    keys, numbers = one.subtract(*reading(content))
    return dict(zip(np.ascontiguousarray(keys).view("<u4").reshape(-1).tolist(), numbers.tolist(), strict=True))


def kept(one: Baseline) -> Baseline:
    """As the next agent finds it."""
    (found,) = baseline.unpack(baseline.pack([one]))
    return found


@given(CONTENT, CONTENT, st.sampled_from([HASH, ARRAY, TRIE]))
def test_what_came_since_is_all_that_is_left(before: dict[int, int], since: dict[int, int], nature: Nature) -> None:
    now = {key: before.get(key, 0) + since.get(key, 0) for key in before | since}
    one = taken(before, nature)
    assert left(one, before) == {}
    assert left(kept(one), now) == {key: count for key, count in since.items() if count}
    assert not one.gone.any()


@given(st.lists(st.tuples(KEYS, st.lists(st.integers(0, 1000), min_size=4, max_size=4)), max_size=10))
def test_slots_of_histograms_are_taken_off_each(rows: list[tuple[int, list[int]]]) -> None:
    content = dict(rows)
    keys = as_keys(list(content))
    numbers = np.array(list(content.values()), np.uint64).reshape(len(content), 4)
    one = baseline.take(map_name="h", value="slots", map_id=7, since_ns=1, nature=HASH, keys=keys, numbers=numbers)
    found, since = kept(one).subtract(keys, numbers + np.array([0, 2, 0, 3], np.uint64))
    assert since.tolist() == [[0, 2, 0, 3]] * len(content)
    assert len(found) == len(content)


def test_a_key_that_came_anew_counts_what_it_holds_now() -> None:
    one = taken({1: 997, 2: 5})
    assert left(one, {1: 23, 2: 6}) == {1: 23, 2: 1}
    assert one.changed
    assert one.gone.tolist() == [True, False]
    # It has overtaken what it held before: that does not make it the old one again.
    assert left(one, {1: 1000, 2: 6}) == {1: 1000, 2: 1}
    assert left(kept(one), {1: 1001, 2: 6}) == {1: 1001, 2: 1}, "the next agent knows it, too"


def test_a_key_that_a_whole_reading_does_not_show_is_gone() -> None:
    one = taken({1: 997, 2: 5})
    assert left(one, {2: 5}) == {}
    assert left(one, {1: 998, 2: 5}) == {1: 998}
    patient = taken({1: 997, 2: 5}, TRIE)
    assert left(patient, {2: 5}) == {}, "of a trie a reading may miss a key that is there"
    assert left(patient, {1: 998, 2: 5}) == {1: 1}


def test_counters_of_32_bits_in_arrays_wrap_and_those_in_hashes_begin_anew() -> None:
    before, now = {3: 2**32 - 23}, {3: 974}
    assert left(taken(before, NARROW_ARRAY), now) == {3: 997}
    # Over all CPUs a sum is larger than one counter; where nothing wrapped nothing is cut off.
    assert left(taken({3: 5}, NARROW_ARRAY), {3: 2**33}) == {3: 2**33 - 5}
    narrow_hash = taken(before, Nature(fixed=False, listed=True, bits=32))
    assert left(narrow_hash, now) == {3: 974}
    assert narrow_hash.gone.all()


def test_of_a_key_that_a_reading_shows_twice_the_last_is_newest() -> None:
    keys, numbers = as_keys([9, 1, 9]), np.array([5, 7, 6], np.uint64)
    one = baseline.take(map_name="m", value="", map_id=7, since_ns=1, nature=HASH, keys=keys, numbers=numbers)
    assert left(one, {1: 8, 9: 8}) == {1: 1, 9: 2}


def test_nothing_held_before_is_an_empty_baseline() -> None:
    one = kept(taken({4: 0}))
    assert len(one.keys) == 0
    assert left(one, {4: 23}) == {4: 23}
    without = baseline.take(
        map_name="m", value="", map_id=7, since_ns=1, nature=TRIE, keys=np.zeros((0, 0), np.uint8),
        numbers=np.zeros(0, np.uint64),
    )  # fmt: skip
    assert left(kept(without), {4: 23}) == {4: 23}


@given(CONTENT, CONTENT)
def test_several_are_kept_together(first: dict[int, int], second: dict[int, int]) -> None:
    several = [taken(first, HASH, 1), taken(second, NARROW_ARRAY, 2)]
    left(several[0], dict(list(first.items())[::2]))
    found = baseline.unpack(baseline.pack(several) + bytes(100))
    for one, other in zip(several, found, strict=True):
        assert (one.map, one.value, one.map_id, one.since_ns, one.nature) == (
            other.map, other.value, other.map_id, other.since_ns, other.nature,
        )  # fmt: skip
        assert np.array_equal(one.keys, other.keys)
        assert np.array_equal(one.numbers, other.numbers)
        assert np.array_equal(one.gone, other.gone)


@given(CONTENT, st.data())
def test_what_is_damaged_is_not_believed(content: dict[int, int], data: st.DataObject) -> None:
    whole = baseline.pack([taken(content)])
    at = data.draw(st.integers(0, 23))  # magic and lengths; what is packed has its digest
    broken = bytearray(whole)
    broken[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match=r"baseline"):
        baseline.unpack(bytes(broken))
    with pytest.raises(ValueError, match=r"baseline"):
        baseline.unpack(whole[: data.draw(st.integers(0, len(whole) - 1))])


class JoiningAHash(RuleBasedStateMachine):
    """A program counts and takes keys away; agents read, keep, die and come back. Truth is counted beside it."""

    @initialize(before=st.dictionaries(KEYS, st.integers(1, 9), max_size=8))
    def join(self, before: dict[int, int]) -> None:
        self.map = dict(before)
        self.one = taken(before)
        self.pinned = bytearray(baseline.pack([self.one]))
        self.truth: Counter[int] = Counter()
        self.said: dict[int, int] = {}
        self.deleted_unseen: set[int] = set()

    @rule(key=KEYS, times=st.integers(1, 9))
    def count(self, key: int, times: int) -> None:
        self.map[key] = self.map.get(key, 0) + times
        self.truth[key] += times

    @rule(key=KEYS)
    def take_away(self, key: int) -> None:
        if self.map.pop(key, None) is not None:
            self.deleted_unseen.add(key)
            self.truth[key] = 0  # what the entry held is gone with it, for whoever reads

    @rule()
    def read(self) -> None:
        self.said = left(self.one, self.map)
        gone = baseline.gone_bits([self.one])
        self.pinned[baseline.GONE_AT : baseline.GONE_AT + len(gone)] = gone
        for key, count in self.said.items():
            assert 0 < count <= self.truth[key], "nothing of before, and nothing twice"
        for key, count in self.truth.items():
            if key not in self.deleted_unseen:
                assert self.said.get(key, 0) == count
        self.deleted_unseen &= {key for key in self.map if self.said.get(key, 0) != self.truth[key]}

    @rule()
    def kill(self) -> None:
        (self.one,) = baseline.unpack(bytes(self.pinned))

    @invariant()
    def never_more_than_the_map_holds(self) -> None:
        assert all(count <= self.map.get(key, count) or key in self.deleted_unseen for key, count in self.said.items())


TestJoiningAHash = JoiningAHash.TestCase
