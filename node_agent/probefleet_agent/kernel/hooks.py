"""What an attachment costs before its program's first instruction, measured on this machine.

The kernel's statistics time the program, not the way to it: a uprobe's trap, a tracepoint's call, a timer's interrupt.
These differ by a factor of a thousand, and by ten between machines (in a virtual machine a trap is dear), so nothing is
taken from a table. A program that returns at once is attached to something that only the calling thread does, and what
the thread takes with and without it is compared; for timers, what interrupts a loop that does nothing but read the
clock. The engine asks before it loads what attaches so. One attempt takes 1 to 20 ms of CPU, and detaching tracepoints
and uprobes waits for the kernel up to 0.2 s more; a busy machine needs a few. What cannot be measured is ``None``, and
the cost then unknown.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NewType, TypeAlias

import numpy as np
import structlog
from probefleet_wire.btf_types import BtfError
from probefleet_wire.v1 import plan_pb2

from probefleet_agent.errors import ProbefleetError
from probefleet_agent.kernel import (
    btf_kernel,
    features,
    hooks_network,
    hooks_timing,
    links,
    links_perf,
    syscall,
    targets,
    uapi,
)
from probefleet_agent.kernel.uapi import ProgramType

#: What costs alike: "tp_btf", "tp_btf sys", "uprobe", "kretprobe", "perf_event cpu-clock", …
HookKind = NewType("HookKind", str)
Work: TypeAlias = Callable[[], object]

#: Timers of this period interrupt this many readings of the clock, so often: three times some 15 interruptions in 3 ms.
_PERIOD_NS, _READINGS, _ROUNDS = 200_000, 33_000, 3
_PR_SET_NAME, _PR_GET_NAME = 15, 16
_UNEVEN_SECONDS = 60.0
#: A call that nobody makes in a hurry, whose handler does next to nothing, and that no example or test of ours counts:
#: what one agent measures, another that runs beside it sees, as everything on the machine.
_RARE_CALL = "getsid"

_libc = ctypes.CDLL(None)
_log = structlog.get_logger("agent")


@dataclass(frozen=True, slots=True)
class _Bench:
    """How one kind is measured: what to attach to, and what makes it fire once."""

    attachment: plan_pb2.Attachment
    work: Work
    #: Cheap hooks are measured by several programs at once: one alone would be lost in the noise.
    copies: int = 1


def kind(attachment: plan_pb2.Attachment, section: str = "") -> HookKind:
    """The kind of hook that an attachment is; ``section`` decides for ``syscall``."""
    asked = links.kind(attachment)
    if asked == "syscall":
        if links.program_type(attachment, section)[0] == ProgramType.KPROBE:
            return HookKind("kretprobe" if attachment.syscall.on_return else "kprobe")
        return HookKind("tracepoint sys")
    if asked == "kprobe":
        if attachment.kprobe.offset:
            # In the middle of a function it is a trap, where at its beginning it is a call: not what we can measure.
            return HookKind("kprobe with an offset")
        return HookKind("kretprobe" if attachment.kprobe.on_return else "kprobe")
    if asked == "uprobe":
        return HookKind("uretprobe" if attachment.uprobe.on_return else "uprobe")
    if asked == "perf_event":
        return HookKind(f"perf_event {attachment.perf_event.event}")
    if asked == "tracepoint":
        return HookKind("tracepoint sys" if attachment.tracepoint.category.endswith("syscalls") else asked)
    if asked == "usdt":
        return HookKind("uprobe")  # a trap in place of its nop
    everywhere = {"raw_tracepoint": attachment.raw_tracepoint.name, "tp_btf": attachment.tp_btf.name}.get(asked)
    return HookKind(f"{asked} sys" if everywhere in ("sys_enter", "sys_exit") else asked)


class Hooks:
    """The kinds measured so far. What could not be measured is tried again when it is asked for again.

    But for what did not stand out, which is left alone for a minute: a measurement fires the hook, and whoever counts
    there already counts that as well.
    """

    def __init__(self) -> None:
        self._known_ns: dict[HookKind, float] = {}
        self._not_before: dict[HookKind, float] = {}  # monotonic seconds

    def measure(self, wanted: HookKind) -> float | None:
        """Nanoseconds a run, measured once; ``None`` where this machine or its rights do not allow it."""
        if wanted not in self._known_ns:
            if time.monotonic() < self._not_before.get(wanted, 0.0):
                return None
            try:
                self._known_ns[wanted] = _measure(wanted)
            except (ProbefleetError, BtfError, OSError, AttributeError, _Unmeasurable, hooks_timing.TooUneven) as error:
                if isinstance(error, hooks_timing.TooUneven):
                    self._not_before[wanted] = time.monotonic() + _UNEVEN_SECONDS
                _log.info("what a hook costs cannot be measured", hook=wanted, error=str(error))
                return None
            _log.info("measured a hook", hook=wanted, cost_ns=round(self._known_ns[wanted]))
        return self._known_ns[wanted]

    def known_ns(self, wanted: HookKind) -> float | None:
        """What ``measure`` found."""
        return self._known_ns.get(wanted)


class _Unmeasurable(Exception):
    """There is no way to measure that kind."""


def _measure(wanted: HookKind) -> float:
    if wanted in ("perf_event cpu-clock", "perf_event task-clock"):
        # The least of a few, here as below: everything else on the machine can only add to it.
        return min(_interruption_ns(wanted.partition(" ")[2]) for _ in range(_ROUNDS))
    if wanted in hooks_network.KINDS:
        return hooks_network.measure(wanted)
    if wanted in ("iterator", "interval"):
        return 0.0  # the agent asks for it: the way there is its own time
    bench = _bench(wanted)
    attached = functools.partial(_attached, bench.attachment, bench.copies)
    return hooks_timing.difference_ns(bench.work, attached) / bench.copies


def _bench(wanted: HookKind) -> _Bench:
    attachment = plan_pb2.Attachment(program="pf_hook")
    rename, rare = _rename(), _rare()
    match wanted:
        case "raw_tracepoint":
            attachment.raw_tracepoint.name = "task_rename"
            return _Bench(attachment, rename, copies=4)
        case "raw_tracepoint sys":
            attachment.raw_tracepoint.name = "sys_enter"
            return _Bench(attachment, rare)
        case "tp_btf":
            attachment.tp_btf.name = "task_rename"
            return _Bench(attachment, rename, copies=4)
        case "tp_btf sys":
            attachment.tp_btf.name = "sys_enter"
            return _Bench(attachment, rare)
        case "tracepoint":
            attachment.tracepoint.category, attachment.tracepoint.name = "task", "task_rename"
            return _Bench(attachment, rename)
        case "tracepoint sys":
            attachment.syscall.name = _RARE_CALL
            return _Bench(attachment, rare)
        case "kprobe" | "kretprobe":
            if not features.kprobes():
                raise _Unmeasurable("this kernel has no kprobes")
            attachment.kprobe.function = targets.syscall_function(_RARE_CALL)
            attachment.kprobe.on_return = wanted == "kretprobe"
            return _Bench(attachment, rare)
        case "uprobe" | "uretprobe":
            attachment.uprobe.path, attachment.uprobe.symbol = _libc_path(), "gnu_get_libc_version"
            attachment.uprobe.on_return = wanted == "uretprobe"
            # The trap is set in this process alone, and counted for this thread alone.
            attachment.uprobe.pid = threading.get_native_id()
            return _Bench(attachment, _libc.gnu_get_libc_version)
    raise _Unmeasurable(f"there is no way to measure {wanted}")


def _rename() -> Work:
    """Gives this thread the name that it has: fires ``task_rename``."""
    name = ctypes.create_string_buffer(16)
    prctl = _libc.prctl
    prctl(_PR_GET_NAME, name, 0, 0, 0)
    return lambda: prctl(_PR_SET_NAME, name, 0, 0, 0)


def _rare() -> Work:
    call = getattr(_libc, _RARE_CALL)
    return lambda: call(0)


def _libc_path() -> str:
    """The C library of this process, as this process sees it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libc.so" in line or "/libc-2" in line:
            return line.split()[-1]
    raise _Unmeasurable("no C library among this process's files")


