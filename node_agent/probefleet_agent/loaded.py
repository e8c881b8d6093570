"""What an instance is once it is in the kernel: its maps, programs and links, and the bytes that it is adopted from.

``execute`` makes these, ``installed`` keeps them, and whoever reads an instance is handed one.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from probefleet_wire.btf_layout import Field
from probefleet_wire.v1 import plan_pb2

from probefleet_agent import following
from probefleet_agent.baseline import Baseline
from probefleet_agent.decode import Layout
from probefleet_agent.kernel import clock, hooks, links, maps, syscall
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.perf_ring import KeptRing

FILTER = "probefleet_filter"
LOST = "probefleet_lost"
OVER_BUDGET = "its programs were detached, for they went over budget.cpu"
ITERATOR = 0  # where a map's type stands
LINE_BYTES = 256
LINES = Layout((), 0, (Field("line", 0, LINE_BYTES, "char", type_name="char", shape=(LINE_BYTES,)),), LINE_BYTES)


@dataclass(frozen=True, slots=True)
class Runs:
    """What an instance's programs have run so far, as far as statistics were on; skipped runs always count."""

    first_program: int  # the kernel's id; 0: there is none
    count: int
    time_ns: int  # in the programs
    hook_time_ns: int  # on the way to them, of hooks whose cost is known
    recursion_misses: int


@dataclass(slots=True)
class MapHandle:
    """One map of an instance, open."""

    name: str
    fd: Fd
    info: maps.MapInfo
    layout: Layout | None
    probe_map_uid: str = ""  # of the ProbeMap that it is, where it is shared
    ring: KeptRing | None = None  # where its records are not the kernel's: lines of a process
    heir_of: int = 0  # kernel id of the first map whose entries it goes on with: a ProbeMap that grew
    since_ns: int = (
        0  # of a ProbeMap: when the first one was made, which may be long before who reads it; 0: nobody knows
    )

    @property
    def epoch(self) -> str:
        """Cumulative values start at zero with it. A map that was handed another's entries goes on in its epoch."""
        return f"{clock.boot_id()}:{self.heir_of or self.info.id}"


class Process(Protocol):
    """A program that has a process of its own, which loads it and says what it counts: bpftrace."""

    @property
    def ended(self) -> str:
        """Why it no longer runs; empty while it does."""

    @property
    def started(self) -> bool:
        """Whether it has attached everything. Raises ObjectError where it never will."""

    def ask(self) -> None:
        """Have it say everything once more."""

    def pump(self, *, complete: bool = False, wait_seconds: float = 0.0) -> None:
        """Take in what it has said; ``complete``: wait until it has said all that it was asked for."""

    def close(self) -> None:
        """End it, and its programs."""


@dataclass(slots=True)
class Joined:
    """Of a policy that came to an instance which had counted before: what is not its own (see ``joining``)."""

    since_ns: int  # when it came
    lost: tuple[int, int, int, int] = (0, 0, 0, 0)  # what ``Loaded.lost`` said then
    misses: int = 0  # runs that the kernel had skipped by then
    said: str = ""  # what its reports have to say of it
    #: Maps and fields of which no baseline could be taken: what is read of them is of the instance's whole time.
    whole: set[tuple[str, str]] = field(default_factory=set)
    baselines: dict[tuple[str, str], Baseline] = field(default_factory=dict)  # by map and field
    kept: Fd | None = None  # the array that is pinned

    def to_json(self) -> dict[str, object]:
        """For the manifest; baselines are kept beside it."""
        return {
            "since_ns": self.since_ns, "lost": self.lost, "misses": self.misses, "whole": sorted(self.whole),
            "said": self.said, "kept": self.kept is not None,
        }  # fmt: skip

    def close(self) -> None:
        """Let go of the array; its pin stays."""
        if self.kept is not None:
            self.kept.close()
            self.kept = None


