"""Reconciliation: from anywhere to where the push wants to be, without ever losing what still works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st
from probefleet_agent import reconcile
from probefleet_agent.pods import PolicyUid
from probefleet_agent.reconcile import (
    Action,
    Bind,
    Desired,
    Digest,
    GrowMap,
    Load,
    MakeMap,
    MapUid,
    Observed,
    Remove,
    RemoveMap,
    Unbind,
    Wanted,
)

T = TypeVar("T")
#: A map is made, an instance loaded, a policy bound, the old instance removed, maps grown: one round each.
MOST_ROUNDS = 5

POLICIES = [PolicyUid(f"policy-{n}") for n in range(4)]
MAPS = [MapUid(f"map-{n}") for n in range(3)]
DIGESTS = [Digest(f"digest-{n}") for n in range(5)]
OLD, NEW = DIGESTS[:2]
SLOW, FAST = POLICIES[:2]
SHARED = MAPS[0]


@dataclass
class Node:
    """A node as ``reconcile`` sees it: what is asked for is done, but what is named in ``broken`` fails."""

    observed: Observed
    needs: dict[Digest, frozenset[MapUid]] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()

    def do(self, action: Action) -> None:
        now = self.observed
        match action:
            case MakeMap(uid) if uid in self.broken:
                self.observed = replace(now, failed_maps=now.failed_maps | {uid})
            case MakeMap(uid):
                assert uid not in now.maps
                self.observed = replace(now, maps=now.maps | {uid})
            case GrowMap(uid) if uid in self.broken:
                self.observed = replace(now, failed_maps=now.failed_maps | {uid})
            case GrowMap(uid):
                assert uid in now.maps
                self.observed = replace(now, outgrown=now.outgrown - {uid})
            case Load(digest) if digest in self.broken or not self.needs.get(digest, frozenset()) <= now.maps:
                self.observed = replace(now, failed=now.failed | {digest})
            case Load(digest):
                assert digest not in now.instances
                uses = self.needs.get(digest, frozenset())
                self.observed = replace(now, instances={**now.instances, digest: uses})
            case Bind(policy, digest):
                assert digest in now.instances
                self.observed = replace(now, bindings={**now.bindings, policy: digest})
            case Unbind(policy):
                self.observed = replace(now, bindings={p: d for p, d in now.bindings.items() if p != policy})
            case Remove(digest):
                assert digest not in now.bindings.values(), "removed while a policy reads from it"
                self.observed = replace(now, instances={d: m for d, m in now.instances.items() if d != digest})
            case RemoveMap(uid):
                assert all(uid not in uses for uses in now.instances.values()), "removed while a program uses it"
                self.observed = replace(now, maps=now.maps - {uid}, outgrown=now.outgrown - {uid})

    def settle(self, desired: Desired) -> list[list[Action]]:
        """Round by round until there is nothing more to do."""
        rounds: list[list[Action]] = []
        while actions := reconcile.reconcile(desired, self.observed):
            rounds.append(actions)
            assert len(rounds) <= MOST_ROUNDS, rounds
            for action in actions:
                self.do(action)
        return rounds


def subset(of: Sequence[T], bits: int) -> frozenset[T]:
    return frozenset(each for at, each in enumerate(of) if bits >> at & 1)


#: Sets are drawn as bits, policies' digests as indices: one small integer each, so that examples cost little.
_SOME_MAPS, _SOME_DIGESTS = st.integers(0, 2 ** len(MAPS) - 1), st.integers(0, 2 ** len(DIGESTS) - 1)
_EACH_POLICY = st.tuples(*[st.integers(0, len(DIGESTS) + 1)] * len(POLICIES))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Desired, Node]:
    """Any push, any node, anything broken."""
    # What a program needs is part of its digest: it is the same wherever the digest is named.
    needs = {
        digest: subset(MAPS, bits)
        for digest, bits in zip(DIGESTS, draw(st.tuples(*[_SOME_MAPS] * len(DIGESTS))), strict=True)
    }
    wishes: dict[PolicyUid, Wanted] = {}
    for policy, choice in zip(POLICIES, draw(_EACH_POLICY), strict=True):
        if choice < len(DIGESTS):
            wishes[policy] = Wanted(DIGESTS[choice], needs[DIGESTS[choice]])
        elif choice == len(DIGESTS):
            wishes[policy] = Wanted(None)
    running = subset(DIGESTS, draw(_SOME_DIGESTS))
    bindings = {
        policy: DIGESTS[choice]
        for policy, choice in zip(POLICIES, draw(_EACH_POLICY), strict=True)
        if choice < len(DIGESTS) and DIGESTS[choice] in running
    }
    maps = subset(MAPS, draw(_SOME_MAPS)).union(*(needs[digest] for digest in running))
    observed = Observed(
        instances={digest: needs[digest] for digest in running},
        bindings=bindings,
        maps=maps,
        outgrown=maps & subset(MAPS, draw(_SOME_MAPS)),
        failed=subset(DIGESTS, draw(_SOME_DIGESTS)) - running,
        failed_maps=subset(MAPS, draw(_SOME_MAPS)),
    )
    broken: frozenset[str] = subset(DIGESTS, draw(_SOME_DIGESTS)) | subset(MAPS, draw(_SOME_MAPS))
    return Desired(wishes, subset(MAPS, draw(_SOME_MAPS))), Node(observed, needs, broken)


@given(situations())
def test_any_node_comes_to_rest_whatever_fails(situation: tuple[Desired, Node]) -> None:
    desired, node = situation
    node.settle(desired)
    assert reconcile.reconcile(desired, node.observed) == []


@given(situations())
def test_at_rest_every_policy_reads_what_it_wants_or_what_it_had(situation: tuple[Desired, Node]) -> None:
    desired, node = situation
    before = dict(node.observed.bindings)
    node.settle(desired)
    after = node.observed
    for policy, wish in desired.policies.items():
        if wish.digest in after.instances:
            assert after.bindings[policy] == wish.digest
        else:
            assert after.bindings.get(policy) == before.get(policy)
    assert set(after.bindings) <= set(desired.policies)


@given(situations())
def test_at_rest_nothing_runs_that_nobody_asked_for_and_what_is_read_still_runs(
    situation: tuple[Desired, Node],
) -> None:
    desired, node = situation
    node.settle(desired)
    after = node.observed
    wanted = {wish.digest for wish in desired.policies.values()}
    assert set(after.bindings.values()) <= set(after.instances)
    assert set(after.instances) <= set(after.bindings.values()) | wanted
    used = {uid for uses in after.instances.values() for uid in uses}
    needed = {uid for wish in desired.policies.values() for uid in wish.maps}
    assert used <= after.maps
    # Nobody knows the maps of a policy that is to be kept and is bound to nothing: then none goes.
    blind = any(wish.digest is None and policy not in after.bindings for policy, wish in desired.policies.items())
    assert after.maps <= used | needed or blind


@given(situations())
def test_no_round_removes_what_is_bound_or_wanted(situation: tuple[Desired, Node]) -> None:
    desired, node = situation
    bound = {digest for policy, digest in node.observed.bindings.items() if policy in desired.policies}
    for action in reconcile.reconcile(desired, node.observed):
        if isinstance(action, Remove):
            assert action.digest not in {wish.digest for wish in desired.policies.values()}
            kept_for = {p for p, d in node.observed.bindings.items() if d == action.digest and p in desired.policies}
            # Only where the policy has moved on, in this same round, to an instance that runs already.
            assert action.digest not in bound or all(
                desired.policies[p].digest in node.observed.instances for p in kept_for
            )
        if isinstance(action, RemoveMap):
            assert all(action.uid not in wish.maps for wish in desired.policies.values())
        if isinstance(action, Unbind):
            assert action.policy not in desired.policies


def test_a_map_stays_while_a_policy_is_kept_whose_instance_could_not_be_adopted() -> None:
    node = Node(Observed(maps=frozenset({SHARED})))
    assert node.settle(Desired({SLOW: Wanted(None)})) == []
    assert node.settle(Desired({})) == [[RemoveMap(SHARED)]]


def test_a_new_policy_is_loaded_then_bound() -> None:
    node = Node(Observed())
    assert node.settle(Desired({SLOW: Wanted(NEW)})) == [[Load(NEW)], [Bind(SLOW, NEW)]]


def test_a_changed_policy_reads_the_old_instance_until_the_new_one_runs() -> None:
    node = Node(Observed(instances={OLD: frozenset()}, bindings={SLOW: OLD}))
    assert node.settle(Desired({SLOW: Wanted(NEW)})) == [[Load(NEW)], [Bind(SLOW, NEW), Remove(OLD)]]


def test_a_load_that_fails_keeps_the_last_good_instance() -> None:
    node = Node(Observed(instances={OLD: frozenset()}, bindings={SLOW: OLD}), broken=frozenset({NEW}))
    assert node.settle(Desired({SLOW: Wanted(NEW)})) == [[Load(NEW)]]
    assert node.observed.bindings == {SLOW: OLD}
    assert OLD in node.observed.instances
    assert node.observed.failed == {NEW}


def test_a_policy_without_a_plan_keeps_what_it_has() -> None:
    node = Node(Observed(instances={OLD: frozenset()}, bindings={SLOW: OLD}))
    assert node.settle(Desired({SLOW: Wanted(None)})) == []


def test_a_map_grows_when_all_else_is_done() -> None:
    uses = frozenset({SHARED})
    node = Node(
        Observed(instances={OLD: uses}, bindings={SLOW: OLD}, maps=uses, outgrown=uses), needs={OLD: uses, NEW: uses}
    )
    wanted = Desired({SLOW: Wanted(NEW, uses)}, uses)
    assert node.settle(wanted) == [[Load(NEW)], [Bind(SLOW, NEW), Remove(OLD)], [GrowMap(SHARED)]]


def test_a_map_that_cannot_grow_is_not_tried_again_and_keeps_its_users() -> None:
    uses = frozenset({SHARED})
    node = Node(
        Observed(instances={OLD: uses}, bindings={SLOW: OLD}, maps=uses, outgrown=uses), broken=frozenset({SHARED})
    )
    assert node.settle(Desired({SLOW: Wanted(OLD, uses)}, uses)) == [[GrowMap(SHARED)]]
    assert node.observed.instances == {OLD: uses}


def test_an_instance_goes_with_the_last_policy_that_shares_it() -> None:
    node = Node(Observed(instances={OLD: frozenset()}, bindings={SLOW: OLD, FAST: OLD}))
    assert node.settle(Desired({FAST: Wanted(OLD)})) == [[Unbind(SLOW)]]
    assert node.settle(Desired({})) == [[Unbind(FAST), Remove(OLD)]]
    assert node.observed == Observed()


def test_two_policies_of_one_digest_load_it_once() -> None:
    node = Node(Observed())
    rounds = node.settle(Desired({SLOW: Wanted(NEW), FAST: Wanted(NEW)}))
    assert rounds == [[Load(NEW)], [Bind(SLOW, NEW), Bind(FAST, NEW)]] or rounds == [
        [Load(NEW)],
        [Bind(FAST, NEW), Bind(SLOW, NEW)],
    ]


def test_a_shared_map_is_made_before_its_users_and_goes_after_them() -> None:
    node = Node(Observed(), needs={NEW: frozenset({SHARED})})
    desired = Desired({SLOW: Wanted(NEW, frozenset({SHARED}))}, frozenset({SHARED}))
    assert node.settle(desired) == [[MakeMap(SHARED)], [Load(NEW)], [Bind(SLOW, NEW)]]
    assert node.settle(Desired({})) == [[Unbind(SLOW), Remove(NEW), RemoveMap(SHARED)]]


def test_a_program_whose_map_was_not_pushed_waits() -> None:
    node = Node(Observed(), needs={NEW: frozenset({SHARED})})
    assert node.settle(Desired({SLOW: Wanted(NEW, frozenset({SHARED}))})) == []


def test_a_program_whose_map_failed_is_tried_so_that_its_failure_has_a_reason() -> None:
    node = Node(Observed(), needs={NEW: frozenset({SHARED})}, broken=frozenset({SHARED}))
    desired = Desired({SLOW: Wanted(NEW, frozenset({SHARED}))}, frozenset({SHARED}))
    assert node.settle(desired) == [[MakeMap(SHARED)], [Load(NEW)]]
    assert node.observed.failed == {NEW}


def test_what_begins_is_not_begun_twice_and_ends_when_nobody_wants_it() -> None:
    begins = Observed(instances={OLD: frozenset()}, bindings={SLOW: OLD}, starting=frozenset({NEW}))
    assert reconcile.reconcile(Desired({SLOW: Wanted(NEW)}), begins) == []
    assert reconcile.reconcile(Desired({SLOW: Wanted(OLD)}), begins) == [Remove(NEW)]
