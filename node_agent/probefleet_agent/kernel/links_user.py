"""Attach to functions of user space, in executables and libraries of this node, by uprobes.

Where there is uprobe.multi (Linux 6.6), all places of a program in one file are one link: the kernel waits for running
programs once, when it is let go of, and not for each place (0.1 s each). Places of one process are perf events, for
uprobe.multi took a process's id for a thread's at first (46ba0e49b642 "bpf: fix multi-uprobe PID filtering logic").
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import SupportsIndex

from probefleet_agent.errors import KernelError, NoSuchTarget, UnsupportedFeature
from probefleet_agent.kernel import features, syscall, targets, user_files
from probefleet_agent.kernel.link import Attachment, Kind, Link, on_events
from probefleet_agent.kernel.uapi import AttachType, ProgramType

_ADVICE = "Uprobes need CAP_SYS_ADMIN."


def _check_uprobe(attachment: Attachment, _section: str) -> None:
    if not features.uprobes():
        raise UnsupportedFeature("uprobes", "4.17", "it was built without CONFIG_UPROBES, or is too old")
    if attachment.uprobe.pods:
        return  # each pod has a file of its own: what it lacks is said when it is there
    targets.uprobe_offset(attachment.uprobe.path, attachment.uprobe.symbol, attachment.uprobe.offset)


def _rooted(attachment: Attachment, root: str) -> Attachment:
    if attachment.uprobe.pods:
        return attachment
    moved = Attachment()
    moved.CopyFrom(attachment)
    moved.uprobe.path = user_files.locate(attachment.uprobe.path, root)
    return moved


def _by_multi(attachment: Attachment) -> bool:
    return features.uprobe_multi() and attachment.uprobe.pid <= 0


def _type(attachment: Attachment, _section: str) -> tuple[int, int]:
    return ProgramType.KPROBE, AttachType.TRACE_UPROBE_MULTI if _by_multi(attachment) else AttachType.NONE


def file_of(attachment: Attachment) -> tuple[str, str, bool] | None:
    """What places have to agree in so that one link can have them all; None for what is a link of its own."""
    wanted = attachment.uprobe
    if attachment.WhichOneof("target") != "uprobe" or wanted.pods or not _by_multi(attachment):
        return None
    return attachment.program, wanted.path, wanted.on_return


def attach_many(prog_fd: SupportsIndex, attachments: Sequence[Attachment]) -> Link | None:
    """One link on places of one file (``file_of``); None where the kernel takes one of them, or the program, not so."""
    first = attachments[0].uprobe
    places = [targets.uprobe_offset(first.path, each.uprobe.symbol, each.uprobe.offset) for each in attachments]
    try:
        fd = syscall.link_places(prog_fd, first.path, [(place, 0, 0) for place in places], on_return=first.on_return)
    except KernelError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise KernelError(error.errno, f"attach to {way_of(attachments[0])}", _ADVICE) from error
        return None  # one by one it will be known which
    return Link((fd,), True, way_of(attachments[0]))


def way_of(attachment: Attachment) -> str:
    """One place, for people."""
    wanted = attachment.uprobe
    offset = targets.uprobe_offset(wanted.path, wanted.symbol, wanted.offset)
    spot = wanted.symbol + (f"+{wanted.offset:#x}" if wanted.offset else "") if wanted.symbol else f"{offset:#x}"
    return f"{'uretprobe' if wanted.on_return else 'uprobe'} {wanted.path}:{spot}"


def _uprobe(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    wanted = attachment.uprobe
    if _by_multi(attachment) and (made := attach_many(prog_fd, [attachment])):
        return made
    offset, way = targets.uprobe_offset(wanted.path, wanted.symbol, wanted.offset), way_of(attachment)
    pmu = targets.pmu("uprobe", "uprobes")
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
            raise KernelError(error.errno, f"attach to {way}", _ADVICE) from error
        if error.errno in (errno.ENOENT, errno.EINVAL):
            spot = way.rpartition(":")[2]
            raise NoSuchTarget(f"place {spot} to probe", where=f"in {wanted.path}") from error
        raise
    return on_events(prog_fd, [event], way)


KINDS = {"uprobe": Kind(_type, _check_uprobe, _uprobe, rooted=_rooted)}
