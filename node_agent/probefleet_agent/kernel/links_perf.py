"""Attach to perf events: software, hardware and cache counters that interrupt each CPU by time or by count.

Every CPU has an event of its own, so an attachment is a ``Spread`` over CPUs: one that comes online gets its event,
that of one that went offline has ended in the kernel, and is let go.
"""

from __future__ import annotations

import errno
import itertools
import re
from typing import SupportsIndex

from probefleet_agent.errors import KernelError, NoSuchTarget, UnsupportedFeature
from probefleet_agent.kernel import features, maps, syscall, targets
from probefleet_agent.kernel.link import Attachment, Kind, Link, always, on_events
from probefleet_agent.kernel.spread import Found, Holder, Place, Pods, Spread
from probefleet_agent.kernel.uapi import ProgramType

PERF_TYPE_HARDWARE, PERF_TYPE_SOFTWARE, PERF_TYPE_CACHE, PERF_TYPE_RAW = 0, 1, 3, 4
# name → (perf type, config); ``include/uapi/linux/perf_event.h``.
EVENTS = {
    "cpu-clock": (1, 0), "task-clock": (1, 1), "page-faults": (1, 2), "context-switches": (1, 3),
    "cpu-migrations": (1, 4), "minor-faults": (1, 5), "major-faults": (1, 6), "alignment-faults": (1, 7),
    "emulation-faults": (1, 8), "cgroup-switches": (1, 11),
    "cpu-cycles": (0, 0), "instructions": (0, 1), "cache-references": (0, 2), "cache-misses": (0, 3),
    "branch-instructions": (0, 4), "branch-misses": (0, 5), "bus-cycles": (0, 6), "ref-cycles": (0, 9),
}  # fmt: skip
# Caches as perf(1) calls them, in lower case: "l1-dcache-load-misses" is cache 0, loads (0 << 8), misses (1 << 16).
_CACHES = ("l1-dcache", "l1-icache", "llc", "dtlb", "itlb", "branch", "node")
_OPERATIONS = (("loads", "load-misses"), ("stores", "store-misses"), ("prefetches", "prefetch-misses"))
EVENTS |= {
    f"{cache}-{name}": (PERF_TYPE_CACHE, number | operation << 8 | result << 16)
    for (number, cache), (operation, names) in itertools.product(enumerate(_CACHES), enumerate(_OPERATIONS))
    for result, name in enumerate(names)
}
_RAW = re.compile(r"r([0-9a-f]{1,16})")


def _check(attachment: Attachment, _section: str) -> None:
    event(attachment.perf_event.event)


def event(name: str) -> tuple[int, int]:
    """(perf type, config) of an event: by name, or "r01c2", as the processor's manual numbers it."""
    if raw := _RAW.fullmatch(name):
        return PERF_TYPE_RAW, int(raw[1], 16)
    if name not in EVENTS:
        raise NoSuchTarget(f"perf event {name}", targets.near(name, EVENTS))
    return EVENTS[name]


def _title(attachment: Attachment) -> str:
    wanted = attachment.perf_event
    often = f"at {wanted.frequency_hz} Hz" if wanted.frequency_hz else f"every {wanted.period or 1}"
    return f"perf_event {wanted.event} {often}"


def spread(prog_fd: SupportsIndex, attachment: Attachment) -> Spread:
    """The event on every CPU that is online."""

    def find(_pods: Pods) -> Found:
        return Found(tuple(Place(f"cpu:{cpu}", f"CPU {cpu}", cpu) for cpu in maps.online_cpus()))

    def attach(place: Place) -> Holder:
        assert isinstance(place.details, int)
        link = _on_cpu(prog_fd, attachment, place.details)
        return link.fds[0] if link.fds else link.keeps[0]

    event(attachment.perf_event.event)
    return Spread(_title(attachment), find, attach, features.perf_link())


def _on_cpu(prog_fd: SupportsIndex, attachment: Attachment, cpu: int) -> Link:
    wanted, way = attachment.perf_event, _title(attachment)
    event_type, config = event(wanted.event)
    try:
        opened = syscall.perf_event_open(
            event_type,
            config,
            cpu=cpu,
            frequency_hz=wanted.frequency_hz,
            period=0 if wanted.frequency_hz else wanted.period or 1,
            what=way,
        )
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV) and event_type != PERF_TYPE_SOFTWARE:
            why = "the processor's counters cannot be reached (in a virtual machine?); cpu-clock works everywhere"
            raise UnsupportedFeature(f"perf event {wanted.event}", why=why) from error
        if error.errno == errno.EINVAL and event_type in (PERF_TYPE_CACHE, PERF_TYPE_RAW):
            raise UnsupportedFeature(f"perf event {wanted.event}", why="this processor does not count that") from error
        if error.errno == errno.EINVAL:
            limit = "/proc/sys/kernel/perf_event_max_sample_rate"
            raise KernelError(error.errno, f"open {way}", f"Is the frequency above {limit}?") from error
        raise
    return on_events(prog_fd, [opened], way)


def _attach_once(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    """For whoever wants no following: the CPUs of this moment."""
    made: list[Link] = []
    try:
        for cpu in maps.online_cpus():
            made.append(_on_cpu(prog_fd, attachment, cpu))  # noqa: PERF401 - those made so far are closed when one fails
    except BaseException:
        for link in made:
            link.close()
        raise
    fds = tuple(fd for link in made for fd in link.fds)
    return Link(fds, made[0].pinnable, _title(attachment), tuple(fd for link in made for fd in link.keeps))


KINDS = {"perf_event": Kind(always(ProgramType.PERF_EVENT), _check, _attach_once)}
