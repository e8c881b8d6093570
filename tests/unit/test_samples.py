"""What is sent: every reading adds up, nothing comes twice, and nothing that is not acknowledged is given back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from probefleet_agent import samples
from probefleet_agent.baseline import Nature
from probefleet_agent.pods import PolicyUid
from probefleet_agent.samples import Classified, GroupKey, Mark, Rows, Stream
from probefleet_wire import columns
from probefleet_wire.v1 import stream_pb2

U32 = st.integers(0, 2**32 - 1)
#: Raw key → how often it was counted. The group is the key's remainder by three.
readings = st.dictionaries(U32, st.integers(0, 2**48), max_size=30)
CALLS = (PolicyUid("p"), "calls", "boot:1")
OPENS = (PolicyUid("p"), "opens", "boot:2")


def mark(position: int) -> Mark:
    """Records of eight bytes."""
    return Mark(position, position // 8, 0)


def as_keys(numbers: Sequence[int]) -> npt.NDArray[np.uint8]:
    return np.array(numbers, "<u4").view(np.uint8).reshape(len(numbers), 4)


def as_numbers(keys: npt.NDArray[np.uint8]) -> list[int]:
    numbers: list[int] = np.ascontiguousarray(keys).view("<u4").reshape(-1).tolist()
    return numbers


class Classifier:
    """Groups by the remainder of three; remembers what it was asked; some keys are refused, some must wait."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.refused: set[int] = set()
        self.pending: set[int] = set()
        self.slot = 0

    def __call__(self, keys: npt.NDArray[np.uint8]) -> Classified:
        numbers = as_numbers(keys)
        self.asked += numbers
        groups: list[GroupKey | None] = [
            None if number in self.refused | self.pending else (f"group {number % 3}", number % 3) for number in numbers
        ]
        pending = np.array([number in self.pending for number in numbers], bool)
        return Classified(groups, pending, np.array([number % 5 for number in numbers], np.int64))


class Operator:
    """The other end: collects tables, as the operator does."""

    def __init__(self) -> None:
        self.keys: list[GroupKey] = []
        self.totals: dict[GroupKey, list[int]] = {}

    def take(self, table: stream_pb2.Table | None) -> None:
        if table is None:
            return
        assert table.first_new_row == len(self.keys)
        parts = [columns.read_column(column, table.new_rows) for column in table.keys]
        self.keys += [tuple(key) for key in zip(*(list(part) for part in parts), strict=True)]
        if table.other_row:
            self.keys[table.other_row - 1] = ()
        rows = columns.unpack_unsigned(table.rows, limit=100_000).tolist()
        values = columns.unpack_unsigned(table.values, limit=1_000_000).reshape(-1, table.width).tolist()
        for row, value in zip(rows, values, strict=True):
            self.totals[self.keys[row]] = value


HASH, ARRAY_OF_U32 = Nature(fixed=False, listed=True), Nature(fixed=True, listed=False, bits=32)


def rows(width: int = 1, fold: str = "sum", nature: Nature | None = None) -> Rows:
    return Rows(width, ("name", "number"), fold, nature)


def read(into: Rows, reading: dict[int, int], classifier: Classifier) -> None:
    into.update(as_keys(list(reading)), np.array(list(reading.values()), np.uint64), classifier)


def sums(reading: dict[int, int]) -> dict[GroupKey, list[int]]:
    totals: Counter[GroupKey] = Counter()
    for key, count in reading.items():
        totals[f"group {key % 3}", key % 3] += count
    return {group: [total] for group, total in totals.items()}


