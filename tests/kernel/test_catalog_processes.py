"""execsnoop, opensnoop, runqlat and profile: exact counts, whose they are, and what their records hold."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from probefleet_agent.kernel import maps, symbols

from tests.kernel.catalog_probe import Running, the_catalog
from tests.kernel.support import until_nothing_was_hidden
from tests.workloads import run

ENOENT = -2


def text(value: bytes | np.bytes_) -> str:
    return bytes(value).split(b"\0", 1)[0].decode()


def waits(probe: Running, cgroup: Path) -> int:
    _, found = probe.rows("durations", cgroup=run.cgroup_id(cgroup))
    return int(found["slots"].sum())


@pytest.fixture
def web() -> Iterator[Path]:
    with run.in_cgroup("web") as cgroup:
        yield cgroup


@pytest.mark.parametrize("way", ["btf", "raw"])
@pytest.mark.shows("probe/execsnoop")
def test_23_execs_are_counted_and_recorded_with_their_arguments(web: Path, way: str) -> None:
    with run.start("execs", 23, "--failing", 5, cgroup=web) as workload, Running("execsnoop", prefer=way) as probe:
        workload.go()
        assert workload.done() == {"execs": 23, "failed": 5}
        me = run.cgroup_id(web)
        keys, counts = probe.rows("execs", cgroup=me)
        assert (keys["user"].tolist(), counts.tolist()) == ([os.getuid()], [23])
        records = probe.records(cgroup=me)
        assert [text(each) for each in records["arguments"]] == [f"execs exit {number}" for number in range(23)]
        assert {text(each) for each in records["command"]} == {"exe"}, "it executes /proc/self/exe"
        assert set(records["parent"]) == {workload.pid}
        assert len(set(records["pid"])) == 23
        assert {text(each) for each in records["file"]} == {"/proc/self/exe"}
        assert (np.diff(records["time"].astype(np.int64)) > 0).all()
        lost = probe.lost()
        assert lost[0] == lost[1] == 0
        assert lost[2] >= 23


def test_arguments_that_are_too_long_are_cut_off_and_their_length_is_said(web: Path) -> None:
    """An empty argument leaves two spaces; 300 bytes do not fit."""
    long = "x" * 300
    with Running("execsnoop") as probe:
        pid = os.posix_spawn("/bin/true", ["true", "", "a b", long], {})
        os.waitpid(pid, 0)
        records = probe.records()
        (record,) = records[records["pid"] == pid]
        assert text(record["arguments"]) == ("true  a b " + long)[:255]
        assert record["argument_bytes"] == len("true  a b ") + 301


def test_a_full_ring_loses_records_but_no_count(web: Path) -> None:
    with run.start("execs", 23, cgroup=web) as workload, Running("execsnoop", sizes={"events": 4096}) as probe:
        workload.go()
        workload.done()
        _, counts = probe.rows("execs", cgroup=run.cgroup_id(web))
        assert counts.sum() == 23
        _, ring_full, submitted, _ = probe.lost()
        assert len(probe.records()) == submitted < 10
        assert ring_full + submitted >= 23


@pytest.mark.shows("probe/opensnoop")
def test_997_opens_of_which_23_fail(web: Path, tmp_path: Path) -> None:
    path = tmp_path / "opened"
    path.touch()
    with run.start("opens", 974, path, "--missing", 23, cgroup=web) as workload, Running("opensnoop") as probe:
        workload.go()
        assert workload.done() == {"opens": 974, "missing": 23}
        me = run.cgroup_id(web)
        keys, counts = probe.rows("opens", cgroup=me)
        assert dict(zip(keys["result"].tolist(), counts.tolist(), strict=True)) == {0: 974, ENOENT: 23}
        records = probe.records(cgroup=me)
        assert len(records) == 997
        files = [text(each) for each in records["file"]]
        assert files == [str(path)] * 974 + [f"{path}.missing"] * 23
        assert (records["result"][:974] >= 0).all()
        assert set(records["result"][974:]) == {ENOENT}
        assert set(records["pid"]) == set(records["thread"]) == {workload.pid}
        assert probe.lost()[:2] == [0, 0]


def test_failed_opens_alone_are_recorded_while_all_are_counted(web: Path, tmp_path: Path) -> None:
    path = tmp_path / "opened"
    path.touch()
    with Running("opensnoop", failed="true") as probe:
        run.run("opens", 101, path, "--missing", 23, cgroup=web)
        me = run.cgroup_id(web)
        assert probe.rows("opens", cgroup=me)[1].sum() == 124
        assert set(probe.records(cgroup=me)["result"]) == {ENOENT}
        assert len(probe.records(cgroup=me)) == 23


def test_every_way_to_open_is_seen(tmp_path: Path) -> None:
    """open, creat and openat2 by number: glibc calls openat for all of them."""
    libc = ctypes.CDLL(None, use_errno=True)
    name = str(tmp_path / "file").encode()
    calls: dict[str, tuple[object, ...]] = {
        "openat2": (437, -100, name, b"\x41" + bytes(7) + b"\x80\x01" + bytes(14), 24)
    }
    if os.uname().machine == "x86_64":
        calls |= {"open": (2, name, 0, 0), "creat": (85, name, 0o600)}
    with Running("opensnoop") as probe:
        for arguments in calls.values():
            os.close(libc.syscall(*arguments))
        mine = probe.records()
        mine = mine[mine["pid"] == os.getpid()]
        mine = mine[[text(each) == name.decode() for each in mine["file"]]]
        expected = {"openat2": 0o101, "open": 0, "creat": 0o1101}
        assert mine["flags"].tolist() == [expected[call] for call in calls]


@pytest.mark.shows("probe/runqlat")
def test_as_many_waits_as_the_scheduler_says(web: Path) -> None:
    def attempt() -> tuple[int, int]:
        with run.start("wakes", 997, cgroup=web) as workload:
            before = workload.switches()
            with Running("runqlat") as probe:
                workload.go()
                assert workload.done()["wakes"] == 997
                queued = (workload.switches() - before).queued
                assert queued >= 2 * 997
                assert probe.lost() == [0, 0, 0, 0]
                return waits(probe, web), queued

    until_nothing_was_hidden(attempt)


def test_a_wait_is_the_woken_tasks_whoever_woke_it(web: Path, tmp_path: Path) -> None:
    """The sleeper of one pod is woken by the waker of another: each has its own waits, no more."""
    with run.in_cgroup("cart") as cart:

        def attempt() -> tuple[int, int]:
            fifo = tmp_path / f"fifo-{time.monotonic_ns()}"
            with (
                run.start("wakes", "--sleeper", fifo, 997, cgroup=web) as sleeper,
                run.start("wakes", "--waker", fifo, 997, cgroup=cart) as waker,
            ):
                before = sleeper.switches(), waker.switches()
                with Running("runqlat") as probe:
                    sleeper.go()
                    waker.go()
                    assert sleeper.done()["wakes"] == 997
                    waker.done()
                    slept = (sleeper.switches() - before[0]).queued
                    others = (waker.switches() - before[1]).queued
                    assert slept >= 997
                    assert waits(probe, web) <= slept
                    assert waits(probe, cart) <= others
                    return waits(probe, web) + waits(probe, cart), slept + others

        until_nothing_was_hidden(attempt)


def test_a_refused_pods_waits_are_not_counted(web: Path) -> None:
    with Running("runqlat", filter_on="1", processes="true") as probe, run.in_cgroup("cart") as cart:
        probe.refuse(run.cgroup_id(web))
        run.run("wakes", 23, cgroup=web)
        with run.start("wakes", 23, cgroup=cart) as workload:
            workload.go()
            workload.done()
            keys, found = probe.rows("durations", cgroup=run.cgroup_id(cart))
            assert workload.pid in set(keys["process"])
            assert found["slots"].sum() >= 23
        assert waits(probe, web) == 0


def test_ended_tasks_wait_no_longer() -> None:
    """After 997 processes came and went there is no more than one entry for each thread that lives."""
    with Running("runqlat") as probe:
        run.run("execs", 997)
        alive = sum(1 for _ in Path("/proc").glob("[0-9]*/task/*"))
        assert len(probe.rows("waiting")[0]) < alive + 100


@pytest.mark.shows("probe/profile")
def test_samples_are_as_many_as_the_cpu_time_and_say_the_function(web: Path) -> None:
    with run.start("spin", 2, cgroup=web) as workload, Running("profile", frequency="199") as probe:
        workload.go()
        used_seconds = workload.done()["cpu_us"] / 1e6
        keys, counts = probe.rows("samples", cgroup=run.cgroup_id(web))
        assert set(keys["pid"]) == {workload.pid}
        # A CPU that is emulated, or shared with other machines, answers its timer late: the kernel drops those ticks.
        least = 0.2 if os.environ.get("VM") else 0.5
        assert least * 199 * used_seconds <= counts.sum() <= 1.1 * 199 * used_seconds + 2
        by_function: dict[str, int] = {}
        collided = 0
        symbolizer = symbols.Symbolizer()
        info = maps.info(probe.maps["stacks"])
        for key, count in zip(keys, counts, strict=True):
            if key["user_stack"] < 0:
                collided += int(count)
                continue
            wanted = np.array([[key["user_stack"]]], "<i4").view(np.uint8)
            found, there = maps.lookup_many(probe.maps["stacks"], info, wanted)
            assert there.all()
            addresses = np.ascontiguousarray(found).view("<u8").reshape(-1)
            names = symbolizer.user(workload.pid, addresses[addresses != 0])
            by_function[";".join(reversed(names))] = by_function.get(";".join(reversed(names)), 0) + int(count)
        hot = sum(count for stack, count in by_function.items() if stack.endswith("main;spin_outer;spin_inner"))
        assert hot >= 0.9 * sum(by_function.values()), by_function
        assert collided <= probe.lost()[3], "a stack that is missing is lost, and said to be"


def test_the_frequency_of_profile_is_where_it_is_attached() -> None:
    probe = the_catalog().get("profile")
    assert probe is not None
    (attachment,) = probe.attachments([("frequency", "23")])
    assert getattr(attachment.target, "frequency_hz", 0) == 23


# offcputime


def sleeps(probe: Running, cgroup: Path) -> tuple[int, int]:
    """(sleeps that ended, nanoseconds of them) of a cgroup."""
    _, found = probe.rows("sleeps", cgroup=run.cgroup_id(cgroup))
    return int(found["times"].sum()), int(found["nanoseconds"].sum())


def kernel_names(probe: Running, stack: int) -> list[str]:
    """The functions of a kernel stack, the leaf first."""
    info = maps.info(probe.maps["stacks"])
    found, there = maps.lookup_many(probe.maps["stacks"], info, np.array([[stack]], "<i4").view(np.uint8))
    assert there.all()
    addresses = np.ascontiguousarray(found).view("<u8").reshape(-1)
    return symbols.Symbolizer().kernel(addresses[addresses != 0])


@pytest.mark.parametrize("preempted", [pytest.param("false", marks=pytest.mark.shows("probe/offcputime")), "true"])
def test_997_sleeps_have_their_time_and_their_stack(web: Path, preempted: str) -> None:
    """The ledger's switches are the sleeps, with the last one, which has not ended."""

    def attempt() -> tuple[int, int]:
        with run.start("calls", "rare", 997, "--pause", 500, cgroup=web) as workload:
            with Running("offcputime", preempted=preempted) as probe:
                began = time.monotonic_ns()
                ledger, before = workload.switches(), workload.schedule()
                workload.go()
                workload.done()
                made = workload.switches() - ledger
                elapsed = time.monotonic_ns() - began
                ran_ns = workload.schedule().ran_ns - before.ran_ns
                times, nanoseconds = sleeps(probe, web)
                keys, found = probe.rows("sleeps", cgroup=run.cgroup_id(web))
                assert set(keys["pid"]) == {workload.pid}
                assert 997 * 500_000 <= nanoseconds <= elapsed
                if preempted == "true":
                    # Off the CPU and on it are all of the time, but for what went by before and after. The scheduler
                    # lets a thread that preempts another run from its wake-up on (rq_clock_skip_update), which is some
                    # microseconds before the switch: on a busy machine it has each sleep a little shorter than we.
                    assert 0.9 * elapsed <= nanoseconds + ran_ns <= elapsed + made.queued * 20_000
                if probe.lost()[3] == 0:
                    asleep = [
                        int(value["nanoseconds"])
                        for key, value in zip(keys, found, strict=True)
                        if any("nanosleep" in each for each in kernel_names(probe, int(key["kernel_stack"])))
                    ]
                    assert sum(asleep) >= 997 * 500_000
                assert probe.lost()[:2] == [0, 0]
            return times, (made.woken if preempted == "false" else made.queued) - 1

    until_nothing_was_hidden(attempt)


def test_sleeps_shorter_than_the_minimum_are_left_out(web: Path) -> None:
    with run.start("calls", "rare", 23, "--pause", 100, cgroup=web) as workload:
        with Running("offcputime", minimum="1m") as probe:
            workload.go()
            workload.done()
            assert sleeps(probe, web) == (0, 0)


def test_a_refused_pods_sleeps_are_not_counted(web: Path) -> None:
    with Running("offcputime", filter_on="1") as probe:
        probe.refuse(run.cgroup_id(web))
        run.run("calls", "rare", 23, "--pause", 100, cgroup=web)
        assert sleeps(probe, web) == (0, 0)


def test_threads_that_ended_are_not_away() -> None:
    with Running("offcputime") as probe:
        run.run("execs", 997)
        alive = sum(1 for _ in Path("/proc").glob("[0-9]*/task/*"))
        assert len(probe.rows("away")[0]) < alive + 100
