"""Attach a loaded program to what a plan asks for. In: descriptor and Attachment; out: a Link that can be pinned.

``execute`` asks ``supported`` before it loads (so that the next alternative can be taken), sets the program's type to
``program_type``, loads, and calls ``attach``. Each kind of target registers itself in ``KINDS`` (see ``link.Kind``);
a new kind is a module with a table of its own, and one line here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsIndex

from probefleet_wire.v1 import plan_pb2

from probefleet_agent.errors import NoSuchTarget, ProbefleetError, UnsupportedFeature
from probefleet_agent.kernel import (
    links_function,
    links_network,
    links_perf,
    links_pods,
    links_trace,
    links_trampoline,
    links_usdt,
    links_user,
)
from probefleet_agent.kernel.link import Kind
from probefleet_agent.kernel.link import Link as Link
from probefleet_agent.kernel.links_interval import KINDS as _INTERVAL
from probefleet_agent.kernel.spread import Spread
from probefleet_agent.kernel.uapi import AttachType, ProgramType

KINDS: Mapping[str, Kind] = {
    **links_trace.KINDS,
    **links_function.KINDS,
    **links_trampoline.KINDS,
    **links_user.KINDS,
    **links_usdt.KINDS,
    **links_perf.KINDS,
    **links_network.KINDS,
    **_INTERVAL,
}


def kind(attachment: plan_pb2.Attachment) -> str:
    """Which kind of target: a key of ``KINDS``."""
    found = attachment.WhichOneof("target")
    if found is None:
        raise ProbefleetError(f"attachment of {attachment.program} names no target")
    return str(found)


def program_type(attachment: plan_pb2.Attachment, section: str = "") -> tuple[int, int]:
    """(program type, expected attach type) that the target needs; ``section`` decides for ``syscall``."""
    return KINDS[kind(attachment)].program_type(attachment, section)


def program_types(
    attachments: Iterable[plan_pb2.Attachment], sections: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """The same of each program, for all that it is attached to.

    One that is attached to functions of user space and to something else cannot be uprobe.multi's: it is a plain kprobe
    program, and each of its places a link.
    """
    found: dict[str, tuple[int, int]] = {}
    for each in attachments:
        mine = program_type(each, sections.get(each.program, ""))
        before = found.get(each.program, mine)
        kinds = {before[1], mine[1]}
        plain = before[0] == mine[0] == ProgramType.KPROBE and len(kinds) > 1 and AttachType.TRACE_UPROBE_MULTI in kinds
        found[each.program] = (int(ProgramType.KPROBE), int(AttachType.NONE)) if plain else mine
    return found


def together(attachments: Sequence[plan_pb2.Attachment]) -> list[list[int]]:
    """Numbers of attachments that can be one link: uprobes of one program in one file. Others are by themselves."""
    groups: dict[object, list[int]] = {}
    for number, each in enumerate(attachments):
        groups.setdefault(links_user.file_of(each) or number, []).append(number)
    return list(groups.values())


def bound_to(attachment: plan_pb2.Attachment) -> str:
    """What the program is bound to when it is loaded ("sched_switch" for tp_btf); "" for most."""
    return KINDS[kind(attachment)].bound_to(attachment)


def btf_name(attachment: plan_pb2.Attachment) -> str:
    """``bound_to`` as the kernel's BTF spells it ("btf_trace_sched_switch")."""
    return KINDS[kind(attachment)].btf_name(attachment)


def spread(
    prog_fd: SupportsIndex, attachment: plan_pb2.Attachment, around: links_network.Surroundings
) -> Spread | None:
    """The spread that an attachment is, where its places come and go; None for kinds that are one place."""
    if kind(attachment) == "perf_event":
        return links_perf.spread(prog_fd, attachment)
    if attachment.uprobe.pods or attachment.usdt.pods:
        return links_pods.spread(prog_fd, attachment)
    return links_network.spread(prog_fd, attachment, around)


def supported(
    attachment: plan_pb2.Attachment, *, program_section: str = "", root: str = ""
) -> UnsupportedFeature | NoSuchTarget | None:
    """Why this kernel cannot attach it, or None. Cheap enough to ask before every load. ``root``: see ``attach``."""
    try:
        KINDS[kind(attachment)].check(KINDS[kind(attachment)].rooted(attachment, root), program_section)
    except (NoSuchTarget, UnsupportedFeature) as error:
        return error
    return None


def attach_together(
    prog_fd: SupportsIndex, attachments: Sequence[plan_pb2.Attachment], *, root: str = ""
) -> tuple[Link, list[str]] | None:
    """Attach what ``together`` put together, each in words; None where it has to be done one by one."""
    found = [KINDS["uprobe"].rooted(each, root) for each in attachments]
    link = links_user.attach_many(prog_fd, found)
    return (link, [links_user.way_of(each) for each in found]) if link else None


def attach(
    prog_fd: SupportsIndex, attachment: plan_pb2.Attachment, *, program_section: str = "", root: str = ""
) -> Link:
    """Attach. NoSuchTarget with near names, UnsupportedFeature, or KernelError.

    ``root`` stands before the paths of uprobes: "/proc/1/root" for an agent in a container, whose own files are others
    than the node's.
    """
    return KINDS[kind(attachment)].attach(prog_fd, KINDS[kind(attachment)].rooted(attachment, root))
