"""What programs of one's own lose is counted where they count it, and said where they do not: never a plain zero."""

from __future__ import annotations

import os
from typing import Any

import pytest

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
    source = f"""
struct {{ __uint(type, BPF_MAP_TYPE_{kind}); __uint(max_entries, 23); __type(value, u64); }} notes SEC(".maps");
ON_CALL {{ u64 one = 1; if (ours()) bpf_map_push_elem(&notes, &one, 0); return 0; }}
"""
    with policies.run(policy(source)) as run:
        call_getppid(22)
        assert report_of(run) == (22, "0", [])
        call_getppid(997)
        assert report_of(run) == (45, "0+?", ["notes was full, and nobody counts what finds no room"])


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
