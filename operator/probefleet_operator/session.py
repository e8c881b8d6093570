"""One agent's open session: what it said, what it is to be told, and the two slots through which it is told.

stream.py reads and writes the wire; controller.py sets `desire` and reads `running`. Nothing queues up for a slow
agent: a Push is the whole desired state and an Ack is cumulative, so one slot each suffices and a newer one replaces
the older.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import grpc
from probefleet_core import endpoints, placement, values
from probefleet_wire.v1 import plan_pb2, stream_pb2

from probefleet_operator import errors, identity

MAX_MESSAGE_BYTES = 16 << 20
# A Push stays well below the limit; blobs that do not fit come with the next one.
MAX_PUSH_BLOB_BYTES = 12 << 20
MAX_POLICIES = 2_000
MAX_REASON = 128
MAX_TEXT = 4_096

BlobOf = Callable[[str], bytes | None]
"""sha256 (hex) → the object as a zstd frame."""


@dataclass(frozen=True, slots=True)
class Desire:
    """What a node is to run, and the pods that it may take for known."""

    state: placement.NodeState
    known_pods: Sequence[str]
    endpoints: int = 0  #: the version that it is to hear of; 0: it does not share the map


@dataclass(frozen=True, slots=True)
class Closing:
    """Why a session is to end."""

    code: grpc.StatusCode
    reason: str


class Session:
    """The operator's side of one stream. Belongs to the main loop."""

    def __init__(
        self,
        hello: stream_pb2.Hello,
        who: identity.Identity,
        *,
        number: int,
        term: int,
        blob_of: BlobOf,
        addresses: endpoints.Endpoints | None = None,
    ) -> None:
        """`number` is larger than that of every session before."""
        self.number = number
        self.node = values.NodeName(hello.node)
        self.hello = hello
        self.identity = who
        self.opened_at = time.time()
        self.version = hello.applied_version if hello.applied_term == term else 0
        self.applied_term = hello.applied_term
        # An agent that never applied anything runs nothing; others say in their first Status what they run.
        self.running: Mapping[values.PolicyUid, stream_pb2.PolicyStatus] | None = (
            {} if hello.applied_term == 0 and hello.applied_version == 0 else None
        )
        self.probe_maps: Sequence[stream_pb2.MapStatus] = ()
        self.answered_version = 0
        self.last_batch_at: float = 0.0  # wall clock
        self.batches = 0  # the number of the last
        self.unheard: set[values.PolicyUid] = set()  # policies of which it said something that could not be taken in
        self.closing: asyncio.Future[Closing] = asyncio.get_running_loop().create_future()
        self._term = term
        self._blob_of = blob_of
        self._carried: set[str] = set()
        self._addresses = addresses
        self._heard = 0  # the version of the endpoints that was sent last
        self._desire: Desire | None = None
        self._ack: int | None = None
        self._wake = asyncio.Event()

    @property
    def ahead(self) -> bool:
        """Whether the node has applied a push of a higher term than ours: it refuses ours, so it gets none."""
        return self.applied_term > self._term

    def said_of(self, policy: values.PolicyUid) -> stream_pb2.PolicyStatus | None:
        """What the node says of a policy, or what we have to say of a node that cannot be told anything."""
        said = (self.running or {}).get(policy)
        if not self.ahead:
            return said
        return stream_pb2.PolicyStatus(
            policy_uid=policy,
            generation=said.generation if said else 0,
            digest=said.digest if said else "",
            state=stream_pb2.PolicyStatus.FAILED,
            reason="NewerOperator",
            message=(
                f"The node has applied a push of term {self.applied_term}; this operator's is {self._term}, so the "
                "node refuses its pushes and keeps what it runs. Either a second operator pushes to these agents: "
                "remove one. Or the Lease and the clock were set back: write a higher term into the Lease's annotation "
                "probefleet.io/term and restart the operator. Or the agent lies: look at its node."
            ),
        )

    def desire(self, desire: Desire) -> None:
        """Have this pushed, instead of whatever was not sent yet."""
        self._desire = desire
        self._wake.set()

    def expect(self, sequence: int) -> None:
        """A batch of this number comes. Raises StreamOutdated where one before it has not come, and never will."""
        if sequence > self.batches + 1:
            raise errors.StreamOutdated(
                f"begin a new stream: batch {sequence} came after {self.batches}, and those between are missing"
            )
        self.batches = max(self.batches, sequence)

    def acknowledge(self, sequence: int) -> None:
        """Have this batch and all before it acknowledged."""
        self._ack = sequence
        self._wake.set()

    def take_status(self, status: stream_pb2.Status) -> None:
        """Remember what the node runs; raises ProtocolViolation for more than a node can run."""
        if len(status.policies) > MAX_POLICIES or len(status.probe_maps) > MAX_POLICIES:
            raise errors.ProtocolViolation(f"a Status with more than {MAX_POLICIES} policies or maps")
        for each in status.policies:
            # Texts of thousands of nodes stay in memory: each as long as it will ever be shown.
            each.reason, each.message = each.reason[:MAX_REASON], each.message[:MAX_TEXT]
            each.log_tail = each.log_tail[-MAX_TEXT:]
        self.running = {values.PolicyUid(each.policy_uid): each for each in status.policies}
        self.probe_maps = tuple(status.probe_maps)
        self.applied_term = max(self.applied_term, status.term)
        if status.term == self._term:
            self.answered_version = max(self.answered_version, status.version)

    def close(self, code: grpc.StatusCode, reason: str) -> None:
        """End the session; the agent reads the reason."""
        if not self.closing.done():
            self.closing.set_result(Closing(code, reason))

    async def due(self) -> Literal["ack", "push"]:
        """What to write next, when there is anything. Acks go first, because agents hold memory until then."""
        while self._ack is None and self._desire is None:
            self._wake.clear()
            await self._wake.wait()
        return "push" if self._ack is None else "ack"

    def ack(self) -> stream_pb2.FromOperator:
        """The message, which was due."""
        assert self._ack is not None, "no ack was due"
        sequence, self._ack = self._ack, None
        return stream_pb2.FromOperator(ack=stream_pb2.Ack(sequence=sequence))

    def push(self) -> stream_pb2.FromOperator:
        """The message, which was due: what the node is to run by now."""
        assert self._desire is not None, "no push was due"
        push, complete = self._push(self._desire)
        if complete:
            self._desire = None
        return stream_pb2.FromOperator(push=push)

    def _push(self, desire: Desire) -> tuple[stream_pb2.Push, bool]:
        """The message, and whether it says everything: what finds no room is kept as it is and comes with the next."""
        self.version += 1
        push = stream_pb2.Push(
            term=self._term,
            version=self.version,
            selections=desire.state.selections,
            known_pod_uids=desire.known_pods,
        )
        room, complete = MAX_PUSH_BLOB_BYTES, True
        for plan in desire.state.plans:
            needed, fits = self._blobs_for(needed_objects(plan), room)
            if fits:
                room -= self._add(push, needed)
                push.plans.append(plan)
            else:
                complete = False
                push.plans.append(kept(plan))
        for probe_map in desire.state.probe_maps:
            needed, fits = self._blobs_for([probe_map.sha256], room)
            if not fits:
                complete = False
                continue
            room -= self._add(push, needed)
            push.probe_maps.append(probe_map)
        if self._addresses is not None and any(each.uid == endpoints.UID for each in push.probe_maps):
            if self._heard != self._addresses.version:
                push.endpoints.CopyFrom(self._addresses.since(self._heard))
                self._heard = self._addresses.version
        else:
            self._heard = 0
        # An agent keeps the objects of its newest push and no others: a policy that comes again brings its own again.
        self._carried &= {sha256 for plan in push.plans for sha256 in needed_objects(plan)} | {
            probe_map.sha256 for probe_map in push.probe_maps
        }
        return push, complete

    def _blobs_for(self, wanted: Iterator[str] | Sequence[str], room: int) -> tuple[list[stream_pb2.Blob], bool]:
        blobs = []
        for sha256 in wanted:
            if sha256 in self._carried:
                continue
            data = self._blob_of(sha256)
            if data is None:
                raise errors.OperatorError(f"the object {sha256} of a plan is not at hand: a bug in the operator")
            blobs.append(stream_pb2.Blob(sha256=sha256, zstd=data))
        size = sum(len(blob.zstd) for blob in blobs)
        # One object that is larger than the room of a whole push still goes, alone.
        return blobs, size <= room or room == MAX_PUSH_BLOB_BYTES

    def _add(self, push: stream_pb2.Push, blobs: Sequence[stream_pb2.Blob]) -> int:
        push.blobs.extend(blobs)
        self._carried.update(blob.sha256 for blob in blobs)
        return sum(len(blob.zstd) for blob in blobs)


def kernel_class(hello: stream_pb2.Hello) -> placement.KernelClass:
    """The class within which one node's verdict on a program holds for all."""
    return placement.KernelClass(hello.kernel_release, hello.kernel_build, hello.machine)


def needed_objects(plan: plan_pb2.Plan) -> Iterator[str]:
    """The sha256 of every object that a plan refers to."""
    if plan.instance.WhichOneof("program") == "object":
        yield plan.instance.object.sha256


def kept(plan: plan_pb2.Plan) -> plan_pb2.Plan:
    """A plan that says: keep what you have of this policy."""
    return plan_pb2.Plan(
        policy_uid=plan.policy_uid, namespace=plan.namespace, name=plan.name, generation=plan.generation
    )
