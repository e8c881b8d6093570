"""Who runs what: policies, nodes, pods and what the nodes said in; each node's whole desired state out. Pure.

The operator calls ``place`` whenever one of its inputs changed, numbers the result per node and pushes what differs
from the last push. Order of inputs makes no difference. Three rules keep programs from being removed by mistake, since
a push is a node's *whole* desired state:

1. From incomplete lists nothing is decided: ``place`` returns None until ``complete``.
2. A node that is away, not ready, or has not yet said what it runs is left out of ``Placement.nodes``: it keeps what it
   has.
3. Where a policy is still wanted but its new plan is not (yet) for this node, the node keeps the plan it had. Where
   that plan is not known any more (the operator is new), the push says so by a Plan without an ``instance``: "keep
   what you have of this policy".

A new digest goes to one node of each kernel class first (the canary) and to the rest of the class when that node is
READY. Where it FAILED the class is held and listed, and nodes keep their last plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from probefleet_wire.v1 import plan_pb2, stream_pb2

from probefleet_core import values


@dataclass(frozen=True, slots=True, order=True)
class KernelClass:
    """Nodes on which the verifier and the attach points are the same."""

    release: str
    build: str
    machine: str


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the API server lists it, joined with its session."""

    name: values.NodeName
    labels: Mapping[str, str]
    ready: bool  #: condition Ready is True
    connected: bool  #: an agent's session is open
    kernel: KernelClass | None = None  #: from its Hello, the last one where it is away
    #: From its last Status of this session, by policy uid. None: it has not said yet what it runs. A Hello with
    #: applied_term 0 and applied_version 0 says as well that nothing runs: then it is empty.
    running: Mapping[values.PolicyUid, stream_pb2.PolicyStatus] | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that is bound to a node, in whatever phase; gone ones as long as the inventory remembers them."""

    uid: values.PodUid
    namespace: str
    labels: Mapping[str, str]
    node: values.NodeName


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy and its plan. ``plan`` None: it cannot be carried out (now); what runs of it keeps running."""

    uid: values.PolicyUid
    namespace: str
    name: str
    policy: values.ProbePolicy | None  #: None: not even readable; nodes keep what they have
    plan: plan_pb2.Plan | None
    probe_maps: tuple[plan_pb2.ProbeMap, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node's whole desired state: a Push without numbers and blobs. All sorted by uid."""

    plans: tuple[plan_pb2.Plan, ...] = ()
    probe_maps: tuple[plan_pb2.ProbeMap, ...] = ()
    selections: tuple[stream_pb2.Selection, ...] = ()


@dataclass(frozen=True, slots=True)
class Held:
    """A kernel class that does not get a plan, because its first node could not run it."""

    policy: values.PolicyUid
    kernel: KernelClass
    node: values.NodeName  #: where it was tried
    reason: str
    message: str
    waiting: int  #: nodes of the class that are held


@dataclass(frozen=True, slots=True)
class Placement:
    """The answer of ``place``."""

    nodes: Mapping[values.NodeName, NodeState]  #: only nodes that may be pushed to now
    #: What coverage and status count: all nodes that a wanted policy selects, reachable or not.
    desired: Mapping[values.PolicyUid, frozenset[values.NodeName]]
    waiting: Mapping[values.PolicyUid, frozenset[values.NodeName]]  #: selected, but the canary is not through yet
    held: tuple[Held, ...]
    #: When a ttl runs out next, wall clock ns: call ``place`` again then. None: never.
    next_expiry_ns: int | None


def place(
    *,
    candidates: Iterable[Candidate],
    nodes: Iterable[Node],
    pods: Iterable[Pod],
    previous: Mapping[values.NodeName, NodeState],
    now_ns: int,
    complete: bool,
) -> Placement | None:
    """Decide every node's desired state; None while ``complete`` is False.

    ``previous`` is what was last pushed (``Placement.nodes`` of earlier calls, newest per node); empty after a restart.
    ``now_ns`` is wall clock, for ttl. ``complete`` says that policies, ProbeMaps, nodes and pods have all been listed.
    """
    if not complete:
        return None
    all_nodes = sorted(nodes, key=lambda node: node.name)
    by_uid = sorted(candidates, key=lambda candidate: candidate.uid)
    wanted = [each for each in by_uid if each.policy is None or is_wanted(each.policy, now_ns)]
    expiries = [end for each in wanted if each.policy and (end := expires_ns(each.policy)) is not None]
    board = _Board(all_nodes, previous)
    for candidate in wanted:
        board.decide(candidate)
    return Placement(
        nodes=board.states(wanted, pods),
        desired=board.desired,
        waiting={uid: frozenset(names) for uid, names in board.waiting.items() if names},
        held=tuple(sorted(board.held, key=lambda held: (held.policy, held.kernel))),
        next_expiry_ns=min(expiries, default=None),
    )


def expires_ns(policy: values.ProbePolicy) -> int | None:
    """Wall clock time at which the policy's ttl is over; None where it has none."""
    return policy.created_ns + policy.ttl_ms * 1_000_000 if policy.ttl_ms else None


def is_wanted(policy: values.ProbePolicy, now_ns: int) -> bool:
    """Whether the policy should run at all: not being deleted, not suspended, its ttl not over."""
    end = expires_ns(policy)
    return not policy.deleting and not policy.suspend and (end is None or now_ns < end)


class _Board:
    """What is decided so far: plans by node, filled policy by policy."""

    def __init__(self, nodes: list[Node], previous: Mapping[values.NodeName, NodeState]) -> None:
        self._nodes = nodes
        # To these can be pushed now. A kernel class is known of each: its Hello said it.
        self._reachable = [node for node in nodes if node.connected and node.ready and node.running is not None]
        self._previous_plans = {
            (name, values.PolicyUid(plan.policy_uid)): plan
            for name, state in previous.items()
            for plan in state.plans
            if plan.HasField("instance")
        }
        self._previous_maps = {name: {each.uid: each for each in state.probe_maps} for name, state in previous.items()}
        self._plans: dict[values.NodeName, list[plan_pb2.Plan]] = {node.name: [] for node in self._reachable}
        self._proven = self._ready_digests()
        #: Where an unproven digest is tried in a class, and by which plan.
        self._trials: dict[tuple[str, KernelClass], tuple[Node, plan_pb2.Plan]] = {}
        self.desired: dict[values.PolicyUid, frozenset[values.NodeName]] = {}
        self.waiting: dict[values.PolicyUid, list[values.NodeName]] = {}
        self.held: list[Held] = []

    def decide(self, candidate: Candidate) -> None:
        """Give each reachable node that the policy selects its new plan, its last one, or the word to keep."""
        policy, plan = candidate.policy, candidate.plan
        if policy is None:
            # What it selects cannot be read: whoever has it keeps it.
            self.desired[candidate.uid] = frozenset()
            for node in self._reachable:
                self._keep(node, candidate)
            return
        selected = [node for node in self._nodes if policy.nodes.matches(node.labels)]
        self.desired[candidate.uid] = frozenset(node.name for node in selected)
        here = [node for node in selected if node.name in self._plans]
        if plan is None:
            for node in here:
                self._keep(node, candidate)
            return
        classes: dict[KernelClass | None, list[Node]] = {}
        for node in here:
            classes.setdefault(node.kernel, []).append(node)
        for kernel, members in classes.items():
            self._decide_class(candidate, plan, kernel, members)

    def _decide_class(
        self, candidate: Candidate, plan: plan_pb2.Plan, kernel: KernelClass | None, members: list[Node]
    ) -> None:
        digest = plan.instance.digest
        if kernel is not None and (digest, kernel) not in self._proven:
            # Another policy may try the same digest on this class already; its node serves for both where it can.
            trial = self._trials.setdefault((digest, kernel), (self._canary(members, plan), plan))
            first = trial[0].name
        else:
            first = None
        others = []
        for node in members:
            # Nodes that run this digest already only learn of new outputs and intervals. One that could not run it (it
            # was first while another was away) has tried it, and is not held.
            tried_here = self._tried(node, candidate.uid, plan) is not None
            if first is None or node.name == first or tried_here or self._runs(node, candidate.uid) == digest:
                self._plans[node.name].append(plan)
            else:
                others.append(node)
                self._keep(node, candidate)
        if kernel is None or first is None or not others:
            return
        node, tried = self._trials[digest, kernel]
        status = self._tried(node, values.PolicyUid(tried.policy_uid), tried)
        if status is None:
            self.waiting.setdefault(candidate.uid, []).extend(each.name for each in others)
        else:
            self.held.append(Held(candidate.uid, kernel, first, status.reason, status.message, len(others)))

    def _canary(self, members: list[Node], plan: plan_pb2.Plan) -> Node:
        """The class's first node: one that tried the plan already, else one that has it, else the first by name."""
        uid = values.PolicyUid(plan.policy_uid)

        def rank(node: Node) -> tuple[int, str]:
            if self._tried(node, uid, plan) is not None:
                return 0, node.name
            last = self._previous_plans.get((node.name, uid))
            has = last is not None and last.instance.digest == plan.instance.digest
            return 1 if has else 2, node.name

        return min(members, key=rank)

    def _ready_digests(self) -> frozenset[tuple[str, KernelClass]]:
        """Which digests run on which kernel classes, on whatever node of any policy."""
        return frozenset(
            (status.digest, node.kernel)
            for node in self._reachable
            if node.kernel is not None and node.running
            for status in node.running.values()
            if status.state == stream_pb2.PolicyStatus.READY
        )

    @staticmethod
    def _tried(node: Node, uid: values.PolicyUid, plan: plan_pb2.Plan) -> stream_pb2.PolicyStatus | None:
        """The node's word that this plan does not run there: it failed, or it cost more than its budget."""
        status = (node.running or {}).get(uid)
        if status is None or status.generation != plan.generation:
            return None
        failed = status.state == stream_pb2.PolicyStatus.FAILED and status.digest != plan.instance.digest
        detached = status.state == stream_pb2.PolicyStatus.DETACHED and status.digest == plan.instance.digest
        return status if failed or detached else None

    @staticmethod
    def _runs(node: Node, uid: values.PolicyUid) -> str:
        status = (node.running or {}).get(uid)
        return status.digest if status else ""

    def _keep(self, node: Node, candidate: Candidate) -> None:
        """The plan that the node was last given; else, where it runs something of this policy, the word to keep it."""
        last = self._previous_plans.get((node.name, candidate.uid))
        if last is None and self._runs(node, candidate.uid):
            last = plan_pb2.Plan(
                policy_uid=candidate.uid,
                namespace=candidate.namespace,
                name=candidate.name,
                generation=(node.running or {})[candidate.uid].generation,
            )
        if last is not None:
            self._plans[node.name].append(last)

    # Selections and ProbeMaps follow from the plans.

    def states(self, wanted: list[Candidate], pods: Iterable[Pod]) -> dict[values.NodeName, NodeState]:
        """Every reachable node's state."""
        new_maps = {each.uid: each for candidate in wanted for each in candidate.probe_maps}
        chosen = {each.uid: (each.policy, _selector(each.policy)) for each in wanted}
        by_node: dict[values.NodeName, list[Pod]] = {}
        for pod in sorted(pods, key=lambda pod: pod.uid):
            by_node.setdefault(pod.node, []).append(pod)
        return {
            name: NodeState(
                plans=tuple(plans),
                probe_maps=self._maps(name, plans, new_maps),
                selections=tuple(self._selection(plan, chosen, by_node.get(name, [])) for plan in plans),
            )
            for name, plans in self._plans.items()
        }

    def _maps(
        self, name: values.NodeName, plans: list[plan_pb2.Plan], new_maps: Mapping[str, plan_pb2.ProbeMap]
    ) -> tuple[plan_pb2.ProbeMap, ...]:
        known = self._previous_maps.get(name, {}) | dict(new_maps)
        uids = {shared.probe_map_uid for plan in plans for shared in plan.instance.shared_maps}
        return tuple(known[uid] for uid in sorted(uids) if uid in known)

    @staticmethod
    def _selection(
        plan: plan_pb2.Plan,
        chosen: Mapping[values.PolicyUid, tuple[values.ProbePolicy | None, str]],
        pods: list[Pod],
    ) -> stream_pb2.Selection:
        policy, selector = chosen[values.PolicyUid(plan.policy_uid)]
        selects = _pod_test(policy, plan)
        return stream_pb2.Selection(
            policy_uid=plan.policy_uid,
            everything=selects is None,
            pod_uids=[pod.uid for pod in pods if selects is not None and selects(pod)],
            selector=selector,
        )


def _selector(policy: values.ProbePolicy | None) -> str:
    """Another text when the policy may select others than before; empty of one that cannot be read any more."""
    if policy is None:
        return ""
    return f"{policy.scope.value}: {'everything' if policy.pods is None else policy.pods}"


def _pod_test(policy: values.ProbePolicy | None, plan: plan_pb2.Plan) -> Callable[[Pod], bool] | None:
    """Whose events the policy wants; None: everyone's, the host's too."""
    if policy is None:
        # Not readable any more: the narrower of what it can have been.
        return lambda pod: pod.namespace == plan.namespace
    labels = policy.pods or values.Selector()
    if policy.scope is values.Scope.NAMESPACE:
        return lambda pod: pod.namespace == policy.namespace and labels.matches(pod.labels)
    if policy.pods is None:
        return None
    return lambda pod: labels.matches(pod.labels)
