"""Merges: order and bundling of samples make no difference; percentiles are what the buckets can know."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_wire import merge
from probefleet_wire.v1.plan_pb2 import Histogram, Output

GROUPS = 5
U64 = st.integers(0, 2**64 - 1)
Rows = list[tuple[int, int, int]]  # group, time, value
rows = st.lists(st.tuples(st.integers(0, GROUPS - 1), st.integers(0, 3), U64), max_size=30)


def merged(samples: Rows, kind: int) -> list[int]:
    group = np.array([g for g, _, _ in samples], np.int64)
    time = np.array([t for _, t, _ in samples], np.int64)
    value = np.array([v for _, _, v in samples], np.uint64)
    return merge.combine(group, value, GROUPS, merge=kind, times_ns=time).tolist()


EXPECTED: dict[int, Callable[[list[tuple[int, int]]], int]] = {
    Output.SUM: lambda rows: sum(v for _, v in rows) % 2**64,
    Output.MAX: lambda rows: max((v for _, v in rows), default=0),
    Output.MIN: lambda rows: min((v for _, v in rows), default=2**64 - 1),
    Output.LATEST: lambda rows: max(rows, default=(0, 0))[1],
}


@pytest.mark.parametrize("kind", EXPECTED)
@given(samples=rows)
def test_a_merge_is_what_a_loop_would_say(kind: int, samples: Rows) -> None:
    expected = [EXPECTED[kind]([(t, v) for g, t, v in samples if g == group]) for group in range(GROUPS)]
    assert merged(samples, kind) == expected


@pytest.mark.parametrize("kind", EXPECTED)
@given(samples=rows, data=st.data())
def test_order_makes_no_difference(kind: int, samples: Rows, data: st.DataObject) -> None:
    assert merged(data.draw(st.permutations(samples)), kind) == merged(samples, kind)


@pytest.mark.parametrize("kind", [Output.SUM, Output.MAX, Output.MIN])
@given(first=rows, second=rows, third=rows)
def test_bundling_makes_no_difference(kind: int, first: Rows, second: Rows, third: Rows) -> None:
    def bundle(samples: Rows) -> Rows:
        return [(group, 0, value) for group, value in enumerate(merged(samples, kind))]

    whole = merged(first + second + third, kind)
    assert merged(bundle(first) + bundle(second + third), kind) == whole
    assert merged(bundle(first + second) + bundle(third), kind) == whole
    assert merged(bundle([]) + bundle(first + second + third), kind) == whole  # identity


@pytest.mark.parametrize("kind", [Output.MAX, Output.MIN, Output.LATEST])
@given(samples=rows)
def test_repetition_makes_no_difference_to_what_is_idempotent(kind: int, samples: Rows) -> None:
    assert merged(samples + samples, kind) == merged(samples, kind)


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(U64, min_size=4, max_size=4)), max_size=20))
def test_histograms_merge_slot_by_slot(samples: list[tuple[int, list[int]]]) -> None:
    group = np.array([g for g, _ in samples], np.int64)
    slots = np.array([s for _, s in samples], np.uint64).reshape(-1, 4)
    expected = [[sum(s[i] for g, s in samples if g == want) % 2**64 for i in range(4)] for want in range(4)]
    assert merge.sum_by(group, slots, 4).tolist() == expected
    if samples:
        assert merge.max_by(group, slots, 4)[group[0]].tolist() == [
            max(s[i] for g, s in samples if g == group[0]) for i in range(4)
        ]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_a_32_bit_counter_is_followed_over_its_end(steps: list[int]) -> None:
    total, truth = np.zeros(1, np.uint64), 0
    for step in steps:
        truth += step
        total = merge.unwrap32(total, np.array([truth % 2**32], np.uint32))
    assert total.tolist() == [truth]


def bounds(scale: int, width: int, step: int = 0) -> list[tuple[float, float]]:
    return [(float(low), float(high)) for low, high in zip(*merge.slot_bounds(scale, step, width), strict=True)]


def test_slots_lie_where_each_scale_puts_them() -> None:
    assert bounds(Histogram.LOG2, 4) == [(0, 2), (2, 4), (4, 8), (8, math.inf)]
    assert bounds(Histogram.LOG2_BCC, 4) == [(0, 1), (0, 2), (2, 4), (4, math.inf)]
    assert bounds(Histogram.LINEAR, 3, 10) == [(0, 10), (10, 20), (20, math.inf)]


@given(
    scale=st.sampled_from([Histogram.LOG2, Histogram.LOG2_BCC, Histogram.LINEAR]),
    values=st.lists(st.integers(0, 2**20), min_size=1, max_size=200),
    quantile=st.sampled_from([0.5, 0.9, 0.99]),
)
def test_a_percentile_lies_in_the_slot_of_the_true_one(scale: int, values: list[int], quantile: float) -> None:
    width = 22
    limits = merge.slot_bounds(scale, 60_000, width)
    index = {
        Histogram.LOG2: lambda v: max(v.bit_length() - 1, 0),
        Histogram.LOG2_BCC: lambda v: max(v.bit_length(), 1),
        Histogram.LINEAR: lambda v: v // 60_000,
    }[scale]
    counts = np.zeros(width, np.uint64)
    for value in values:
        counts[index(value)] += np.uint64(1)
    true = sorted(values)[max(math.ceil(quantile * len(values) - 1e-9) - 1, 0)]
    got = merge.percentile(counts, limits, quantile)
    assert got is not None
    assert limits[0][index(true)] <= got.value <= limits[1][index(true)]


@pytest.mark.parametrize(
    ("counts", "quantile", "expected"),
    [
        ([0, 10, 0, 0], 0.5, merge.Percentile(3.0)),  # halfway through [2, 4)
        ([5, 5, 0, 0], 0.5, merge.Percentile(2.0)),  # the very end of slot 0
        ([5, 5, 0, 0], 0.0, merge.Percentile(0.0)),
        ([0, 0, 4, 0], 0.25, merge.Percentile(5.0)),
        ([1, 0, 0, 99], 0.5, merge.Percentile(8.0, at_least=True)),  # the open slot: no more is known
        ([0, 0, 0, 0], 0.5, None),
    ],
)
def test_percentiles_by_hand(counts: list[int], quantile: float, expected: merge.Percentile | None) -> None:
    limits = merge.slot_bounds(Histogram.LOG2, 0, 4)
    assert merge.percentile(np.array(counts, np.uint64), limits, quantile) == expected


def test_percentiles_of_many_rows_at_once() -> None:
    counts = np.array([[0, 10, 0, 0], [0, 0, 0, 0], [1, 0, 0, 99]], np.uint64)
    value, at_least = merge.percentiles(counts, merge.slot_bounds(Histogram.LOG2, 0, 4), 0.5)
    assert [None if math.isnan(v) else v for v in value] == [3.0, None, 8.0]
    assert at_least.tolist() == [False, False, True]


@given(st.lists(st.lists(st.integers(0, 1 << 20), min_size=8, max_size=8), min_size=1, max_size=5))
def test_a_sum_lies_between_those_of_the_slots_ends(rows: list[list[int]]) -> None:
    counts = np.array(rows, np.uint64)
    low, high = bounds = merge.slot_bounds(Histogram.LOG2, 0, 8)
    found = merge.sums(counts, bounds)
    # The last slot is open: its values are taken for where it begins.
    ends = np.where(np.isfinite(high), high - 1, low)
    assert (counts @ low <= found).all() and (found <= counts @ ends).all()
    # Merged first or added up later: the same.
    assert math.isclose(merge.sums(counts.sum(axis=0, keepdims=True), bounds)[0], found.sum(), rel_tol=1e-12)


def test_a_sum_of_small_whole_numbers_is_exact_where_slots_hold_one_each() -> None:
    counts = np.array([[1000, 0, 0, 0, 0, 0], [0, 0, 0, 0, 100, 0]], np.uint64)
    assert merge.sums(counts, merge.slot_bounds(Histogram.LINEAR, 1, 6)).tolist() == [0, 400]


@given(st.lists(U64, max_size=50), st.integers(-1, 60))
def test_the_top_is_the_head_of_the_sorted_rows(weights: list[int], limit: int) -> None:
    expected = sorted(range(len(weights)), key=lambda row: (-weights[row], row))[: max(limit, 0)]
    assert merge.top(np.array(weights, np.uint64), limit).tolist() == expected


def test_equal_weights_keep_their_order() -> None:
    assert merge.top(np.array([5, 7, 5, 7, 5], np.uint64), 3).tolist() == [1, 3, 0]
