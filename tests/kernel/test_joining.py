"""A policy that joins a running program counts from when it came: exactly, whoever is killed, in real maps.

The agent is a process of its own, so that ``kill -9`` is one; the operator's side is this process's: an aggregate a
policy, new ones where the operator is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from probefleet_agent import joining
from probefleet_agent.engine import Engine
from probefleet_agent.installed import Installed
from probefleet_agent.kernel import blobs, maps, mounts, pins, syscall
from probefleet_cli import local_pods, preparation
from probefleet_core import aggregate, report, result
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.kernel import policies
from tests.kernel.support import call_getppid, compile_object

pytestmark = pytest.mark.kernel
DIGEST = "a" * 32
NODE = "node"
# Each call counts under the key that ``which`` holds; key 99 is not counted, but counted lost.
SOURCE = """
struct event { u64 number; };
struct hist { u32 slots[8]; };
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u32); }
which SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, u32); __type(value, u64); }
calls SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_HASH); __uint(max_entries, 64); __type(key, u32); __type(value, u64); }
each_cpu SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 2); __type(key, u32); __type(value, struct hist); }
sizes SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 1 << 20); __type(value, struct event); }
ring SEC(".maps");
ON_CALL
{
	u32 zero = 0, *key = bpf_map_lookup_elem(&which, &zero);
	struct hist *hist = bpf_map_lookup_elem(&sizes, &zero);
	struct event *event;
	u32 number;

	if (!ours() || !key || !hist)
		return 0;
	number = *key;
	if (number == 99) {
		probefleet_count_lost(0);
		return 0;
	}
	probefleet_add(&calls, &number, 1);
	probefleet_add(&each_cpu, &number, 1);
	__sync_fetch_and_add(&hist->slots[number & 7], 1);
	event = bpf_ringbuf_reserve(&ring, sizeof(*event), 0);
	if (!event) {
		probefleet_count_lost(1);
		return 0;
	}
	event->number = number;
	bpf_ringbuf_submit(event, 0);
	return 0;
}
"""
OUTPUTS = (
    plan_pb2.Output(name="calls", map="calls", kind=plan_pb2.Output.TOPK, group_by=["key"]),
    plan_pb2.Output(name="each_cpu", map="each_cpu", kind=plan_pb2.Output.COUNTER),
    plan_pb2.Output(
        name="sizes", map="sizes", value="slots", kind=plan_pb2.Output.HISTOGRAM,
        histogram=plan_pb2.Histogram(slots="value"),
    ),
    plan_pb2.Output(name="ring", map="ring", kind=plan_pb2.Output.EVENTS),
)  # fmt: skip


def program() -> bytes:
    return compile_object(policies.HEAD.replace("PID", str(os.getpid())) + SOURCE, prelude=False)


def plan(uid: str, *, generation: int = 1, **changes: Any) -> plan_pb2.Plan:
    made = plan_pb2.Plan(
        policy_uid=uid, name=uid, generation=generation, scope=plan_pb2.SCOPE_CLUSTER, interval_ms=1000,
        outputs=changes.pop("outputs", OUTPUTS), **changes,
    )  # fmt: skip
    made.instance.digest, made.instance.title = DIGEST, "c/test"
    made.instance.object.sha256 = hashlib.sha256(program()).hexdigest()
    target = made.instance.attachments.add(program="on_call").tracepoint
    target.category, target.name = "syscalls", "sys_enter_getppid"
    return made


def serve(connection: Connection, folder: Path, die: str) -> None:
    """The agent's process: its engine does what it is told. ``die``: by its own hand, at that moment."""
    points: dict[str, tuple[Any, str]] = {
        "before the baseline is pinned": (pins.Folder, "pin_baseline"),
        "before the manifest names the policy": (Installed, "remember"),
        "before gone keys are kept": (blobs, "patch"),
    }
    with Engine.open(bpffs=folder, node=NODE, stats=False) as engine:
        engine.hello()
        if die:
            setattr(*points[die], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        connection.send(b"ready")
        while True:
            what, data = connection.recv()
            if what == "apply":
                engine.apply(stream_pb2.Push.FromString(data))
                connection.send(engine.status().SerializeToString())
            else:
                batch = engine.collect(time.time_ns(), force=True)
                assert batch is not None
                connection.send(batch.SerializeToString())
                engine.acknowledge(batch.sequence)


class Fleet:
    """One node and its operator."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, result.PolicyFacts] = {}
        self._version = self._session = 0
        self.start()
        self.replace_operator()

    def start(self, *, die: str = "") -> None:
        """A new agent: a new stream."""
        self._session += 1
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.folder, die), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.recv() == b"ready"

    def kill(self) -> None:
        self._process.kill()
        self._died()

    def _died(self) -> None:
        self._process.join(30)
        code = self._process.exitcode
        self._process.close()
        self._pipe.close()
        assert code == -signal.SIGKILL

    def replace_operator(self) -> None:
        """Another one, which knows nothing, and a new stream to it."""
        self.aggregates = {uid: aggregate.Aggregate(facts) for uid, facts in self.facts.items()}

    def apply(self, *plans: plan_pb2.Plan, dies: bool = False, prepared: stream_pb2.Push | None = None) -> None:
        """``prepared``: what these plans need beside them."""
        self._version += 1
        push = stream_pb2.Push()
        if prepared is None:
            push.blobs.add(sha256=hashlib.sha256(program()).hexdigest(), zstd=zstandard.compress(program()))
        else:
            push.blobs.extend(prepared.blobs)
            push.probe_maps.extend(prepared.probe_maps)
        push.term, push.version = 1, self._version
        push.plans.extend(plans)
        for each in plans:
            push.selections.add(policy_uid=each.policy_uid, everything=True)
            self.facts[each.policy_uid] = facts = result.PolicyFacts.of(each)
            if each.policy_uid in self.aggregates:
                self.aggregates[each.policy_uid].update(facts)
            else:
                self.aggregates[each.policy_uid] = aggregate.Aggregate(facts)
        self._pipe.send(("apply", push.SerializeToString()))
        if dies:
            self._died()
            return
        for status in stream_pb2.Status.FromString(self._pipe.recv()).policies:
            assert status.state == stream_pb2.PolicyStatus.READY, status.message

    def collect(self, *, dies: bool = False) -> stream_pb2.Batch:
        self._pipe.send(("collect", b""))
        if dies:
            self._died()
            return stream_pb2.Batch()
        batch = stream_pb2.Batch.FromString(self._pipe.recv())
        for each in self.aggregates.values():
            each.apply(NODE, self._session, batch, time.time_ns())
        return batch

    def report(self, uid: str) -> report.Json:
        self.collect()
        merged = self.aggregates[uid].result(time.time_ns(), selected_nodes={NODE}, names=lambda _: None)
        return report.status(merged)

    def counts(self, uid: str) -> dict[str, int]:
        """Of every output the total."""
        return {each["name"]: int(each["total"]["value"]) for each in self.report(uid)["outputs"]}

    def rows(self, uid: str) -> dict[str, int]:
        (output,) = [each for each in self.report(uid)["outputs"] if each["name"] == "calls"]
        return {row["key"][0]: row["value"] for row in output["total"]["rows"]}

    def map(self, name: str) -> Any:
        return syscall.obj_get(str(self.pinned(f"map_{name}")))

    def pinned(self, name: str) -> Path:
        return self.folder / "probefleet/instances" / DIGEST / name

    def call(self, times: int, key: int = 7) -> None:
        with self.map("which") as fd:
            syscall.map_update(fd, bytes(4), key.to_bytes(4, "little"))
        call_getppid(times)


def alike(count: int) -> dict[str, int]:
    return dict.fromkeys(("calls", "each_cpu", "sizes", "ring"), count)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    path = mounts.mount_bpffs() / f"probefleet-test-joining-{os.getpid()}"
    path.mkdir(exist_ok=True)
    made = Fleet(path)
    yield made
    with contextlib.suppress(ValueError):  # dead already
        made.kill()
    with Engine.open(bpffs=path) as engine:
        engine.remove_everything()
    path.rmdir()


def test_the_joiner_says_23_and_the_first_1020(fleet: Fleet) -> None:
    fleet.apply(plan("first"))
    fleet.call(997)
    began_ns = time.time_ns()
    fleet.apply(plan("first"), plan("second"))
    assert fleet.counts("second") == alike(0), "nothing of before"
    fleet.call(23)
    assert (fleet.counts("first"), fleet.counts("second")) == (alike(1020), alike(23))
    batch = fleet.collect()
    since = {table.policy_uid: table.since_ns for table in batch.tables}
    assert since["first"] < began_ns < since["second"] < time.time_ns()
    assert fleet.report("second")["uncounted"] == []
    assert fleet.report("second")["columns"]["lost"] == "0"


def test_across_kill_9_of_the_agent_and_a_new_operator_nothing_is_lost_or_doubled(fleet: Fleet) -> None:
    fleet.apply(plan("first"))
    fleet.call(997)
    fleet.apply(plan("first"), plan("second"))
    fleet.call(23)
    assert fleet.counts("second") == alike(23)
    fleet.kill()
    fleet.call(101)
    fleet.start()
    assert (fleet.counts("first"), fleet.counts("second")) == (alike(1121), alike(124))
    fleet.apply(plan("first"), plan("second"))
    fleet.kill()
    fleet.replace_operator()
    fleet.call(2)
    fleet.start()
    assert (fleet.counts("first"), fleet.counts("second")) == (alike(1123), alike(126))


@pytest.mark.parametrize("moment", ["before the baseline is pinned", "before the manifest names the policy"])
def test_an_agent_killed_while_a_policy_joins_begins_the_policy_anew(fleet: Fleet, moment: str) -> None:
    fleet.apply(plan("first"))
    fleet.call(997)
    fleet.kill()
    fleet.start(die=moment)
    fleet.apply(plan("first"), plan("second"), dies=True)
    fleet.call(5)
    fleet.start()
    assert not list(fleet.pinned("").glob("base_*"))
    fleet.apply(plan("first"), plan("second"))
    fleet.call(23)
    assert (fleet.counts("first"), fleet.counts("second")) == (alike(1025), alike(23))


def test_policies_that_come_with_the_program_have_no_baseline(fleet: Fleet) -> None:
    fleet.apply(plan("first"), plan("second"))
    assert not list(fleet.pinned("").glob("base_*"))
    fleet.call(23)
    assert (fleet.counts("first"), fleet.counts("second")) == (alike(23), alike(23))


def test_a_key_taken_away_takes_its_baseline_with_it_also_past_kill_9(fleet: Fleet) -> None:
    fleet.apply(plan("first"))
    fleet.call(997, key=7)
    fleet.call(11, key=5)
    fleet.apply(plan("first"), plan("second"))
    fleet.call(3, key=5)
    assert fleet.rows("second") == {"5": 3}
    with fleet.map("calls") as fd:
        maps.delete_many(fd, np.array([7], "<u4").view(np.uint8).reshape(1, 4))
    fleet.call(23, key=7)
    assert fleet.rows("second") == {"5": 3, "7": 23}
    (said,) = fleet.report("second")["uncounted"]
    assert said.startswith("1 keys of calls that were there before this policy went, or began anew")
    fleet.call(1000, key=7)
    fleet.kill()
    fleet.start()
    assert fleet.rows("second") == {"5": 3, "7": 1023}, "and not what is above the 997 of before"


def test_an_agent_killed_before_it_kept_what_went_decides_alike(fleet: Fleet) -> None:
    fleet.apply(plan("first"))
    fleet.call(997)
    fleet.apply(plan("first"), plan("second"))
    fleet.kill()
    with fleet.map("calls") as fd:
        maps.delete_many(fd, np.array([7], "<u4").view(np.uint8).reshape(1, 4))
    fleet.call(23)
    fleet.start(die="before gone keys are kept")
    fleet.collect(dies=True)
    fleet.start()
    assert fleet.rows("second") == {"7": 23}


def test_what_was_lost_before_is_not_the_joiners_loss(fleet: Fleet) -> None:
    fleet.apply(plan("first"))
    fleet.call(29, key=99)
    fleet.apply(plan("first"), plan("second"))
    fleet.call(3, key=99)
    assert [fleet.report(uid)["lost"] for uid in ("first", "second")] == [32, 3]


def test_who_leaves_and_comes_again_counts_both_times_and_not_what_was_between(fleet: Fleet) -> None:
    fleet.apply(plan("first"))
    fleet.call(997)
    fleet.apply(plan("first"), plan("second"))
    fleet.call(23)
    assert fleet.counts("second") == alike(23)
    fleet.apply(plan("first"))
    assert not list(fleet.pinned("").glob("base_*")), "gone with its policy"
    fleet.call(101)
    fleet.apply(plan("first"), plan("second"))
    fleet.call(5)
    assert (fleet.counts("first"), fleet.counts("second")) == (alike(1126), alike(28))
    fleet.apply(plan("second"))
    fleet.call(2)
    assert fleet.counts("second") == alike(30), "the first has left; the program stays"


def test_an_output_that_is_added_later_begins_then(fleet: Fleet) -> None:
    few, all_of_them = OUTPUTS[:1], OUTPUTS[:3]
    fleet.apply(plan("first"))
    fleet.call(997)
    fleet.apply(plan("first"), plan("second", outputs=few))
    fleet.call(23)
    assert fleet.counts("second") == {"calls": 23}
    fleet.apply(plan("first"), plan("second", outputs=all_of_them, generation=2))
    fleet.kill()
    fleet.call(5)
    fleet.start()
    assert fleet.counts("second") == {"calls": 28, "each_cpu": 5, "sizes": 5}


def test_no_room_for_a_baseline_is_said_and_the_totals_are_the_programs(fleet: Fleet) -> None:
    fleet.apply(plan("first"))
    fleet.call(997)
    budget = plan_pb2.Budget(map_memory_bytes=1)
    fleet.apply(plan("first"), plan("second", budget=budget))
    fleet.call(23)
    for restart in (False, True):
        if restart:
            fleet.kill()
            fleet.start()
        body = fleet.report("second")
        assert fleet.counts("second") == {**alike(1020), "ring": 23}, "records have their mark all the same"
        (said,) = body["uncounted"]
        assert said.startswith("in part of the time before this policy came, since the program began:")
        assert "beyond budget.mapMemory" in said
        outputs = {each["name"]: each["since"] for each in body["outputs"]}
        assert outputs["calls"] == fleet.report("first")["since"]


def test_a_baseline_is_counted_as_memory(fleet: Fleet) -> None:
    fleet.apply(plan("first"))
    fleet.call(997)
    before = fleet.report("first")["cost"]["mapBytesMax"]
    fleet.apply(plan("first"), plan("second"))
    fleet.call(1)
    after = fleet.report("first")["cost"]["mapBytesMax"]
    with syscall.obj_get(str(fleet.pinned("base_second"))) as fd:
        assert after - before == maps.memory_used_bytes(fd) > 0


def test_a_damaged_baseline_begins_anew_and_says_so(fleet: Fleet) -> None:
    fleet.apply(plan("first"))
    fleet.call(997)
    fleet.apply(plan("first"), plan("second"))
    fleet.call(23)
    assert fleet.counts("second") == alike(23)
    fleet.kill()
    with syscall.obj_get(str(fleet.pinned("base_second"))) as fd:
        blobs.patch(fd, 0, b"damaged")
    fleet.call(5)
    for _ in range(2):
        fleet.start()
        fleet.call(3)
        body = fleet.report("second")
        assert body["uncounted"] == ["the agent could not read what this policy had counted: it began anew"]
        fleet.kill()
    # 23 were sent before; the five are what is missing.
    fleet.start()
    assert fleet.counts("second")["calls"] == 23 + 6


def test_a_baseline_outlives_the_growing_of_a_shared_map(fleet: Fleet) -> None:
    source = """
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __type(key, u32); __type(value, u64); }
both SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __type(key, u32); __type(value, u64); }
calls SEC(".maps");
ON_CALL
{
	u32 key = 7;

	if (!ours())
		return 0;
	probefleet_add(&both, &key, 1);
	probefleet_add(&calls, &key, 1);
	return 0;
}
"""
    outputs = [{"name": name, "from": {"map": name}, "counter": {}} for name in ("calls", "both")]
    sharing = [{"name": "both", "share": {"probeMap": "both"}}]
    manifest = policies.c_policy(source, maps=sharing, outputs=outputs, interval="1s")

    def apply(entries: int, *uids: str) -> None:
        shape = {"type": "hash", "maxEntries": entries, "key": "u32 key", "value": "u64 calls"}
        probe_map = {**manifest, "kind": "ProbeMap", "metadata": {"name": "both"}, "spec": shape}
        prepared = policies.prepare(probe_map, manifest)
        push = preparation.push(prepared, pods=local_pods.find(), namespace=None, version=1)
        plans = [plan_pb2.Plan.FromString(push.plans[0].SerializeToString()) for _ in uids]
        for each, uid in zip(plans, uids, strict=True):
            each.policy_uid = uid
        fleet.apply(*plans, prepared=push)

    apply(64, "first")
    call_getppid(997)
    apply(64, "first", "second")
    call_getppid(23)
    # A ProbeMap is of everybody: what it holds is shown, whoever counted it.
    assert fleet.counts("second") == {"calls": 23, "both": 1020}
    apply(4096, "first", "second")
    call_getppid(5)
    assert fleet.counts("second") == {"calls": 28, "both": 1025}
    fleet.kill()
    fleet.start()
    call_getppid(2)
    assert (fleet.counts("first"), fleet.counts("second")) == (
        {"calls": 1027, "both": 1027}, {"calls": 30, "both": 1027},
    )  # fmt: skip


def test_who_joins_a_bpftrace_script_counts_from_then_also_where_it_begins_again(fleet: Fleet) -> None:
    script = f"tracepoint:syscalls:sys_enter_getppid /pid == {os.getpid()}/ {{ @calls = count(); }}"
    manifest = policies.c_policy("", program={"bpftrace": {"script": script}})
    (prepared,) = policies.prepare(manifest)
    first, second = (plan_pb2.Plan.FromString(prepared.planned.plan.SerializeToString()) for _ in range(2))
    first.policy_uid, second.policy_uid = "first", "second"
    fleet.apply(first)
    call_getppid(997)
    fleet.apply(first, second)
    call_getppid(23)
    assert (fleet.counts("first"), fleet.counts("second")) == ({"calls": 1020}, {"calls": 23})
    since = fleet.report("second")["since"]
    fleet.kill()  # and bpftrace with it
    fleet.start()
    call_getppid(5)
    assert (fleet.counts("first"), fleet.counts("second")) == ({"calls": 1025}, {"calls": 28})
    assert fleet.report("second")["since"] == since


@pytest.mark.parametrize("size", [0, 1, 100, blobs.PIECE_BYTES, 3 * blobs.PIECE_BYTES + 5])
def test_bytes_of_any_length_are_kept_and_patched(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    with blobs.create(data, "test") as fd:
        assert blobs.read(fd)[:size] == data
        assert not any(blobs.read(fd)[size:])
        at = size // 3
        blobs.patch(fd, at, data[at : at + size // 2][::-1])
        assert blobs.read(fd)[:size] == data[:at] + data[at : at + size // 2][::-1] + data[at + size // 2 :]


def test_a_baseline_that_the_memory_of_an_agent_has_no_room_for_is_not_taken(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.apply(plan("first"))
    fleet.call(997)
    fleet.kill()
    monkeypatch.setattr(joining, "MAX_INSTANCE_BYTES", 8)
    fleet.start()  # a fork: it has the same bound
    fleet.apply(plan("first"), plan("second"))
    fleet.call(23)
    assert fleet.rows("second") == {"7": 1020}
    (said,) = fleet.report("second")["uncounted"]
    assert "at most 8 are kept" in said