@dataclass(slots=True)
class Loaded:
    """An instance in the kernel. Closing it lets go of the descriptors; the pins stay."""

    instance: plan_pb2.Instance
    maps: dict[str, MapHandle]
    programs: dict[str, Fd]
    sections: dict[str, str]
    links: dict[int, links.Link] = field(default_factory=dict)  # by the attachment's number
    followers: following.Followers = field(default_factory=following.Followers)
    #: Of iterators that write structs, by the program; of structs that an output names (``record_of``).
    record_layouts: dict[str, Layout] = field(default_factory=dict)
    readings: dict[str, bytes] = field(default_factory=dict)  # of iterators, the last
    troubles: list[str] = field(default_factory=list)  # what could not be read in this interval
    #: Policy uid and output → what nobody counted, in words.
    missed: dict[str, list[str]] = field(default_factory=dict)
    forgotten: Mapping[str, Sequence[str]] = field(default_factory=dict)  # `missed` as an agent before this one left it
    full: list[str] = field(default_factory=list)  # maps that no output reads, and that were full when it was looked
    notes: list[str] = field(default_factory=list)  # what its reports have to say of maps that the agent keeps
    chosen: list[plan_pb2.Attachment] = field(default_factory=list)
    ways: list[str] = field(default_factory=list)
    since_ns: int = 0  # wall clock
    gaps: list[tuple[int, int, str]] = field(default_factory=list)
    pinned_links: bool = True
    plans: dict[str, plan_pb2.Plan] = field(default_factory=dict)  # by policy uid: who is bound
    joined: dict[str, Joined] = field(default_factory=dict)  # those of them that came later than the instance
    asked_boot_ns: int = 0  # when an operator asked for it last, by the time since boot
    halted_ns: int = 0  # since when it is attached no more, for a map of it grows; 0: it is attached
    detached: str = ""  # why, where it went over its budget
    detached_ns: int = 0  # since when
    ended_ns: int = 0  # since when its process is known to have ended
    hooks_ns: dict[str, float] = field(default_factory=dict)  # program → what its hook costs a run, on this node
    unmeasured: set[hooks.HookKind] = field(default_factory=set)  # hooks whose cost is not known
    running: Process | None = None

    @property
    def digest(self) -> str:
        """The instance's."""
        return self.instance.digest

    @property
    def map_bytes(self) -> int:
        """Kernel memory of its own maps (shared ones belong to their ProbeMap), and of its policies' baselines."""
        own = [handle.fd for handle in self.maps.values() if not handle.probe_map_uid]
        kept = [joined.kept for joined in self.joined.values() if joined.kept is not None]
        return sum(maps.memory_used_bytes(fd) for fd in (*own, *kept))

    def add_gap(self, start_ns: int, end_ns: int, why: str) -> None:
        """What was not measured, from when to when."""
        self.gaps = [*self.gaps, (start_ns, end_ns, why)][-following.MAX_GAPS :]

    def lost(self) -> tuple[int, int, int, int]:
        """(failed updates, ring full, records submitted, other), cumulative; zeros where nothing counts them."""
        handle = self.maps.get(LOST)
        if handle is None:
            return (0, 0, 0, 0)
        counts = [int(count) for count in maps.sum_lost(handle.fd)] + [0] * 4
        return (counts[0], counts[1], counts[2], counts[3])

    def said(self) -> list[str]:
        """What is missing in all that it measures, in words."""
        return [*self.followers.sentences(), *self.troubles, *self.full, *self.notes]

    def counts_losses(self) -> bool:
        """A program of it counts what it loses: the header alone brings the map, too."""
        handle = self.maps.get(LOST)
        used = {number for fd in self.programs.values() for number in syscall.program_info(fd).map_ids}
        return handle is not None and handle.info.id in used

    def lost_of(self, policy: str) -> tuple[int, int, int, int]:
        """The same, of the time since a policy came."""
        now = self.lost()
        before = self.joined[policy].lost if policy in self.joined else (0, 0, 0, 0)
        return (
            max(now[0] - before[0], 0), max(now[1] - before[1], 0), max(now[2] - before[2], 0),
            max(now[3] - before[3], 0),
        )  # fmt: skip

    def since_of(self, policy: str) -> int:
        """When a policy came: with the instance, or later."""
        return self.joined[policy].since_ns if policy in self.joined else self.since_ns

    def gaps_of(self, policy: str, now_ns: int) -> list[tuple[int, int, str]]:
        """Gaps of the time since a policy came, until now."""
        since_ns = self.since_of(policy)
        gaps = [*self.gaps, (self.detached_ns, now_ns, OVER_BUDGET)] if self.detached else list(self.gaps)
        if self.ended_ns and self.running is not None:
            gaps.append((self.ended_ns, now_ns, f"bpftrace has ended: {self.running.ended}"))
        return [(max(start, since_ns), end, why) for start, end, why in gaps if end > since_ns]

    def runs(self) -> Runs:
        """Of all programs."""
        infos = {name: syscall.program_info(fd) for name, fd in self.programs.items()}
        return Runs(
            first_program=min((info.id for info in infos.values()), default=0),
            count=sum(info.run_count for info in infos.values()),
            time_ns=sum(info.run_time_ns for info in infos.values()),
            hook_time_ns=round(sum(info.run_count * self.hooks_ns.get(name, 0.0) for name, info in infos.items())),
            recursion_misses=sum(info.recursion_misses for info in infos.values()),
        )

    def verified_instructions(self) -> int:
        """What the verifier walked through, all programs together; 0 before Linux 5.16."""
        return sum(syscall.program_info(fd).verified_instructions for fd in self.programs.values())

    def close(self) -> None:
        """Let go of all descriptors."""
        if self.running is not None:
            self.running.close()
        for link in self.links.values():
            link.close()
        self.followers.close()
        for fd in (*self.programs.values(), *(handle.fd for handle in self.maps.values())):
            fd.close()
        for joined in self.joined.values():
            joined.close()

    @property
    def runs_each_interval(self) -> bool:
        """Whether it has iterators or syscall programs."""
        return any(each.WhichOneof("target") in ("iterator", "interval") for each in self.chosen)

    def source(self, name: str) -> MapHandle | None:
        """What an output reads: a map, or an iterator by its function's name."""
        if name in self.maps:
            return self.maps[name]
        for number, attachment in enumerate(self.chosen):
            link = self.links.get(number)
            if attachment.program == name and attachment.WhichOneof("target") == "iterator" and link:
                return MapHandle(name, link.fd, source_info(link.fd, name), self.record_layouts.get(name, LINES))
        return None

    def layout(self, handle: MapHandle, record: str) -> Layout | None:
        """How a source is read for an output: as itself says, else as the struct is that the output names."""
        return handle.layout or self.record_layouts.get(record_of(record))

    def manifest(self) -> bytes:
        """All that adoption needs."""
        return json.dumps(
            {
                "version": 1,
                "instance": b64(self.instance),
                "layouts": {name: handle.layout.to_json() for name, handle in self.maps.items() if handle.layout},
                "shared": {name: h.probe_map_uid for name, h in self.maps.items() if h.probe_map_uid},
                "sections": self.sections,
                "chosen": [b64(attachment) for attachment in self.chosen],
                "ways": self.ways,
                "since_ns": self.since_ns,
                "gaps": self.gaps,
                "missed": {whose: said for whose, said in self.missed.items() if whose.split()[0] in self.plans},
                "pinned_links": self.pinned_links,
                "places": self.followers.places(),
                "records": {name: layout.to_json() for name, layout in self.record_layouts.items()},
                "plans": {uid: b64(plan) for uid, plan in self.plans.items()},
                "joined": {uid: joined.to_json() for uid, joined in self.joined.items()},
                "asked_boot_ns": self.asked_boot_ns,
                "halted_ns": self.halted_ns,
                "detached": self.detached,
                "detached_ns": self.detached_ns,
            },
            separators=(",", ":"),
        ).encode()


def record_of(name: str) -> str:
    """A struct's place among the record layouts; no program has such a name."""
    return f"struct {name}"


def source_info(link: Fd, name: str) -> maps.MapInfo:
    """An iterator in the words of a map: its type is 0, which no map has."""
    return maps.MapInfo(
        id=syscall.link_info(link).id, type=ITERATOR, key_size=0, value_size=0, max_entries=0, flags=0, name=name,
        btf_id=0, btf_key_type_id=0, btf_value_type_id=0,
    )  # fmt: skip


def b64(message: plan_pb2.Instance | plan_pb2.Plan | plan_pb2.Attachment | plan_pb2.ProbeMap) -> str:
    """A message as a manifest keeps it."""
    return base64.b64encode(message.SerializeToString(deterministic=True)).decode()