@contextlib.contextmanager
def _attached(attachment: plan_pb2.Attachment, copies: int) -> Iterator[None]:
    """A program that returns at once, there."""
    program_type, attach_type = links.program_type(attachment)
    btf_name = links.btf_name(attachment)
    btf_id = btf_kernel.vmlinux().require(btf_name) if btf_name else 0
    with contextlib.ExitStack() as owned:
        for _ in range(copies):
            program = owned.enter_context(
                syscall.prog_load(
                    features.RETURN_ZERO, program_type, name="pf_hook", expected_attach_type=attach_type,
                    attach_btf_id=btf_id,
                )
            )  # fmt: skip
            owned.enter_context(links.attach(program, attachment))
        yield


def _interruption_ns(event: str) -> float:
    """How long a timer's sample keeps a thread from its work: the gaps that it leaves in readings of the clock."""
    event_type, config = links_perf.event(event)
    clock = time.perf_counter_ns
    with (
        syscall.prog_load(features.RETURN_ZERO, ProgramType.PERF_EVENT, name="pf_hook") as program,
        syscall.perf_event_open(event_type, config, pid=0, period=_PERIOD_NS, what=f"{event} of one thread") as timer,
    ):
        syscall.perf_ioctl(timer, uapi.PERF_EVENT_IOC_SET_BPF, program)
        began_ns = time.thread_time_ns()
        readings = np.fromiter((clock() for _ in range(_READINGS)), np.int64, _READINGS)
        # The timer runs only while this thread does.
        samples = (time.thread_time_ns() - began_ns) // _PERIOD_NS
    steps = np.sort(np.diff(readings))
    if samples < 5:
        raise _Unmeasurable(f"{samples} samples are too few")
    # The median: a few of the gaps are other interrupts, or another thread's turn.
    return max(float(np.median(steps[-samples:]) - np.median(steps)), 1.0)