@given(readings, st.randoms(use_true_random=False))
def test_totals_are_sums_by_group_in_whatever_order_keys_come(reading: dict[int, int], random: object) -> None:
    shuffled = list(reading.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    operator, table = Operator(), rows()
    read(table, dict(shuffled), Classifier())
    operator.take(table.table())
    assert operator.totals == sums(reading)


@given(st.lists(readings, min_size=1, max_size=5))
def test_totals_are_those_of_the_last_reading_however_it_grew(increments: list[dict[int, int]]) -> None:
    operator, table, counted = Operator(), rows(), Counter[int]()
    for increment in increments:
        counted.update(increment)
        read(table, dict(counted), Classifier())
        operator.take(table.table())
    assert operator.totals == sums(dict(counted))


@given(readings)
def test_reading_again_changes_nothing_and_sends_nothing(reading: dict[int, int]) -> None:
    table, classifier = rows(), Classifier()
    read(table, reading, classifier)
    table.table()
    read(table, reading, classifier)
    assert table.table() is None


@given(readings, st.data())
def test_a_key_that_a_reading_shows_twice_counts_once_as_read_last(
    reading: dict[int, int], data: st.DataObject
) -> None:
    twice = data.draw(st.lists(st.sampled_from(sorted(reading)), max_size=9)) if reading else []
    seen = [(key, max(reading[key] - 1, 0)) for key in twice] + list(reading.items())
    operator, table, classifier = Operator(), rows(), Classifier()
    for _ in range(2):  # keys that are new, and keys that are known
        table.update(as_keys([key for key, _ in seen]), np.array([count for _, count in seen], np.uint64), classifier)
    operator.take(table.table())
    assert operator.totals == sums(reading)


@given(readings)
def test_a_key_is_classified_once(reading: dict[int, int]) -> None:
    table, classifier = rows(), Classifier()
    for _ in range(3):
        read(table, reading, classifier)
    assert sorted(classifier.asked) == sorted(reading)


def test_only_what_changed_is_sent() -> None:
    table, classifier = rows(), Classifier()
    read(table, {0: 23, 1: 29}, classifier)
    table.table()
    read(table, {0: 23, 1: 31, 2: 1}, classifier)
    changed = table.table()
    assert changed is not None
    assert (changed.first_new_row, changed.new_rows) == (2, 1)
    assert columns.unpack(changed.rows, limit=9).tolist() == [1, 2]
    assert columns.unpack(changed.values, limit=9).tolist() == [31, 1]


@given(st.lists(readings, min_size=1, max_size=4))
def test_a_new_stream_carries_everything(increments: list[dict[int, int]]) -> None:
    table, counted, before = rows(), Counter[int](), Operator()
    for increment in increments:
        counted.update(increment)
        read(table, dict(counted), Classifier())
        before.take(table.table())
    table.restart_stream()
    after = Operator()
    after.take(table.table())
    assert after.totals == before.totals == sums(dict(counted))
    assert after.keys == before.keys


@given(st.lists(st.dictionaries(st.integers(0, 9), st.integers(0, 99)), max_size=9), st.sampled_from([1, 4]))
def test_what_a_key_had_counted_when_it_went_stays_counted(increments: list[dict[int, int]], width: int) -> None:
    operator, table, classifier = Operator(), rows(width, nature=HASH), Classifier()
    held, counted = Counter[int](), Counter[int]()
    for increment in increments:
        held = Counter({key: held[key] + count for key, count in increment.items()})  # all others are deleted
        counted.update(increment)
        read(table, held, classifier)
        operator.take(table.table())
    assert {group: sum(slots) for group, slots in operator.totals.items()} == {
        group: total for group, (total,) in sums(counted).items()
    }


def test_a_key_that_went_and_came_between_two_readings_is_added_and_told() -> None:
    operator, table, classifier = Operator(), rows(nature=HASH), Classifier()
    for reading in ({0: 23, 3: 7}, {0: 5, 3: 11}, {3: 11}):
        read(table, reading, classifier)
        operator.take(table.table())
    assert operator.totals == {("group 0", 0): [39]}
    assert table.went == 2


@pytest.mark.parametrize("nature", [HASH, None])
def test_keys_that_went_take_no_memory(nature: Nature | None) -> None:
    operator, table, classifier = Operator(), rows(nature=nature), Classifier()
    classifier.refused = set(range(0, 6000, 2))
    for number in range(0, 6000, 60):
        read(table, dict.fromkeys(range(number, number + 60), 7), classifier)
        operator.take(table.table())
        assert table._raw is not None and len(table._raw) == len(table._row_of) == 60
    assert sum(total for (total,) in operator.totals.values()) == 7 * (3000 if nature else 30)


def test_slots_of_a_value_that_began_anew_are_added_each() -> None:
    operator, table = Operator(), rows(width=3, nature=HASH)
    for slots in ([1, 2, 3], [4, 0, 3]):
        table.update(as_keys([0]), np.array([slots], np.uint64), Classifier())
        operator.take(table.table())
    assert operator.totals == {("group 0", 0): [5, 2, 6]}


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1))
def test_a_32_bit_counter_in_an_array_is_followed_over_its_end(steps: list[int]) -> None:
    operator, table, classifier, counted = Operator(), rows(nature=ARRAY_OF_U32), Classifier(), 0
    for step in steps:
        counted += step
        read(table, {0: counted % 2**32}, classifier)
        operator.take(table.table())
    assert operator.totals == {("group 0", 0): [counted]}
    assert not table.went


