"""Interfaces and cgroups as targets: XDP, TC, cgroup and socket filter programs. Shapes, values and words. Pure.

One place holds all that is said of these kinds, so that ``attach_shape``, ``policy``, ``to_wire`` and ``observe_only``
only ask here. What the programs themselves may do is in ``probefleet_wire.network_programs``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from probefleet_wire import network_programs
from probefleet_wire.v1 import plan_pb2

from probefleet_core import errors
from probefleet_core.shape import Flag, ListOf, Record, Shape, Text, Union


class Hook(enum.StrEnum):
    """What happens to a socket when a cgroup program is asked."""

    CREATE = "create"
    RELEASE = "release"
    POST_BIND4 = "postBind4"
    POST_BIND6 = "postBind6"


@dataclass(frozen=True, slots=True)
class Xdp:
    """The first look at what an interface receives. ``pods``: the interfaces are those of the selected pods."""

    interfaces: tuple[str, ...] = ()
    pods: bool = False
    native: bool = False


@dataclass(frozen=True, slots=True)
class Tc:
    """Traffic control: what an interface receives, or sends."""

    interfaces: tuple[str, ...] = ()
    pods: bool = False
    egress: bool = False


@dataclass(frozen=True, slots=True)
class SocketFilter:
    """A packet socket of the agent's own: what an interface receives and sends."""

    interfaces: tuple[str, ...] = ()
    pods: bool = False


@dataclass(frozen=True, slots=True)
class CgroupSkb:
    """What the sockets of a cgroup receive, or send; ``cgroup`` empty: the node's."""

    cgroup: str = ""
    pods: bool = False
    egress: bool = False


@dataclass(frozen=True, slots=True)
class CgroupSock:
    """Sockets that the processes of a cgroup make, bind or release."""

    cgroup: str = ""
    pods: bool = False
    hook: Hook = Hook.CREATE


Target: TypeAlias = Xdp | Tc | SocketFilter | CgroupSkb | CgroupSock
TARGETS = (Xdp, Tc, SocketFilter, CgroupSkb, CgroupSock)


# Shapes.

_WHERE = Union(("interfaces", "pods"), "place", "it looks at interfaces of the node, or at the pods' own")
_INTERFACE = Text(
    max_length=15,
    min_length=1,
    pattern=r"[A-Za-z0-9_.@:*?-]+",
    write="Write an interface's name, or a pattern such as eth*: * is any text, ? one character.",
)
_DIRECTION = Text(max_length=7, choices=("ingress", "egress"))
_CGROUP = Text(
    max_length=1024,
    min_length=1,
    pattern=r"/[^\x00-\x1f]*",
    write="Write the cgroup's path below the cgroup2 mount, such as /system.slice.",
)


def _place_rule(value: Mapping[str, object], path: str, problems: errors.Problems) -> None:
    if value.get("cgroup") and value.get("pods"):
        problems.add(
            path,
            "cgroup and pods at once",
            why="the pods' cgroups are found by themselves",
            write="Keep one of them.",
        )
    if value.get("interfaces") == []:
        problems.add(
            f"{path}.interfaces",
            "empty",
            why="it would look at nothing",
            write="Write a name, a pattern, or pods: true.",
        )
    if value.get("pods") is False:
        problems.add(
            path, "pods: false", why="only pods: true says something", write="Leave it away, or write interfaces."
        )


def _on_interfaces(what: str, **more: Text) -> Record:
    fields: dict[str, Shape] = {"interfaces": ListOf(_INTERFACE, max_items=16), "pods": Flag(), **more}
    required = ("direction",) if "direction" in more else ()
    return Record(what, fields, required=required, unions=(_WHERE,), rules=(_place_rule,))


SHAPES = {
    "xdp": _on_interfaces("XDP", mode=Text(max_length=7, choices=("generic", "native"))),
    "tc": _on_interfaces("traffic control", direction=_DIRECTION),
    "socketFilter": _on_interfaces("a packet socket"),
    "cgroupSkb": Record(
        "packets of a cgroup",
        {"direction": _DIRECTION, "cgroup": _CGROUP, "pods": Flag()},
        required=("direction",),
        rules=(_place_rule,),
    ),
    "cgroupSock": Record(
        "sockets of a cgroup",
        {"hook": Text(max_length=9, choices=tuple(Hook)), "cgroup": _CGROUP, "pods": Flag()},
        required=("hook",),
        rules=(_place_rule,),
    ),
}


# Values.


