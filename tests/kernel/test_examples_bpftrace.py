"""bpftrace scripts as policies: maps and lines exact, gone with their process, said where it cannot be."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_agent import bpftrace_programs, engine
from probefleet_agent.kernel import bpftrace
from probefleet_cli import preparation
from probefleet_cli.failures import BadInput
from probefleet_cli.sources import Source
from probefleet_core import catalog
from probefleet_wire import bpftrace_script, columns
from probefleet_wire.v1 import stream_pb2

from tests.kernel import examples_runner, policies, support
from tests.workloads import run as workloads

NAME = "sched_get_priority_min"
CALLS = {"x86_64": 147, "aarch64": 126}[os.uname().machine]
TRACEPOINT = f"tracepoint:syscalls:sys_enter_{NAME}"


def policy(script: str) -> dict[str, Any]:
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": "script"},
        "spec": {"scope": "Cluster", "program": {"bpftrace": {"script": script}}},
    }


def raising(error: type[BaseException]) -> Callable[..., None]:
    def raises(*_: object) -> None:
        raise error

    return raises


def make_calls(count: int, argument: int) -> None:
    with support.nobody_else_calls(NAME), workloads.start("calls", CALLS, count, argument) as workload:
        workload.go()
        assert workload.done()["calls"] == count


@pytest.mark.shows("example/bpftrace-calls", "program/bpftrace")
def test_maps_histograms_and_lines_of_the_example_are_exact() -> None:
    with examples_runner.running("bpftrace-calls.yaml", instances=1) as run:
        make_calls(23, 7)
        make_calls(19, 55)
    name = "bpftrace-calls"
    assert run.rows(name, "calls") == {("calls,7",): 23, ("calls,55",): 19}
    buckets = {each["from"]: each["count"] for each in run.output(name, "policies")["total"]["buckets"]}
    assert {low: count for low, count in buckets.items() if count} == {4: 23, 32: 19}
    buckets = {each["from"]: each["count"] for each in run.output(name, "tens")["total"]["buckets"]}
    assert {low: count for low, count in buckets.items() if count} == {0: 23, 50: 19}
    assert run.rows(name, "largest") == {(): 55}
    assert run.rows(name, "stats_count") == {("calls",): 42}
    assert run.rows(name, "stats_total") == {("calls",): 23 * 7 + 19 * 55}
    assert run.counts(name, "printf")["received"] == 42
    messages = [each["message"] for each in run.records(name, "printf")]
    assert messages == ["calls asks for 7"] * 23 + ["calls asks for 55"] * 19


def test_what_a_script_clears_stays_counted(tmp_path: Path) -> None:
    script = f"{TRACEPOINT} {{ @calls = count(); }} interval:ms:300 {{ print(@calls); clear(@calls); }}"
    path = tmp_path / "script.yaml"
    path.write_text(yaml.safe_dump(policy(script)))
    with examples_runner.running(path, instances=1) as run:
        for _ in range(5):
            make_calls(23, 1)
            time.sleep(0.4)  # some clear() in between; the count does not depend on which
    assert run.rows("script", "calls") == {(): 5 * 23}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('kprobe:f { system("id"); @a = count(); }', "it calls system()"),
        ("BEGIN { exit(); }", "nothing to report"),
    ],
)
def test_what_cannot_be_is_said_before_a_node_hears_of_it(script: str, words: str) -> None:
    with pytest.raises(BadInput, match=re.escape(words)):
        preparation.prepare([Source("script", policy(script))], catalog=catalog.Catalog({}))


def test_a_mistake_has_bpftraces_own_words() -> None:
    with policies.run(policy("tracepoint:syscalls:nonexistent { @a = count(); }"), ready=False) as run:
        (status,) = run.measured.statuses()
    assert status.state == stream_pb2.PolicyStatus.FAILED
    assert re.search(r"script: bpftrace: .*nonexistent", status.message)


def test_a_node_without_bpftrace_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpftrace.shutil, "which", lambda _: None)
    with pytest.raises(bpftrace.BpftraceUnavailable, match="not installed here; Debian: apt install bpftrace"):
        bpftrace.Process("BEGIN { }")


def test_the_process_has_few_rights_and_no_network() -> None:
    process = bpftrace.Process(bpftrace_script.instrumented(f"{TRACEPOINT} {{ @a = count(); }}"))
    try:
        # Until then it may still be what gives the rights away.
        while not any(each["type"] == "attached_probes" for each in process.messages(1.0)):
            assert not process.ended, process.ended
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        # CAP_SYS_ADMIN 21, CAP_SYSLOG 34, CAP_PERFMON 38, CAP_BPF 39
        for which in ("CapEff", "CapBnd", "CapPrm"):
            assert int(status[which], 16) & ~(1 << 21 | 1 << 34 | 1 << 38 | 1 << 39) == 0
        assert status["NoNewPrivs"] == "1"
        own = os.readlink("/proc/self/ns/net")
        assert os.readlink(f"/proc/{process.pid}/ns/net") != own
        environment = Path(f"/proc/{process.pid}/environ").read_bytes().rstrip(b"\0").split(b"\0")
        assert b"HOME=/nonexistent" in environment
        names = {each.partition(b"=")[0] for each in environment}
        assert names - {b"BPFTRACE_BTF"} == {b"PATH", b"HOME", b"BPFTRACE_STRLEN"}
    finally:
        process.close()
    assert not Path(f"/proc/{process.pid}").exists()


@pytest.mark.parametrize("one_more_dies", [False, True])
def test_an_agent_that_starts_again_begins_anew_and_shows_the_gap(
    one_more_dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends with its agent: counts of before stay with the operator, in an epoch of their own.

    Also where another agent ends while it starts the script: the one after it still knows.
    """
    bpffs = Path("/sys/fs/bpf") / f"test-bpftrace-{os.getpid()}"
    bpffs.mkdir()
    (prepared,) = preparation.prepare(
        [Source("script", policy(f"{TRACEPOINT} {{ @calls = count(); }}"))], catalog=catalog.Catalog({})
    )
    push = stream_pb2.Push(
        term=1,
        version=1,
        plans=[prepared.planned.plan],
        selections=[stream_pb2.Selection(policy_uid=prepared.policy.uid, everything=True)],
    )
    try:
        with engine.Engine.open(bpffs=bpffs, stats=False) as first:
            first.hello()
            first.apply(push)
            make_calls(23, 1)
            before = first.collect(time.time_ns(), force=True)
        ended_ns = time.time_ns()
        if one_more_dies:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(bpftrace_programs, "load", raising(KeyboardInterrupt))
                engine.Engine.open(bpffs=bpffs, stats=False)
        with engine.Engine.open(bpffs=bpffs, stats=False) as second:
            second.hello()
            make_calls(19, 1)
            after = second.collect(time.time_ns(), force=True)
            (status,) = second.status().policies
            assert status.state == stream_pb2.PolicyStatus.READY
            second.remove_everything()
        assert before is not None and after is not None
        assert before.tables[0].epoch != after.tables[0].epoch
        (gap,) = after.tables[0].gaps
        assert gap.why == "bpftrace ends with the agent's process" and gap.start_ns < ended_ns < gap.end_ns
        assert not after.instances[0].cost_known
    finally:
        for path in sorted(bpffs.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        bpffs.rmdir()


def test_a_script_that_deletes_while_it_counts_goes_on(tmp_path: Path) -> None:
    """bpftrace ends where it prints a map of which a key goes meanwhile."""
    script = f"""
    {TRACEPOINT} /args->policy == 13/ {{ @at[tid, nsecs] = nsecs; @last[tid] = nsecs; }}
    {TRACEPOINT.replace("enter", "exit")} /@last[tid]/ {{
        @calls = count(); delete(@at[tid, @last[tid]]); delete(@last[tid]);
    }}"""
    path = tmp_path / "script.yaml"
    path.write_text(yaml.safe_dump(policy(script)))
    with examples_runner.running(path, instances=1) as run:
        make_calls(200_003, 13)
    assert run.rows("script", "calls") == {(): 200_003}
    assert [each["name"] for each in run.reports["script"]["outputs"]] == ["calls"]


def test_kernel_stacks_have_names(tmp_path: Path) -> None:
    """Which takes addresses in /proc/kallsyms, that the kernel shows to CAP_SYSLOG only."""
    path = tmp_path / "script.yaml"
    path.write_text(yaml.safe_dump(policy(f"{TRACEPOINT} /args->policy == 19/ {{ @stacks[kstack(1)] = count(); }}")))
    with examples_runner.running(path, instances=1) as run:
        make_calls(23, 19)
    (((stack,), count),) = run.rows("script", "stacks").items()
    assert re.match(r"[A-Za-z_][\w.]*\+\d+$", stack.strip()) and count == 23


def test_a_script_begins_while_the_agent_does_its_other_work() -> None:
    """Compiling and attaching take seconds. Until the new one counts, the one that it replaces does."""
    bpffs = Path("/sys/fs/bpf") / f"test-bpftrace-{os.getpid()}"
    bpffs.mkdir()

    def push(version: int, script: str) -> stream_pb2.Push:
        (prepared,) = preparation.prepare([Source("script", policy(script))], catalog=catalog.Catalog({}))
        return stream_pb2.Push(
            term=1,
            version=version,
            plans=[prepared.planned.plan],
            selections=[stream_pb2.Selection(policy_uid=prepared.policy.uid, everything=True)],
        )

    def settle(agent: engine.Engine) -> int:
        """How often it could do something else meanwhile."""
        turns, rounds = agent.turns, 0
        while agent.turns == turns:
            agent.collect(time.time_ns())
            rounds += 1
            time.sleep(0.02)  # as a session ticks
        return rounds

    try:
        with engine.Engine.open(bpffs=bpffs, stats=False) as agent:
            agent.hello()
            agent.apply(push(1, f"{TRACEPOINT} /args->policy == 17/ {{ @calls = count(); }}"), wait=False)
            (status,) = agent.status().policies
            assert (status.state, status.reason) == (stream_pb2.PolicyStatus.PENDING, "Starting")
            assert settle(agent) > 1, "it can do other things meanwhile"
            (first,) = agent.status().policies
            assert (first.state, first.reason) == (stream_pb2.PolicyStatus.READY, "")
            agent.apply(push(2, f"{TRACEPOINT} /args->policy == 17/ {{ @calls = sum(2); }}"), wait=False)
            (status,) = agent.status().policies
            assert (status.reason, status.digest) == ("Starting", first.digest)
            make_calls(23, 17)
            batch = agent.collect(time.time_ns(), force=True)
            assert batch is not None
            assert columns.unpack(batch.tables[0].values, limit=9).tolist() == [23], "the one before counts on"
            settle(agent)
            (second,) = agent.status().policies
            assert second.state == stream_pb2.PolicyStatus.READY and second.digest != first.digest
            agent.apply(push(3, f"{TRACEPOINT} {{ @calls = count(args->nothing); }}"), wait=False)
            settle(agent)
            (failed,) = agent.status().policies
            assert failed.state == stream_pb2.PolicyStatus.FAILED and "bpftrace" in failed.message
            assert failed.digest == second.digest, "the last good one stays"
            agent.apply(push(4, f"{TRACEPOINT} /args->policy == 21/ {{ @calls = count(); exit(); }}"), wait=False)
            settle(agent)
            make_calls(1, 21)
            batch = agent.collect(time.time_ns(), force=True)  # waits for what it says last
            assert batch is not None
            assert [gap.why for gap in batch.tables[0].gaps] == ["bpftrace has ended: the script called exit()"]
            agent.apply(push(5, f"{TRACEPOINT} {{ @never = count(); }}"), wait=False)
            agent.apply(push(6, f"{TRACEPOINT} {{ @other = count(); }}"), wait=False)
            settle(agent)
            (last,) = agent.status().policies
            assert last.state == stream_pb2.PolicyStatus.READY, "one that nobody waits for any more is ended"
            agent.remove_everything()
    finally:
        for path in sorted(bpffs.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        bpffs.rmdir()


def test_a_script_that_only_prints_and_has_ended_is_a_gap_once_an_interval(folder: Path) -> None:
    script = f'{TRACEPOINT} /args->policy == 23/ {{ printf("last words\\n"); exit(); }}'
    (prepared,) = preparation.prepare([Source("script", policy(script))], catalog=catalog.Catalog({}))
    selection = stream_pb2.Selection(policy_uid=prepared.policy.uid, everything=True)
    with engine.Engine.open(bpffs=folder, stats=False) as agent:
        agent.hello()
        agent.apply(stream_pb2.Push(term=1, version=1, plans=[prepared.planned.plan], selections=[selection]))
        make_calls(1, 23)
        begun = agent.collect(time.time_ns(), force=True)
        assert begun is not None and len(begun.events) == 1
        said: list[tuple[int, int]] = []
        now_ns = (time.time_ns() // 10**9 + 1) * 10**9
        for tick in range(0, 2 * prepared.planned.plan.interval_ms, 250):
            at_ns = now_ns + tick * 10**6
            batch = agent.collect(at_ns)
            for chunk in batch.events if batch else ():
                said += [(gap.end_ns - gap.start_ns, at_ns) for gap in chunk.gaps]
                assert [gap.why for gap in chunk.gaps] == ["bpftrace has ended: the script called exit()"]
            agent.acknowledge(agent._stream.sequence)
        agent.remove_everything()
    assert len(said) == 2 and said[0][0] < said[1][0]


def test_rows_of_text_are_left_out_and_negative_buckets_are_the_first() -> None:
    spec = bpftrace_script.Map("a", bpftrace_script.Kind.LATEST, True)
    assert bpftrace_programs._rows(spec, "map", {"one": "text", "two": 2}) == [
        (bpftrace_programs._KEY.pack(b"two", 0), (2, 0, 0))
    ]
    histogram = bpftrace_script.Map("h", bpftrace_script.Kind.HIST, False)
    found = bpftrace_programs._rows(
        histogram, "hist", [{"max": -1, "count": 3}, {"min": 1024, "max": 2047, "count": 5}]
    )
    assert found == [
        (bpftrace_programs._KEY.pack(b"", 0), (3, 0, 0)),
        (bpftrace_programs._KEY.pack(b"", 10), (5, 0, 0)),
    ]


def test_a_script_that_includes_the_kernels_headers_has_types_and_macros_without_them(tmp_path: Path) -> None:
    script = f"#include <linux/sched.h>\n{TRACEPOINT} /args->policy == TASK_INTERRUPTIBLE/ {{ @calls = count(); }}"
    path = tmp_path / "script.yaml"
    path.write_text(yaml.safe_dump(policy(script)))
    with examples_runner.running(path, instances=1) as run:
        make_calls(23, 1)
        make_calls(5, 7)
    assert run.rows("script", "calls") == {(): 23}