def test_a_32_bit_counter_that_a_program_sets_to_zero_has_not_wrapped() -> None:
    operator, table, classifier = Operator(), rows(nature=ARRAY_OF_U32), Classifier()
    for count in (23, 0, 7):
        read(table, {0: count}, classifier)
        operator.take(table.table())
    assert operator.totals == {("group 0", 0): [30]}
    assert table.went == 1


@given(readings)
def test_what_must_wait_counts_whole_once_its_owner_is_known(reading: dict[int, int]) -> None:
    operator, table, classifier = Operator(), rows(), Classifier()
    classifier.pending = {key for key in reading if key % 2}
    read(table, reading, classifier)
    operator.take(table.table())
    assert table.pending_count == len(classifier.pending)
    assert operator.totals == sums({key: count for key, count in reading.items() if key % 2 == 0})
    classifier.pending = set()
    read(table, reading, classifier)
    operator.take(table.table())
    assert table.pending_count == 0
    assert operator.totals == sums(reading)


def test_what_is_refused_counts_never_and_is_not_asked_again() -> None:
    table, classifier = rows(), Classifier()
    classifier.refused = {1}
    for _ in range(2):
        read(table, {1: 997}, classifier)
    assert table.table() is None
    assert table.pending_count == 0
    assert classifier.asked == [1]


@pytest.mark.parametrize(("fold", "expected"), [("max", 29), ("min", 23), ("sum", 52)])
def test_keys_of_one_group_fold_as_the_output_says(fold: str, expected: int) -> None:
    operator, table = Operator(), rows(fold=fold)
    read(table, {0: 23, 3: 29}, Classifier())
    operator.take(table.table())
    assert operator.totals == {("group 0", 0): [expected]}


def test_a_gauge_may_fall() -> None:
    operator, table = Operator(), rows(fold="max")
    for value in (29, 23):
        read(table, {0: value}, Classifier())
        operator.take(table.table())
    assert operator.totals == {("group 0", 0): [23]}


@pytest.mark.parametrize("fold", ["max", "min", "sum"])
def test_a_gauge_that_is_gone_has_no_value(fold: str) -> None:
    table, said = rows(fold=fold), []
    for reading in ({0: 23, 1: 29}, {1: 29}, {1: 29}, {0: 0, 1: 29}):
        read(table, reading, Classifier())
        news = table.table()
        said.append(news and tuple(columns.unpack(each, limit=9).tolist() if each else [] for each in (
            news.rows, news.values, news.gone)))  # fmt: skip
    assert said == [([0, 1], [23, 29], []), ([], [], [0]), None, ([0], [0], [])]
    read(table, {1: 29}, Classifier())
    table.restart_stream()
    news = table.table()
    assert news is not None
    assert (columns.unpack(news.rows, limit=9).tolist(), columns.unpack(news.gone, limit=9).tolist()) == ([1], [0])


def test_a_slot_in_the_key_becomes_a_slot_of_the_row() -> None:
    operator, table = Operator(), rows(width=4)
    # Slots are remainders of five; the last of the row is open to the right.
    read(table, {0: 2, 6: 3, 3: 5, 9: 7}, Classifier())
    operator.take(table.table())
    assert operator.totals == {("group 0", 0): [2, 3, 0, 12]}


def test_slots_in_the_value_are_summed_each_for_itself() -> None:
    operator, table = Operator(), rows(width=3)
    table.update(as_keys([0, 3]), np.array([[1, 2, 3], [10, 20, 30]], np.uint64), Classifier())
    operator.take(table.table())
    assert operator.totals == {("group 0", 0): [11, 22, 33]}