def parse(kind: str, item: Mapping[str, Any]) -> Target:
    """A target of ``spec.attach`` that has passed its shape."""
    pods = bool(item.get("pods"))
    names = tuple(dict.fromkeys(item.get("interfaces") or ()))
    egress = item.get("direction") == "egress"
    match kind:
        case "xdp":
            return Xdp(names, pods, item.get("mode") == "native")
        case "tc":
            return Tc(names, pods, egress)
        case "socketFilter":
            return SocketFilter(names, pods)
        case "cgroupSkb":
            return CgroupSkb(item.get("cgroup") or "", pods, egress)
        case _:
            return CgroupSock(item.get("cgroup") or "", pods, Hook(item["hook"]))


_HOOKS = {
    Hook.CREATE: plan_pb2.CgroupSock.CREATE,
    Hook.RELEASE: plan_pb2.CgroupSock.RELEASE,
    Hook.POST_BIND4: plan_pb2.CgroupSock.POST_BIND4,
    Hook.POST_BIND6: plan_pb2.CgroupSock.POST_BIND6,
}


def put(made: plan_pb2.Attachment, target: Target) -> None:
    """Write the target into the wire's attachment."""
    match target:
        case Xdp(names, pods, native):
            made.xdp.CopyFrom(plan_pb2.Xdp(interfaces=names, pods=pods, native=native))
        case Tc(names, pods, egress):
            made.tc.CopyFrom(plan_pb2.Tc(interfaces=names, pods=pods, egress=egress))
        case SocketFilter(names, pods):
            made.socket_filter.CopyFrom(plan_pb2.SocketFilter(interfaces=names, pods=pods))
        case CgroupSkb(cgroup, pods, egress):
            made.cgroup_skb.CopyFrom(plan_pb2.CgroupSkb(cgroup=cgroup, pods=pods, egress=egress))
        case CgroupSock(cgroup, pods, hook):
            made.cgroup_sock.CopyFrom(plan_pb2.CgroupSock(cgroup=cgroup, pods=pods, hook=_HOOKS[hook]))


def kind_of(target: Target) -> str:
    """The target's member in ``spec.attach``."""
    name = type(target).__name__
    return name[0].lower() + name[1:]


def describe(target: Target) -> str:
    """What it is attached to: ``eth* (generic)``."""
    where = "the selected pods" if target.pods else ""
    match target:
        case Xdp(names, _, native):
            return f"{where or ' '.join(names)} ({'native' if native else 'generic'})"
        case Tc(names, _, egress):
            return f"{where or ' '.join(names)} {'egress' if egress else 'ingress'}"
        case SocketFilter(names, _):
            return where or " ".join(names)
        case CgroupSkb(cgroup, _, egress):
            return f"{where or cgroup or 'the node'} {'egress' if egress else 'ingress'}"
        case CgroupSock(cgroup, _, hook):
            return f"{where or cgroup or 'the node'} {hook}"


# What SEC() says.

_SOCK_SECTIONS = {
    "sock": Hook.CREATE,
    "sock_create": Hook.CREATE,
    "sock_release": Hook.RELEASE,
    "post_bind4": Hook.POST_BIND4,
    "post_bind6": Hook.POST_BIND6,
}


@dataclass(frozen=True, slots=True)
class Section:
    """A SEC() name of a network program: its kind, the targets that fit, and the target that it names by itself."""

    kind: network_programs.Kind
    fits: tuple[str, ...]
    target: Target | None = None


def read_section(section: str) -> Section | None:
    """What a SEC() name means, by libbpf's rules; None for programs that are not of the network."""
    word, _, rest = section.removeprefix("?").partition("/")
    if word in ("xdp", "xdp.frags") and not rest:
        return Section(network_programs.XDP, ("xdp",))
    if (word in ("tc", "tcx") and rest in ("", "ingress", "egress")) or word in ("classifier", "action"):
        return Section(network_programs.TC, ("tc",))
    if word == "socket":
        return Section(network_programs.SOCKET_FILTER, ("socketFilter",))
    if word == "cgroup_skb" and rest in ("ingress", "egress"):
        return Section(network_programs.CGROUP_SKB, ("cgroupSkb",), CgroupSkb(egress=rest == "egress"))
    if (word, rest) == ("cgroup", "skb"):
        return Section(network_programs.CGROUP_SKB, ("cgroupSkb",))
    if word == "cgroup" and rest in _SOCK_SECTIONS:
        return Section(network_programs.CGROUP_SOCK, ("cgroupSock",), CgroupSock(hook=_SOCK_SECTIONS[rest]))
    return None
