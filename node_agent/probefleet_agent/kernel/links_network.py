"""Attach to interfaces and cgroups: XDP, TC (TCX, or clsact before Linux 6.6), cgroup and socket filter programs.

Each of these is a ``Spread``: interfaces and pods come and go. Nothing is ever displaced: links are put behind what is
there (TCX, cgroups), and where a hook takes one program only (XDP) a taken one is left to its owner, and said.
``network_programs`` has proved before that a program changes nothing.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

from probefleet_wire.v1 import plan_pb2

from probefleet_agent.errors import KernelError, NoSuchTarget, ProbefleetError, UnsupportedFeature
from probefleet_agent.kernel import cgroups, features, interfaces, netlink, syscall, targets
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.link import Attachment, Kind, Link, always
from probefleet_agent.kernel.spread import Found, Holder, Place, Pods, Spread
from probefleet_agent.kernel.uapi import AttachType, ProgramType

XDP_GENERIC, XDP_NATIVE = 2, 4  # XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE: include/uapi/linux/if_link.h
_SO_ATTACH_BPF = 50
_ETH_P_ALL = 3
_SOCK_HOOKS = {
    plan_pb2.CgroupSock.CREATE: (AttachType.CGROUP_INET_SOCK_CREATE, "sock_create"),
    plan_pb2.CgroupSock.RELEASE: (AttachType.CGROUP_INET_SOCK_RELEASE, "sock_release"),
    plan_pb2.CgroupSock.POST_BIND4: (AttachType.CGROUP_INET4_POST_BIND, "post_bind4"),
    plan_pb2.CgroupSock.POST_BIND6: (AttachType.CGROUP_INET6_POST_BIND, "post_bind6"),
}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where the agent is: before which root the node's files lie, which cgroup is the node's, and how our filters
    are known (``mark``: TC filters outlive us without a pin, so their name says whose they are).
    """

    root: str = ""
    cgroup: str = "/"
    mark: str = "probefleet"


@dataclass(frozen=True, slots=True)
class _Spot:
    """An interface in its namespace."""

    namespace: interfaces.Namespace
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class _TcFilter:
    """A filter by clsact: unlike a link it stays when its descriptor goes, so letting go is deleting it."""

    spot: _Spot
    name: str
    egress: bool

    def close(self) -> None:
        """Delete it; an interface that is gone took it along."""
        try:
            with interfaces.entered(self.spot.namespace):
                _delete_filters(self.spot.index, self.name, self.egress)
        except (KernelError, OSError):
            pass


def spread(
    prog_fd: SupportsIndex, attachment: Attachment, surroundings: Surroundings = Surroundings()
) -> Spread | None:
    """The spread that an attachment is; None for kinds that are one place. ``prog_fd`` has to stay open."""
    make = _SPREADS.get(str(attachment.WhichOneof("target")))
    return make(prog_fd, attachment, surroundings) if make else None


# Interfaces.


def _find_interfaces(names: Sequence[str], by_pod: bool, root: str) -> Callable[[Pods], Found]:
    def find(pods: Pods) -> Found:
        node = interfaces.of_node(root)
        missing: list[str] = []
        if not by_pod:
            places = _places(node, names)
            there = {place.details.name for place in places if isinstance(place.details, _Spot)}
            missing += [f"{name}: no such interface now" for name in names if _explicit(name) and name not in there]
            if not places and not missing:
                missing.append(f"no interface fits {', '.join(names)} now")
            return Found(tuple(places), tuple(missing))
        found: dict[str, Place] = {}
        for uid, groups in pods.items():
            namespace = interfaces.of_pod(uid, groups)
            if namespace is None:
                continue
            if namespace.number == node.number:
                missing.append(f"pod {uid} uses the node's network: its packets cannot be told from the node's")
                continue
            try:
                found |= {place.key: place for place in _places(namespace, names)}
            except (KernelError, OSError):
                continue  # the pod has just ended
        return Found(tuple(found.values()), tuple(missing))

    return find


def _on_interfaces(
    title: str,
    names: Sequence[str],
    by_pod: bool,
    around: Surroundings,
    attach: Callable[[Place], Holder],
    *,
    pinnable: bool,
) -> Spread:
    def nothing() -> ProbefleetError:
        there = [each.name for each in interfaces.matching(interfaces.of_node(around.root), ["*"])]
        name = next(name for name in names if _explicit(name))
        return NoSuchTarget(f"interface {name}", targets.near(name, there), where="on this machine")

    named = not by_pod and any(_explicit(name) for name in names)
    find = _find_interfaces(names, by_pod, around.root)
    return Spread(title, find, attach, pinnable, nothing if named else None)