def test_groups_beyond_the_limit_share_one_row_and_no_count_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_ROWS", 2)

    def each(keys: npt.NDArray[np.uint8]) -> Classified:
        numbers = as_numbers(keys)
        zeros = np.zeros(len(numbers), np.int64)
        return Classified([(f"key {number}", number) for number in numbers], zeros.astype(bool), zeros)

    operator, table = Operator(), rows()
    table.update(as_keys([1, 2]), np.array([3, 5], np.uint64), each)
    assert not table.overflowed
    table.update(as_keys([1, 2, 3, 4]), np.array([3, 5, 7, 11], np.uint64), each)
    operator.take(table.table())
    assert table.overflowed
    assert operator.totals == {("key 1", 1): [3], ("key 2", 2): [5], (): [18]}


def test_the_row_of_the_rest_is_no_groups_and_leaves_the_numbers_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_ROWS", 3)
    numbers = [2**64 - 1, 0xFFFFFFFF81000001, 0xFFFFFFFF81000002, 7, 11]  # addresses of the kernel

    def each(keys: npt.NDArray[np.uint8]) -> Classified:
        zeros = np.zeros(len(keys), np.int64)
        return Classified([(number,) for number in numbers], zeros.astype(bool), zeros)

    operator, table = Operator(), Rows(1, ("address",))
    table.update(as_keys(range(5)), np.array([2, 3, 5, 7, 11], np.uint64), each)
    operator.take(table.table())
    assert operator.totals == {(number,): [count] for number, count in zip(numbers[:3], (2, 3, 5), strict=True)} | {
        (): [18]
    }


def test_an_output_without_groups_is_one_row() -> None:
    table = Rows(1, ())
    table.update(
        as_keys([1, 2]),
        np.array([3, 5], np.uint64),
        lambda keys: Classified([()] * len(keys), np.zeros(len(keys), bool), np.zeros(len(keys), np.int64)),
    )
    sent = table.table()
    assert sent is not None
    assert (sent.new_rows, list(sent.keys)) == (1, [])
    assert columns.unpack(sent.values, limit=1).tolist() == [8]


def test_an_empty_map_sends_nothing() -> None:
    table = rows()
    read(table, {}, Classifier())
    assert table.table() is None


# Sequence numbers and acknowledgements.


def test_a_window_of_batches_may_be_under_way() -> None:
    stream = Stream()
    numbers = []
    while stream.open:
        numbers.append(stream.number([]))
    assert numbers == list(range(1, samples.WINDOW + 1))
    stream.acknowledge(1)
    assert stream.open


def test_an_acknowledgement_gives_back_all_rings_up_to_it() -> None:
    stream = Stream()
    stream.number([(CALLS, mark(8)), (OPENS, mark(16))])
    stream.number([(CALLS, mark(24))])
    stream.number([(CALLS, mark(40))])
    assert stream.acknowledge(2) == {CALLS: mark(24), OPENS: mark(16)}
    assert stream.acknowledge(2) == {}
    assert stream.acknowledge(1) == {}
    assert stream.acknowledge(3) == {CALLS: mark(40)}
    assert stream.acknowledged == 3


def test_an_acknowledgement_of_what_was_never_sent_is_an_error() -> None:
    stream = Stream()
    stream.number([])
    with pytest.raises(ValueError, match="acknowledged batch 2, but only 1 were sent"):
        stream.acknowledge(2)


class Acknowledgements(RuleBasedStateMachine):
    """Batches and acknowledgements in any order: what is given back was acknowledged, once, and never falls."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream()
        self.position = 0
        self.carried: dict[int, int] = {}
        self.given_back = 0

    @precondition(lambda self: self.stream.open)
    @rule(size=st.integers(0, 100))
    def send(self, size: int) -> None:
        self.position += size
        self.carried[self.stream.number([(CALLS, mark(self.position))])] = self.position

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        sequence = data.draw(st.integers(0, self.stream.sequence))
        before = self.stream.acknowledged
        given = self.stream.acknowledge(sequence)
        if sequence > before:
            assert given == {CALLS: mark(self.carried[sequence])}
            assert given[CALLS].position >= self.given_back
            self.given_back = given[CALLS].position
        else:
            assert given == {}

    @invariant()
    def nothing_is_given_back_that_was_not_acknowledged(self) -> None:
        acknowledged = [end for sequence, end in self.carried.items() if sequence <= self.stream.acknowledged]
        assert self.given_back == max(acknowledged, default=0)
        assert self.stream.sequence - self.stream.acknowledged <= samples.WINDOW


test_ring_positions_follow_acknowledgements = Acknowledgements.TestCase
test_ring_positions_follow_acknowledgements.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
