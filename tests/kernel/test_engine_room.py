"""Room in maps: what is forgotten of cgroups that ended, what never is, and how full maps are said to be."""

from __future__ import annotations

import errno
import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from probefleet_agent import batches, identities, loaded
from probefleet_agent.engine import Engine
from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import maps, pins
from probefleet_agent.pods import CgroupId
from probefleet_core import aggregate, result
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.kernel.support import compile_object
from tests.kernel.test_engine import push
from tests.workloads import run

pytestmark = pytest.mark.kernel
FULL = "execs is full, and the program does not count what finds no room"
HOUR_NS = identities.GONE_NS
#: More than half of the tracker's 16,384; ids that no kernel has given out.
STRANGERS = range(1 << 60, (1 << 60) + 9001)


def counting_push() -> stream_pb2.Push:
    """execsnoop with a table of execs by user, and its records."""
    wanted = push(1)
    wanted.plans[0].outputs.add(name="by_user", map="execs", group_by=["pod"])
    return wanted


def crowd(folder: Path) -> None:
    """Cgroups that were made and went, as the program on cgroup_mkdir would have remembered them."""
    table = pins.root(folder).identity_map("cgroups")
    assert table is not None
    with table:
        keys = np.array(STRANGERS, np.uint64).view(np.uint8).reshape(-1, 8)
        values = np.zeros((len(keys), 256), np.uint8)
        values[:, 0] = ord("/")
        maps.update_many(table, keys, values)


def remembered(folder: Path) -> set[int]:
    table = pins.root(folder).identity_map("cgroups")
    assert table is not None
    with table:
        keys, _ = maps.read(table, maps.info(table))
    return set(np.ascontiguousarray(keys).view(np.uint64).reshape(-1).tolist())


def test_cgroups_that_went_are_forgotten_but_not_what_a_map_still_counts(folder: Path) -> None:
    with Engine.open(bpffs=folder) as engine:
        engine.apply(counting_push())
        engine.hello()
        with run.in_cgroup("ended") as cgroup:
            counted = run.cgroup_id(cgroup)
            run.run("execs", 23, cgroup=cgroup)
        with run.in_cgroup("idle") as cgroup:
            idle = run.cgroup_id(cgroup)
        with run.in_cgroup("lives") as cgroup:
            living = run.cgroup_id(cgroup)
            now_ns = time.time_ns()
            assert engine.collect(now_ns, force=True) is not None
            assert {counted, idle, living} <= remembered(folder), "there is room: nothing is forgotten"
            crowd(folder)
            engine.collect(now_ns + 1, force=True)  # sees that it is crowded
            engine.collect(now_ns + 2, force=True)  # sees what is gone
            assert idle in remembered(folder), "it went just now"
            engine.collect(now_ns + HOUR_NS + 3, force=True)
            kept = remembered(folder)
            assert not kept & (set(STRANGERS) | {idle})
            assert {counted, living} <= kept


def test_where_a_map_cannot_be_read_no_cgroup_is_forgotten_and_sampling_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> set[int]:
        raise KernelError(errno.EPERM, "read inner maps")

    monkeypatch.setattr(batches, "cgroups_in_use", unreadable)
    with Engine.open(bpffs=folder) as engine:
        engine.apply(counting_push())
        engine.hello()
        crowd(folder)
        now_ns = time.time_ns()
        for at in (now_ns, now_ns + 1, now_ns + HOUR_NS + 3):
            batch = engine.collect(at, force=True)
            assert batch is not None and batch.tables
        assert set(STRANGERS) <= remembered(folder)