def _places(namespace: interfaces.Namespace, names: Sequence[str]) -> list[Place]:
    return [
        Place(
            f"net:{namespace.number}/{each.index}/{each.name}",
            f"{each.name} of {namespace.owner}" if namespace.owner else each.name,
            _Spot(namespace, each.index, each.name),
        )
        for each in interfaces.matching(namespace, names)
    ]


def _explicit(name: str) -> bool:
    return not interfaces.is_pattern(name)


def _spot(place: Place) -> _Spot:
    assert isinstance(place.details, _Spot)
    return place.details


def _on(names: Sequence[str], by_pod: bool) -> str:
    what = " ".join(names) or "every interface"
    return f"{what} of the selected pods" if by_pod else what


def _xdp(prog_fd: SupportsIndex, attachment: Attachment, around: Surroundings) -> Spread:
    wanted = attachment.xdp

    def attach(place: Place) -> Fd:
        spot = _spot(place)
        with interfaces.entered(spot.namespace):
            try:
                flags = XDP_NATIVE if wanted.native else XDP_GENERIC
                return syscall.link_create(prog_fd, spot.index, AttachType.XDP, flags=flags)
            except KernelError as error:
                raise _xdp_refused(error, spot, wanted.native) from error

    mode = "native" if wanted.native else "generic"
    title = f"xdp ({mode}) {_on(wanted.interfaces, wanted.pods)}"
    return _on_interfaces(title, wanted.interfaces, wanted.pods, around, attach, pinnable=True)


def _xdp_refused(error: KernelError, spot: _Spot, native: bool) -> ProbefleetError:
    if error.errno in (errno.EBUSY, errno.EEXIST):
        taken = next((each.xdp_program for each in netlink.interfaces() if each.index == spot.index), 0)
        return KernelError(
            errno.EBUSY,
            f"attach to XDP of {spot.name}",
            f"An interface has one XDP program, and {_program(taken)} is there; it is left in place. "
            "Count by tc instead, which any number of programs share.",
        )
    if native and error.errno in (errno.EOPNOTSUPP, errno.ERANGE, errno.EINVAL):
        why = "its driver has none, or not with its present MTU and offloads. Leave mode away: generic works everywhere"
        return UnsupportedFeature(f"native XDP for {spot.name}", why=why)
    return error


def _program(number: int) -> str:
    if not number:
        return "another program"
    try:
        with syscall.fd_by_id("program", number) as fd:
            return f"program {syscall.program_info(fd).name} (id {number})"
    except KernelError:
        return f"program {number}"


def _tc(prog_fd: SupportsIndex, attachment: Attachment, around: Surroundings) -> Spread:
    wanted = attachment.tc
    by_link = features.tcx()
    kind = AttachType.TCX_EGRESS if wanted.egress else AttachType.TCX_INGRESS
    name = f"{around.mark}:{attachment.program}"

    def attach(place: Place) -> Holder:
        spot = _spot(place)
        with interfaces.entered(spot.namespace):
            if by_link:
                return syscall.link_create(prog_fd, spot.index, kind)
            _delete_filters(spot.index, name, wanted.egress)  # of an agent before us, on this very place
            netlink.add_clsact(spot.index)
            netlink.add_filter(spot.index, prog_fd, name, egress=wanted.egress)
        return _TcFilter(spot, name, wanted.egress)

    way = f"{'tcx' if by_link else 'tc'} {'egress' if wanted.egress else 'ingress'}"
    title = f"{way} {_on(wanted.interfaces, wanted.pods)}"
    return _on_interfaces(title, wanted.interfaces, wanted.pods, around, attach, pinnable=by_link)


def _delete_filters(index: int, name: str, egress: bool) -> None:
    for each in netlink.filters(index, egress=egress):
        if each.name == name:
            netlink.delete_filter(index, each, egress=egress)


def sweep(tree: Path, root: str = "", *, but: Collection[str] = ()) -> int:
    """Delete the filters that dead agents of this tree of pins left on the node, but those of these instances."""
    if features.tcx():
        return 0
    mark = f"probefleet:{tree}:"
    deleted = 0
    try:
        with interfaces.entered(interfaces.of_node(root)):
            for each, egress in itertools.product(netlink.interfaces(), (False, True)):
                for found in netlink.filters(each.index, egress=egress):
                    if found.name.startswith(mark) and found.name.removeprefix(mark).split(":")[0] not in but:
                        netlink.delete_filter(each.index, found, egress=egress)
                        deleted += 1
    except (KernelError, OSError):
        pass  # who may not look there could not attach there
    return deleted


def _socket_filter(prog_fd: SupportsIndex, attachment: Attachment, around: Surroundings) -> Spread:
    wanted = attachment.socket_filter

    def attach(place: Place) -> Fd:
        spot = _spot(place)
        # Without a protocol nothing arrives before the program is there.
        with interfaces.entered(spot.namespace), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as made:
            made.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, struct.pack("=I", int(prog_fd)))
            made.bind((spot.name, _ETH_P_ALL))
            return Fd(made.detach(), f"packet socket on {spot.name}")

    title = f"socket filter {_on(wanted.interfaces, wanted.pods)}"
    return _on_interfaces(title, wanted.interfaces, wanted.pods, around, attach, pinnable=False)


