"""What comes back from the nodes: the gRPC server's listener, and one aggregate for each policy.

Session news and statuses go on to the controller; batches are merged here, in the main loop, before the next message of
that stream is read. documents.py is told which policy has news and reads `result`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType

import structlog
from probefleet_core import aggregate, earlier, endpoints, values
from probefleet_wire import columns
from probefleet_wire.v1 import stream_pb2

from probefleet_operator import controller, errors, inventory, kube, metrics, planning, session, status

log = structlog.get_logger(__name__)

#: A node that is gone keeps its rows for so long after its last stream: one that was taken out of the cluster while it
#: was cut off registers again, and goes on without a gap. An agent tries at least every half minute.
FOLD_SECONDS = 300.0


class Results:
    """Belongs to the main loop."""

    def __init__(
        self,
        control: controller.Controller,
        plans: planning.Planning,
        names: inventory.Inventory,
        recorder: kube.Recorder,
        before: Mapping[str, earlier.Earlier] = MappingProxyType({}),
    ) -> None:
        """``before``: policy uid → what the operator before this one alone knew."""
        self._earlier = before
        self._control, self._plans, self._names, self._recorder = control, plans, names, recorder
        self._aggregates: dict[values.PolicyUid, aggregate.Aggregate] = {}
        self._known_nodes: set[values.NodeName] = set()
        self._left: dict[values.NodeName, float] = {}  # nodes that are gone → since when without a stream (monotonic)
        self._compiled: dict[values.NodeName, tuple[int, int]] = {}  # hits and misses of the agents that are connected
        self._news = asyncio.Event()
        # Set by documents.py: a policy's samples, or what nodes say of it, have changed.
        self.on_samples: Callable[[values.PolicyUid], None] = _nobody
        self.on_status: Callable[[values.PolicyUid], None] = _nobody

    # What sessions say.

    def session_opened(self, opened: session.Session) -> None:
        """A node's agent is there."""
        self._control.session_opened(opened)

    def session_closed(self, closed: session.Session, reason: str) -> None:
        """A node's agent has gone; what it measured stays."""
        if self._compiled.pop(closed.node, None):
            self._count_compiled()
        self._control.session_closed(closed, reason)

    def status_received(self, sender: session.Session, said: stream_pb2.Status) -> None:
        """A node says what it runs."""
        self._control.status_received(sender, said)
        for each in said.policies:
            entry = self._plans.entries.get(values.PolicyUid(each.policy_uid))
            if entry is None:
                continue
            self.on_status(entry.uid)
            if each.state in status.BROKEN:
                self._recorder.warn(
                    entry.raw,
                    each.reason or "ProgramFailed",
                    f"node {sender.node} ({sender.hello.kernel_release}): {each.message}",
                    action="Program",
                )

    def batch_received(self, sender: session.Session, batch: stream_pb2.Batch, _: int) -> None:
        """Merge samples; raises ProtocolViolation or StreamOutdated."""
        received_ns = time.time_ns()
        sender.last_batch_at = received_ns / 1e9
        desired = self._control.desired()
        for uid in spoken_of(batch):
            merged = self._aggregates.get(uid)
            if merged is None or sender.node not in desired.get(uid, ()):
                metrics.TABLES_IGNORED.inc()
                if uid in self._plans.entries:
                    sender.unheard.add(uid)
                continue
            if uid in sender.unheard:
                # Its rows and records are on that node's account for told: the next stream says all of it again.
                raise errors.StreamOutdated(
                    "begin a new stream: a policy was not planned yet when this one spoke of it"
                )
            try:
                merged.apply(sender.node, sender.number, batch, received_ns)
            except columns.ColumnsError as problem:
                raise errors.ProtocolViolation(f"batch {batch.sequence}: {problem}") from None
            except aggregate.ResyncNeeded as problem:
                raise errors.StreamOutdated(f"begin a new stream: {problem}") from None
            self.on_samples(uid)
        metrics.BATCHES.inc()
        compiled = batch.compile_hits, batch.compile_misses
        if any(compiled) and compiled != self._compiled.get(sender.node):
            self._compiled[sender.node] = compiled
            self._count_compiled()
        self._news.set()

    async def wait_news(self, seconds: float) -> None:
        """Return when a batch came, or after that time."""
        self._news.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            pass

    # What others read.

    def refresh(self) -> None:
        """After every round of the controller: aggregates follow plans, and nodes that have left are forgotten."""
        entries = self._plans.entries
        for uid in self._aggregates.keys() - entries.keys():
            del self._aggregates[uid]
        for uid, entry in entries.items():
            if entry.planned is None:
                continue
            facts = aggregate.PolicyFacts.of(entry.planned.plan)
            if known := self._aggregates.get(uid):
                # To suspend is an edit as well, and keeps what was counted.
                if entry.policy is None or not entry.policy.suspend:
                    known.update(facts)
            else:
                self._aggregates[uid] = aggregate.Aggregate(facts, self._earlier.get(uid, aggregate.NOTHING_EARLIER))
        nodes = {values.NodeName(node.name) for node in self._names.nodes()}
        for left in self._known_nodes - nodes:
            for merged in self._aggregates.values():
                merged.forget(left)
        self._fold(self._known_nodes - nodes, nodes)
        self._known_nodes = nodes

    def _fold(self, leaving: Set[values.NodeName], nodes: Set[values.NodeName]) -> None:
        """Nodes that are gone from a whole list and silent for long are kept as sums only."""
        now, streams = time.monotonic(), self._control.sessions()
        self._left |= dict.fromkeys(leaving, now)
        for node, since in list(self._left.items()):
            if node in nodes:
                del self._left[node]
            elif node in streams:
                self._left[node] = now
            elif now - since >= FOLD_SECONDS:
                del self._left[node]
                for merged in self._aggregates.values():
                    merged.fold(node)

    def _count_compiled(self) -> None:
        for index, result in enumerate(("hit", "miss")):
            metrics.AGENT_COMPILE_CACHE.labels(result).set(sum(each[index] for each in self._compiled.values()))

    def aggregate_of(self, uid: values.PolicyUid) -> aggregate.Aggregate | None:
        """The aggregate of a policy; None where it never had a plan."""
        return self._aggregates.get(uid)

    def result(self, uid: values.PolicyUid) -> aggregate.Result | None:
        """The merged result of now; None where the policy never had a plan."""
        merged = self._aggregates.get(uid)
        if merged is None:
            return None
        selected = self._control.desired().get(uid, frozenset())
        result = merged.result(time.time_ns(), selected_nodes=selected, names=self.name_of)
        metrics.FOREIGN_ROWS.set(sum(each.foreign for each in self._aggregates.values()))
        return result

    def is_told_by_earlier(self, result: aggregate.Result) -> bool:
        """Nobody is left to tell more than the report of an operator before this one does: no node runs the policy."""
        uid = values.PolicyUid(result.facts.uid)
        return not result.since_ns and uid in self._earlier and not self._control.desired().get(uid)

    def name_of(self, pod_uid: str) -> aggregate.PodName | None:
        """What a pod is called and whose it is; None for one that nobody has heard of in the last hour."""
        if pod_uid.startswith(endpoints.MARK):
            # Not a pod's uid, but what stands for it in programs that ask whose an address is.
            digits = pod_uid.removeprefix(endpoints.MARK)
            pod_uid = self._names.endpoints.pod(int(digits, 16)) or "" if len(digits) == 16 else ""
        pod = self._names.pod(pod_uid)
        if pod is None or not pod.node:
            return None  # not bound to a node, as far as we have heard: nobody can have counted for it
        owner = self._names.workload(pod)
        return aggregate.PodName(
            namespace=pod.namespace,
            name=pod.name,
            workload_kind=owner.kind,
            workload=owner.name,
            containers=self._names.containers(pod),
            nodes=self._names.nodes_of(pod),
        )


def spoken_of(batch: stream_pb2.Batch) -> set[values.PolicyUid]:
    """The policies that a batch has anything about."""
    named = [table.policy_uid for table in batch.tables] + [chunk.policy_uid for chunk in batch.events]
    named += [uid for instance in batch.instances for uid in instance.policy_uids]
    return {values.PolicyUid(uid) for uid in named}


def _nobody(_: values.PolicyUid) -> None:
    """Nobody listens yet."""
