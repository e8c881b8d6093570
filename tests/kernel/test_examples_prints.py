"""What programs print: a ring of each program's own in place of the trace_pipe that all share; exact."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from probefleet_agent.kernel import mounts

from tests.kernel import examples_runner, support
from tests.workloads import run as workloads

# sched_get_priority_min: nothing on the machine calls it; other tests that do wait.
RARER = {"x86_64": 147, "aarch64": 126}[os.uname().machine]
POLICIES = """
apiVersion: probefleet.io/v1alpha1
kind: ProbePolicy
metadata: {name: flood}
spec:
  scope: Cluster
  program:
    c:
      source: |
        #include <probefleet.h>
        SEC("tracepoint/syscalls/sys_enter_sched_get_priority_min")
        int on_call(void *ctx)
        {
            u32 i;

            for (i = 0; i < 128; i++)
                bpf_printk("%u of 128", i);
            return 0;
        }
        char LICENSE[] SEC("license") = "GPL";
  interval: 1h
"""


@pytest.fixture(autouse=True)
def _nobody_else() -> Iterator[None]:
    with support.nobody_else_calls("sched_get_priority_min"):
        yield


def shared_trace() -> str:
    """What lies in the machine's own trace; reading this file takes nothing out, as trace_pipe would."""
    mounts.mount_tracefs()
    root = mounts.tracefs()
    assert root is not None
    return (root / "trace").read_text()


@pytest.mark.shows("example/prints")
def test_two_policies_that_print_at_once_have_their_own_lines_each() -> None:
    with examples_runner.running("prints.yaml", links=2) as run:
        with workloads.start("calls", RARER, 23, 7) as workload:
            workload.go()
            assert workload.done()["calls"] == 23
            pid = str(workload.pid)
    for policy, message in (("prints-bcc", "bcc: policy 7"), ("prints-core", "core: calls asks for 7, 0xff")):
        assert run.counts(policy, "trace_printk") == {"received": 23, "submitted": 23, "lost": 0, "dropped": 0}
        records = run.records(policy, "trace_printk")
        assert {each["message"] for each in records} == {message}
        for each in records:
            assert (each["task"], each["pid"], each["tgid"]) == ("calls", pid, pid)
            assert 0 <= int(each["cpu"]) < (os.cpu_count() or 1)
            assert re.fullmatch(r"-[.N]--", each["flags"]) and each["time"].startswith("20")
        assert not {"format", "values", "texts", "pointers"} & set(records[0])
        times = [each["time"] for each in records]
        assert times == sorted(times)


def test_the_machines_trace_pipe_gets_nothing_of_it() -> None:
    """Nor is anything taken out of it that others wrote: it is still there for whoever reads it."""
    mounts.mount_tracefs()
    root = mounts.tracefs()
    assert root is not None
    others = f"line of another program {os.getpid()}"
    with examples_runner.running("prints.yaml", links=2) as run, workloads.start("calls", RARER, 23, 41) as workload:
        (root / "trace_marker").write_text(others)
        workload.go()
        workload.done()
    assert run.counts("prints-bcc", "trace_printk")["received"] == 23
    said = shared_trace()
    assert "policy 41" not in said and "asks for 41" not in said
    assert said.count(others) == 1


def test_lines_that_find_no_room_are_counted(tmp_path: Path) -> None:
    """64 calls print 8,192 lines at once: a ring of 512 KiB keeps what fits, and the rest is lost, counted."""
    path = tmp_path / "flood.yaml"
    path.write_text(POLICIES)
    with examples_runner.running(path, links=1) as run, workloads.start("calls", RARER, 64) as workload:
        workload.go()
        workload.done()
    counts = run.counts("flood", "trace_printk")
    assert counts["lost"] > 0 and counts["dropped"] == 0
    assert counts["received"] == counts["submitted"]
    assert counts["submitted"] + counts["lost"] == 64 * 128
