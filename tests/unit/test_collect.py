"""Readers: from bytes of maps and rings to tables and chunks: only what the policy selects, and nothing too early."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_agent import collect, pods
from probefleet_agent.baseline import Nature
from probefleet_agent.collect import EventReader, TableReader
from probefleet_agent.decode import DecodeError, Layout
from probefleet_agent.pods import Book, CgroupId, PodUid, PolicyUid, Selected
from probefleet_agent.samples import Mark
from probefleet_wire import columns
from probefleet_wire.btf_layout import Field
from probefleet_wire.v1 import plan_pb2, stream_pb2
from probefleet_wire.v1.plan_pb2 import Output

MINE = PolicyUid("mine")
WEB, DB, NEW = (PodUid(f"{n}2345678-1111-4222-8333-444455556666") for n in "abc")
CONTAINER = "5e" * 32
IN_WEB, IN_DB, IN_NEW, UNSEEN = 2, 3, 5, 13
PLAN = plan_pb2.Plan(policy_uid=MINE)
BOOTED_NS = 1_700_000_000_000_000_000

CGROUP = Field("cgroup", 0, 8, "int", typedefs=("cgroup_id_t",))
PORT = Field("port", 8, 2, "int", typedefs=("port_t",))
SLOT = Field("slot", 12, 4, "int")
COUNT = Field("", 0, 8, "int")
BY_PORT = Layout((CGROUP, PORT, SLOT), 16, (COUNT,), 8)


class Machine:
    machine = "x86_64"
    wall_minus_ktime_ns = BOOTED_NS

    def command(self, pid: int) -> str:
        return f"command-{pid}"

    def learn(self, pid: int, command: str) -> None:
        pass

    def user(self, uid: int) -> str:
        return f"user-{uid}"

    def device(self, number: int) -> str:
        return f"device-{number}"

    def function(self, address: int) -> str:
        return f"function-{address}"


class Frames:
    """Stacks whose text says which they are."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def folded(
        self, pids: Sequence[int], kernel_ids: Sequence[int | None], user_ids: Sequence[int | None]
    ) -> list[str]:
        self.asked += pids
        return [f"{pid};{user};{kernel}" for pid, kernel, user in zip(pids, kernel_ids, user_ids, strict=True)]


@pytest.fixture
def book() -> Book:
    """``MINE`` selects the pod ``WEB``, not ``DB``; of ``NEW`` the operator has said nothing yet."""
    book = Book()
    book.learn(
        {
            CgroupId(IN_WEB): f"/kubepods/pod{WEB}/{CONTAINER}",
            CgroupId(IN_DB): f"/kubepods/pod{DB}",
            CgroupId(IN_NEW): f"/kubepods/pod{NEW}",
        }
    )
    book.select({MINE: Selected(False, frozenset({WEB}))}, [WEB, DB])
    return book


def reader(
    book: Book,
    output: Output,
    layout: Layout = BY_PORT,
    stacks: collect.Stacks | None = None,
    nature: Nature | None = None,
) -> TableReader:
    return TableReader(PLAN, output, layout, book, Machine(), stacks, nature=nature)


