"""Attachments whose places come and go, kept up with them: new ones attached and pinned, gaps and refusals said.

``execute`` begins them when it loads an instance, and takes them over when it adopts one; the engine has ``follow``
called about once a second. A link is pinned as ``link_<n>_<program>``, n being the attachment's number times 4096 plus
the place's; the manifest says which place that is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from probefleet_wire.v1 import plan_pb2

from probefleet_agent.kernel import links, links_network, pins
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.spread import MAX_PLACES, Held, Pods, Spread

#: Gaps that are kept; the oldest go first.
MAX_GAPS = 64
Gap = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class Follower:
    """One spread of an instance: the attachment's number, and its program."""

    number: int
    program: str
    spread: Spread
    by_pod: bool

    def pinned(self) -> Iterator[tuple[int, Fd, str]]:
        """(number of the pin, link, key of its place) of all links that can be pinned."""
        for key, held in self.spread.held.items():
            if self.spread.pinnable and isinstance(held.holder, Fd):
                yield self.number * MAX_PLACES + held.number, held.holder, key


@dataclass(slots=True)
class Followers:
    """All spreads of one instance."""

    each: list[Follower] = field(default_factory=list)

    def add(
        self, number: int, attachment: plan_pb2.Attachment, program: Fd, around: links_network.Surroundings
    ) -> None:
        """Follow this attachment, if its places come and go."""
        made = links.spread(program, attachment, around)
        if made is not None:
            target = getattr(attachment, str(attachment.WhichOneof("target")))
            self.each.append(Follower(number, attachment.program, made, bool(getattr(target, "pods", False))))

    def begin(self) -> list[tuple[int, str]]:
        """Attach to what is there when an instance is loaded; each attachment in words. Pods are not known yet then.

        Raises what stands against it where nothing could be attached that is named.
        """
        for follower in self.each:
            if not follower.by_pod:
                follower.spread.follow({}, time.time_ns())
                follower.spread.raise_if_in_vain()
        return self.ways()

    def ways(self) -> list[tuple[int, str]]:
        """(number of the attachment, program and places in words)."""
        return [(follower.number, f"{follower.program}: {follower.spread.way}") for follower in self.each]

    def pin(self, folder: pins.Folder) -> None:
        """Pin every link there is."""
        for follower in self.each:
            for number, fd, _ in follower.pinned():
                folder.pin_link(number, follower.program, fd)

    def places(self) -> dict[str, str]:
        """Number of the pin → key of the place, for the manifest."""
        return {str(number): key for follower in self.each for number, _, key in follower.pinned()}

    def take_over(self, links: Mapping[int, Fd], places: Mapping[str, str], stopped_ns: int) -> set[int]:
        """Adopt the links of an earlier process; the numbers of those that are kept open."""
        taken: set[int] = set()
        for follower in self.each:
            follower.spread.looked_ns = stopped_ns
            for number, fd in links.items():
                if number // MAX_PLACES == follower.number and (key := places.get(str(number))):
                    label = key.rpartition("/")[2] if key.startswith("net:") else key
                    follower.spread.take_over(key, Held(number % MAX_PLACES, label, fd))
                    taken.add(number)
        return taken

    def follow(self, folder: pins.Folder, pods: Pods, now_ns: int) -> tuple[bool, list[Gap]]:
        """Look again: whether anything changed, and what was not measured meanwhile."""
        changed, gaps = False, []
        for follower in self.each:
            spread = follower.spread
            before, since_ns = set(spread.held), spread.looked_ns
            changes = spread.follow(pods, now_ns)
            for number in changes.gone:
                folder.unpin_link(follower.number * MAX_PLACES + number, follower.program)
            for number, fd, key in follower.pinned():
                if key not in before:
                    folder.pin_link(number, follower.program, fd)
            if changes.came and since_ns:
                shown = ", ".join(changes.came[:4]) + (" and more" if len(changes.came) > 4 else "")
                gaps.append((since_ns, now_ns, f"{shown} came: what it carried before it was found is not counted"))
            changed |= bool(changes.came or changes.gone)
        return changed, gaps

    @property
    def by_pod(self) -> bool:
        """Whether any of them is attached to the selected pods."""
        return any(follower.by_pod for follower in self.each)

    def sentences(self) -> list[str]:
        """What is not measured, and why."""
        return [text for follower in self.each for text in follower.spread.sentences()]

    def close(self) -> None:
        """Let go of all of them; what is pinned stays attached."""
        for follower in self.each:
            follower.spread.close()
        self.each.clear()
