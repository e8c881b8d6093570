"""Which policy reads which instance: a reader an output, and the rings that several policies read.

The engine binds a policy when its instance runs, and again when its plan changes. ``batches`` asks the readers every
interval. A ring is given back to the kernel only as far as every policy's records of it are acknowledged, and how far
that is stands in ``marks`` before: a later process goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from probefleet_wire import map_types
from probefleet_wire.v1 import plan_pb2

from probefleet_agent import collect, iterating, joining, names, samples
from probefleet_agent.decode import DecodeError
from probefleet_agent.errors import ProbefleetError
from probefleet_agent.installed import Failure
from probefleet_agent.kernel import symbols
from probefleet_agent.kernel.rings import RingReader
from probefleet_agent.kernel.uapi import MapType
from probefleet_agent.loaded import ITERATOR, Loaded, MapHandle
from probefleet_agent.marks import Marks
from probefleet_agent.perf_ring import KeptRing, PerfRing, QueueRing
from probefleet_agent.pods import Book, PolicyUid
from probefleet_agent.reconcile import Digest


@dataclass(slots=True)
class Bound:
    """One policy with its readers."""

    plan: plan_pb2.Plan
    digest: Digest
    tables: dict[str, collect.TableReader] = field(default_factory=dict)
    events: dict[str, collect.EventReader] = field(default_factory=dict)
    due_ns: int = 0
    failure: Failure | None = None  # its outputs cannot be read, or its maps not be written
    unread: dict[str, Failure] = field(default_factory=dict)  # outputs that could not be read when they were due


class Bindings:
    """All policies of this node with their readers, and the rings that they read."""

    def __init__(self, book: Book, marks: Marks) -> None:
        self.bound: dict[PolicyUid, Bound] = {}
        self.lookups = names.MachineLookups()
        self._book = book
        self._marks = marks
        self._symbolizer = symbols.Symbolizer()
        self._rings: dict[tuple[Digest, str], RingReader | KeptRing] = {}
        self._shared: dict[int, RingReader | KeptRing] = {}  # by the ProbeMap's kernel id

    def bind(self, uid: PolicyUid, plan: plan_pb2.Plan, loaded: Loaded) -> None:
        """Make the policy's readers; one that reads a ring on goes on where it was."""
        before = self.bound.get(uid)
        bound = Bound(plan, Digest(loaded.digest))
        try:
            for output in plan.outputs:
                self._add_reader(bound, output, loaded, before)
        except (DecodeError, ProbefleetError) as error:
            bound.failure = Failure.of(error)
        self.bound[uid] = bound
        if before:
            self._drop_marks(uid, before, but={reader.epoch for reader in bound.events.values()})

    def unbind(self, uid: PolicyUid) -> Bound:
        """Forget a policy's readers; answers with what it was."""
        bound = self.bound.pop(uid)
        self._drop_marks(uid, bound, but=frozenset())
        return bound

    def forget_strangers(self) -> None:
        """A push has named everything: marks of what nobody reads went while no agent was there."""
        self._marks.keep_only(
            (uid, name, reader.epoch) for uid, bound in self.bound.items() for name, reader in bound.events.items()
        )

    def users(self, digest: Digest) -> list[PolicyUid]:
        """The policies that read an instance."""
        return [uid for uid, bound in self.bound.items() if bound.digest == digest]

    def budgets(self) -> dict[Digest, int]:
        """CPU budget of each instance in millicores: the largest of its policies', 0 where one has none."""
        budgets: dict[Digest, int] = {}
        for bound in self.bound.values():
            asked = bound.plan.budget.cpu_millicores
            known = budgets.get(bound.digest)
            budgets[bound.digest] = asked if known is None else 0 if 0 in (known, asked) else max(known, asked)
        return budgets

    def ring(self, digest: Digest, handle: MapHandle) -> RingReader | KeptRing:
        """The reader of an instance's ring, perf buffer or queue, opened where it is not yet.

        Of a map that instances share there is one reader: the kernel knows one consumer.
        """
        key = (digest, handle.name)
        if key not in self._rings:
            shared = self._shared.get(handle.info.id) if handle.probe_map_uid else None
            self._rings[key] = shared or handle.ring or _open_ring(handle)
            if handle.probe_map_uid:
                self._shared[handle.info.id] = self._rings[key]
        return self._rings[key]

    def maps_read(self, digest: Digest) -> set[str]:
        """The maps of an instance that outputs read as tables."""
        return {
            reader.output.map
            for bound in self.bound.values()
            if bound.digest == digest
            for reader in bound.tables.values()
        }

    def feed(self, loaded: Loaded) -> None:
        """Iterators have been read: their records are events for whoever reads them so."""
        for (digest, name), ring in self._rings.items():
            source = loaded.source(name) if digest == loaded.digest else None
            if isinstance(ring, iterating.IteratorRing) and source is not None:
                ring.feed(iterating.records(loaded, source))

    def acknowledge(self, marks: Mapping[samples.RingOf, samples.Mark]) -> None:
        """The operator has these rings' records up to these marks: their room goes back to the kernel."""
        for (uid, output, epoch), mark in marks.items():
            bound = self.bound.get(uid)
            reader = bound.events.get(output) if bound else None
            # What an instance sent that has been replaced since says nothing of the new one's ring, nor what was
            # counted by a selector that has been replaced.
            if reader is not None and reader.epoch == epoch and mark.position > reader.settled.position:
                reader.settled = mark
                self._marks.put((uid, output, epoch), mark)
        for ring in set(self._rings.values()):
            everyone = [
                reader.settled.position
                for bound in self.bound.values()
                for reader in bound.events.values()
                if self._rings.get((bound.digest, reader.output.map)) is ring
            ]
            if everyone and min(everyone) > ring.consumer_position():
                ring.commit(min(everyone))

    def restart_stream(self) -> None:
        """A new stream knows nothing: every key is due again, and every record that is not acknowledged."""
        for bound in self.bound.values():
            bound.due_ns = 0
            for reader in bound.tables.values():
                reader.rows.restart_stream()
            for events in bound.events.values():
                events.restart_stream()

    def forget(self, digest: Digest) -> None:
        """The instance goes: close its rings."""
        for key in [key for key in self._rings if key[0] == digest]:
            self._let_go(self._rings.pop(key))

    def close(self) -> None:
        """Let go of the rings; what was not acknowledged stays in them."""
        for ring in set(self._rings.values()):
            ring.close()
        self._rings, self._shared = {}, {}

    def _add_reader(self, bound: Bound, output: plan_pb2.Output, loaded: Loaded, before: Bound | None) -> None:
        handle = loaded.source(output.map)
        if handle is None:
            raise DecodeError(
                f"output {output.name}: no map {output.map!r}; there is: {', '.join(sorted(loaded.maps))}"
            )
        layout = loaded.layout(handle, output.record)
        if layout is None:
            raise DecodeError(f"output {output.name}: nothing describes the entries of map {output.map}")
        if collect.wants_events(output):
            self._add_event_reader(bound, output, loaded, before.events.get(output.name) if before else None)
            return
        earlier = before.tables.get(output.name) if before and before.digest == bound.digest else None
        if earlier is not None and self._is_of_another_selector(earlier):
            earlier = None  # it has judged keys by other pods
        joined = loaded.joined.get(bound.plan.policy_uid)
        baseline = joined.baselines.get((output.map, output.value)) if joined else None
        if output.kind == plan_pb2.Output.GAUGE or (baseline is not None and baseline.map_id != handle.info.id):
            baseline = None
        if earlier is not None and earlier.output == output and earlier.baseline is baseline:
            # The same rows go on: the plan differs in what is no output's business. But with each edit the operator
            # begins anew, and has to hear of all of them.
            if earlier.plan.generation != bound.plan.generation:
                earlier.rows.restart_stream()
            earlier.plan = bound.plan
            bound.tables[output.name] = earlier
            return
        stacks = None
        if output.kind == plan_pb2.Output.STACKS:
            traces = [each for each in loaded.maps.values() if each.info.type == MapType.STACK_TRACE]
            programs = frozenset(loaded.programs)
            fds = [each.fd for each in traces]
            stacks = names.StackReader(fds, self._symbolizer, self.lookups, programs) if traces else None
        # An iterator's records are read anew each time; what bpftrace prints, the agent itself adds up.
        listed = handle.info.type != ITERATOR and loaded.running is None
        bound.tables[output.name] = collect.TableReader(
            bound.plan, output, layout, self._book, self.lookups, stacks, handle.info.type == ITERATOR, baseline,
            joining.nature_of(handle, layout, output.value) if listed else None,
        )  # fmt: skip

    def _add_event_reader(
        self, bound: Bound, output: plan_pb2.Output, loaded: Loaded, earlier: collect.EventReader | None
    ) -> None:
        handle = loaded.source(output.map)
        assert handle is not None
        layout = loaded.layout(handle, output.record)
        assert layout is not None
        ring = self.ring(bound.digest, handle)
        joined = loaded.joined.get(bound.plan.policy_uid)
        epoch = f"{handle.epoch}{ring.incarnation if isinstance(ring, KeptRing) else ''}"
        if joined is not None:
            # A policy that left and came again counts from nothing once more.
            epoch += f":{joined.since_ns:x}"
        whose = (PolicyUid(bound.plan.policy_uid), output.name, epoch)
        if earlier is not None and earlier.epoch != epoch:
            earlier = None
        settled = earlier.settled if earlier else self._marks.get(whose) or _beginning(bound, loaded, ring)
        anew = earlier is not None and self._is_of_another_selector(earlier)
        if earlier is not None and anew:
            settled = samples.Mark(earlier.cursor, 0, 0)  # those before were other pods'
        reader = collect.EventReader(bound.plan, output, layout, self._book, self.lookups, settled, epoch)
        if earlier:
            reader.go_on(settled if anew else earlier.mark)
            reader.since_ns = time.time_ns() if anew else earlier.since_ns
            reader.selector = "" if anew else earlier.selector
            reader.lost_before, reader.dropped_before = earlier.lost_before, earlier.dropped_before
            reader.full_before = earlier.full_before
        elif joined is not None and isinstance(ring, KeptRing):
            reader.lost_before, reader.dropped_before = ring.lost, ring.dropped
        elif joined is not None and isinstance(ring, RingReader):
            reader.full_before = ring.full
        if isinstance(ring, RingReader):
            ring.expect(layout.value_bytes)
        self._marks.put(whose, settled)
        bound.events[output.name] = reader

    def _is_of_another_selector(self, earlier: collect.TableReader | collect.EventReader) -> bool:
        selector = self._book.selector(PolicyUid(earlier.plan.policy_uid))
        return bool(earlier.selector) and earlier.selector != selector

    def _let_go(self, ring: RingReader | KeptRing) -> None:
        if ring not in self._rings.values():
            ring.close()
            self._shared = {number: each for number, each in self._shared.items() if each is not ring}

    def _drop_marks(self, uid: PolicyUid, bound: Bound, *, but: Set[str]) -> None:
        for name, reader in bound.events.items():
            if reader.epoch not in but:
                self._marks.drop((uid, name, reader.epoch))


def _open_ring(handle: MapHandle) -> RingReader | KeptRing:
    if handle.info.type == ITERATOR:
        return iterating.IteratorRing()
    if handle.info.type == MapType.PERF_EVENT_ARRAY:
        return PerfRing(handle.fd)
    if handle.info.type in map_types.POPPED:
        return QueueRing(handle.fd, handle.info)
    return RingReader(handle.fd)


def _beginning(bound: Bound, loaded: Loaded, ring: RingReader | KeptRing) -> samples.Mark:
    """Where a policy begins to read a ring: what one in use held before the policy came is not its own."""
    if bound.plan.policy_uid in loaded.joined and bound.plan.policy_uid not in loaded.plans:
        return samples.Mark(ring.producer_position(), 0, 0)
    # A ring that was read, and nobody knows how far: its mark found no room.
    position = ring.consumer_position()
    return samples.Mark(position, None if position else 0, 0)