def test_a_forgotten_cgroup_leaves_the_filter_also_after_a_restart(folder: Path) -> None:
    wanted = counting_push()
    wanted.selections[0].everything = False
    wanted.selections[0].pod_uids.append("nobody")
    with Engine.open(bpffs=folder) as engine:
        engine.apply(wanted)
        assert refused(engine), "the host's cgroups are no pod's"
        with run.in_cgroup("idle") as cgroup:
            idle = run.cgroup_id(cgroup)
            engine.collect(time.time_ns(), force=True)
            assert idle in refused(engine)
    with Engine.open(bpffs=folder) as engine:
        engine.hello()
        now_ns = time.time_ns()
        crowd(folder)
        for at in (now_ns + 1, now_ns + 2, now_ns + HOUR_NS + 3):
            engine.collect(at, force=True)
        assert idle not in refused(engine)
        assert refused(engine)


def refused(engine: Engine) -> set[int]:
    (instance,) = engine._installed.loaded.values()
    handle = instance.maps["probefleet_filter"]
    keys, _ = maps.read(handle.fd, handle.info)
    return {CgroupId(key) for key in np.ascontiguousarray(keys).view(np.uint64).reshape(-1).tolist()}


def test_a_table_says_how_full_its_map_is(folder: Path) -> None:
    with Engine.open(bpffs=folder) as engine, run.in_cgroup("web") as cgroup:
        engine.apply(counting_push())
        engine.hello()
        run.run("execs", 23, cgroup=cgroup)
        batch = engine.collect(time.time_ns(), force=True)
        assert batch is not None
        (table,) = batch.tables
        assert 1 <= table.entries < table.max_entries
        assert not table.uncounted


@pytest.mark.parametrize("counts_losses", [True, False])
def test_a_full_map_is_said_to_be_full_where_its_losses_are_not_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, counts_losses: bool
) -> None:
    wanted = counting_push()
    wanted.plans[0].instance.map_sizes.add(map="execs", max_entries=1)
    with Engine.open(bpffs=folder) as engine, run.in_cgroup("web") as web, run.in_cgroup("cart") as cart:
        engine.apply(wanted)
        engine.hello()
        for cgroup in (web, cart):
            run.run("execs", 23, cgroup=cgroup)
        if not counts_losses:
            for reader in (batches, loaded):
                monkeypatch.setattr(reader, "LOST", "another")
        batch = engine.collect(time.time_ns(), force=True)
        assert batch is not None
        (table,) = batch.tables
        assert (table.entries, table.max_entries) == (1, 1)
        assert (table.lost >= 23) == counts_losses
        assert list(table.uncounted) == ([] if counts_losses else [FULL])


NO_RECORD = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include "probefleet.h"
char LICENSE[] SEC("license") = "GPL";
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); __type(value, u64); } records SEC(".maps");
SEC("tp_btf/sched_process_exec") int on_exec(void *ctx)
{
	u64 *record = probefleet_selected(0) ? 0 : probefleet_reserve(&records, sizeof(u64));

	if (record)
		probefleet_submit(record);
	probefleet_count_lost(PROBEFLEET_LOST_UPDATE);
	return 0;
}
"""


def test_records_that_never_came_to_the_ring_are_lost_though_no_other_comes(folder: Path) -> None:
    wanted, data = push(1), compile_object(NO_RECORD, prelude=False)
    plan = wanted.plans[0]
    plan.instance.object.sha256 = wanted.blobs[0].sha256 = hashlib.sha256(data).hexdigest()
    plan.instance.attachments[0].program = "on_exec"
    plan.outputs.add(name="execs", map="records", kind=plan_pb2.Output.EVENTS)
    wanted.blobs[0].zstd = zstandard.compress(data)
    with Engine.open(bpffs=folder) as engine, run.in_cgroup("web") as cgroup:
        engine.apply(wanted)
        engine.hello()
        policy = aggregate.Aggregate(result.PolicyFacts("p", "", "p", 1, 1000, tuple(plan.outputs)))
        for _ in range(2):
            run.run("execs", 23, cgroup=cgroup)
            batch = engine.collect(time.time_ns(), force=True)
            assert batch is not None
            assert policy.apply("node", 1, batch, batch.time_ns)
        assert policy.result(batch.time_ns, selected_nodes={"node"}, names={}.get).lost >= 46
