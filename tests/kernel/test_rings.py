"""Ring buffers: every record once, in order, also where the ring ends; nobody passes a BUSY record; drops count."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading

import numpy as np
import pytest
from probefleet_agent.errors import ProbefleetError
from probefleet_agent.kernel import btf_kernel, links, maps, rings, syscall

from tests.kernel import policies
from tests.kernel.support import Loaded, attachment, call_getppid, needs

SIZE = 4096
EVENT = np.dtype([("number", "<u8"), ("text", "S16")])
SOURCE = """
struct event { u64 number; char text[16]; };
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); __type(value, struct event); }
ring SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 4); __type(key, u32); __type(value, u64); }
lost SEC(".maps");
u64 number = 0;
static __always_inline void count(u32 what)
{
	u64 *value = bpf_map_lookup_elem(&lost, &what);
	if (value)
		__sync_fetch_and_add(value, 1);
}
SEC("tracepoint/syscalls/sys_enter_getppid")
int on_it(void *ctx)
{
	if (!ours())
		return 0;
	struct event *event = bpf_ringbuf_reserve(&ring, sizeof(*event), 0);
	if (!event) {
		count(1);
		return 0;
	}
	event->number = number++; /* one thread calls */
	__builtin_memcpy(event->text, "fifteen chars..", 16);
	count(2);
	DISCARD
	bpf_ringbuf_submit(event, 0);
	return 0;
}
"""
PLAIN = SOURCE.replace("DISCARD", "")
# Every third record is given up.
DISCARDING = SOURCE.replace("DISCARD", "if (event->number % 3 == 2) { bpf_ringbuf_discard(event, 0); return 0; }")
# Records of three sizes in turn.
MIXED = """
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); } ring SEC(".maps");
u64 number = 0;
SEC("tracepoint/syscalls/sys_enter_getppid")
int on_it(void *ctx)
{
	u64 words[8] = {};
	if (!ours())
		return 0;
	u64 n = number++; /* one thread calls */
	words[0] = n;
	switch (n % 3) {
	case 0: bpf_ringbuf_output(&ring, words, 8, 0); break;
	case 1: bpf_ringbuf_output(&ring, words, 20, 0); break;
	default: bpf_ringbuf_output(&ring, words, 64, 0);
	}
	return 0;
}
"""
GETPPID = attachment("on_it", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})


@pytest.mark.shows("map/ringbuf")
def test_every_record_comes_once_and_in_order_across_the_end_of_the_ring() -> None:
    """997 records of 32 bytes through a ring of 4096: it wraps seven times."""
    numbers: list[int] = []
    positions: list[int] = []
    with Loaded(PLAIN) as loaded, links.attach(loaded.programs["on_it"], GETPPID):
        with rings.RingReader(loaded.maps["ring"], SIZE) as reader:
            cursor, left = reader.consumer_position(), 997
            while left:
                call_getppid(min(left, 31))
                left -= min(left, 31)
                records = reader.read(cursor)
                events = records.array(EVENT)
                assert set(events["text"]) == {b"fifteen chars.."}
                numbers += events["number"].tolist()
                positions += records.positions.tolist()
                cursor = records.end_position
                reader.commit(cursor)
            assert cursor == 997 * 32 == reader.producer_position()
            del records, events
        assert maps.sum_lost(loaded.maps["lost"]).tolist() == [0, 0, 997, 0]
    assert numbers == list(range(997))
    assert positions == [32 * number for number in range(997)]


def test_a_full_ring_drops_and_each_drop_is_counted() -> None:
    with Loaded(PLAIN) as loaded, links.attach(loaded.programs["on_it"], GETPPID):
        call_getppid(997)
        with rings.RingReader(loaded.maps["ring"]) as reader:
            kept = len(reader.read(0))
        counts = maps.sum_lost(loaded.maps["lost"]).tolist()
    assert 0 < kept < SIZE // 32
    assert counts == [0, 997 - kept, kept, 0]


def test_discarded_records_are_skipped_and_passed() -> None:
    with Loaded(DISCARDING) as loaded, links.attach(loaded.programs["on_it"], GETPPID):
        call_getppid(23)
        with rings.RingReader(loaded.maps["ring"]) as reader:
            records = reader.read(0)
            assert records.array(EVENT)["number"].tolist() == [n for n in range(23) if n % 3 != 2]
            assert records.end_position == 23 * 32
            del records


def test_records_of_many_sizes() -> None:
    with Loaded(MIXED) as loaded, links.attach(loaded.programs["on_it"], GETPPID):
        call_getppid(997)
        with rings.RingReader(loaded.maps["ring"]) as reader:
            records = reader.read(0)
            assert records.lengths.tolist() == [(8, 20, 64)[n % 3] for n in range(997)]
            assert records.array(np.dtype([("number", "<u8")]))["number"].tolist() == list(range(997))
            assert struct.unpack_from("<Q", records.bytes_at(996))[0] == 996
            filled = records.array(np.dtype([("number", "<u8"), ("rest", "<u8", 2)]))
            assert filled["number"].tolist() == list(range(997)) and not filled["rest"][0].any()
            del records


def test_reading_ahead_leaves_the_kernels_room_alone_until_committed() -> None:
    with Loaded(PLAIN) as loaded, links.attach(loaded.programs["on_it"], GETPPID):
        call_getppid(23)
        with rings.RingReader(loaded.maps["ring"]) as reader:
            first = reader.read(0)
            again = reader.read(0, limit_bytes=32 * 7)
            assert len(first) == 23 and len(again) == 7 and again.end_position == 7 * 32
            assert reader.consumer_position() == 0
            assert reader.commit(first.end_position) == 23 * 32
            assert reader.consumer_position() == 23 * 32
            with pytest.raises(ProbefleetError, match="not in the ring"):
                reader.read(0)
            with pytest.raises(ProbefleetError, match="cannot be committed"):
                reader.commit(24 * 32)
            del first, again


def test_the_position_survives_the_reader() -> None:
    with Loaded(PLAIN) as loaded, links.attach(loaded.programs["on_it"], GETPPID):
        call_getppid(23)
        with rings.RingReader(loaded.maps["ring"]) as reader:
            reader.commit(7 * 32)
        with rings.RingReader(loaded.maps["ring"]) as reader:
            assert reader.consumer_position() == 7 * 32
            assert len(reader.read(reader.consumer_position())) == 16


def test_a_submitted_record_wakes_a_poller() -> None:
    with (
        Loaded(PLAIN) as loaded,
        links.attach(loaded.programs["on_it"], GETPPID),
        rings.RingReader(loaded.maps["ring"]) as reader,
    ):
        poll = select.poll()
        poll.register(reader.poll_fd, select.POLLIN)
        assert poll.poll(0) == []
        call_getppid(1)
        assert poll.poll(5000)


def heads(*lengths: int) -> np.ndarray:
    """Headers as they lie in a ring: one slot of eight bytes each, records without content skipped over."""
    slots: list[int] = []
    for head in lengths:
        slots += [head, *[0xDEAD] * (((head & 0x3FFFFFFF) + 7) // 8)]
    return np.array(slots, np.uint32)


BUSY, DISCARD = 1 << 31, 1 << 30


@pytest.mark.parametrize("before", [0, 1, 7, 31, 32, 33, 997])
def test_nobody_passes_a_busy_record(before: int) -> None:
    starts, lengths, at = rings._parse(heads(*[24] * before, 24 | BUSY, *[24] * 5))
    assert len(starts) == before and set(lengths) <= {24}
    assert at == before * 4


def test_nobody_passes_a_busy_record_among_many_sizes() -> None:
    starts, lengths, at = rings._parse(heads(8, 16, 24, 8, 16 | DISCARD, 64, 8 | BUSY, 8))
    assert lengths.tolist() == [8, 16, 24, 8, 64]
    assert starts.tolist() == [0, 16, 40, 72, 112]
    assert at * 8 == 112 + 72


def test_a_record_of_no_bytes() -> None:
    starts, lengths, at = rings._parse(heads(0, 0, 8))
    assert (starts.tolist(), lengths.tolist(), at) == ([0, 8, 16], [0, 0, 8], 4)


SPINNING = """
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); } ring SEC(".maps");
volatile u64 go_on = 0, waiting = 0;
static long turn(u32 i, void *ctx)
{
	waiting = 1;
	return go_on ? 1 : 0;
}
static long spin(u32 i, void *ctx)
{
	bpf_loop(1 << 16, turn, 0, 0);
	return go_on ? 1 : 0;
}
SEC("tracepoint/syscalls/sys_enter_getppid")
int on_it(void *ctx)
{
	u64 *word;
	bool slow = !waiting;
	if (!ours())
		return 0;
	word = bpf_ringbuf_reserve(&ring, 8, 0);
	if (!word)
		return 0;
	*word = slow;
	if (slow)
		bpf_loop(1 << 14, spin, 0, 0); /* seconds, unless told to go on */
	bpf_ringbuf_submit(word, 0);
	return 0;
}
"""


def bpf_loop() -> bool:
    """The helper (Linux 5.17)."""
    return "bpf_loop" in btf_kernel.functions()


def test_a_busy_record_of_a_real_program_stops_the_reader() -> None:
    """A thread's program holds a reserved record in a long loop; meanwhile the others' records wait behind it."""
    needs(bpf_loop)
    with (
        Loaded(SPINNING) as loaded,
        links.attach(loaded.programs["on_it"], GETPPID),
        _bss(loaded) as state,
        rings.RingReader(loaded.maps["ring"]) as reader,
    ):
        libc = ctypes.CDLL(None)
        slow = threading.Thread(target=libc.getppid)  # ctypes lets the interpreter go on meanwhile
        slow.start()
        try:
            while struct.unpack("<QQ", syscall.map_lookup(state, bytes(4), 16) or bytes(16)).count(1) == 0:
                os.sched_yield()
            call_getppid(23)
            held = reader.read(0)
            assert reader.producer_position() == 24 * 16
            assert len(held) == 0 and held.end_position == 0
        finally:
            syscall.map_update(state, bytes(4), struct.pack("<QQ", 1, 1))
            slow.join()
        assert len(reader.read(0)) == 24
        del held


def _bss(loaded: Loaded) -> syscall.Fd:
    """The map of the program's global variables."""
    for number in syscall.program_info(loaded.programs["on_it"]).map_ids:
        fd = syscall.fd_by_id("map", number)
        if syscall.map_info(fd).name.endswith(".bss"):
            return fd
        fd.close()
    raise AssertionError("no .bss")


def test_a_policys_records_may_be_shorter_than_their_type() -> None:
    """As of a program that submits a text with its length; one policy's records must not stop the others'."""
    source = """
    struct event { u64 value; char text[4096]; };
    struct {
        __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 1 << 16); __type(value, struct event);
    } events SEC(".maps");
    ON_CALL
    {
        struct { u64 value; char text[8]; } some = {.value = 7, .text = "short"};
        if (ours())
            bpf_ringbuf_output(&events, &some, sizeof(some), 0);
        return 0;
    }
    """
    with policies.run(policies.c_policy(source)) as run:
        for _ in range(997):
            os.getppid()
        found = run.output("events")
    assert found["events"]["received"] == 997
    assert {(each["value"], each["text"]) for each in found["events"]["records"]} == {("7", "short")}