def keys(*entries: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    return rectangle([struct.pack("<QHxxI", *entry) for entry in entries], 16)


def counts(*numbers: int) -> npt.NDArray[np.uint8]:
    return rectangle([struct.pack("<Q", number) for number in numbers], 8)


def rectangle(parts: Sequence[bytes], width: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(parts), np.uint8).reshape(len(parts), width)


def content(table: stream_pb2.Table | None) -> dict[tuple[object, ...], list[int]]:
    """A first table, whole: group → values."""
    assert table is not None
    parts = [list(columns.read_column(column, table.new_rows)) for column in table.keys]
    groups = list(zip(*parts, strict=True)) if parts else [()] * table.new_rows
    values = columns.unpack_unsigned(table.values, limit=9999).reshape(-1, table.width)
    return dict(zip(groups, values.tolist(), strict=True))


def test_only_the_selected_pod_counts_and_under_its_own_name(book: Book) -> None:
    table = reader(book, Output(kind=Output.COUNTER, group_by=["pod", "key.port"]))
    table.read(keys((IN_WEB, 80, 0), (IN_DB, 80, 0), (IN_NEW, 80, 0), (UNSEEN, 80, 0)), counts(23, 29, 31, 37))
    assert content(table.rows.table()) == {(WEB, 80): [23]}
    assert table.rows.pending_count == 2


def test_counts_that_wait_for_a_name_too_long_are_said_to_be_in_no_row(book: Book) -> None:
    table = reader(book, Output(kind=Output.COUNTER, group_by=["workload"]))
    waiting = keys((IN_WEB, 80, 0), (IN_NEW, 80, 0), (IN_NEW, 443, 0), (UNSEEN, 80, 0))
    table.read(waiting, counts(23, 29, 31, 37))
    assert table.unnamed(1) == 0, "names take a moment to come"
    table.read(waiting, counts(23, 29, 31, 37))
    assert table.unnamed(1 + collect.HOLD_NS) == 2
    book.select({MINE: Selected(False, frozenset({WEB, NEW}))}, [WEB, DB, NEW])
    table.read(waiting, counts(23, 29, 31, 37))
    assert table.unnamed(2 + collect.HOLD_NS) == 1, "one has its name"
    table.read(keys((IN_WEB, 80, 0)), counts(23))
    assert table.unnamed(3 + collect.HOLD_NS) == 0


def test_counts_of_a_pod_arrive_whole_when_the_operator_names_it(book: Book) -> None:
    table = reader(book, Output(kind=Output.COUNTER, group_by=["workload"]))
    table.read(keys((IN_NEW, 80, 0)), counts(23))
    assert table.rows.table() is None
    book.select({MINE: Selected(False, frozenset({WEB, NEW}))}, [WEB, DB, NEW])
    table.read(keys((IN_NEW, 80, 0)), counts(997))
    assert content(table.rows.table()) == {(NEW,): [997]}


def test_a_pod_that_is_selected_after_it_was_refused_counts_from_then_on(book: Book) -> None:
    table = reader(book, Output(kind=Output.COUNTER, group_by=["workload"]))
    counted = keys((IN_WEB, 80, 0), (IN_DB, 80, 0), (IN_DB, 443, 0)), counts(23, 29, 31)
    table.read(*counted)
    book.select({MINE: Selected(False, frozenset({WEB, DB}))}, [WEB, DB])  # its labels have changed
    table.read(*counted)
    assert content(table.rows.table()) == {(WEB,): [23], (DB,): [60]}


def test_containers_are_columns_beside_their_pods(book: Book) -> None:
    table = reader(book, Output(kind=Output.TOPK, group_by=["container", "node"]))
    table.read(keys((IN_WEB, 80, 0), (IN_WEB, 443, 0)), counts(3, 5))
    assert content(table.rows.table()) == {(WEB, CONTAINER): [8]}


def test_a_map_without_cgroups_counts_for_everybody(book: Book) -> None:
    layout = Layout((Field("", 0, 4, "int", typedefs=("user_id_t",)),), 4, (COUNT,), 8)
    table = reader(book, Output(kind=Output.COUNTER, group_by=["key"]), layout)
    table.read(rectangle([struct.pack("<I", 33)], 4), counts(23))
    assert content(table.rows.table()) == {("user-33",): [23]}


def test_a_policy_may_say_which_field_is_the_cgroup(book: Book) -> None:
    layout = Layout((Field("where", 0, 8, "int"),), 8, (COUNT,), 8)
    output = Output(kind=Output.COUNTER, group_by=["pod"], decode={"key.where": "cgroup", "key.other": "integer"})
    table = reader(book, output, layout)
    table.read(counts(IN_WEB, IN_DB), counts(23, 29))
    assert content(table.rows.table()) == {(WEB,): [23]}


def test_a_field_that_the_key_does_not_have_is_said_before_any_event(book: Book) -> None:
    with pytest.raises(DecodeError, match="the key has no field 'prt'; its fields are: cgroup, port, slot"):
        reader(book, Output(kind=Output.COUNTER, group_by=["key.prt"]))


def test_a_histogram_takes_its_slot_from_the_key(book: Book) -> None:
    output = Output(kind=Output.HISTOGRAM, histogram=plan_pb2.Histogram(slots="key.slot"))
    table = reader(book, output)
    table.read(keys((IN_WEB, 80, 0), (IN_WEB, 443, 5), (IN_WEB, 80, 5), (IN_WEB, 80, 999)), counts(2, 3, 5, 7))
    values = content(table.rows.table())[()]
    assert {slot: value for slot, value in enumerate(values) if value} == {0: 2, 5: 8, 63: 7}


def test_a_histogram_whose_whole_key_is_the_slot(book: Book) -> None:
    layout = Layout((Field("", 0, 4, "int"),), 4, (COUNT,), 8)
    table = reader(book, Output(kind=Output.HISTOGRAM, histogram=plan_pb2.Histogram(slots="key")), layout)
    table.read(rectangle([struct.pack("<I", 7)], 4), counts(23))
    assert content(table.rows.table())[()][7] == 23


def test_a_histogram_in_an_array_of_the_value(book: Book) -> None:
    layout = Layout((CGROUP,), 8, (Field("slots", 0, 12, "int", shape=(3,)),), 12)
    output = Output(kind=Output.HISTOGRAM, value="slots", histogram=plan_pb2.Histogram(slots="value"))
    table = reader(book, output, layout)
    table.read(counts(IN_WEB), rectangle([struct.pack("<3I", 1, 2, 3)], 12))
    assert content(table.rows.table()) == {(): [1, 2, 3]}


def test_a_histogram_without_slots_is_refused_with_a_way_out(book: Book) -> None:
    output = Output(name="latency", map="hist", kind=Output.HISTOGRAM, histogram=plan_pb2.Histogram(slots="value"))
    with pytest.raises(DecodeError, match=r"output latency: hist holds one number a key.*key\.FIELD"):
        reader(book, output)


def test_a_counter_of_an_array_is_its_sum(book: Book) -> None:
    layout = Layout((CGROUP,), 8, (Field("slots", 0, 12, "int", shape=(3,)),), 12)
    table = reader(book, Output(kind=Output.COUNTER), layout)
    table.read(counts(IN_WEB), rectangle([struct.pack("<3I", 1, 2, 3)], 12))
    assert content(table.rows.table()) == {(): [6]}


@pytest.mark.parametrize(
    ("merge", "expected"), [(Output.MAX, 29), (Output.MIN, 23), (Output.SUM, 83), (Output.LATEST, 29)]
)
def test_a_gauge_folds_cpus_and_keys_as_its_merge_says(
    book: Book, merge: Output.Merge.ValueType, expected: int
) -> None:
    table = reader(book, Output(kind=Output.GAUGE, merge=merge))
    per_cpu = np.stack([counts(23, 31 - 6), counts(29, 6)], axis=1) if merge == Output.SUM else None
    values = per_cpu if per_cpu is not None else np.stack([counts(23, 24), counts(29, 25)], axis=1)
    table.read(keys((IN_WEB, 80, 0), (IN_WEB, 443, 0)), values)
    assert content(table.rows.table()) == {(): [expected]}


@pytest.mark.parametrize("nature", [Nature(fixed=False, listed=True), Nature(fixed=True, listed=False)])
def test_a_pod_whose_labels_match_no_more_counts_no_more_and_what_it_counted_stays(book: Book, nature: Nature) -> None:
    table = reader(book, Output(kind=Output.COUNTER, group_by=["workload"]), nature=nature)
    source, entries = events(book), keys((IN_WEB, 80, 0), (IN_WEB, 443, 0), (IN_DB, 80, 0))
    shown = []
    for selected, numbers in (
        ({WEB, DB}, (23, 7, 1)),
        ({DB}, (29, 7, 2)),  # the program goes on for it: not every program asks whose an event is
        ({DB}, (31, 3, 4)),  # and one of its keys began anew
        ({WEB, DB}, (33, 5, 8)),
    ):
        book.select({MINE: Selected(False, frozenset(selected), "app=web")}, [WEB, DB])
        table.read(entries, counts(*numbers))
        table.rows.restart_stream()
        shown.append(content(table.rows.table()))
    assert shown == [{(WEB,): [web], (DB,): [db]} for web, db in ((30, 1), (30, 2), (30, 4), (34, 8))]
    assert table.rows.left and not table.rows.went
    book.select({MINE: Selected(False, frozenset({DB}), "app=web")}, [WEB, DB])
    assert kept(chunk_of(source, [IN_WEB, IN_DB])) == [1032]


def test_what_a_relabelled_pod_holds_is_no_gauge_of_the_policy(book: Book) -> None:
    table = reader(book, Output(kind=Output.GAUGE, group_by=["workload"]))
    for selected in ({WEB, DB}, {DB}):
        book.select({MINE: Selected(False, frozenset(selected), "app=web")}, [WEB, DB])
        table.read(keys((IN_WEB, 80, 0), (IN_DB, 80, 0)), counts(23, 29))
        news = table.rows.table()
    assert news is not None
    assert (news.values, columns.unpack(news.gone, limit=9).tolist()) == (columns.pack(np.zeros(0, np.uint64)), [0])


@pytest.mark.parametrize(
    ("merge", "expected"), [(Output.MAX, 3), (Output.MIN, -7), (Output.SUM, -9), (Output.LATEST, 3)]
)
def test_a_gauge_below_zero_is_less_than_one_above(book: Book, merge: Output.Merge.ValueType, expected: int) -> None:
    layout = Layout((CGROUP,), 8, (Field("", 0, 4, "int", signed=True),), 4)
    values = rectangle([struct.pack("<i4xi4xi4x", *cpus) for cpus in ((-5, 0, 3), (-7, 0, 0))], 24).reshape(2, 3, 8)
    whole, alone = (reader(book, Output(kind=Output.GAUGE, merge=merge), layout) for _ in range(2))
    whole.read(counts(IN_WEB, IN_WEB + 100), values)
    book.learn({CgroupId(IN_WEB + 100): f"/kubepods/pod{WEB}"})
    whole.read(counts(IN_WEB, IN_WEB + 100), values)
    table = whole.rows.table()
    assert table is not None
    assert columns.unpack(table.values, limit=9).tolist() == [expected]
    alone.read(counts(IN_WEB), rectangle([struct.pack("<i", -5)], 4))  # not by CPU
    table = alone.rows.table()
    assert table is not None
    assert columns.unpack(table.values, limit=9).tolist() == [-5]


STACKED = Layout(
    (
        CGROUP,
        Field("pid", 8, 4, "int", typedefs=("pid_nr_t",)),
        Field("user", 12, 4, "int", signed=True, typedefs=("user_stack_id_t",)),
        Field("kernel", 16, 4, "int", signed=True, typedefs=("kernel_stack_id_t",)),
    ),
    20,
    (COUNT,),
    8,
)


def test_stacks_are_folded_once_and_only_those_that_count(book: Book) -> None:
    frames = Frames()
    table = reader(book, Output(kind=Output.STACKS, group_by=["pod"]), STACKED, frames)
    entries = rectangle([struct.pack("<QIii", IN_WEB, 7, 1, -14), struct.pack("<QIii", IN_DB, 11, 2, 3)], 20)
    for _ in range(2):
        table.read(entries, counts(23, 29))
    assert content(table.rows.table()) == {(WEB, "7;1;-14"): [23]}
    assert frames.asked == [7]


def test_a_stack_without_its_process_or_kernel_half_is_still_one(book: Book) -> None:
    layout = Layout((Field("", 0, 4, "int", typedefs=("stack_id_t",)),), 4, (COUNT,), 8)
    table = reader(book, Output(kind=Output.STACKS), layout, Frames())
    table.read(rectangle([struct.pack("<I", 5)], 4), counts(23))
    assert content(table.rows.table()) == {("0;5;None",): [23]}


def test_stacks_without_a_stack_trace_map_are_an_error_with_the_outputs_name(book: Book) -> None:
    table = reader(book, Output(name="flames", kind=Output.STACKS), STACKED)
    with pytest.raises(DecodeError, match="output flames: the program has no stack trace map"):
        table.read(rectangle([struct.pack("<QIii", IN_WEB, 7, 1, 2)], 20), counts(1))


# Events.

TIME = Field("when", 8, 8, "int", typedefs=("ktime_t_ns",))
COMM = Field("comm", 16, 8, "char", shape=(8,))
RECORD = Layout((), 0, (CGROUP, TIME, COMM), 24)


def records(*cgroups: int) -> npt.NDArray[np.uint8]:
    return rectangle([struct.pack("<QQ8s", cgroup, at + 1, b"sh") for at, cgroup in enumerate(cgroups)], 24)


def events(book: Book, layout: Layout = RECORD) -> EventReader:
    return EventReader(PLAN, Output(kind=Output.EVENTS), layout, book, Machine(), Mark(1000, 0, 0))


def positions(count: int) -> npt.NDArray[np.uint64]:
    """Where each record starts: 32 bytes each, from 1000 on."""
    return np.arange(1000, 1000 + 32 * count, 32, np.uint64)


def chunk_of(source: EventReader, cgroups: Sequence[int], now_ns: int = 1) -> stream_pb2.EventChunk | None:
    """What the reader makes of these records, of which it has read some already."""
    all_records, at = records(*cgroups), positions(len(cgroups))
    due = at >= source.cursor
    return source.chunk(all_records[due], at[due], 1000 + 32 * len(cgroups), now_ns)


def kept(chunk: stream_pb2.EventChunk | None) -> list[int]:
    assert chunk is not None
    return columns.unpack_unsigned(chunk.positions, limit=9999).tolist()


def test_records_of_the_selected_pod_are_sent_with_their_positions(book: Book) -> None:
    source = events(book)
    chunk = chunk_of(source, [IN_WEB, IN_DB, IN_WEB])
    assert chunk is not None
    assert kept(chunk) == [1000, 1064]
    assert (chunk.end_position, source.cursor, chunk.dropped) == (1096, 1096, 0)
    shown = {column.name: list(columns.read_column(column, 2)) for column in chunk.columns}
    assert shown == {
        "time_ns": [BOOTED_NS + 1, BOOTED_NS + 3],
        "comm": ["sh", "sh"],
        "pod_uid": [WEB, WEB],
        "container_id": [CONTAINER, CONTAINER],
    }


def test_only_the_first_time_of_a_record_is_its_time(book: Book) -> None:
    second = Field("until", 16, 8, "int", typedefs=("ktime_t_ns",))
    chunk = events(book, Layout((), 0, (CGROUP, TIME, second), 24)).chunk(records(IN_WEB), positions(1), 1032, 1)
    assert chunk is not None
    assert [column.name for column in chunk.columns] == ["time_ns", "until", "pod_uid", "container_id"]


def test_records_of_programs_without_cgroups_all_count(book: Book) -> None:
    chunk = events(book, Layout((), 0, (COMM,), 24)).chunk(records(IN_DB), positions(1), 1032, 1)
    assert kept(chunk) == [1000]


def test_nothing_new_in_the_ring_is_nothing_to_send(book: Book) -> None:
    assert events(book).chunk(records(), positions(0), 1000, 1) is None


def test_records_that_do_not_count_still_move_the_cursor(book: Book) -> None:
    source = events(book)
    assert kept(chunk_of(source, [IN_DB, IN_DB])) == []
    assert source.cursor == 1064


def test_a_record_of_an_unknown_pod_holds_back_itself_and_what_follows(book: Book) -> None:
    source = events(book)
    assert kept(chunk_of(source, [IN_WEB, IN_NEW, IN_WEB])) == [1000]
    assert source.cursor == 1032
    book.select({MINE: Selected(False, frozenset({WEB, NEW}))}, [WEB, DB, NEW])
    assert kept(chunk_of(source, [IN_WEB, IN_NEW, IN_WEB], now_ns=2)) == [1032, 1064]
    assert source.dropped == 0


def test_a_record_that_nobody_claims_is_dropped_after_five_seconds_and_counted(book: Book) -> None:
    source, ring = events(book), [IN_NEW, IN_WEB, UNSEEN]
    assert kept(chunk_of(source, ring, now_ns=1)) == []
    assert kept(chunk_of(source, ring, now_ns=collect.HOLD_NS)) == []
    chunk = chunk_of(source, ring, now_ns=collect.HOLD_NS + 1)
    assert kept(chunk) == [1032]
    assert chunk is not None
    assert chunk.dropped == source.dropped == 2
    assert source.cursor == 1096


def test_a_clock_that_is_set_back_holds_nothing_for_longer(book: Book) -> None:
    source, table, hour_ns = events(book), reader(book, Output(kind=Output.COUNTER)), 3600 * 10**9
    for now_ns in (hour_ns, 1, 1 + collect.HOLD_NS):
        chunk_of(source, [IN_NEW], now_ns=now_ns)
        table.read(keys((IN_NEW, 80, 0)), counts(23))
        unnamed = table.unnamed(now_ns)
    assert (source.dropped, unnamed) == (1, 1)


def test_the_five_seconds_start_anew_for_the_next_unknown(book: Book) -> None:
    source = events(book)
    chunk_of(source, [IN_NEW], now_ns=1)
    chunk_of(source, [IN_NEW], now_ns=collect.HOLD_NS + 1)
    assert kept(chunk_of(source, [IN_NEW, UNSEEN], now_ns=collect.HOLD_NS + 2)) == []
    assert source.dropped == 1


def test_an_operator_that_is_away_names_nobody_so_the_five_seconds_begin_with_its_first_push(book: Book) -> None:
    source, ring, away_ns = events(book), [IN_NEW, IN_WEB], 10 * collect.HOLD_NS
    assert kept(chunk_of(source, ring, now_ns=1)) == []
    book.restart_stream()
    source.restart_stream()
    for now_ns in (collect.HOLD_NS + 1, away_ns):
        assert kept(chunk_of(source, ring, now_ns=now_ns)) == []
    assert source.dropped == 0
    book.select({MINE: Selected(False, frozenset({WEB}))}, [WEB, DB])
    assert kept(chunk_of(source, ring, now_ns=away_ns + collect.HOLD_NS - 1)) == []
    book.select({MINE: Selected(False, frozenset({WEB}))}, [WEB, DB, NEW])
    assert kept(chunk_of(source, ring, now_ns=away_ns + collect.HOLD_NS)) == [1032]
    assert source.dropped == 0, "it was another pod's, of which the new operator told late"


@given(
    ring=st.lists(st.sampled_from([IN_WEB, IN_DB, IN_NEW, UNSEEN]), max_size=12),
    steps=st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=8),
)
def test_every_record_is_sent_refused_or_counted_as_dropped_once(
    ring: list[int], steps: list[tuple[int, bool]]
) -> None:
    book = Book()
    book.learn({CgroupId(cgroup): f"/kubepods/pod{pod}" for cgroup, pod in ((IN_WEB, WEB), (IN_DB, DB), (IN_NEW, NEW))})
    book.select({MINE: Selected(False, frozenset({WEB}))}, [WEB, DB])
    source, sent, now_ns, size = events(book), list[int](), 1, 0
    for grown, slept in [*steps, (len(ring), True), (len(ring), True)]:
        size = max(size, min(grown, len(ring)))
        now_ns += collect.HOLD_NS if slept else 1
        chunk = chunk_of(source, ring[:size], now_ns)
        sent += kept(chunk) if chunk is not None else []
    at = dict(zip(positions(len(ring)).tolist(), ring, strict=True))
    assert sent == [position for position, cgroup in at.items() if cgroup == IN_WEB]
    assert source.dropped == sum(cgroup in (IN_NEW, UNSEEN) for cgroup in ring)
    assert source.cursor == 1000 + 32 * len(ring)


# Small questions.


def test_judging_nothing_is_nothing(book: Book) -> None:
    counted, pending, identities = collect.judge(book, MINE, records(), CGROUP)
    assert (counted.tolist(), pending.tolist(), list(identities)) == ([], [], [])


def test_an_entry_without_a_cgroup_is_nobodys_we_know(book: Book) -> None:
    _, _, identities = collect.judge(book, MINE, records(IN_WEB), None)
    assert list(identities) == [pods.Identity(pods.UNKNOWN, "")]


def test_events_are_read_from_rings_and_the_rest_from_maps() -> None:
    assert collect.wants_events(Output(kind=Output.EVENTS))
    assert not collect.wants_events(Output(kind=Output.STACKS))


def test_cgroups_in_keys_are_listed_once() -> None:
    assert collect.cgroups_in(BY_PORT, keys((IN_DB, 1, 0), (IN_WEB, 2, 0), (IN_DB, 3, 0))) == [IN_WEB, IN_DB]
    assert collect.cgroups_in(Layout((PORT,), 16, (COUNT,), 8), keys((IN_DB, 1, 0))) == []
