"""Attach to perf events: software and hardware counters that interrupt each CPU by time or by count."""

from __future__ import annotations

import errno
from typing import SupportsIndex

from probefleet_agent.errors import KernelError, NoSuchTarget, UnsupportedFeature
from probefleet_agent.kernel import maps, syscall, targets
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.link import Attachment, Kind, Link, always, on_events
from probefleet_agent.kernel.uapi import ProgramType

PERF_TYPE_HARDWARE, PERF_TYPE_SOFTWARE = 0, 1
# name → (perf type, config); ``include/uapi/linux/perf_event.h``.
EVENTS = {
    "cpu-clock": (1, 0), "task-clock": (1, 1), "page-faults": (1, 2), "context-switches": (1, 3),
    "cpu-migrations": (1, 4), "minor-faults": (1, 5), "major-faults": (1, 6), "alignment-faults": (1, 7),
    "emulation-faults": (1, 8), "cgroup-switches": (1, 11),
    "cpu-cycles": (0, 0), "instructions": (0, 1), "cache-references": (0, 2), "cache-misses": (0, 3),
    "branch-instructions": (0, 4), "branch-misses": (0, 5), "bus-cycles": (0, 6), "ref-cycles": (0, 9),
}  # fmt: skip


def _check(attachment: Attachment, _section: str) -> None:
    _event(attachment.perf_event.event)


def _event(name: str) -> tuple[int, int]:
    if name not in EVENTS:
        raise NoSuchTarget(f"perf event {name}", targets.near(name, EVENTS))
    return EVENTS[name]


def _perf_event(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    wanted = attachment.perf_event
    often = f"at {wanted.frequency_hz} Hz" if wanted.frequency_hz else f"every {wanted.period or 1}"
    way = f"perf_event {wanted.event} {often}"
    event_type, config = _event(wanted.event)
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
    return on_events(prog_fd, events, way)


KINDS = {"perf_event": Kind(always(ProgramType.PERF_EVENT), _check, _perf_event)}
