"""What processes are called: also those that are gone, and never by the name of who had the pid before."""

from __future__ import annotations

import os
import subprocess

import pytest
from probefleet_agent import names


def test_a_process_that_is_gone_keeps_the_name_that_a_record_gave() -> None:
    lookups = names.MachineLookups()
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert lookups.command(gone.pid) == ""
    lookups.learn(gone.pid, "true")
    assert lookups.command(gone.pid) == "true"


def test_the_name_of_a_pid_that_may_be_used_again_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = names.MachineLookups()
    gone = subprocess.Popen(["true"])
    gone.wait()
    lookups.learn(gone.pid, "true")
    lookups.learn(os.getpid(), "former")
    before = names._forks()
    with open("/proc/sys/kernel/pid_max") as file:
        most = int(file.read())
    monkeypatch.setattr(names, "_forks", lambda: before + most // 2 - 1000)
    lookups.refresh()
    assert lookups.command(gone.pid) == "true"
    monkeypatch.setattr(names, "_forks", lambda: before + most // 2 + 1)
    lookups.refresh()
    assert lookups.command(gone.pid) == ""
    with open("/proc/self/comm") as file:
        assert lookups.command(os.getpid()) == file.read().strip()


def test_forks_are_counted_by_the_kernel() -> None:
    before = names._forks()
    subprocess.run(["true"], check=True)
    assert names._forks() > before


def test_no_more_names_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_COMMANDS", 3)
    lookups = names.MachineLookups()
    for pid in (1 << 23, 2 << 23, 3 << 23, 1 << 23, 4 << 23):
        lookups.learn(pid, f"c{pid >> 23}")
    assert [lookups.command(each << 23) for each in (1, 2, 3, 4)] == ["c1", "", "c3", "c4"]


PROGRAM = "bpf_prog_216d6d6d346f835b_sched_switch"


@pytest.mark.parametrize(
    ("stack", "left"),
    [
        ([PROGRAM, "bpf_trace_run4", "__schedule", "schedule"], ["__schedule", "schedule"]),
        ([PROGRAM, "trace_call_bpf", "perf_call_bpf_enter", "__schedule"], ["__schedule"]),
        (["__schedule", "schedule"], ["__schedule", "schedule"]),
        ([], []),
        # Of another instance: that is where time goes.
        (
            ["bpf_prog_216d6d6d346f835b_sys_enter", "bpf_trace_run2"],
            ["bpf_prog_216d6d6d346f835b_sys_enter", "bpf_trace_run2"],
        ),
        (["__schedule", PROGRAM], ["__schedule", PROGRAM]),
        (["bpf_prog_216d6d6d346f835b_a_name_of_more_", "bpf_trace_run1", "work"], ["work"]),
    ],
)
def test_a_stack_begins_where_the_program_was_called_not_in_it(stack: list[str], left: list[str]) -> None:
    assert names.without_own(stack, {"sched_switch", "a_name_of_more_than_fits"}) == left
