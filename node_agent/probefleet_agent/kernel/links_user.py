"""Attach to functions of user space, in executables and libraries of this node, by uprobes."""

from __future__ import annotations

import errno
from typing import SupportsIndex

from probefleet_agent.errors import KernelError, NoSuchTarget, UnsupportedFeature
from probefleet_agent.kernel import features, syscall, targets, user_files
from probefleet_agent.kernel.link import Attachment, Kind, Link, always, on_events
from probefleet_agent.kernel.uapi import ProgramType


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


def _uprobe(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
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
    return on_events(prog_fd, [event], way)


KINDS = {"uprobe": Kind(always(ProgramType.KPROBE), _check_uprobe, _uprobe, rooted=_rooted)}