# Cgroups.


def _find_cgroups(path: str, by_pod: bool, around: Surroundings) -> Callable[[Pods], Found]:
    def find(pods: Pods) -> Found:
        if not by_pod:
            return _cgroup_places({path or around.cgroup: path or around.cgroup})
        # The pod's own cgroup is above its containers': one program sees them all.
        tops = {min(groups, key=len): f"pod {uid}" for uid, groups in pods.items() if groups}
        return _cgroup_places(tops)

    return find


def _cgroup_places(labels: dict[str, str]) -> Found:
    places, missing = [], []
    for path, label in labels.items():
        try:
            number = cgroups.id_of(path)
        except OSError:
            missing.append(f"{label}: no such cgroup now")
            continue
        places.append(Place(f"cgroup:{number}", label, path))
    return Found(tuple(places), tuple(missing))


def _cgroup(
    prog_fd: SupportsIndex, path: str, by_pod: bool, hook: AttachType, word: str, around: Surroundings
) -> Spread:
    def attach(place: Place) -> Fd:
        folder = cgroups.mount_point() / str(place.details).strip("/")
        with Fd(_open_folder(folder), f"cgroup {folder}") as fd:
            try:
                return syscall.link_create(prog_fd, fd, hook)
            except KernelError as error:
                if error.errno == errno.EPERM:
                    advice = "A program was attached there, or above, that allows no other; it is left in place."
                    raise KernelError(errno.EBUSY, f"attach to {word} of {place.label}", advice) from error
                raise

    where = "the selected pods" if by_pod else path or around.cgroup
    nothing = None if by_pod else lambda: NoSuchTarget(f"cgroup {path or around.cgroup}", where="on this machine")
    return Spread(f"cgroup {word} {where}", _find_cgroups(path, by_pod, around), attach, True, nothing)


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _cgroup_skb(prog_fd: SupportsIndex, attachment: Attachment, around: Surroundings) -> Spread:
    wanted = attachment.cgroup_skb
    hook = AttachType.CGROUP_INET_EGRESS if wanted.egress else AttachType.CGROUP_INET_INGRESS
    return _cgroup(prog_fd, wanted.cgroup, wanted.pods, hook, "egress" if wanted.egress else "ingress", around)


def _cgroup_sock(prog_fd: SupportsIndex, attachment: Attachment, around: Surroundings) -> Spread:
    wanted = attachment.cgroup_sock
    hook, word = _SOCK_HOOKS[wanted.hook]
    return _cgroup(prog_fd, wanted.cgroup, wanted.pods, hook, word, around)


# The table.


def _check_cgroups(_attachment: Attachment, _section: str) -> None:
    cgroups.mount_point()


def _nothing_to_check(_attachment: Attachment, _section: str) -> None:
    """Whether the interfaces are there shows when they are looked for."""


def _skb_type(attachment: Attachment, _section: str) -> tuple[int, int]:
    egress = attachment.cgroup_skb.egress
    return ProgramType.CGROUP_SKB, AttachType.CGROUP_INET_EGRESS if egress else AttachType.CGROUP_INET_INGRESS


def _sock_type(attachment: Attachment, _section: str) -> tuple[int, int]:
    return ProgramType.CGROUP_SOCK, _SOCK_HOOKS[attachment.cgroup_sock.hook][0]


def _attach_once(prog_fd: SupportsIndex, attachment: Attachment) -> Link:
    """For whoever wants no following: the places of this moment."""
    made = spread(prog_fd, attachment)
    assert made is not None
    made.follow({}, 0)
    made.raise_if_in_vain()
    return Link(made.fds, made.pinnable, made.way)


def _kind(program_type: Callable[[Attachment, str], tuple[int, int]], check: Callable[[Attachment, str], None]) -> Kind:
    return Kind(program_type, check, _attach_once)


KINDS = {
    "xdp": _kind(always(ProgramType.XDP, AttachType.XDP), _nothing_to_check),
    "tc": _kind(always(ProgramType.SCHED_CLS), _nothing_to_check),
    "socket_filter": _kind(always(ProgramType.SOCKET_FILTER), _nothing_to_check),
    "cgroup_skb": _kind(_skb_type, _check_cgroups),
    "cgroup_sock": _kind(_sock_type, _check_cgroups),
}
_SPREADS: dict[str, Callable[[SupportsIndex, Attachment, Surroundings], Spread]] = {
    "xdp": _xdp,
    "tc": _tc,
    "socket_filter": _socket_filter,
    "cgroup_skb": _cgroup_skb,
    "cgroup_sock": _cgroup_sock,
}
