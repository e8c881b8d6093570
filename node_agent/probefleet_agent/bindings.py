"""Which policy reads which instance: a reader an output, and the rings that several policies read.

The engine binds a policy when its instance runs, and again when its plan changes. ``batches`` asks the readers every
interval. A ring is given back to the kernel only as far as every policy's records of it are acknowledged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from probefleet_wire.v1 import plan_pb2

from probefleet_agent import collect, names
from probefleet_agent.decode import DecodeError
from probefleet_agent.errors import ProbefleetError
from probefleet_agent.execute import Loaded, MapHandle
from probefleet_agent.installed import Failure
from probefleet_agent.kernel import symbols
from probefleet_agent.kernel.rings import RingReader
from probefleet_agent.kernel.uapi import MapType
from probefleet_agent.perf_ring import PerfRing
from probefleet_agent.pods import Book, PolicyUid
from probefleet_agent.reconcile import Digest


@dataclass(slots=True)
class Bound:
    """One policy with its readers."""

    plan: plan_pb2.Plan
    digest: Digest
    tables: dict[str, collect.TableReader] = field(default_factory=dict)
    events: dict[str, collect.EventReader] = field(default_factory=dict)
    committed: dict[str, int] = field(default_factory=dict)  # output → position acknowledged
    begins: dict[str, int] = field(default_factory=dict)  # output → position of the first record that is this policy's
    due_ns: int = 0
    failure: Failure | None = None  # its outputs cannot be read


class Bindings:
    """All policies of this node with their readers, and the rings that they read."""

    def __init__(self, book: Book) -> None:
        self.bound: dict[PolicyUid, Bound] = {}
        self.lookups = names.MachineLookups()
        self._book = book
        self._symbolizer = symbols.Symbolizer()
        self._rings: dict[tuple[Digest, str], RingReader | PerfRing] = {}

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

    def ring(self, digest: Digest, handle: MapHandle) -> RingReader | PerfRing:
        """The reader of an instance's ring or perf buffer, opened where it is not yet."""
        key = (digest, handle.name)
        if key not in self._rings:
            perf = handle.info.type == MapType.PERF_EVENT_ARRAY
            self._rings[key] = PerfRing(handle.fd) if perf else RingReader(handle.fd)
        return self._rings[key]

    def acknowledge(self, positions: Mapping[tuple[PolicyUid, str], int]) -> None:
        """The operator has these outputs' records up to these positions: their room goes back to the kernel."""
        for (uid, output), position in positions.items():
            bound = self.bound.get(uid)
            if bound is not None and output in bound.events:
                bound.committed[output] = max(bound.committed.get(output, 0), position)
        for (digest, name), ring in self._rings.items():
            everyone = [
                bound.committed.get(output, ring.consumer_position())
                for bound in self.bound.values()
                for output, reader in bound.events.items()
                if bound.digest == digest and reader.output.map == name
            ]
            if everyone and min(everyone) > ring.consumer_position():
                ring.commit(min(everyone))

    def restart_stream(self, loaded: Mapping[Digest, Loaded]) -> None:
        """A new stream knows nothing: every key is due again, and every record that is not acknowledged."""
        for bound in self.bound.values():
            bound.due_ns = 0
            bound.committed.clear()
            for reader in bound.tables.values():
                reader.rows.restart_stream()
            for name, events in bound.events.items():
                ring = self.ring(bound.digest, loaded[bound.digest].maps[events.output.map])
                events.cursor = max(bound.begins.get(name, 0), ring.consumer_position())

    def forget(self, digest: Digest) -> None:
        """The instance goes: close its rings."""
        for key in [key for key in self._rings if key[0] == digest]:
            self._rings.pop(key).close()

    def close(self) -> None:
        """Let go of the rings; what was not acknowledged stays in them."""
        for ring in self._rings.values():
            ring.close()
        self._rings = {}

    def _add_reader(self, bound: Bound, output: plan_pb2.Output, loaded: Loaded, before: Bound | None) -> None:
        handle = loaded.maps.get(output.map)
        if handle is None:
            raise DecodeError(
                f"output {output.name}: no map {output.map!r}; there is: {', '.join(sorted(loaded.maps))}"
            )
        if handle.layout is None:
            raise DecodeError(f"output {output.name}: nothing describes the entries of map {output.map}")
        if collect.wants_events(output):
            ring = self.ring(bound.digest, handle)
            earlier = before.events.get(output.name) if before and before.digest == bound.digest else None
            bound.begins[output.name] = begins = _begins(bound, output.name, loaded, before, ring)
            cursor = earlier.cursor if earlier else max(begins, ring.consumer_position())
            bound.events[output.name] = collect.EventReader(
                bound.plan, output, handle.layout, self._book, self.lookups, cursor
            )
            return
        stacks = None
        if output.kind == plan_pb2.Output.STACKS:
            traces = [each for each in loaded.maps.values() if each.info.type == MapType.STACK_TRACE]
            stacks = names.StackReader(traces[0].fd, self._symbolizer, self.lookups) if traces else None
        bound.tables[output.name] = collect.TableReader(
            bound.plan, output, handle.layout, self._book, self.lookups, stacks
        )


def _begins(bound: Bound, output: str, loaded: Loaded, before: Bound | None, ring: RingReader | PerfRing) -> int:
    """From where on records are this policy's: what a ring in use held before the policy came is not."""
    if before and before.digest == bound.digest and output in before.begins:
        return before.begins[output]
    came_later = bound.plan.policy_uid not in loaded.plans and loaded.plans
    return ring.producer_position() if came_later else 0
