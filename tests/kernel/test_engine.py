"""The engine on the real kernel: what an agent finds that it cannot adopt is left alone until a push decides."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
import zstandard
from probefleet_agent.engine import Engine
from probefleet_wire import resources
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.kernel.support import compile_object

pytestmark = pytest.mark.kernel
DIGEST = "e" * 32


def push(version: int) -> stream_pb2.Push:
    data = resources.object_bytes("execsnoop")
    digest = hashlib.sha256(data).hexdigest()
    plan = plan_pb2.Plan(policy_uid="p", generation=1, scope=plan_pb2.SCOPE_CLUSTER, interval_ms=1000)
    plan.instance.digest, plan.instance.title, plan.instance.object.sha256 = DIGEST, "catalog/execsnoop", digest
    plan.instance.attachments.add(program="exec_btf").tp_btf.name = "sched_process_exec"
    return stream_pb2.Push(
        term=1,
        version=version,
        plans=[plan],
        selections=[stream_pb2.Selection(policy_uid="p", everything=True)],
        blobs=[stream_pb2.Blob(sha256=digest, zstd=zstandard.compress(data))],
    )


def state(engine: Engine) -> stream_pb2.PolicyStatus:
    (status,) = engine.status().policies
    return status


def state_of_loaded(engine: Engine) -> list[str]:
    return [stat.digest for stat in collected(engine).instances]


def collected(engine: Engine) -> stream_pb2.Batch:
    batch = engine.collect(time.time_ns(), force=True)
    assert batch is not None
    return batch


def test_an_instance_that_cannot_be_adopted_counts_on_until_a_push_replaces_it(folder: Path) -> None:
    with Engine.open(bpffs=folder) as engine:
        engine.apply(push(1))
        assert state(engine).state == stream_pb2.PolicyStatus.READY, state(engine).message
    pins = folder / "probefleet/instances" / DIGEST
    (pins / "manifest").unlink()
    before = sorted(pins.iterdir())
    with Engine.open(bpffs=folder) as engine:
        assert sorted(pins.iterdir()) == before
        engine.apply(push(2))
        assert state(engine).state == stream_pb2.PolicyStatus.READY, state(engine).message
        assert (pins / "manifest").exists()


def test_a_probe_map_that_cannot_be_adopted_does_not_keep_the_agent_from_its_work(folder: Path) -> None:
    with Engine.open(bpffs=folder) as engine:
        engine.apply(push(1))
    broken = folder / "probefleet/maps" / "f0f0"
    broken.mkdir()
    with Engine.open(bpffs=folder) as engine:
        assert state_of_loaded(engine) == [DIGEST], "the instance beside it is adopted"
        assert broken.exists()
        engine.apply(push(2))
        assert not broken.exists(), "no policy wants it"


def test_what_a_perf_buffer_missed_between_two_agents_is_a_gap(folder: Path) -> None:
    data = compile_object("""
struct { __uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY); __uint(key_size, 4); __uint(value_size, 4); } out SEC(".maps");
SEC("tp_btf/sched_process_exec") int on_exec(void *ctx)
{
	u64 one = 1;
	hit();
	return bpf_perf_event_output(ctx, &out, BPF_F_CURRENT_CPU, &one, sizeof(one));
}
""")
    pushed = push(1)
    plan = pushed.plans[0]
    plan.instance.object.sha256 = pushed.blobs[0].sha256 = hashlib.sha256(data).hexdigest()
    plan.instance.attachments[0].program = "on_exec"
    plan.outputs.add(name="hits", map="hits", kind=plan_pb2.Output.COUNTER)
    pushed.blobs[0].zstd = zstandard.compress(data)
    with Engine.open(bpffs=folder) as engine:
        engine.apply(pushed)
        assert state(engine).state == stream_pb2.PolicyStatus.READY, state(engine).message
        assert not collected(engine).tables[0].gaps
    with Engine.open(bpffs=folder) as engine:
        (gap,) = collected(engine).tables[0].gaps
        assert gap.start_ns < gap.end_ns and gap.why.startswith("perf buffers end with the agent's process")


BCC = """
BPF_HASH(by_uid, u32, u64);
TRACEPOINT_PROBE(syscalls, sys_enter_execve) { u32 uid = bpf_get_current_uid_gid(); by_uid.increment(uid); return 0; }
"""


def bcc_push(version: int, *entries: int, source: str = BCC) -> stream_pb2.Push:
    """A policy for each size of the map, all of one source."""
    pushed = stream_pb2.Push(term=1, version=version)
    for size in entries:
        plan = pushed.plans.add(policy_uid=f"p{size}", generation=version, scope=plan_pb2.SCOPE_CLUSTER)
        plan.instance.digest, plan.instance.title = f"{size:032x}", "bcc/execs"
        plan.instance.bcc.source, plan.instance.bcc.file_name = source, "execs.c"
        plan.instance.map_sizes.add(map="by_uid", max_entries=size)
        pushed.selections.add(policy_uid=plan.policy_uid, everything=True)
    return pushed


def test_a_policy_that_comes_again_and_another_of_its_source_wait_for_no_compiler(folder: Path) -> None:
    with Engine.open(bpffs=folder) as engine:
        for version, sizes in enumerate(([23], [], [23], [23, 997]), 1):
            engine.apply(bcc_push(version, *sizes))
            assert {each.message for each in engine.status().policies} <= {""}
            assert len(engine.status().policies) == len(sizes)
        batch = collected(engine)
    assert (batch.compile_misses, batch.compile_hits) == (1, 2)
