"""The engine on the real kernel: what an agent finds that it cannot adopt is left alone until a push decides."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from probefleet_agent import decode, following
from probefleet_agent.engine import Engine, StalePush
from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import clock, maps
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.rings import RingReader
from probefleet_wire import columns, resources
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.kernel.support import call_getppid, compile_object
from tests.workloads import run

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
    batch = engine.collect(time.time_ns(), force=True)
    return [stat.digest for stat in batch.instances] if batch else []


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


@pytest.mark.parametrize(("wall_hours", "hours_up", "left"), [(9, 0, [DIGEST]), (-9, 0.5, [DIGEST]), (-9, 2, [])])
def test_an_instance_goes_when_it_ran_for_an_hour_unasked_whatever_the_wall_clock_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wall_hours: float, hours_up: float, left: list[str]
) -> None:
    with Engine.open(bpffs=folder) as engine:
        engine.apply(push(1))
    hour_ns, now_ns, up_ns = 3600 * 10**9, time.time_ns, clock.since_boot_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(wall_hours * hour_ns))
    monkeypatch.setattr(clock, "since_boot_ns", lambda: up_ns() + int(hours_up * hour_ns))
    with Engine.open(bpffs=folder) as engine:
        assert state_of_loaded(engine) == left


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


def test_what_a_perf_buffer_missed_between_two_agents_is_a_gap_and_the_newest_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "MAX_GAPS", 2)
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
    for _ in range(3):
        with Engine.open(bpffs=folder) as engine:
            gaps = collected(engine).tables[0].gaps
    assert len(gaps) == 2 and gap.end_ns < gaps[0].start_ns < gaps[1].start_ns


def test_a_push_that_is_not_newer_changes_nothing(folder: Path) -> None:
    with Engine.open(bpffs=folder) as engine:
        engine.apply(push(7))
        before = state(engine)
        for term, version in ((1, 7), (1, 6), (0, 99)):
            older = stream_pb2.Push(term=term, version=version)  # an empty one would remove everything
            with pytest.raises(StalePush, match=rf"push {term}\.{version} is not newer than 1\.7"):
                engine.apply(older)
            assert state(engine) == before
    # It is remembered with the pins: also the next agent takes no older one.
    with Engine.open(bpffs=folder) as engine:
        with pytest.raises(StalePush):
            engine.apply(stream_pb2.Push(term=1, version=7))
        assert state_of_loaded(engine) == [DIGEST]
        engine.apply(stream_pb2.Push(term=2, version=1))
        assert not list((folder / "probefleet/instances").iterdir()), "a newer one may"


def test_an_edit_that_leaves_the_programs_alone_sends_every_row_again(folder: Path) -> None:
    data = compile_object('SEC("tp_btf/sched_process_exec") int on_exec(void *ctx) { return hit(); }')
    pushes = [push(1), push(2)]
    for generation, pushed in enumerate(pushes, 1):
        plan = pushed.plans[0]
        plan.generation, plan.instance.object.sha256 = generation, hashlib.sha256(data).hexdigest()
        plan.instance.attachments[0].program = "on_exec"
        plan.outputs.add(name="hits", map="hits", kind=plan_pb2.Output.COUNTER)
        pushed.blobs[0].sha256, pushed.blobs[0].zstd = plan.instance.object.sha256, zstandard.compress(data)
    with Engine.open(bpffs=folder) as engine:
        for generation, pushed in enumerate(pushes, 1):
            engine.apply(pushed)
            table = collected(engine).tables[0]
            assert (table.generation, table.first_new_row, table.new_rows) == (generation, 0, 1)


def test_a_node_whose_clock_is_set_back_goes_on_sampling(folder: Path) -> None:
    pushed = push(1)
    pushed.plans[0].outputs.add(name="execs", map="execs")
    with Engine.open(bpffs=folder) as engine:
        engine.apply(pushed)
        now_ns, times = time.time_ns(), []
        for at_ns in (now_ns, now_ns + 1, now_ns - 3600 * 10**9, now_ns - 3600 * 10**9 + 1):
            batch = engine.collect(at_ns)
            times += [batch.time_ns - now_ns] if batch and batch.tables else []
        assert times == [0, -3600 * 10**9]


def test_records_count_anew_where_another_selector_chooses_others(folder: Path) -> None:
    def selecting(version: int, selector: str, generation: int) -> stream_pb2.Push:
        pushed = push(version)
        pushed.plans[0].generation = generation
        pushed.plans[0].outputs.add(name="events", map="events", kind=plan_pb2.Output.EVENTS)
        pushed.selections[0].everything, pushed.selections[0].selector = selector == "all", selector
        return pushed

    def told(engine: Engine) -> tuple[int, int]:
        """All that is counted of a new stream's ring, and since when."""
        engine.hello()
        (chunk,) = collected(engine).events
        positions = columns.unpack(chunk.positions, limit=9999) if chunk.positions else []
        return chunk.counted_before + len(positions), chunk.since_ns

    with Engine.open(bpffs=folder) as engine:
        engine.apply(selecting(1, "all", 1))
        run.run("execs", 23)
        first, began_ns = told(engine)
        engine.acknowledge(engine._stream.sequence)
        assert first >= 23
        engine.apply(selecting(2, "all", 2))
        again, since_ns = told(engine)
        assert again >= first and since_ns == began_ns, "the selector is the same"
        before_ns, under_way = time.time_ns(), engine._stream.sequence
        engine.apply(selecting(3, "nobody", 3))
        engine.acknowledge(under_way)  # comes late, and is of the other selector's records
        run.run("execs", 23)
        none, since_ns = told(engine)
        assert none == 0 and since_ns >= before_ns


