"""The reconciler: what is asked for and what is there, in; every node's desired state, out over the sessions.

Everything that changes (policies, ProbeMaps, nodes, pods, sessions, statuses, plans that got ready, a ttl that ran out)
only marks the state dirty. One loop then lets `placement.place` decide over the whole of it and hands each session what
differs from what it was last told. So the order of events makes no difference, and what is lost in between comes with
the next round.

Nothing is removed by mistake: `place` decides nothing before every list is complete, nodes that have not said what they
run are not pushed to, and a policy without a plan is pushed as "keep what you have".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import grpc
import structlog
from probefleet_core import endpoints, placement, values
from probefleet_wire.v1 import stream_pb2

from probefleet_operator import inventory, metrics, objects, planning, session

log = structlog.get_logger(__name__)

SETTLE_SECONDS = 0.05  # events of one `kubectl apply` come together
MAX_SHARE = 0.2  # of the loop's time that deciding may take: at 5,000 nodes rounds get rarer instead of the loop late
ENDPOINTS_SECONDS = 1.0  # nodes that share the map of endpoints hear of changes at most so often
FIRST_PLANS_SECONDS = 10.0  # after a start, wait so long for all plans before the first push

Names = Mapping[values.PolicyUid, frozenset[values.NodeName]]


class Controller:
    """Belongs to the main loop; `run` is one task."""

    def __init__(self, store: objects.ObjectStore, *, term: int) -> None:
        self.term = term
        self._store = store
        self._on_decided: Callable[[], None]
        self._dirty = asyncio.Event()
        self._sessions: dict[values.NodeName, session.Session] = {}
        self._hellos: dict[values.NodeName, stream_pb2.Hello] = {}  # the last of each node, for nodes that are away
        self._told: dict[values.NodeName, session.Desire] = {}  # what each open session was told
        self._previous: dict[values.NodeName, placement.NodeState] = {}
        self._began = time.monotonic()
        self._endpoints = 0  # the version that nodes are told of
        self._endpoints_due: asyncio.TimerHandle | None = None
        self.placement: placement.Placement | None = None
        self.decided = asyncio.Event()  # at least once, from complete lists
        self._inventory: inventory.Inventory
        self._planning: planning.Planning

    def connect(
        self, nodes_and_pods: inventory.Inventory, plans: planning.Planning, *, on_decided: Callable[[], None]
    ) -> None:
        """Once, before `run`: the parts that in turn call `mark`. `on_decided()` is called after every round."""
        self._inventory, self._planning, self._on_decided = nodes_and_pods, plans, on_decided

    def mark(self) -> None:
        """Something changed: decide again soon."""
        self._dirty.set()

    @property
    def complete(self) -> bool:
        """Policies, ProbeMaps, nodes and pods have all been listed to the end."""
        return self._store.complete and self._inventory.complete

    def most_cpus(self) -> int:
        """CPUs of the largest node, for estimates."""
        return max((hello.cpus for hello in self._hellos.values()), default=1) or 1

    def sessions(self) -> Mapping[values.NodeName, session.Session]:
        """Open sessions by node."""
        return self._sessions

    def hello(self, node: values.NodeName) -> stream_pb2.Hello | None:
        """The last Hello of a node, open session or not."""
        return self._hellos.get(node)

    def seen(self) -> frozenset[values.NodeName]:
        """Nodes of the cluster whose agent has been connected since this process began to lead."""
        return frozenset(self._hellos)

    def policies(self) -> int:
        """How many ProbePolicies there are, those included that run nowhere."""
        return len(self._store.all("ProbePolicy"))

    def desired(self) -> Names:
        """Which nodes each policy selects; empty before the first decision."""
        return self.placement.desired if self.placement else {}

    def runs(self, node: values.NodeName, policy: values.PolicyUid) -> bool:
        """Whether the node was told to run (or keep) the policy."""
        told = self._previous.get(node)
        return told is not None and any(plan.policy_uid == policy for plan in told.plans)

    def pushed_objects(self) -> set[str]:
        """Objects that nodes were last told to have."""
        found: set[str] = set()
        for state in self._previous.values():
            for plan in state.plans:
                found.update(session.needed_objects(plan))
            found.update(probe_map.sha256 for probe_map in state.probe_maps)
        return found

    # What sessions, nodes and pods do.

    def session_opened(self, opened: session.Session) -> None:
        """A node's agent is there."""
        self._sessions[opened.node] = opened
        self._hellos[opened.node] = opened.hello
        self._told.pop(opened.node, None)
        if opened.ahead:
            log.error("a node has applied a higher term", node=opened.node, applied=opened.applied_term, term=self.term)
        self.mark()

    def session_closed(self, closed: session.Session, _: str) -> None:
        """A node's agent has gone."""
        if self._sessions.get(closed.node) is closed:
            del self._sessions[closed.node]
            self._told.pop(closed.node, None)
            self.mark()

    def status_received(self, _: session.Session, __: stream_pb2.Status) -> None:
        """A node answered; the session has noted it."""
        self.mark()

    def node_changed(self, _: str) -> None:
        """A node came, went or changed."""
        self.mark()

    def pod_changed(self, pod: inventory.Pod, gone: bool) -> None:
        """A pod came, went or changed. An agent whose pod is deleted has nothing more to say."""
        node = values.NodeName(pod.node)
        here = self._sessions.get(node)
        if self._inventory.endpoints.version != self._endpoints and self._endpoints_due is None:
            self._endpoints_due = asyncio.get_running_loop().call_later(ENDPOINTS_SECONDS, self._tell_endpoints)
        if here is None:
            return
        if gone and here.identity.pod_uid == pod.uid:
            here.close(grpc.StatusCode.UNAUTHENTICATED, "the agent's pod has been deleted")
        self.mark()

    def _tell_endpoints(self) -> None:
        """Addresses of pods have changed: nodes that share the map hear of it."""
        self._endpoints_due = None
        self._endpoints = self._inventory.endpoints.version
        if any(_shares_endpoints(state) for state in self._previous.values()):
            self.mark()

    # Deciding.

    async def run(self) -> None:
        """Decide for ever."""
        while True:
            await self._wait()
            await asyncio.sleep(SETTLE_SECONDS)
            self._dirty.clear()
            began = time.monotonic()
            self._planning.refresh()
            self._decide()
            took = time.monotonic() - began
            metrics.RECONCILE_SECONDS.observe(took)
            await asyncio.sleep(took * (1 / MAX_SHARE - 1))

    async def _wait(self) -> None:
        """Until something changed or a ttl has run out."""
        if self.placement is None:
            seconds: float | None = 1.0
        else:
            expiry = self.placement.next_expiry_ns
            seconds = None if expiry is None else max(0.0, (expiry - time.time_ns()) / 1e9)
        try:
            async with asyncio.timeout(seconds):
                await self._dirty.wait()
        except TimeoutError:
            pass

    def _decide(self) -> None:
        complete = self.complete
        if complete and self.placement is None and not self._planning.idle:
            # Keeping is safe but costs a push a node; all plans in one push is what a restart should look like.
            complete = time.monotonic() - self._began > FIRST_PLANS_SECONDS
        decided = placement.place(
            candidates=self._planning.candidates(),
            nodes=[self._node(node) for node in self._inventory.nodes()],
            pods=self._inventory.pods(),
            previous=self._previous,
            now_ns=time.time_ns(),
            complete=complete,
        )
        if decided is None:
            return
        self.placement = decided
        self.decided.set()
        pushed = sum(self._tell(node, state) for node, state in decided.nodes.items())
        for gone in [node for node in self._previous if self._inventory.node(node) is None]:
            del self._previous[gone]
        # Not only of nodes that were told anything: an agent may say Hello once more when its Node object is gone.
        for gone in [node for node in self._hellos if self._inventory.node(node) is None]:
            del self._hellos[gone]
        if pushed:
            log.info(
                "decided",
                pushed=pushed,
                sessions=len(self._sessions),
                policies=len(decided.desired),
                held=len(decided.held),
                waiting=sum(len(nodes) for nodes in decided.waiting.values()),
            )
        metrics.NODES_AHEAD.set(sum(each.ahead for each in self._sessions.values()))
        self._on_decided()

    def _tell(self, node: values.NodeName, state: placement.NodeState) -> bool:
        """Have a node's state pushed, if it differs from what its session was told."""
        here = self._sessions.get(node)
        if here is None:
            return False
        known = tuple(sorted(pod.uid for pod in self._inventory.pods_of(node)))
        version = max(self._endpoints, 1) if _shares_endpoints(state) else 0
        desire = session.Desire(state, known, version)
        self._previous[node] = state
        if self._told.get(node) == desire:
            return False
        self._told[node] = desire
        here.desire(desire)
        return True

    def _node(self, node: inventory.Node) -> placement.Node:
        name = values.NodeName(node.name)
        here, hello = self._sessions.get(name), self._hellos.get(name)
        return placement.Node(
            name=name,
            labels=node.labels,
            ready=node.ready,
            connected=here is not None,
            kernel=session.kernel_class(hello) if hello else None,
            # One that would refuse a push gets none; nodes that have not said what they run do not either.
            running=here.running if here and not here.ahead else None,
        )


def _shares_endpoints(state: placement.NodeState) -> bool:
    return any(each.uid == endpoints.UID for each in state.probe_maps)


def expired(policy: values.ProbePolicy, now_ns: int) -> bool:
    """Whether its ttl is over: its programs are removed and its report is kept."""
    end = placement.expires_ns(policy)
    return end is not None and end <= now_ns
