"""How many records a second an agent takes with none lost: ``python tests/bench/events.py [RATE] [SECONDS]``, as root.

A program puts eight records of 40 bytes into a ring at each of a rare system call, which a process of its own makes as
often as the rate asks. The engine is read as the session reads it, batches are serialized as for the wire, and
acknowledged at once. The goal is a million a second for 30 s with none lost. Prints what came, what was lost, and the
CPU time of the agent's side for each record.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import zstandard
from probefleet_agent import session
from probefleet_agent.engine import Engine
from probefleet_agent.kernel import mounts
from probefleet_wire import columns, syscalls
from probefleet_wire.v1 import plan_pb2, stream_pb2

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.kernel.support import compile_object

BURST = 8
RING_BYTES = 16 << 20
SOURCE = """
#include <probefleet.h>
struct event { cgroup_id_t cgroup; ktime_t_ns time; pid_nr_t pid; user_id_t user; u64 number; u64 other; };
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
	__type(value, struct event);
} events SEC(".maps");
SEC("raw_tp/sys_enter")
int BPF_PROG(on_enter, struct pt_regs *regs, long number)
{
	struct event *event;

	if (number != CALL)
		return 0;
	for (int i = 0; i < BURST; i++) {
		event = probefleet_reserve(&events, sizeof(*event));
		if (!event)
			continue;
		event->cgroup = probefleet_current_cgroup();
		event->time = bpf_ktime_get_ns();
		event->pid = probefleet_current_process();
		event->user = bpf_get_current_uid_gid();
		event->number = i;
		event->other = 0;
		probefleet_submit(event);
	}
	return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""
PRODUCER = """
import ctypes, sys, time
call = ctypes.CDLL(None).sched_get_priority_max
rate, seconds = float(sys.argv[1]), float(sys.argv[2])
began, made = time.monotonic(), 0
while (now := time.monotonic()) < began + seconds:
    for _ in range(int((now - began) * rate) - made):
        call(0)
    made = int((now - began) * rate)
    time.sleep(0.001)  # calls come at a rate: this is the rate's step
print(made)
"""


def push(elf: bytes) -> stream_pb2.Push:
    """One policy that wants every record."""
    digest = hashlib.sha256(elf).hexdigest()
    plan = plan_pb2.Plan(policy_uid="bench", generation=1, scope=plan_pb2.SCOPE_CLUSTER, interval_ms=10_000)
    plan.instance.digest, plan.instance.title, plan.instance.object.sha256 = digest[:32], "bench", digest
    plan.instance.attachments.add(program="on_enter").raw_tracepoint.name = "sys_enter"
    plan.instance.map_sizes.add(map="events", max_entries=RING_BYTES)
    plan.outputs.add(name="records", map="events", kind=plan_pb2.Output.EVENTS)
    return stream_pb2.Push(
        term=1,
        version=1,
        plans=[plan],
        selections=[stream_pb2.Selection(policy_uid="bench", everything=True)],
        blobs=[stream_pb2.Blob(sha256=digest, zstd=zstandard.compress(elf))],
    )


def take(engine: Engine, *, force: bool = False) -> tuple[int, int, int]:
    """(records, lost, dropped) of the next batch."""
    batch = engine.collect(time.time_ns(), force=force)
    if batch is None:
        return 0, 0, 0
    stream_pb2.FromAgent(batch=batch).SerializeToString()
    engine.acknowledge(batch.sequence)
    for chunk in batch.events:
        # A stream's first chunk may only say what lay before.
        count = len(columns.unpack(chunk.positions, limit=1 << 24)) if chunk.positions else 0
        return count, chunk.lost, chunk.dropped
    return 0, 0, 0


def main(rate: float = 1e6, seconds: float = 30.0) -> int:
    """Run; 1 where a record was lost."""
    number = syscalls.number("sched_get_priority_max", os.uname().machine)
    source = SOURCE.replace("CALL", str(number)).replace("BURST", str(BURST))
    folder = mounts.mount_bpffs() / "probefleet-bench-events"
    folder.mkdir(exist_ok=True)
    came = lost = dropped = 0
    with Engine.open(bpffs=folder, stats=False) as engine:
        try:
            engine.apply(push(compile_object(source, prelude=False)))
            (status,) = engine.status().policies
            assert status.state == stream_pb2.PolicyStatus.READY, status.message
            engine.hello()
            command = [sys.executable, "-c", PRODUCER, str(rate / BURST), str(seconds)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as producer:
                began, cpu_began = time.monotonic(), time.process_time()
                while producer.poll() is None:
                    records, now_lost, now_dropped = take(engine)
                    came, lost, dropped = came + records, max(lost, now_lost), max(dropped, now_dropped)
                    if not engine.behind:  # at the pace of a session, which ticks as well
                        time.sleep(session.TICK_SECONDS)
                took, cpu = time.monotonic() - began, time.process_time() - cpu_began
                made = int(producer.communicate()[0]) * BURST
            while True:
                records, now_lost, now_dropped = take(engine, force=True)
                came, lost, dropped = came + records, max(lost, now_lost), max(dropped, now_dropped)
                if not records:
                    break
        finally:
            engine.remove_everything()
    folder.rmdir()
    print(
        f"{made:,} records in {took:.1f} s ({made / took / 1e6:.2f} M/s): {came:,} came, {lost:,} lost, "
        f"{dropped:,} dropped; agent: {cpu / took:.0%} of a CPU, {cpu / max(came, 1) * 1e9:.0f} ns a record"
    )
    return int(came != made or lost > 0 or dropped > 0)


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:])))
