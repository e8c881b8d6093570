"""What programs of one's own lose is counted where they count it, and said where they do not: never a plain zero."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from probefleet_agent.engine import Engine
from probefleet_agent.kernel import iterators
from probefleet_cli import local_pods, preparation

from tests.kernel import policies
from tests.kernel.support import call_getppid

RING = """
struct note { u64 number; };
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); __type(value, struct note); }
notes SEC(".maps");
"""
#: Of 16 bytes each, with the header: the last 16 of a page are never used.
ROOM = 4096 // 16 - 1
FULL = "notes was full, and the program does not count what finds no room"
COUNTED = """
ON_CALL
{
	struct note note = { 7 };
	if (!ours())
		return 0;
	if (bpf_ringbuf_output(&notes, &note, sizeof(note), 0))
		probefleet_count_lost(PROBEFLEET_LOST_RING);
	else
		probefleet_count_lost(PROBEFLEET_SUBMITTED);
	return 0;
}
"""
PLAIN = """
ON_CALL
{
	struct note note = { 7 };
	if (ours())
		bpf_ringbuf_output(&notes, &note, sizeof(note), 0);
	return 0;
}
"""


def policy(source: str, output: str = "notes", **kind: Any) -> policies.Manifest:
    outputs = [{"name": "all", "from": {"map": output}, **(kind or {"events": {}})}]
    return policies.c_policy(source, outputs=outputs, interval="1h")


def report_of(run: policies.Run) -> tuple[int, str, list[str]]:
    """(records or rows' sum, LOST as it is shown, what is uncounted)."""
    run.measured.sample_rest()
    (report,) = run.measured.reports()
    return report["outputs"][0]["total"]["value"], report["columns"]["lost"], report["uncounted"]


def test_records_that_find_no_room_and_that_nobody_counts_are_said() -> None:
    with policies.run(policy(RING + PLAIN)) as run:
        call_getppid(ROOM - 1)
        assert report_of(run) == (ROOM - 1, "0", []), "there was room for one more"
        call_getppid(997)
        assert report_of(run) == (ROOM - 1 + ROOM, "0+?", [FULL])
        call_getppid(23)
        assert report_of(run) == (ROOM - 1 + ROOM + 23, "0+?", [FULL]), "what is missing stays missing"


QUEUE = """
struct { __uint(type, BPF_MAP_TYPE_QUEUE); __uint(max_entries, 23); __type(value, u64); } notes SEC(".maps");
ON_CALL { u64 one = 1; if (ours()) bpf_map_push_elem(&notes, &one, 0); return 0; }
"""
FULL_QUEUE = "notes was full, and nobody counts what finds no room"


@pytest.mark.parametrize(("source", "room", "full"), [(RING + PLAIN, ROOM, FULL), (QUEUE, 23, FULL_QUEUE)])
def test_what_is_missing_stays_missing_though_another_agent_takes_over(source: str, room: int, full: str) -> None:
    made = policy(source)
    with policies.run(made) as run:
        call_getppid(997)
        assert report_of(run) == (room, "0+?", [full])
        # As after `kill -9`, and long after the ring was full.
        with Engine.open(bpffs=policies.folder()) as again:
            push = preparation.push(policies.prepare(made), pods=local_pods.find(), namespace=None, version=9)
            again.hello()
            again.apply(push)
            again.acknowledge(0)
            call_getppid(1)
            batch = again.collect(time.time_ns(), force=True)
            assert batch is not None
            (chunk,) = batch.events
            assert list(chunk.uncounted) == [full]


def test_where_the_program_counts_them_the_number_is_enough() -> None:
    with policies.run(policy(RING + COUNTED)) as run:
        call_getppid(997)
        assert report_of(run) == (ROOM, str(997 - ROOM), [])


def test_records_that_never_fit_are_said() -> None:
    source = """
struct note { u64 numbers[1024]; };
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); __type(value, struct note); }
notes SEC(".maps");
ON_CALL
{
	struct note *note = ours() ? bpf_ringbuf_reserve(&notes, sizeof(*note), 0) : 0;
	if (note)
		bpf_ringbuf_submit(note, 0);
	return 0;
}
"""
    with policies.run(policy(source)) as run:
        call_getppid(23)
        assert report_of(run) == (0, "0+?", [FULL])


def test_rings_of_bcc_are_no_exception() -> None:
    made = policy("")
    made["spec"]["program"] = {
        "bcc": {
            "source": f"""
struct note {{ u64 number; }};
BPF_RINGBUF_OUTPUT(notes, 1);
TRACEPOINT_PROBE(syscalls, sys_enter_getppid)
{{
    struct note note = {{ 7 }};
    if (bpf_get_current_pid_tgid() >> 32 == {os.getpid()})
        notes.ringbuf_output(&note, sizeof(note), 0);
    return 0;
}}
"""
        }
    }
    with policies.run(made) as run:
        call_getppid(997)
        assert report_of(run) == (ROOM, "0+?", [FULL])


@pytest.mark.parametrize("kind", ["QUEUE", "STACK"])
def test_a_queue_that_was_full_is_said(kind: str) -> None:
    with policies.run(policy(QUEUE.replace("TYPE_QUEUE", f"TYPE_{kind}"))) as run:
        call_getppid(22)
        assert report_of(run) == (22, "0", [])
        call_getppid(997)
        assert report_of(run) == (45, "0+?", [FULL_QUEUE])


HASH = """
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 23); __type(key, u64); __type(value, u64); }
notes SEC(".maps");
u64 number = 0;
ON_CALL { u64 key, one = 1; if (!ours()) return 0; key = number++; ADD return 0; }
"""


@pytest.mark.parametrize(
    ("add", "lost", "uncounted"),
    [
        (
            "bpf_map_update_elem(&notes, &key, &one, 0);",
            "0+?",
            ["notes is full, and the program does not count what finds no room"],
        ),
        ("probefleet_add(&notes, &key, 1);", "974", []),
    ],
    ids=["not counted", "counted"],
)
def test_a_full_hash_is_said_where_the_header_alone_is_there(add: str, lost: str, uncounted: list[str]) -> None:
    with policies.run(policy(HASH.replace("ADD", add), topk={}, groupBy=["key"])) as run:
        call_getppid(997)
        assert report_of(run) == (23, lost, uncounted)


STARTS = """
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 23); __type(key, u64); __type(value, u64); }
starts SEC(".maps");
u64 calls = 0;
"""


@pytest.mark.parametrize("times", [22, 997])
@pytest.mark.parametrize("events", [False, True], ids=["counts", "events"])
def test_a_map_that_no_output_reads_is_said_when_it_is_full(events: bool, times: int) -> None:
    """As one of calls that began and never ended: what begins then has no end."""
    body = "u64 key = calls++, now = bpf_ktime_get_ns(); bpf_map_update_elem(&starts, &key, &now, 0);"
    source = (
        STARTS + (RING if events else "") + "ON_CALL { if (!ours()) return 0; BODY return 0; }".replace("BODY", body)
    )
    made = policy(source) if events else policy(source, ".bss", counter={})
    if not events:
        made["spec"]["outputs"][0]["from"]["value"] = "calls"
    full = ["starts is full, and the program does not count what finds no room"] if times > 23 else []
    with policies.run(made) as run:
        call_getppid(times)
        assert report_of(run) == (0 if events else times, "0+?" if full else "0", full)


def test_a_map_that_the_policy_fills_may_be_full() -> None:
    made = policy(
        STARTS + "ON_CALL { u64 key = 1; if (bpf_map_lookup_elem(&starts, &key) && ours()) calls++; return 0; }"
    )
    made["spec"]["outputs"] = [{"name": "all", "from": {"map": ".bss", "value": "calls"}, "counter": {}}]
    made["spec"]["maps"] = [{"name": "starts", "values": [{"key": each, "value": 1} for each in range(23)]}]
    with policies.run(made) as run:
        call_getppid(97)
        assert report_of(run) == (97, "0", [])


def test_what_an_iterator_writes_beyond_a_readings_bound_is_said_of_events_too() -> None:
    source = """
u64 unused = 0;
SEC("iter/task")
int dump(struct bpf_iter__task *ctx)
{
	static const char format[] = "%s";
	char text[200];
	u64 argument = (u64)text;

	__builtin_memset(text, 'x', sizeof(text));
	text[199] = 0;
	if (ctx->task)
		bpf_seq_printf(ctx->meta->seq, format, sizeof(format), &argument, sizeof(argument));
	return 0;
}
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iterators, "MAX_BYTES", 1 << 12)
        with policies.run(policy(source, "dump")) as run:
            _, lost, uncounted = report_of(run)
    assert lost == "0+?" and uncounted == ["dump writes more than 0 MiB: the rest is cut off"]
