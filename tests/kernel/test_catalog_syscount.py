"""syscount: calls and durations, exactly, by cgroup; whatever way it is attached."""

from __future__ import annotations

import os

import pytest
from probefleet_wire import syscalls

from tests.kernel.catalog_probe import Running
from tests.workloads import run

MACHINE = os.uname().machine


def number(name: str) -> int:
    found = syscalls.number(name, MACHINE)
    assert found is not None
    return found


def calls(probe: Running, cgroup: int, name: str) -> int:
    keys, counts = probe.rows("calls", cgroup=cgroup)
    return int(counts[keys["syscall"] == number(name)].sum())


def durations(probe: Running, cgroup: int, name: str) -> list[int]:
    keys, found = probe.rows("durations", cgroup=cgroup)
    return [int(each) for each in found["slots"][keys["syscall"] == number(name)].sum(axis=0)]


@pytest.mark.parametrize("way", ["btf", "raw"])
@pytest.mark.shows("probe/syscount")
def test_997_calls_are_997_calls_and_997_durations(way: str) -> None:
    with (
        run.in_cgroup("web") as cgroup,
        run.start("calls", "rare", 997, cgroup=cgroup) as workload,
        Running("syscount", prefer=way) as probe,
    ):
        workload.go()
        workload.done()
        me = run.cgroup_id(cgroup)
        assert calls(probe, me, "sched_get_priority_max") == 997
        slots = durations(probe, me, "sched_get_priority_max")
        assert sum(slots) == 997
        assert sum(slots[20:]) < 23, "sched_get_priority_max takes no millisecond"
        assert probe.lost() == [0, 0, 0, 0]


def test_pods_are_told_apart_and_a_refused_one_is_not_counted() -> None:
    with run.in_cgroup("web") as web, run.in_cgroup("cart") as cart, run.in_cgroup("other") as other:
        with Running("syscount", syscalls="sched_get_priority_max", latency="false", filter_on="1") as probe:
            probe.refuse(run.cgroup_id(other))
            for cgroup, count in ((web, 997), (cart, 23), (other, 101)):
                run.run("calls", "rare", count, cgroup=cgroup)
            counts = [calls(probe, run.cgroup_id(each), "sched_get_priority_max") for each in (web, cart, other)]
            assert counts == [997, 23, 0]
            keys, _ = probe.rows("calls")
            assert set(keys["syscall"]) == {number("sched_get_priority_max")}, "only what was asked for"
            assert len(probe.rows("durations")[0]) == 0


def test_a_call_that_never_returns_is_counted_without_a_duration() -> None:
    with run.in_cgroup("web") as cgroup, Running("syscount") as probe:
        run.run("calls", "rare", 1, cgroup=cgroup)
        me = run.cgroup_id(cgroup)
        assert calls(probe, me, "exit_group") == 1
        assert sum(durations(probe, me, "exit_group")) == 0


def test_23_execs_return_once_each_though_execve_changes_the_process() -> None:
    with run.in_cgroup("web") as cgroup, run.start("execs", 23, cgroup=cgroup) as workload:
        with Running("syscount", syscalls="execve") as probe:
            workload.go()
            assert workload.done()["execs"] == 23
            assert calls(probe, run.cgroup_id(cgroup), "execve") == 23
            assert sum(durations(probe, run.cgroup_id(cgroup), "execve")) == 23


def test_calls_under_way_at_attach_have_no_duration() -> None:
    """The workload waits in read(2) when the probe comes: that read returns, but was not seen to enter."""
    with run.in_cgroup("web") as cgroup, run.start("calls", "rare", 23, cgroup=cgroup) as workload:
        with Running("syscount", syscalls="read") as probe:
            workload.go()
            workload.done()
            me = run.cgroup_id(cgroup)
            assert sum(durations(probe, me, "read")) <= calls(probe, me, "read") <= 1, "the next read waits still"


def test_ended_threads_leave_nothing_behind() -> None:
    with run.in_cgroup("web") as cgroup, Running("syscount") as probe:
        with run.start("execs", 23, cgroup=cgroup) as workload:
            workload.go()
            workload.done()
        _, flights = probe.rows("in_flight")
        assert run.cgroup_id(cgroup) not in set(flights["cgroup"])


def test_what_a_full_map_cannot_count_is_lost_and_said() -> None:
    with Running("syscount", latency="false", sizes={"calls": 1}, syscalls="getppid,getuid,getgid") as probe:
        for _ in range(23):
            os.getppid(), os.getuid(), os.getgid()
        counted, lost = int(probe.rows("calls")[1].sum()), probe.lost()[0]
        assert lost >= 23
        assert counted + lost >= 69
