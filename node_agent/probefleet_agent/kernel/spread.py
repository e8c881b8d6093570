"""One attachment that is many places which come and go: the interfaces of a pattern, the cgroups of pods.

``Spread`` is told how to find places and how to attach to one. ``follow`` looks again: what is new is attached, what is
gone is let go, and what cannot be attached is kept as a sentence, for the report, and tried again the next time. The
links that it holds are pinned one by one by ``following``, under numbers that a place keeps as long as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from probefleet_agent.errors import ProbefleetError
from probefleet_agent.kernel.fds import Fd

#: Places of one attachment; pins of an attachment are numbered below this.
MAX_PLACES = 4096
#: Pod uid → paths of its cgroups.
Pods = Mapping[str, Sequence[str]]


class Holder(Protocol):
    """What keeps a program attached: a link's descriptor, a socket, a filter."""

    def close(self) -> None:
        """Let go of it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere to attach: ``key`` is the same as long as it is the same place, ``label`` is for people."""

    key: str
    label: str
    details: object = None


@dataclass(frozen=True, slots=True)
class Found:
    """The places there are now, and what is known to be missing, in words."""

    places: tuple[Place, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Held:
    """A place with its link, and the number under which that is pinned."""

    number: int
    label: str
    holder: Holder


@dataclass(frozen=True, slots=True)
class Changes:
    """What one look came to: labels of new places, and the numbers of those that are gone."""

    came: tuple[str, ...]
    gone: tuple[int, ...]


@dataclass(slots=True)
class Spread:
    """An attachment to all places of a kind."""

    title: str  # "xdp eth*"
    find: Callable[[Pods], Found]
    attach: Callable[[Place], Holder]
    pinnable: bool
    #: What to raise where nothing is found at first; None where that may be.
    nothing: Callable[[], ProbefleetError] | None = None
    held: dict[str, Held] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    looked_ns: int = 0
    first_error: ProbefleetError | None = None

    @property
    def way(self) -> str:
        """In words, with the places."""
        labels = [each.label for each in self.held.values()]
        shown = ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
        return f"{self.title} on {shown}" if labels else f"{self.title} on nothing yet"

    @property
    def fds(self) -> tuple[Fd, ...]:
        """The links' descriptors."""
        return tuple(each.holder for each in self.held.values() if isinstance(each.holder, Fd))

    def sentences(self) -> list[str]:
        """What is not measured, and why."""
        return [*self.missing, *(f"{label}: {why}" for label, why in self.refused.items())]

    def raise_if_in_vain(self) -> None:
        """After the first look: raise why not one place was attached, unless places may come later."""
        if not self.held and self.first_error:
            raise self.first_error
        if not self.held and self.nothing:
            raise self.nothing()

    def take_over(self, key: str, held: Held) -> None:
        """Adopt a link that an earlier process pinned."""
        self.held[key] = held

    def follow(self, pods: Pods, now_ns: int) -> Changes:
        """Look where it should be attached now, and make it so."""
        try:
            found = self.find(pods)
        except (ProbefleetError, OSError) as error:
            # What is attached stays so until it can be looked again.
            self.missing = (f"{self.title}: it cannot be looked what is there: {error}",)
            self.first_error = error if isinstance(error, ProbefleetError) else ProbefleetError(self.missing[0])
            return Changes((), ())
        there = {place.key: place for place in found.places[:MAX_PLACES]}
        gone = []
        for key in [key for key in self.held if key not in there]:
            held = self.held.pop(key)
            held.holder.close()
            gone.append(held.number)
        came = []
        self.refused, self.missing = {}, found.missing
        taken = {held.number for held in self.held.values()}
        for key, place in there.items():
            if key in self.held:
                continue
            try:
                holder = self.attach(place)
            except (ProbefleetError, OSError) as error:
                self.refused[place.label] = str(error)
                if isinstance(error, ProbefleetError):
                    self.first_error = self.first_error or error
                continue
            number = next(each for each in range(MAX_PLACES) if each not in taken)
            taken.add(number)
            self.held[key] = Held(number, place.label, holder)
            came.append(place.label)
        self.looked_ns = now_ns
        return Changes(tuple(came), tuple(gone))

    def close(self) -> None:
        """Let go of all places; what is pinned stays attached."""
        for held in self.held.values():
            held.holder.close()
        self.held.clear()
