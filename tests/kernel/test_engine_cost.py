"""What the engine says of a program's cost: the kernel's statistics, and the hook's own time, measured here."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard
from probefleet_agent import costs, loaded
from probefleet_agent.engine import Engine
from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import features, hooks, links
from probefleet_agent.reconcile import Digest
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.kernel import support
from tests.kernel.test_engine import push

pytestmark = pytest.mark.kernel
#: No way into a program takes longer, on any machine that anybody runs.
MOST_NS = 50_000
CHEAP = ("raw_tracepoint", "raw_tracepoint sys", "tp_btf", "tp_btf sys", "tracepoint", "tracepoint sys")


#: A machine that is busy says that it cannot measure, and is asked again: for so long.
BUSY_SECONDS = 30


def measured_ns(kind: str) -> float:
    """What an agent measures that has just started."""
    ends = time.monotonic() + BUSY_SECONDS
    while (found := hooks.Hooks().measure(hooks.HookKind(kind))) is None:
        assert time.monotonic() < ends, kind
    print(f"{kind}: {found:.0f} ns")
    return found


@functools.cache
def cost_ns(kind: str) -> float:
    """The same, measured once."""
    return measured_ns(kind)


@pytest.mark.parametrize("kind", CHEAP)
def test_a_tracepoint_costs_something_and_less_than_a_trap(kind: str) -> None:
    assert 0 < cost_ns(kind) < MOST_NS
    assert cost_ns(kind) < cost_ns("uprobe")


@pytest.mark.parametrize("kind", ["uprobe", "uretprobe"])
def test_a_uprobe_costs_its_trap(kind: str) -> None:
    assert 200 < cost_ns(kind) < MOST_NS


@pytest.mark.parametrize("kind", ["kprobe", "kretprobe"])
def test_a_kprobe_costs_something(kind: str) -> None:
    support.needs(features.kprobes)
    assert 0 < cost_ns(kind) < MOST_NS


@pytest.mark.parametrize("kind", ["perf_event cpu-clock", "perf_event task-clock"])
def test_a_sample_costs_its_interrupt(kind: str) -> None:
    # An interrupt leaves a virtual machine: dear, and dearer while its host is busy.
    assert 100 < cost_ns(kind) < 5 * MOST_NS


def test_what_cannot_be_measured_is_not_known() -> None:
    measured = hooks.Hooks()
    assert measured.measure(hooks.HookKind("perf_event page-faults")) is None
    assert measured.known_ns(hooks.HookKind("perf_event page-faults")) is None


@pytest.mark.parametrize(
    ("target", "section", "kind"),
    [
        (plan_pb2.Attachment(raw_tracepoint=plan_pb2.RawTracepoint(name="sched_switch")), "", "raw_tracepoint"),
        (plan_pb2.Attachment(tp_btf=plan_pb2.BtfTracepoint(name="sys_exit")), "", "tp_btf sys"),
        (plan_pb2.Attachment(tracepoint=plan_pb2.Tracepoint(category="sched", name="x")), "", "tracepoint"),
        (plan_pb2.Attachment(tracepoint=plan_pb2.Tracepoint(category="raw_syscalls", name="x")), "", "tracepoint sys"),
        (plan_pb2.Attachment(syscall=plan_pb2.Syscall(name="read")), "tracepoint", "tracepoint sys"),
        (plan_pb2.Attachment(syscall=plan_pb2.Syscall(name="read", on_return=True)), "kprobe", "kretprobe"),
        (plan_pb2.Attachment(kprobe=plan_pb2.Kprobe(function="f", offset=4)), "", "kprobe with an offset"),
        (plan_pb2.Attachment(uprobe=plan_pb2.Uprobe(path="/x", on_return=True)), "", "uretprobe"),
        (plan_pb2.Attachment(perf_event=plan_pb2.PerfEvent(event="cpu-clock")), "", "perf_event cpu-clock"),
    ],
)
def test_hooks_are_of_a_kind(target: plan_pb2.Attachment, section: str, kind: str) -> None:
    assert hooks.kind(target, section) == kind


def first_window(engine: Engine) -> stream_pb2.InstanceStat:
    """Exec until the statistics' first window is over; the policy's interval is far longer."""
    engine.hello()
    begun = engine.collect(time.time_ns())
    assert begun is not None
    (stat,) = begun.instances
    assert not stat.stats_time_ns, "the window has just begun"
    deadline = time.monotonic() + 20 * costs.WINDOW_NS / 1e9
    while time.monotonic() < deadline:
        for _ in range(23):
            os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
        batch = engine.collect(time.time_ns())
        if batch is not None and batch.instances:
            assert not batch.tables, "no interval is over"
            return batch.instances[0]
    raise AssertionError("the window never ended")


def slow_push() -> stream_pb2.Push:
    wanted = push(1)
    wanted.plans[0].interval_ms = 3_600_000
    return wanted


def test_the_first_window_is_reported_when_it_is_over_with_the_hooks_time(folder: Path) -> None:
    with Engine.open(bpffs=folder) as engine:
        engine.apply(slow_push())
        stat = first_window(engine)
    assert stat.cost_known
    assert stat.stats_time_ns >= costs.WINDOW_NS
    assert stat.runs >= 23
    # What is reported is what is measured for this kind of hook, times the runs; a busy machine measures unevenly.
    a_run_ns, again_ns = stat.hook_time_ns / stat.runs, measured_ns("tp_btf")
    assert again_ns / 5 < a_run_ns < again_ns * 5


def test_what_went_over_its_budget_stays_detached_until_the_policy_changes(folder: Path) -> None:
    data = support.compile_object(
        'SEC("tracepoint") int on_call(void *ctx)'
        f"{{ return bpf_get_current_pid_tgid() >> 32 == {os.getpid()} ? hit() : 0; }}"
    )

    def calls(generation: int, version: int) -> stream_pb2.Push:
        wanted = push(version)
        plan = wanted.plans[0]
        plan.generation = generation
        plan.instance.object.sha256 = wanted.blobs[0].sha256 = hashlib.sha256(data).hexdigest()
        wanted.blobs[0].zstd = zstandard.compress(data)
        del plan.instance.attachments[:]
        plan.instance.attachments.add(program="on_call").syscall.name = "getppid"
        plan.outputs.add(name="calls", map="hits")
        return wanted

    def counted(engine: Engine) -> tuple[int, list[str]]:
        """All calls that were counted, with one more, and the gaps that are told."""
        support.call_getppid(1)
        engine.hello()
        batch = engine.collect(time.time_ns(), force=True)
        assert batch is not None
        (table,) = batch.tables
        return int(columns.unpack(table.values, limit=999).sum()), [gap.why for gap in table.gaps]

    with Engine.open(bpffs=folder) as engine:
        engine.apply(calls(1, 1))
        assert counted(engine) == (1, [])
        (instance,) = engine._installed.loaded.values()
        instance.detached = "it took 99m of CPU"
        engine._installed.detach(Digest(instance.digest))
        assert counted(engine) == (1, [loaded.OVER_BUDGET])
    with Engine.open(bpffs=folder) as engine:
        engine.apply(calls(1, 2))
        assert counted(engine) == (1, [loaded.OVER_BUDGET])
        (status,) = engine.status().policies
        assert (status.state, status.message) == (stream_pb2.PolicyStatus.DETACHED, "it took 99m of CPU")
        engine.apply(calls(2, 3))
        (status,) = engine.status().policies
        assert status.state == stream_pb2.PolicyStatus.READY
        assert counted(engine) == (2, [loaded.OVER_BUDGET]), "the gap is over, and told"
    with Engine.open(bpffs=folder) as engine:
        engine.apply(calls(2, 4))
        assert counted(engine) == (3, [loaded.OVER_BUDGET])


def test_what_cannot_be_attached_again_is_not_attached_in_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach, given = links.attach, []

    def fail(*args: Any, **named: Any) -> links.Link:
        given.append(args)
        if len(given) == 2:
            raise KernelError(errno.ENOMEM, "attach")
        return attach(*args, **named)

    with Engine.open(bpffs=folder) as engine:
        wanted = slow_push()
        wanted.plans[0].instance.attachments.append(wanted.plans[0].instance.attachments[0])
        engine.apply(wanted)
        (instance,) = engine._installed.loaded.values()
        assert len(instance.links) == 2
        instance.detached = "it took 99m of CPU"
        engine._installed.detach(Digest(instance.digest))
        monkeypatch.setattr(links, "attach", fail)
        edited = stream_pb2.Push.FromString(wanted.SerializeToString())
        edited.version, edited.plans[0].generation = 2, 2
        engine.apply(edited)
        (status,) = engine.status().policies
        assert (status.state, instance.detached) == (stream_pb2.PolicyStatus.FAILED, "it took 99m of CPU")
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
        batch = engine.collect(time.time_ns(), force=True)
        assert batch is not None and not instance.links
        assert not list(folder.glob("probefleet/instances/*/link_*"))


def test_a_hook_that_cannot_be_measured_makes_the_cost_unknown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_kind: hooks.HookKind) -> float:
        raise OSError("no rights")

    monkeypatch.setattr(hooks, "_measure", refused)
    with Engine.open(bpffs=folder) as engine:
        engine.apply(slow_push())
        stat = first_window(engine)
    assert not stat.cost_known
    assert stat.runs >= 23, "the rate is known all the same"
    assert stat.hook_time_ns == 0
