"""An attachment of many places: what comes is attached, what goes is let go, what cannot be attached is said."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from probefleet_agent.errors import KernelError, NoSuchTarget, ProbefleetError
from probefleet_agent.kernel.spread import Found, Held, Place, Pods, Spread


@dataclass
class Holder:
    open: bool = True

    def close(self) -> None:
        self.open = False


@dataclass
class World:
    """Places by name; ``taken`` are those where somebody else sits."""

    there: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    missing: tuple[str, ...] = ()
    broken: ProbefleetError | None = None
    made: dict[str, Holder] = field(default_factory=dict)

    def find(self, _pods: Pods) -> Found:
        if self.broken:
            raise self.broken
        return Found(tuple(Place(f"key/{name}", name) for name in self.there), self.missing)

    def attach(self, place: Place) -> Holder:
        if place.label in self.taken:
            raise KernelError(16, f"attach to {place.label}")
        self.made[place.label] = Holder()
        return self.made[place.label]

    def spread(self, *, required: bool = False) -> Spread:
        nothing = (lambda: NoSuchTarget("interface a")) if required else None
        return Spread("xdp *", self.find, self.attach, True, nothing)


def test_what_comes_is_attached_and_what_goes_is_let_go() -> None:
    world = World(["a", "b"])
    spread = world.spread()
    assert spread.follow({}, 5).came == ("a", "b")
    world.there = ["b", "c"]
    changes = spread.follow({}, 6)
    assert (changes.came, changes.gone) == (("c",), (0,))
    assert [world.made[name].open for name in "abc"] == [False, True, True]
    assert spread.way == "xdp * on b, c" and spread.looked_ns == 6


def test_a_place_keeps_its_number_and_a_free_number_is_used_again() -> None:
    world = World(["a", "b", "c"])
    spread = world.spread()
    spread.follow({}, 1)
    world.there = ["c", "d", "a"]
    spread.follow({}, 2)
    assert {held.label: held.number for held in spread.held.values()} == {"a": 0, "c": 2, "d": 1}


def test_what_cannot_be_attached_is_said_and_tried_again() -> None:
    world = World(["a", "b"], taken={"b"}, missing=("c: no such interface now",))
    spread = world.spread()
    spread.follow({}, 1)
    assert [text.split(":")[0] for text in spread.sentences()] == ["c", "b"]
    spread.raise_if_in_vain()
    world.taken.clear()
    world.missing = ()
    assert spread.follow({}, 2).came == ("b",)
    assert spread.sentences() == []


def test_in_vain_is_an_error_where_all_are_taken_or_what_is_named_is_not_there() -> None:
    taken = World(["a"], taken={"a"}).spread()
    taken.follow({}, 1)
    with pytest.raises(KernelError, match="attach to a"):
        taken.raise_if_in_vain()
    named = World().spread(required=True)
    named.follow({}, 1)
    with pytest.raises(NoSuchTarget, match="interface a"):
        named.raise_if_in_vain()
    pattern = World().spread()
    pattern.follow({}, 1)
    pattern.raise_if_in_vain()
    assert pattern.way == "xdp * on nothing yet"


def test_what_is_attached_stays_while_it_cannot_be_looked() -> None:
    world = World(["a"])
    spread = world.spread()
    spread.follow({}, 1)
    world.broken = KernelError(1, "list the interfaces")
    changes = spread.follow({}, 2)
    assert (changes.came, changes.gone) == ((), ()) and world.made["a"].open
    assert "it cannot be looked what is there" in spread.sentences()[0]
    world.broken = None
    spread.follow({}, 3)
    assert spread.sentences() == []


def test_a_link_of_an_earlier_process_is_taken_over_and_not_made_again() -> None:
    world = World(["a", "b"])
    spread = world.spread()
    old = Holder()
    spread.take_over("key/a", Held(7, "a", old))
    assert spread.follow({}, 1).came == ("b",)
    assert "a" not in world.made and {held.number for held in spread.held.values()} == {7, 0}
    spread.close()
    assert not old.open and not spread.held
