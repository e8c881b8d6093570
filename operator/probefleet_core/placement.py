"""Who runs what: policies, nodes, pods and what the nodes said in; each node's whole desired state out. Pure.

The operator calls ``place`` whenever one of its inputs changed, numbers the result per node and pushes what differs from
the last push. Order of inputs makes no difference. Three rules keep programs from being removed by mistake, since a
push is a node's *whole* desired state:

1. From incomplete lists nothing is decided: ``place`` returns None until ``complete``.
2. A node that is away, not ready, or has not yet said what it runs is left out of ``Placement.nodes``: it keeps what it
   has.
3. Where a policy is still wanted but its new plan is not (yet) for this node, the node keeps the plan it had. Where that
   plan is not known any more (the operator is new), the push says so by a Plan without an ``instance``: "keep what you
   have of this policy".

A new digest goes to one node of each kernel class first (the canary) and to the rest of the class when that node is
READY. Where it FAILED the class is held and listed, and nodes keep their last plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from probefleet_core import values
from probefleet_wire.v1 import plan_pb2, stream_pb2


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
    raise NotImplementedError


def expires_ns(policy: values.ProbePolicy) -> int | None:
    """Wall clock time at which the policy's ttl is over; None where it has none."""
    raise NotImplementedError


def is_wanted(policy: values.ProbePolicy, now_ns: int) -> bool:
    """Whether the policy should run at all: not being deleted, not suspended, its ttl not over."""
    raise NotImplementedError
