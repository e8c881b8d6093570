"""Attach a loaded program to what a plan asks for. In: descriptor and Attachment; out: a Link that can be pinned.

``execute`` asks ``supported`` before it loads (so that the next alternative can be taken), sets the program's type to
``program_type``, loads, and calls ``attach``. One function per kind of target. Everything goes through a perf event and
BPF_LINK_CREATE, raw tracepoints and tp_btf through BPF_RAW_TRACEPOINT_OPEN; before Linux 5.15 perf events have no
links: then the program hangs on the event itself, nothing can be pinned, and counting ends with this process.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import SupportsIndex

from probefleet_wire.v1 import plan_pb2

from probefleet_agent.errors import KernelError, NoSuchTarget, ObjectError, ProbefleetError, UnsupportedFeature
from probefleet_agent.kernel import btf_kernel, features, maps, syscall, targets, uapi
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import AttachType, ProgramType

PERF_TYPE_HARDWARE, PERF_TYPE_SOFTWARE, PERF_TYPE_TRACEPOINT = 0, 1, 2
# name → (perf type, config); ``include/uapi/linux/perf_event.h``.
EVENTS = {
    "cpu-clock": (1, 0), "task-clock": (1, 1), "page-faults": (1, 2), "context-switches": (1, 3),
    "cpu-migrations": (1, 4), "minor-faults": (1, 5), "major-faults": (1, 6), "alignment-faults": (1, 7),
    "emulation-faults": (1, 8), "cgroup-switches": (1, 11),
    "cpu-cycles": (0, 0), "instructions": (0, 1), "cache-references": (0, 2), "cache-misses": (0, 3),
    "branch-instructions": (0, 4), "branch-misses": (0, 5), "bus-cycles": (0, 6), "ref-cycles": (0, 9),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Link:
    """An attachment: closing detaches, unless its links were pinned. ``fds`` are to be pinned, ``keeps`` only held."""

    fds: tuple[Fd, ...]
    pinnable: bool
    way: str  # "raw_tracepoint sys_enter": for people
    keeps: tuple[Fd, ...] = field(default=())

    @property
    def fd(self) -> Fd:
        """The first of ``fds``; perf events have one a CPU."""
        return self.fds[0]

    def close(self) -> None:
        """Let go of it."""
        for fd in (*self.fds, *self.keeps):
            fd.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kind(attachment: plan_pb2.Attachment) -> str:
    """Which kind of target: "tracepoint", "raw_tracepoint", "tp_btf", "kprobe", "uprobe", "perf_event", "syscall"."""
    found = attachment.WhichOneof("target")
    if found is None:
        raise ProbefleetError(f"attachment of {attachment.program} names no target")
    return str(found)


def program_type(attachment: plan_pb2.Attachment, section: str = "") -> tuple[int, int]:
    """(program type, expected attach type) that the target needs; ``section`` decides for ``syscall``."""
    asked = kind(attachment)
    if asked == "syscall":
        probes = ("kprobe", "kretprobe", "ksyscall", "kretsyscall")
        asked = "kprobe" if section.split("/")[0] in probes else "tracepoint"
    return {
        "tracepoint": (ProgramType.TRACEPOINT, AttachType.NONE),
        "raw_tracepoint": (ProgramType.RAW_TRACEPOINT, AttachType.NONE),
        "tp_btf": (ProgramType.TRACING, AttachType.TRACE_RAW_TP),
        "kprobe": (ProgramType.KPROBE, AttachType.NONE),
        "uprobe": (ProgramType.KPROBE, AttachType.NONE),
        "perf_event": (ProgramType.PERF_EVENT, AttachType.NONE),
    }[asked]


def supported(
    attachment: plan_pb2.Attachment, *, program_section: str = "", root: str = ""
) -> UnsupportedFeature | NoSuchTarget | None:
    """Why this kernel cannot attach it, or None. Cheap enough to ask before every load. ``root``: see ``attach``."""
    attachment = _rooted(attachment, root)
    asked = kind(attachment)
    kprobe_call = asked == "syscall" and program_type(attachment, program_section)[0] == ProgramType.KPROBE
    if (asked == "kprobe" or kprobe_call) and not features.kprobes():
        return UnsupportedFeature("kprobes", why="it was built without CONFIG_KPROBES; take a tracepoint or tp_btf")
    if asked == "uprobe" and not features.uprobes():
        return UnsupportedFeature("uprobes", "4.17", "it was built without CONFIG_UPROBES, or is too old")
    if asked == "tp_btf" and not features.tp_btf():
        why = "" if features.btf() else "it carries no BTF (CONFIG_DEBUG_INFO_BTF)"
        return UnsupportedFeature("tp_btf programs", "5.5", why)
    if asked == "perf_event" and attachment.perf_event.event not in EVENTS:
        event = attachment.perf_event.event
        return NoSuchTarget(f"perf event {event}", targets.near(event, EVENTS))
    try:
        if asked == "tp_btf" and attachment.tp_btf.name not in btf_kernel.raw_tracepoints():
            return targets.no_raw_tracepoint(attachment.tp_btf.name, "tp_btf tracepoint")
        if asked == "tracepoint":
            targets.tracepoint_id(attachment.tracepoint.category, attachment.tracepoint.name)
        elif asked == "kprobe":
            targets.check_function(attachment.kprobe.function)
        elif asked == "uprobe":
            targets.uprobe_offset(attachment.uprobe.path, attachment.uprobe.symbol, attachment.uprobe.offset)
        elif asked == "syscall":
            _syscall_target(attachment.syscall, kprobe=kprobe_call)
    except (NoSuchTarget, UnsupportedFeature) as error:
        return error
    return None


def attach(
    prog_fd: SupportsIndex, attachment: plan_pb2.Attachment, *, program_section: str = "", root: str = ""
) -> Link:
    """Attach. NoSuchTarget with near names, UnsupportedFeature, or KernelError.

    ``root`` stands before the paths of uprobes: "/proc/1/root" for an agent in a container, whose own files are others
    than the node's.
    """
    return _ATTACH[kind(attachment)](prog_fd, _rooted(attachment, root))


def _rooted(attachment: plan_pb2.Attachment, root: str) -> plan_pb2.Attachment:
    if not root or kind(attachment) != "uprobe":
        return attachment
    moved = plan_pb2.Attachment()
    moved.CopyFrom(attachment)
    moved.uprobe.path = root.rstrip("/") + attachment.uprobe.path
    return moved


def _tracepoint(prog_fd: SupportsIndex, attachment: plan_pb2.Attachment) -> Link:
    wanted = attachment.tracepoint
    return _trace(prog_fd, wanted.category, wanted.name, f"tracepoint {wanted.category}:{wanted.name}")


def _trace(prog_fd: SupportsIndex, category: str, name: str, way: str) -> Link:
    number = targets.tracepoint_id(category, name)
    # A BPF program on a tracepoint runs for all CPUs and tasks, whichever the event was opened for.
    event = syscall.perf_event_open(PERF_TYPE_TRACEPOINT, number, cpu=0, what=way)
    try:
        return _on_events(prog_fd, [event], way)
    except KernelError as error:
        # perf_event_set_bpf_prog() compares the highest offset that the program reads with the record's size.
        if error.errno == errno.EACCES:
            why = "the program reads past the end of its record; one that takes struct pt_regs needs a kprobe"
            raise ObjectError(f"{way}: {why}") from error
        raise


def _raw_tracepoint(prog_fd: SupportsIndex, attachment: plan_pb2.Attachment) -> Link:
    name = attachment.raw_tracepoint.name
    try:
        return Link((syscall.raw_tracepoint_open(name, prog_fd),), True, f"raw_tracepoint {name}")
    except KernelError as error:
        if error.errno == errno.ENOENT:
            raise targets.no_raw_tracepoint(name) from error
        raise


def _tp_btf(prog_fd: SupportsIndex, attachment: plan_pb2.Attachment) -> Link:
    return Link((syscall.raw_tracepoint_open(None, prog_fd),), True, f"tp_btf {attachment.tp_btf.name}")


def _kprobe(prog_fd: SupportsIndex, attachment: plan_pb2.Attachment) -> Link:
    wanted = attachment.kprobe
    return _probe_function(prog_fd, wanted.function, wanted.offset, wanted.on_return)


def _probe_function(prog_fd: SupportsIndex, function: str, offset: int, on_return: bool) -> Link:
    way = f"{'kretprobe' if on_return else 'kprobe'} {function}" + (f"+{offset:#x}" if offset else "")
    pmu = targets.pmu("kprobe", "kprobes")
    targets.check_function(function)
    try:
        event = syscall.perf_event_open(
            pmu.type, pmu.on_return if on_return else 0, cpu=0, config1=function.encode(), config2=offset, what=way
        )
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.EADDRNOTAVAIL, errno.EILSEQ):
            why = "the kernel does not allow a probe there (it is inlined, notrace, or on the blacklist)"
            raise NoSuchTarget(f"function {function} to probe", targets.near_functions(function), why) from error
        raise
    return _on_events(prog_fd, [event], way)


def _uprobe(prog_fd: SupportsIndex, attachment: plan_pb2.Attachment) -> Link:
    wanted = attachment.uprobe
    offset = targets.uprobe_offset(wanted.path, wanted.symbol, wanted.offset)
    pmu = targets.pmu("uprobe", "uprobes")
    spot = wanted.symbol + (f"+{wanted.offset:#x}" if wanted.offset else "") if wanted.symbol else f"{offset:#x}"
    way = f"{'uretprobe' if wanted.on_return else 'uprobe'} {wanted.path}:{spot}"
    pid, cpu = (wanted.pid, -1) if wanted.pid > 0 else (-1, 0)
    try:
        event = syscall.perf_event_open(
            pmu.type, pmu.on_return if wanted.on_return else 0, pid=pid, cpu=cpu, config1=wanted.path.encode(),
            config2=offset, what=way,
        )  # fmt: skip
    except KernelError as error:
        if error.errno == errno.ESRCH:
            raise NoSuchTarget(f"process {wanted.pid} to probe") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise KernelError(error.errno, f"attach to {way}", "Uprobes need CAP_SYS_ADMIN.") from error
        if error.errno in (errno.ENOENT, errno.EINVAL):
            raise NoSuchTarget(f"place {spot} to probe", where=f"in {wanted.path}") from error
        raise
    return _on_events(prog_fd, [event], way)


def _perf_event(prog_fd: SupportsIndex, attachment: plan_pb2.Attachment) -> Link:
    wanted = attachment.perf_event
    often = f"at {wanted.frequency_hz} Hz" if wanted.frequency_hz else f"every {wanted.period or 1}"
    way = f"perf_event {wanted.event} {often}"
    if wanted.event not in EVENTS:
        raise NoSuchTarget(f"perf event {wanted.event}", targets.near(wanted.event, EVENTS))
    event_type, config = EVENTS[wanted.event]
    events: list[Fd] = []
    try:
        for cpu in maps.online_cpus():
            events.append(  # noqa: PERF401 - those opened so far are closed when one fails
                syscall.perf_event_open(
                    event_type,
                    config,
                    cpu=cpu,
                    frequency_hz=wanted.frequency_hz,
                    period=0 if wanted.frequency_hz else wanted.period or 1,
                    what=way,
                )
            )
    except KernelError as error:
        for event in events:
            event.close()
        if error.errno in (errno.ENOENT, errno.EOPNOTSUPP) and event_type == PERF_TYPE_HARDWARE:
            why = "the processor's counters cannot be reached (in a virtual machine?); cpu-clock works everywhere"
            raise UnsupportedFeature(f"perf event {wanted.event}", why=why) from error
        if error.errno == errno.EINVAL:
            limit = "/proc/sys/kernel/perf_event_max_sample_rate"
            raise KernelError(error.errno, f"open {way}", f"Is the frequency above {limit}?") from error
        raise
    return _on_events(prog_fd, events, way)


def _syscall(prog_fd: SupportsIndex, attachment: plan_pb2.Attachment) -> Link:
    wanted = attachment.syscall
    if syscall.program_info(prog_fd).type == ProgramType.KPROBE:
        return _probe_function(prog_fd, _syscall_target(wanted, kprobe=True), 0, wanted.on_return)
    name = _syscall_target(wanted, kprobe=False)
    return _trace(prog_fd, "syscalls", name, f"tracepoint syscalls:{name}")


def _syscall_target(wanted: plan_pb2.Syscall, *, kprobe: bool) -> str:
    """The tracepoint, or the function, of a system call."""
    if kprobe:
        return targets.syscall_function(wanted.name)
    name = f"sys_{'exit' if wanted.on_return else 'enter'}_{wanted.name}"
    targets.tracepoint_id("syscalls", name)
    return name


def _on_events(prog_fd: SupportsIndex, events: list[Fd], way: str) -> Link:
    """Hang the program on each event: by links where there are links, else on the events themselves."""
    links: list[Fd] = []
    try:
        if features.perf_link():
            for event in events:
                links.append(syscall.link_create(prog_fd, event, AttachType.PERF_EVENT))  # noqa: PERF401 - as above
            for event in events:
                event.close()  # the link holds it
            return Link(tuple(links), True, way)
        for event in events:
            syscall.perf_ioctl(event, uapi.PERF_EVENT_IOC_SET_BPF, prog_fd)
            syscall.perf_ioctl(event, uapi.PERF_EVENT_IOC_ENABLE)
        return Link((), False, way, tuple(events))
    except BaseException as error:
        for fd in (*links, *events):
            fd.close()
        if isinstance(error, KernelError) and error.errno == errno.EINVAL:
            advice = "Is the program of the kind that this target needs? SEC() says which."
            raise KernelError(error.errno, f"attach to {way}", advice) from error
        raise


_ATTACH: dict[str, Callable[[SupportsIndex, plan_pb2.Attachment], Link]] = {
    "tracepoint": _tracepoint,
    "raw_tracepoint": _raw_tracepoint,
    "tp_btf": _tp_btf,
    "kprobe": _kprobe,
    "uprobe": _uprobe,
    "perf_event": _perf_event,
    "syscall": _syscall,
}