def test_what_a_key_had_counted_when_it_went_stays_until_the_agent_is_replaced_and_is_told(folder: Path) -> None:
    data = compile_object(
        """
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __type(key, u32); __type(value, u64); }
calls SEC(".maps");
SEC("tracepoint") int on_call(void *ctx)
{
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	u64 one = 1, *count;

	if (pid != PID)
		return 0;
	count = bpf_map_lookup_elem(&calls, &pid);
	if (count && *count == 23)
		bpf_map_delete_elem(&calls, &pid);
	else if (count)
		*count += 1;
	else
		bpf_map_update_elem(&calls, &pid, &one, BPF_ANY);
	return 0;
}
""".replace("PID", str(os.getpid()))
    )

    def pushed(version: int) -> stream_pb2.Push:
        made = push(version)
        plan = made.plans[0]
        plan.instance.object.sha256 = made.blobs[0].sha256 = hashlib.sha256(data).hexdigest()
        del plan.instance.attachments[:]
        plan.instance.attachments.add(program="on_call").syscall.name = "getppid"
        plan.outputs.add(name="calls", map="calls")
        made.blobs[0].zstd = zstandard.compress(data)
        return made

    def told(engine: Engine) -> tuple[list[int], list[str]]:
        engine.hello()
        (table,) = collected(engine).tables
        return columns.unpack(table.values, limit=9).tolist(), list(table.uncounted)

    with Engine.open(bpffs=folder) as engine:
        engine.apply(pushed(1))
        assert state(engine).state == stream_pb2.PolicyStatus.READY, state(engine).message
        call_getppid(23)
        assert told(engine) == ([23], [])
        call_getppid(1 + 7)
        went = "keys of calls went, or began anew (1 times): counts between their last reading and that are missing"
        assert told(engine) == ([30], [went])
    forgotten = "keys of calls went before the agent was replaced: what they had counted is in no total"
    for version in (2, 3):
        with Engine.open(bpffs=folder) as engine:
            engine.apply(pushed(version))
            assert told(engine) == ([7], [forgotten])


