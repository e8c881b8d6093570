"""Attach to tracepoints: by tracefs (``tracepoint``), raw (``raw_tracepoint``), raw and typed (``tp_btf``)."""

from __future__ import annotations

import errno
from typing import SupportsIndex

from probefleet_agent.errors import KernelError, ObjectError, UnsupportedFeature
from probefleet_agent.kernel import btf_kernel, features, syscall, targets
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.link import Attachment, Kind, Link, always, on_events
from probefleet_agent.kernel.uapi import AttachType, ProgramType

PERF_TYPE_TRACEPOINT = 2


def _check_tracepoint(attachment: Attachment, _section: str) -> None:
    targets.tracepoint_id(attachment.tracepoint.category, attachment.tracepoint.name)


def _tracepoint(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    wanted = attachment.tracepoint
    return trace(prog_fd, wanted.category, wanted.name)


def trace(prog_fd: SupportsIndex, category: str, name: str) -> Link:
    """Attach to ``category:name`` of tracefs."""
    way = f"tracepoint {category}:{name}"
    number = targets.tracepoint_id(category, name)
    # A BPF program on a tracepoint runs for all CPUs and tasks, whichever the event was opened for.
    event = syscall.perf_event_open(PERF_TYPE_TRACEPOINT, number, cpu=0, what=way)
    try:
        return on_events(prog_fd, [event], way)
    except KernelError as error:
        # perf_event_set_bpf_prog() compares the highest offset that the program reads with the record's size.
        if error.errno == errno.EACCES:
            why = "the program reads past the end of its record; one that takes struct pt_regs needs a kprobe"
            raise ObjectError(f"{way}: {why}") from error
        raise


def _check_raw(attachment: Attachment, _section: str) -> None:
    """What the kernel's types do not name may be a module's: of that the kernel is asked, for a moment."""
    name = attachment.raw_tracepoint.name
    if btf_kernel.own() and name in btf_kernel.raw_tracepoints():
        return
    with syscall.prog_load(features.RETURN_ZERO, ProgramType.RAW_TRACEPOINT, name="pf_probe") as program:
        _open_raw(program, name).close()


def _raw_tracepoint(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    name = attachment.raw_tracepoint.name
    return Link((_open_raw(prog_fd, name),), True, f"raw_tracepoint {name}")


def _open_raw(prog_fd: SupportsIndex, name: str) -> Fd:
    try:
        return syscall.raw_tracepoint_open(name, prog_fd)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            raise targets.no_raw_tracepoint(name) from error
        raise


def _check_tp_btf(attachment: Attachment, _section: str) -> None:
    if not features.tp_btf():
        why = "" if features.btf() else "it carries no BTF (CONFIG_DEBUG_INFO_BTF)"
        raise UnsupportedFeature("tp_btf programs", "5.5", why)
    if attachment.tp_btf.name not in btf_kernel.raw_tracepoints():
        raise targets.no_raw_tracepoint(attachment.tp_btf.name, "tp_btf tracepoint")


def _tp_btf(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    return Link((syscall.raw_tracepoint_open(None, prog_fd),), True, f"tp_btf {attachment.tp_btf.name}")


KINDS = {
    "tracepoint": Kind(always(ProgramType.TRACEPOINT), _check_tracepoint, _tracepoint),
    "raw_tracepoint": Kind(always(ProgramType.RAW_TRACEPOINT), _check_raw, _raw_tracepoint),
    "tp_btf": Kind(
        always(ProgramType.TRACING, AttachType.TRACE_RAW_TP),
        _check_tp_btf,
        _tp_btf,
        bound_to=lambda attachment: attachment.tp_btf.name,
        btf_name=lambda attachment: f"btf_trace_{attachment.tp_btf.name}",
    ),
}
