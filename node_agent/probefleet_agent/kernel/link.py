"""What an attachment is: the Link that comes out, and the Kind that each family of targets registers.

``links`` holds the table of kinds; ``links_trace``, ``links_function``, ``links_user`` and ``links_perf`` fill it. They
share what is here, and know nothing of each other.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import SupportsIndex

from probefleet_wire.v1 import plan_pb2

from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import features, syscall, uapi
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import AttachType

Attachment = plan_pb2.Attachment


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


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of target, ``Attachment.target``'s member. ``section`` is what the program's SEC() says."""

    #: (program type, expected attach type) to load the program with.
    program_type: Callable[[Attachment, str], tuple[int, int]]
    #: Raises UnsupportedFeature or NoSuchTarget where this kernel cannot; cheap enough to ask before every load.
    check: Callable[[Attachment, str], None]
    attach: Callable[[SupportsIndex, Attachment], Link]
    #: What the program is bound to when it is loaded, by its name in the kernel's BTF: "sched_switch" for tp_btf.
    bound_to: Callable[[Attachment], str] = lambda _: ""
    #: The same, as BTF itself spells it: "btf_trace_sched_switch".
    btf_name: Callable[[Attachment], str] = lambda _: ""
    #: The attachment with its files found, below another root ("/proc/1/root") where that is given.
    rooted: Callable[[Attachment, str], Attachment] = lambda attachment, _: attachment


def always(program_type: int, attach_type: int = AttachType.NONE) -> Callable[[Attachment, str], tuple[int, int]]:
    """A ``program_type`` that depends on nothing."""
    return lambda _attachment, _section: (int(program_type), int(attach_type))


def on_events(prog_fd: SupportsIndex, events: list[Fd], way: str, *, cookie: int = 0) -> Link:
    """Hang the program on each perf event: by links where there are links, else on the events themselves.

    Before Linux 5.15 perf events have no links: nothing can be pinned, and counting ends with this process. There is no
    cookie then either: whoever needs one asks ``features.cookies`` first.
    """
    links: list[Fd] = []
    try:
        if features.perf_link():
            for event in events:
                link = syscall.link_create(prog_fd, event, AttachType.PERF_EVENT, cookie=cookie)
                links.append(link)  # one by one: those made so far are closed when one fails
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