def test_records_that_cannot_be_read_stay_in_the_ring(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = push(1)
    pushed.plans[0].outputs.add(name="events", map="events", kind=plan_pb2.Output.EVENTS)
    pushed.plans[0].outputs.add(name="execs", map="execs")

    def raising(error: Callable[[], Exception]) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise error()  # a new one: its frames look into the ring

        return fail

    with Engine.open(bpffs=folder) as engine:
        engine.apply(pushed)
        engine.hello()
        run.run("execs", 23)
        for owner, name, error in (
            (RingReader, "read", lambda: KernelError(errno.EIO, "read ring")),
            (decode, "coded", lambda: decode.DecodeError("a field that nobody knows")),
        ):
            with monkeypatch.context() as broken:
                broken.setattr(owner, name, raising(error))
                batch = collected(engine)
            assert batch.tables and not batch.events
            assert state(engine).message == str(error())
        (chunk,) = collected(engine).events
        assert len(columns.unpack(chunk.positions, limit=9999)) >= 23
        assert (chunk.counted_before, chunk.start_position) == (0, 0)
        assert state(engine).state == stream_pb2.PolicyStatus.READY


def test_a_map_that_cannot_be_read_is_told_and_the_others_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = compile_object('SEC("tp_btf/sched_process_exec") int on_exec(void *ctx) { return hit(); }')
    pushed = push(1)
    plan = pushed.plans[0]
    plan.instance.object.sha256 = pushed.blobs[0].sha256 = hashlib.sha256(data).hexdigest()
    plan.instance.attachments[0].program = "on_exec"
    plan.outputs.add(name="hits", map="hits")
    pushed.blobs[0].zstd = zstandard.compress(data)
    other = pushed.plans.add()
    other.CopyFrom(push(1).plans[0])
    other.policy_uid, other.instance.digest = "other", "f" * 32
    other.outputs.add(name="execs", map="execs")
    pushed.blobs.add().CopyFrom(push(1).blobs[0])
    pushed.selections.add(policy_uid="other", everything=True)

    def read(fd: Fd, info: maps.MapInfo) -> tuple[maps.Bytes, maps.Bytes]:
        if info.name == "hits":
            raise KernelError(errno.ENOMEM, "read map hits")
        return really_read(fd, info)

    really_read, words = maps.read, "read map hits: Cannot allocate memory (ENOMEM)"
    with Engine.open(bpffs=folder) as engine:
        engine.apply(pushed)
        before = engine.turns
        monkeypatch.setattr(maps, "read", read)
        tables = {table.output: table for table in collected(engine).tables}
        assert list(tables["hits"].uncounted) == [f"output hits could not be read: {words}"]
        assert not tables["execs"].uncounted
        said = {each.policy_uid: (each.state, each.message) for each in engine.status().policies}
        assert said["p"] == (stream_pb2.PolicyStatus.FAILED, words)
        assert said["other"][0] == stream_pb2.PolicyStatus.READY
        assert engine.turns != before, "it is told at once"
        monkeypatch.setattr(maps, "read", really_read)
        assert not any(table.uncounted for table in collected(engine).tables)
        assert engine.turns == before


TWO_WAYS = """
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 2); __type(key, u32); __type(value, u64); }
ways SEC(".maps");
static const u32 only = PID;
static __always_inline int count(u32 way)
{
	u64 *calls = bpf_get_current_pid_tgid() >> 32 == only ? bpf_map_lookup_elem(&ways, &way) : 0;

	if (calls)
		__sync_fetch_and_add(calls, 1);
	return 0;
}
SEC("tp_btf") int first(void *ctx) { return count(0); }
SEC("tracepoint") int second(void *ctx) { return count(1); }
"""


def test_where_the_kernel_lacks_the_first_way_the_next_one_counts(folder: Path) -> None:
    data = compile_object(TWO_WAYS.replace("PID", str(os.getpid())))
    pushed = push(1)
    (plan,) = pushed.plans
    plan.instance.object.sha256 = pushed.blobs[0].sha256 = hashlib.sha256(data).hexdigest()
    pushed.blobs[0].zstd = zstandard.compress(data)
    del plan.instance.attachments[:]
    plan.instance.attachments.add(program="first", alternative="calls").tp_btf.name = "no_kernel_has_this"
    second = plan.instance.attachments.add(program="second", alternative="calls")
    second.tracepoint.category, second.tracepoint.name = "syscalls", "sys_enter_getppid"
    plan.outputs.add(name="ways", map="ways", kind=plan_pb2.Output.COUNTER, group_by=["key"])
    with Engine.open(bpffs=folder) as engine:
        engine.apply(pushed)
        said = state(engine)
        assert said.state == stream_pb2.PolicyStatus.READY, said.message
        assert len(said.ways) == 1 and "sys_enter_getppid" in said.ways[0]
        call_getppid(997)
        (table,) = collected(engine).tables
    keys, counts = (columns.unpack(each, limit=2).tolist() for each in (table.keys[0].integers, table.values))
    assert {key: count for key, count in zip(keys, counts, strict=True) if count} == {1: 997}


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
