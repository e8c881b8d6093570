"""Perf buffers: every record once and in order on its CPU, and every loss counted."""

from __future__ import annotations

import errno
import os
import select

import numpy as np
import pytest
from probefleet_agent import perf_ring
from probefleet_agent.errors import KernelError, ProbefleetError
from probefleet_agent.kernel import links, maps, perf
from probefleet_agent.kernel.fds import Fd

from tests.kernel.support import Loaded, attachment, call_getppid, needs

EVENT = np.dtype([("number", "<u8"), ("rest", "V12")])
SOURCE = """
struct { __uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY); __uint(key_size, 4); __uint(value_size, 4); } out SEC(".maps");
u64 number = 0;
struct event { u64 number; char rest[12]; } __attribute__((packed));
SEC("tracepoint/syscalls/sys_enter_getppid")
int on_it(void *ctx)
{
	struct event event = {};
	if (!ours())
		return 0;
	event.number = number++; /* one thread calls */
	if (bpf_perf_event_output(ctx, &out, BPF_F_CURRENT_CPU, &event, sizeof(event)))
		hit();
	return 0;
}
"""
GETPPID = attachment("on_it", tracepoint={"category": "syscalls", "name": "sys_enter_getppid"})


@pytest.mark.shows("map/perf-event-array")
def test_every_record_comes_once_across_the_end_of_the_ring() -> None:
    """997 records of 32 bytes through rings of 4096 on each CPU."""
    numbers: list[int] = []
    sequence: list[int] = []
    with (
        Loaded(SOURCE) as loaded,
        links.attach(loaded.programs["on_it"], GETPPID),
        perf.PerfBufferReader(loaded.maps["out"], pages=1) as reader,
    ):
        left = 997
        while left:
            call_getppid(min(left, 53))
            left -= min(left, 53)
            records = reader.read()
            assert records.lost == 0
            numbers += records.array(EVENT)["number"].tolist()
            sequence += records.sequence.tolist()
            assert set(records.cpus.tolist()) <= set(range(os.cpu_count() or 1))
    assert sorted(numbers) == list(range(997))
    assert sequence == list(range(997))


def test_a_full_buffer_loses_and_each_loss_is_counted() -> None:
    """No reader for 997 records: a page holds some 120, the rest is refused by the kernel, and told."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with (
            Loaded(SOURCE) as loaded,
            links.attach(loaded.programs["on_it"], GETPPID),
            perf.PerfBufferReader(loaded.maps["out"], pages=1) as reader,
        ):
            call_getppid(997)
            first = reader.read()
            call_getppid(1)  # kernels without PERF_FORMAT_LOST tell with the next record
            second = reader.read()
            refused = loaded.hits()
    finally:
        os.sched_setaffinity(0, allowed)
    assert 0 < len(first) < 997
    assert refused == 997 - len(first)
    assert second.lost == refused
    assert len(second) == 1
    assert first.array(EVENT)["number"].tolist() == list(range(len(first)))


def test_a_record_wakes_a_poller() -> None:
    with (
        Loaded(SOURCE) as loaded,
        links.attach(loaded.programs["on_it"], GETPPID),
        perf.PerfBufferReader(loaded.maps["out"], pages=1) as reader,
    ):
        poll = select.poll()
        for number in reader.poll_fds:
            poll.register(number, select.POLLIN)
        assert poll.poll(0) == []
        call_getppid(1)
        assert poll.poll(5000)


def test_only_perf_event_arrays_and_powers_of_two() -> None:
    with Loaded(SOURCE) as loaded:
        with pytest.raises(ProbefleetError, match="not a perf event array"):
            perf.PerfBufferReader(loaded.maps["hits"])
        with pytest.raises(ProbefleetError, match="power of two"):
            perf.PerfBufferReader(loaded.maps["out"], pages=3)


def test_damaged_memory_is_refused() -> None:
    with pytest.raises(ProbefleetError, match="damaged"):
        perf._parse(bytes(16))


def test_a_cpu_that_comes_online_is_read_from_then_on_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_cpus() -> bool:
        return len(maps.online_cpus()) > 1

    needs(two_cpus)
    here, other, *_ = maps.online_cpus()
    allowed, online = os.sched_getaffinity(0), {other}
    monkeypatch.setattr(maps, "online_cpus", lambda: sorted(online))
    os.sched_setaffinity(0, {here})
    try:
        with Loaded(SOURCE) as loaded, links.attach(loaded.programs["on_it"], GETPPID):
            ring = perf_ring.PerfRing(loaded.maps["out"])
            call_getppid(23)
            assert (ring.producer_position(), loaded.hits(), ring.said) == (0, 23, [])
            for came in (True, False, True):
                (online.add if came else online.discard)(here)
                ring.producer_position()  # sees it
                call_getppid(29)
            read = ring.read(0, 1 << 20)
            assert loaded.hits() == 23, "one that went has its ring until it comes again"
            ring.close()
    finally:
        os.sched_setaffinity(0, allowed)
    assert sorted(read.array(EVENT)["number"].tolist()) == list(range(23, 23 + 3 * 29))
    assert ring.lost == 0
    assert ring.said == [f"CPU {here} came online: what it recorded before its perf buffer was opened"]


def test_a_cpu_that_has_no_place_in_the_map_is_told() -> None:
    source = SOURCE.replace("__uint(key_size, 4)", "__uint(max_entries, 1); __uint(key_size, 4)")
    with Loaded(source) as loaded:
        ring = perf_ring.PerfRing(loaded.maps["out"])
        ring.producer_position()
        beyond = ", ".join(map(str, maps.online_cpus()[1:]))
        assert ring.said == ([f"out has 1 places: what CPU {beyond} records is lost"] if beyond else [])
        ring.close()


def test_a_cpu_whose_buffer_cannot_be_opened_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    here = maps.online_cpus()[0]
    online, allowed, opened = {here}, os.sched_getaffinity(0), perf._CpuRing._open
    monkeypatch.setattr(maps, "online_cpus", lambda: sorted(online))
    os.sched_setaffinity(0, {here})
    try:
        with Loaded(SOURCE) as loaded, links.attach(loaded.programs["on_it"], GETPPID):
            ring = perf_ring.PerfRing(loaded.maps["out"])
            online.clear()
            ring.producer_position()
            online.add(here)

            def refuse(*_: object) -> Fd:
                raise KernelError(errno.ENODEV, f"perf buffer of CPU {here}")

            monkeypatch.setattr(perf._CpuRing, "_open", refuse)
            call_getppid(23)
            assert ring.producer_position() > 0, "what it held before can be read"
            assert [text.partition(":")[0] for text in ring.said] == [f"CPU {here} has no perf buffer"]
            monkeypatch.setattr(perf._CpuRing, "_open", opened)
            ring.producer_position()
            call_getppid(29)
            read = ring.read(0, 1 << 20)
            assert ring.said == [f"CPU {here} came online: what it recorded before its perf buffer was opened"]
            ring.close()
    finally:
        os.sched_setaffinity(0, allowed)
    assert len(read) == 23 + 29
