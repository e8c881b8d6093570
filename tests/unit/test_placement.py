"""Who runs what: waves, what is kept, and what no order of events may change."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_core import placement, values
from probefleet_wire.v1 import plan_pb2, stream_pb2

OLD, NEW = "0" * 32, "1" * 32
KERNEL = placement.KernelClass("6.12.1", "#1 SMP", "x86_64")
OTHER = placement.KernelClass("5.10.0", "#1 SMP", "x86_64")
State = stream_pb2.PolicyStatus
SECOND = 10**9


def policy(uid: str = "p1", **changes: Any) -> values.ProbePolicy:
    base = values.ProbePolicy(
        uid=values.PolicyUid(uid),
        namespace="shop",
        name=uid,
        generation=1,
        created_ns=1000 * SECOND,
        deleting=False,
        scope=values.Scope.NAMESPACE,
        program=values.CatalogProgram("syscount"),
    )
    return dataclasses.replace(base, **changes)


def plan(uid: str = "p1", digest: str = NEW, generation: int = 1, maps: tuple[str, ...] = ()) -> plan_pb2.Plan:
    return plan_pb2.Plan(
        policy_uid=uid,
        namespace="shop",
        name=uid,
        generation=generation,
        instance=plan_pb2.Instance(
            digest=digest, shared_maps=[plan_pb2.SharedMap(map="m", probe_map_uid=map_uid) for map_uid in maps]
        ),
    )


def candidate(
    found: values.ProbePolicy | None = None,
    made: plan_pb2.Plan | None = None,
    maps: tuple[plan_pb2.ProbeMap, ...] = (),
) -> placement.Candidate:
    found = found or policy()
    return placement.Candidate(found.uid, found.namespace, found.name, found, made, maps)


def said(uid: str, digest: str, state: State.State.ValueType, generation: int = 1) -> State:
    return State(
        policy_uid=uid, digest=digest, state=state, generation=generation, reason="VerifierRefused", message="m"
    )


def node(name: str, *statuses: State, **changes: Any) -> placement.Node:
    base = placement.Node(
        name=values.NodeName(name),
        labels={"pool": "web"},
        ready=True,
        connected=True,
        kernel=KERNEL,
        running={values.PolicyUid(each.policy_uid): each for each in statuses},
    )
    return dataclasses.replace(base, **changes)


def pod(uid: str, on: str, namespace: str = "shop", **labels: str) -> placement.Pod:
    return placement.Pod(values.PodUid(uid), namespace, labels, values.NodeName(on))


def place(
    candidates: list[placement.Candidate],
    nodes: list[placement.Node],
    pods: list[placement.Pod] | None = None,
    previous: dict[Any, placement.NodeState] | None = None,
    now_ns: int = 2000 * SECOND,
) -> placement.Placement:
    placed = placement.place(
        candidates=candidates, nodes=nodes, pods=pods or [], previous=previous or {}, now_ns=now_ns, complete=True
    )
    assert placed is not None
    return placed


def digests(placed: placement.Placement) -> dict[str, list[str]]:
    return {name: [each.instance.digest for each in state.plans] for name, state in placed.nodes.items()}


def running(digest: str, *names: str, generation: int = 1) -> list[placement.Node]:
    return [node(name, said("p1", digest, State.READY, generation)) for name in names]


def test_nothing_is_decided_from_incomplete_lists() -> None:
    assert (
        placement.place(
            candidates=[candidate(made=plan())],
            nodes=[node("a")],
            pods=[],
            previous={},
            now_ns=0,
            complete=False,
        )
        is None
    )


def test_the_first_node_of_a_kernel_class_goes_first() -> None:
    placed = place([candidate(made=plan())], [node("b"), node("a"), node("c", kernel=OTHER)])
    assert digests(placed) == {"a": [NEW], "b": [], "c": [NEW]}
    assert placed.desired["p1"] == {"a", "b", "c"}
    assert placed.waiting == {"p1": {"b"}}


def test_the_rest_follows_when_the_first_is_ready() -> None:
    placed = place([candidate(made=plan())], [node("a", said("p1", NEW, State.READY)), node("b"), node("c")])
    assert digests(placed) == {"a": [NEW], "b": [NEW], "c": [NEW]}
    assert placed.waiting == {} and placed.held == ()


def test_another_policys_proof_counts() -> None:
    nodes = [node("a"), node("b", said("p2", NEW, State.READY))]
    assert digests(place([candidate(made=plan())], nodes)) == {"a": [NEW], "b": [NEW]}


def test_a_failure_holds_the_class_and_is_listed() -> None:
    before = place([candidate(made=plan(digest=OLD))], running(OLD, "a", "b", "c")).nodes
    nodes = [
        node("a", said("p1", OLD, State.READY)),
        node("b", said("p1", OLD, State.FAILED, generation=2)),
        node("c", said("p1", OLD, State.READY)),
    ]
    placed = place([candidate(policy(generation=2), plan(generation=2))], nodes, previous=dict(before))
    assert digests(placed) == {"a": [OLD], "b": [NEW], "c": [OLD]}
    assert placed.held == (
        placement.Held(values.PolicyUid("p1"), KERNEL, values.NodeName("b"), "VerifierRefused", "m", 2),
    )
    assert placed.waiting == {}


def test_a_node_that_failed_as_well_is_not_held() -> None:
    """``a`` was away for a moment, so ``b`` was tried; now both are there and both have failed."""
    failed = [node(name, said("p1", "", State.FAILED)) for name in ("a", "b")]
    placed = place([candidate(made=plan())], [*failed, node("c")])
    assert digests(placed) == {"a": [NEW], "b": [NEW], "c": []}
    assert [(held.node, held.waiting) for held in placed.held] == [("a", 1)]


def test_where_all_have_failed_none_is_held() -> None:
    failed = [node(name, said("p1", "", State.FAILED)) for name in ("a", "b")]
    assert place([candidate(made=plan())], failed).held == ()


def test_over_budget_on_the_first_node_holds_the_class() -> None:
    nodes = [node("a", said("p1", NEW, State.DETACHED)), node("b")]
    placed = place([candidate(made=plan())], nodes)
    assert digests(placed) == {"a": [NEW], "b": []}
    assert [held.waiting for held in placed.held] == [1]


def test_a_failure_of_an_older_generation_does_not_hold() -> None:
    nodes = [node("a", said("p1", "", State.FAILED, generation=1)), node("b")]
    placed = place([candidate(policy(generation=2), plan(generation=2))], nodes)
    assert placed.held == () and placed.waiting == {"p1": {"b"}}


def test_a_class_of_one_that_failed_holds_nobody() -> None:
    placed = place([candidate(made=plan())], [node("a", said("p1", "", State.FAILED))])
    assert placed.held == () and placed.waiting == {}


def test_no_second_canary_while_the_first_tries() -> None:
    """Whatever node is added, the one that was given the plan stays the first."""
    first = place([candidate(made=plan())], [node("m"), node("n")])
    assert digests(first) == {"m": [NEW], "n": []}
    second = place([candidate(made=plan())], [node("a"), node("m"), node("n")], previous=dict(first.nodes))
    assert digests(second) == {"a": [], "m": [NEW], "n": []}


def test_two_policies_with_one_digest_have_one_canary() -> None:
    placed = place([candidate(made=plan()), candidate(policy("p2"), plan("p2"))], [node("a"), node("b")])
    assert digests(placed) == {"a": [NEW, NEW], "b": []}


def test_a_failure_under_one_policy_holds_the_others_of_the_same_digest() -> None:
    elsewhere = policy("p2", nodes=values.Selector((("pool", "db"),)))
    nodes = [node("a", said("p1", "", State.FAILED)), node("b", labels={"pool": "db"})]
    placed = place([candidate(made=plan()), candidate(elsewhere, plan("p2"))], nodes)
    assert digests(placed) == {"a": [NEW], "b": []}
    assert [(held.policy, held.node, held.waiting) for held in placed.held] == [("p1", "a", 1), ("p2", "a", 1)]


def test_new_outputs_of_a_running_digest_go_everywhere_at_once() -> None:
    nodes = running(NEW, "a", "b")
    placed = place([candidate(policy(generation=2), plan(generation=2))], nodes)
    assert [state.plans[0].generation for state in placed.nodes.values()] == [2, 2]


def test_nodes_keep_their_last_plan_until_the_new_one_is_proven() -> None:
    before = place([candidate(made=plan(digest=OLD))], running(OLD, "a", "b"))
    placed = place(
        [candidate(policy(generation=2), plan(generation=2))], running(OLD, "a", "b"), previous=dict(before.nodes)
    )
    assert digests(placed) == {"a": [NEW], "b": [OLD]}


def test_a_new_operator_tells_nodes_to_keep_what_it_does_not_know() -> None:
    placed = place([candidate(policy(generation=2), plan(generation=2))], running(OLD, "a", "b"))
    kept = placed.nodes[values.NodeName("b")].plans[0]
    assert kept.policy_uid == "p1" and not kept.HasField("instance") and kept.generation == 1
    assert placed.nodes[values.NodeName("b")].selections[0].policy_uid == "p1"


def test_a_policy_without_a_plan_keeps_running_where_it_runs() -> None:
    before = place([candidate(made=plan(digest=OLD))], running(OLD, "a"))
    nodes = [*running(OLD, "a"), node("b")]
    assert digests(place([candidate()], nodes, previous=dict(before.nodes))) == {"a": [OLD], "b": []}
    assert digests(place([candidate()], nodes)) == {"a": [""], "b": []}


def test_an_unreadable_policy_keeps_running() -> None:
    unreadable = placement.Candidate(values.PolicyUid("p1"), "shop", "p1", None, None)
    placed = place([unreadable], running(OLD, "a"), [pod("u1", "a"), pod("u2", "a", namespace="other")])
    assert digests(placed) == {"a": [""]}
    assert list(placed.nodes[values.NodeName("a")].selections[0].pod_uids) == ["u1"]


@pytest.mark.parametrize(
    "change",
    [{"deleting": True}, {"suspend": True}, {"ttl_ms": 1000 * 1000}],
    ids=["deleted", "suspended", "expired"],
)
def test_what_is_not_wanted_is_removed(change: dict[str, Any]) -> None:
    placed = place([candidate(policy(**change), plan())], running(NEW, "a"))
    assert digests(placed) == {"a": []} and placed.desired == {}


def test_the_next_expiry_is_told() -> None:
    long, short = policy("p1", ttl_ms=2000_000), policy("p2", ttl_ms=1001_000)
    placed = place([candidate(long, plan()), candidate(short, plan("p2"))], [])
    assert placed.next_expiry_ns == 2001 * SECOND
    assert place([candidate(made=plan())], []).next_expiry_ns is None


@pytest.mark.parametrize(
    "change", [{"ready": False}, {"connected": False}, {"running": None}], ids=["not ready", "away", "silent"]
)
def test_nodes_that_cannot_be_told_are_left_alone_and_counted(change: dict[str, Any]) -> None:
    placed = place([candidate(made=plan())], [dataclasses.replace(node("a"), **change), node("b")])
    assert set(placed.nodes) == {"b"}
    assert placed.desired["p1"] == {"a", "b"}


def test_nodes_are_selected_by_labels() -> None:
    only = policy(nodes=values.Selector((("pool", "db"),)))
    placed = place([candidate(only, plan())], [node("a"), node("b", labels={"pool": "db"})])
    assert digests(placed) == {"a": [], "b": [NEW]}
    assert placed.desired["p1"] == {"b"}


PODS = [
    pod("u1", "a", app="web"),
    pod("u2", "a", app="db"),
    pod("u3", "a", namespace="other", app="web"),
    pod("u4", "b", app="web"),
]


NOT_DB = values.Selector(
    match_expressions=(
        values.Requirement("app", values.Operator.EXISTS),
        values.Requirement("app", values.Operator.NOT_IN, ("db", "cache")),
    )
)


@pytest.mark.parametrize(
    ("scope", "pods", "everything", "selected", "words"),
    [
        ("Namespace", None, False, ["u1", "u2"], "Namespace: everything"),
        ("Namespace", values.Selector((("app", "web"),)), False, ["u1"], "Namespace: app=web"),
        ("Cluster", values.Selector((("app", "web"),)), False, ["u1", "u3"], "Cluster: app=web"),
        ("Cluster", NOT_DB, False, ["u1", "u3"], "Cluster: app Exists; app NotIn db,cache"),
        ("Cluster", values.Selector(), False, ["u1", "u2", "u3"], "Cluster: "),
        ("Cluster", None, True, [], "Cluster: everything"),
    ],
)
def test_whose_events_count(
    scope: str, pods: values.Selector | None, everything: bool, selected: list[str], words: str
) -> None:
    placed = place([candidate(policy(scope=values.Scope(scope), pods=pods), plan())], [node("a")], PODS)
    selection = placed.nodes[values.NodeName("a")].selections[0]
    assert (selection.everything, list(selection.pod_uids)) == (everything, selected)
    assert selection.selector == words


def test_probe_maps_follow_the_plans() -> None:
    old_map, new_map = plan_pb2.ProbeMap(uid="m1", sha256="a"), plan_pb2.ProbeMap(uid="m2", sha256="b")
    shared = candidate(made=plan(digest=OLD, maps=("m1",)), maps=(old_map,))
    before = place([shared], running(OLD, "a", "b"))
    assert [each.uid for each in before.nodes[values.NodeName("b")].probe_maps] == ["m1"]
    changed = candidate(policy(generation=2), plan(generation=2, maps=("m2",)), (new_map,))
    after = place([changed], running(OLD, "a", "b"), previous=dict(before.nodes))
    assert [each.uid for each in after.nodes[values.NodeName("a")].probe_maps] == ["m2"]
    assert [each.uid for each in after.nodes[values.NodeName("b")].probe_maps] == ["m1"], "the last plan's map"


# What holds for every cluster.

NODE_NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
POLICY_UIDS = st.sampled_from(["p1", "p2", "p3"])
STATUSES = st.builds(
    said,
    POLICY_UIDS,
    st.sampled_from([OLD, NEW, ""]),
    st.sampled_from([State.PENDING, State.READY, State.FAILED, State.DETACHED]),
    st.integers(1, 2),
)
NODES = st.builds(
    lambda name, statuses, kernel, ready, connected, silent: node(
        name, *statuses, kernel=kernel, ready=ready, connected=connected, **({"running": None} if silent else {})
    ),
    NODE_NAMES,
    st.lists(STATUSES, max_size=3),
    st.sampled_from([KERNEL, OTHER]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
CANDIDATES = st.builds(
    lambda uid, digest, generation, change: candidate(
        policy(uid, generation=generation, **change), plan(uid, digest, generation) if digest else None
    ),
    POLICY_UIDS,
    st.sampled_from([OLD, NEW, None]),
    st.integers(1, 2),
    st.sampled_from([{}, {"suspend": True}, {"deleting": True}, {"ttl_ms": 1}, {"scope": values.Scope.CLUSTER}]),
)
WORLDS = st.tuples(
    st.lists(CANDIDATES, max_size=3, unique_by=lambda each: each.uid),
    st.lists(NODES, max_size=5, unique_by=lambda each: each.name),
    st.lists(
        st.builds(pod, st.sampled_from(["u1", "u2", "u3"]), NODE_NAMES), max_size=3, unique_by=lambda each: each.uid
    ),
)


@given(WORLDS, st.randoms(use_true_random=False))
def test_the_order_of_inputs_makes_no_difference(world: Any, shuffler: random.Random) -> None:
    candidates, nodes, pods = world
    first = place(candidates, nodes, pods)
    for items in (candidates, nodes, pods):
        shuffler.shuffle(items)
    assert place(candidates, nodes, pods) == first


@given(WORLDS, CANDIDATES)
def test_a_wanted_policy_is_never_taken_from_a_node(world: Any, changed: placement.Candidate) -> None:
    """Whatever a push says, what a reachable, selected node ran of a wanted policy is in it, or told to be kept."""
    candidates, nodes, pods = world
    before = place(candidates, nodes, pods)
    after = place([changed], nodes, pods, previous=dict(before.nodes))
    assert changed.policy is not None
    if not placement.is_wanted(changed.policy, 2000 * SECOND):
        assert all(not state.plans for state in after.nodes.values())
        return
    for each in nodes:
        state = after.nodes.get(each.name)
        had = each.running and changed.uid in each.running and each.running[changed.uid].digest
        if state is not None and had:
            assert [found.policy_uid for found in state.plans] == [changed.uid]


@given(WORLDS)
def test_an_unproven_digest_has_one_node_a_class(world: Any) -> None:
    """No two waves at once: a new instance is on at most one node of a kernel class, those that run it aside."""
    candidates, nodes, pods = world
    placed = place(candidates, nodes, pods)
    proven = {
        (status.digest, each.kernel)
        for each in nodes
        if each.name in placed.nodes
        for status in (each.running or {}).values()
        if status.state == State.READY
    }
    tried: dict[Any, set[str]] = {}
    for each in nodes:
        for found in placed.nodes.get(each.name, placement.NodeState()).plans:
            status = (each.running or {}).get(values.PolicyUid(found.policy_uid))
            has_it = status is not None and status.digest == found.instance.digest
            if found.HasField("instance") and not has_it and (found.instance.digest, each.kernel) not in proven:
                tried.setdefault((found.instance.digest, each.kernel), set()).add(each.name)
    assert all(len(names) == 1 for names in tried.values())


@given(WORLDS)
def test_only_reachable_nodes_are_told_and_each_plan_has_its_selection(world: Any) -> None:
    candidates, nodes, pods = world
    placed = place(candidates, nodes, pods)
    reachable = {each.name for each in nodes if each.ready and each.connected and each.running is not None}
    assert set(placed.nodes) == reachable
    for state in placed.nodes.values():
        uids = [each.policy_uid for each in state.plans]
        assert uids == sorted(set(uids))
        assert [each.policy_uid for each in state.selections] == uids


@given(WORLDS)
def test_a_rollout_ends_everywhere(world: Any) -> None:
    """When each node does what it is told, every selected, reachable node runs the new plan after a few rounds."""
    candidates, nodes, pods = world
    candidates = [each for each in candidates if each.plan is not None]
    nodes = [dataclasses.replace(each, running=each.running and {}) for each in nodes]
    previous: dict[Any, placement.NodeState] = {}
    for _ in range(4):
        placed = place(candidates, nodes, pods, previous)
        previous |= placed.nodes
        nodes = [
            dataclasses.replace(
                each,
                running={
                    values.PolicyUid(found.policy_uid): said(
                        found.policy_uid, found.instance.digest, State.READY, found.generation
                    )
                    for found in placed.nodes[each.name].plans
                },
            )
            if each.name in placed.nodes
            else each
            for each in nodes
        ]
    assert not placed.waiting and not placed.held
    for each in candidates:
        for name in placed.desired.get(each.uid, frozenset()) & placed.nodes.keys():
            assert each.plan in placed.nodes[name].plans
