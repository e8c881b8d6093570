"""The workloads make exactly the events that they report: asked of strace and of the kernel's own ledgers."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workloads import run

CONNECTS_BYTES = 70_001  # more than the program's buffer holds


@pytest.fixture(scope="module", autouse=True)
def built() -> Path:
    return run.build()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    with run.in_cgroup("test") as folder:
        yield folder


def traced(calls: str, tmp_path: Path, name: str, *arguments: object) -> list[str]:
    """The lines that strace has for a workload and its children."""
    log = tmp_path / "strace"
    command = ["strace", "-f", "-qq", "-e", f"trace={calls}", "-o", str(log), str(run.binary(name))]
    subprocess.run([*command, *map(str, arguments)], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    return [line for line in log.read_text().splitlines() if re.search(r"\w+\(", line)]


def test_calls_are_made_exactly_as_often_as_asked(tmp_path: Path) -> None:
    lines = traced("sched_get_priority_max", tmp_path, "calls", "rare", 997)
    assert len(lines) == 997


def test_calls_report_their_failures() -> None:
    assert run.run("calls", "rare", 23, -1) == {"calls": 23, "failed": 23}


def test_a_pause_is_short_once_a_byte_has_come_and_only_then(cgroup: Path) -> None:
    paced = ("calls", "rare", 23, "--pause", 50_000, "--hurry")
    began = time.monotonic()
    subprocess.run([run.binary(paced[0]), *map(str, paced[1:])], check=True, stdin=subprocess.DEVNULL)
    assert time.monotonic() - began > 23 * 0.05, "the end of stdin is no byte"
    with run.start("calls", "rare", 997, "--pause", 100_000, "--hurry", cgroup=cgroup) as workload:
        workload.go()
        workload.hurry()
        assert workload.done()["calls"] == 997  # in a second or two, and not in a hundred


def test_execs_succeed_and_fail_exactly_as_often_as_asked(tmp_path: Path) -> None:
    lines = traced("execve", tmp_path, "execs", 23, "--failing", 5)
    assert sum('["execs", "exit", ' in line and line.endswith("= 0") for line in lines) == 23
    assert sum("ENOENT" in line for line in lines) == 5
    assert len(lines) == 23 + 5 + 1  # and the start of the workload itself


def test_opens_are_all_the_opens_of_the_program(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    lines = traced("open,openat,openat2,creat", tmp_path, "opens", 97, path, "--missing", 5)
    assert sum("ENOENT" in line for line in lines) == 5
    assert len(lines) == 97 + 5


def test_a_sleeper_is_woken_exactly_as_often_as_asked() -> None:
    with run.start("wakes", 97) as workload:
        before = workload.switches()
        workload.go()
        done = workload.done()
        after = workload.switches()
    assert done["wakes"] == 97
    # The sleeper's wake-ups and birth, and at least one sleep of the waker for each of them.
    assert (after - before).woken >= 97 + 1 + 97


def test_a_sleeper_is_woken_from_another_cgroup(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    with (
        run.in_cgroup("sleeper") as one,
        run.in_cgroup("waker") as other,
        run.start("wakes", "--sleeper", fifo, 97, cgroup=one) as sleeper,
        run.start("wakes", "--waker", fifo, 97, cgroup=other) as waker,
    ):
        before = sleeper.switches()
        waker.go()
        sleeper.go()
        done = sleeper.done()
        woken = (sleeper.switches() - before).woken
        assert waker.done()["repeated"] == done["repeated"]
    assert done["wakes"] == 97
    # 97 by the waker, one by our "go", and at most one by each of the two FIFOs whose other end was not open yet.
    assert 97 + 1 <= woken <= 97 + 1 + 2


def test_connections_carry_the_bytes_asked_for(tmp_path: Path) -> None:
    with run.echo_server() as port:
        lines = traced("connect", tmp_path, "connects", 23, port, "--bytes", CONNECTS_BYTES)
        done = run.run("connects", 5, port, "--bytes", CONNECTS_BYTES)
    assert len(lines) == 23
    assert done == {"connects": 5, "refused": 0, "bytes": 5 * CONNECTS_BYTES}


def test_connections_over_ipv6() -> None:
    with run.echo_server(address="::1") as port:
        assert run.run("connects", 5, port, "::1")["connects"] == 5


def test_refused_connections_are_counted_apart() -> None:
    with run.echo_server() as port:
        pass  # now nobody listens there
    assert run.run("connects", 5, port) == {"connects": 0, "refused": 5, "bytes": 0}


def test_block_requests_are_those_that_the_device_completed() -> None:
    with run.loop_device() as device, run.start("blockio", 97, device, "--writes", 23) as workload:
        before = run.block_requests(device)
        workload.go()
        workload.done()
        assert run.block_requests(device) - before == run.Requests(97, 23, 97 * 4096, 23 * 4096)


def test_a_file_is_read_and_written_exactly_as_often_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    lines = traced("pread64,pwrite64", tmp_path, "files", 23, path, "--writes", 29, "--size", 97)
    assert sum(line.count("pwrite64(") for line in lines) == 29
    assert sum(line.count("pread64(") for line in lines) == 23
    assert path.stat().st_size == 29 * 97


def test_a_function_is_hit_with_every_argument_once() -> None:
    with run.start("hits", 997) as workload:
        # The offset is the function's: its first instruction saves the frame pointer (push %rbp).
        assert run.binary("hits").read_bytes()[workload.ready["offset"]] == 0x55
        workload.go()
        assert workload.done() == {"hits": 997, "sum": 997**2}


def test_spinning_uses_the_cpu_time_asked_for() -> None:
    used_us = run.run("spin", 1)["cpu_us"]
    assert 1_000_000 <= used_us < 1_500_000


def test_a_held_workload_is_in_its_cgroup_before_its_first_event(cgroup: Path) -> None:
    with run.start("calls", "rare", 23, cgroup=cgroup) as workload:
        assert (cgroup / "cgroup.procs").read_text().split() == [str(workload.pid)]
        workload.go()
        assert workload.done()["calls"] == 23
        assert run.cgroup_id(cgroup) == os.stat(cgroup).st_ino


def test_a_workload_that_is_never_told_to_go_does_nothing(tmp_path: Path) -> None:
    log = tmp_path / "strace"
    command = ["strace", "-f", "-e", "trace=sched_get_priority_max", "-o", str(log), str(run.binary("calls"))]
    done = subprocess.run([*command, "--hold", "rare", "23"], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert done.stdout == b"ready\n"
    assert "sched_get_priority_max" not in log.read_text()


def test_leaving_a_cgroup_kills_what_is_in_it() -> None:
    with run.in_cgroup("pod/container") as cgroup:
        process = subprocess.Popen(["sleep", "1000"])
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        run.place(process.pid, cgroup)
    reaper.join()
    assert process.returncode == -9
    assert not cgroup.parent.exists()


def test_a_workload_that_fails_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(run.WorkloadError, match="No such file or directory"),
        run.start("opens", 1, tmp_path / "absent") as workload,
    ):
        workload.go()
        workload.done()
