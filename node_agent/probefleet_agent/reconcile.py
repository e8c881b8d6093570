"""Desired and observed in, actions out. Pure; the engine calls it until it has nothing more to say.

::

    Push ─▶ Desired ─┐
                     ├─▶ reconcile ─▶ actions ─▶ engine executes each ─▶ Observed ─▶ reconcile …
    kernel ▶ Observed┘

Each round says what can be done *now*: a policy is bound to its new instance in the round after that has loaded,
and what nobody is bound to goes in the round after that. So a load that fails leaves the last good instance where
it is, whoever asks for the rest. Nothing is removed but by a ``Desired``, and only an authenticated push makes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NewType, TypeAlias

from probefleet_agent.pods import PolicyUid

Digest = NewType("Digest", str)
MapUid = NewType("MapUid", str)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One policy's wish: an instance (and the ProbeMaps it shares), or ``None``: keep what there is."""

    digest: Digest | None
    maps: frozenset[MapUid] = frozenset()


@dataclass(frozen=True, slots=True)
class Desired:
    """A push, as far as programs and maps go."""

    policies: Mapping[PolicyUid, Wanted]
    maps: frozenset[MapUid] = frozenset()


@dataclass(frozen=True, slots=True)
class Observed:
    """What this node has."""

    #: Loaded and attached, and which ProbeMaps each uses.
    instances: Mapping[Digest, frozenset[MapUid]] = field(default_factory=dict)
    bindings: Mapping[PolicyUid, Digest] = field(default_factory=dict)
    maps: frozenset[MapUid] = frozenset()
    #: Processes that begin: neither loaded nor failed yet.
    starting: frozenset[Digest] = frozenset()
    failed: frozenset[Digest] = frozenset()  # tried since the last push that changed it
    failed_maps: frozenset[MapUid] = frozenset()
    #: ProbeMaps that were made by another definition than the one that is wanted.
    outgrown: frozenset[MapUid] = frozenset()


@dataclass(frozen=True, slots=True)
class MakeMap:
    """Create and pin a ProbeMap."""

    uid: MapUid


@dataclass(frozen=True, slots=True)
class Load:
    """Load, attach and pin an instance."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Bind:
    """The policy's outputs are read from this instance from now on."""

    policy: PolicyUid
    digest: Digest


@dataclass(frozen=True, slots=True)
class Unbind:
    """The policy is gone."""

    policy: PolicyUid


@dataclass(frozen=True, slots=True)
class Remove:
    """Detach, unload and unpin an instance that nobody is bound to."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class RemoveMap:
    """Unpin a ProbeMap that nobody uses."""

    uid: MapUid


@dataclass(frozen=True, slots=True)
class GrowMap:
    """Put a larger map in a ProbeMap's place, with its entries, in all instances that use it."""

    uid: MapUid


Action: TypeAlias = GrowMap | MakeMap | Load | Bind | Unbind | Remove | RemoveMap


def reconcile(desired: Desired, observed: Observed) -> list[Action]:
    """What can be done now, in this order; empty where observed is what desired allows."""
    wanted = {w.digest: w for w in desired.policies.values() if w.digest is not None}
    needed_maps = {uid for w in wanted.values() for uid in w.maps}
    actions: list[Action] = []

    missing = (needed_maps & desired.maps) - observed.maps - observed.failed_maps
    actions += [MakeMap(uid) for uid in sorted(missing)]
    for digest in sorted(wanted):
        idle = digest not in observed.instances and digest not in observed.failed | observed.starting
        if idle and wanted[digest].maps <= observed.maps | observed.failed_maps:
            actions.append(Load(digest))

    bindings = dict(observed.bindings)
    for policy in sorted(observed.bindings):
        if policy not in desired.policies:
            actions.append(Unbind(policy))
            del bindings[policy]
    for policy, wish in sorted(desired.policies.items()):
        if wish.digest in observed.instances and bindings.get(policy) != wish.digest and wish.digest is not None:
            actions.append(Bind(policy, wish.digest))
            bindings[policy] = wish.digest

    # A digest that is wanted but bound to nobody yet will be bound in the next round.
    in_use = set(bindings.values()) | set(wanted)
    gone = sorted(({*observed.instances} | observed.starting) - in_use)
    actions += [Remove(digest) for digest in gone]
    used_maps = {uid for digest, uids in observed.instances.items() if digest not in gone for uid in uids}
    # A policy that is to keep what it has, but is bound to nothing: what it has could not be adopted, so nobody knows
    # which maps it uses.
    # Nor can these be given another map.
    if any(wish.digest is None and policy not in bindings for policy, wish in desired.policies.items()):
        return actions
    actions += [RemoveMap(uid) for uid in sorted(observed.maps - used_maps - needed_maps)]
    # Last: what goes needs no new programs, and what comes is loaded with the map that is there.
    outgrown = observed.outgrown & needed_maps & desired.maps - observed.failed_maps
    return actions or [GrowMap(uid) for uid in sorted(outgrown)]
