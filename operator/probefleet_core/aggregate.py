"""One policy's samples of all nodes become one result. Pure: times come in as arguments.

The operator's stream hands every batch to the aggregates of the policies that it speaks of, from one thread;
on a change of the policy it calls ``update``; every interval the reporter asks for a ``Result``. On a single
machine ``probefleet run`` does the same inside its own process.

Exactness: a node's newest stream counts, and in it each batch once, so repeats and late ones change nothing.
Values are cumulative within an epoch; what an epoch counted before it ended stays. State is bounded whatever
a node sends (see ``tables`` and ``keys``), and a batch that breaks the rules raises ``ColumnsError``: close
that node's stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace
from typing import Final

from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2

from probefleet_core import costs, departed, earlier, events, tables
from probefleet_core.result import Coverage, Names, NodeGap, OutputResult, PodName, PolicyFacts, Result
from probefleet_core.tables import ResyncNeeded

__all__ = ["Aggregate", "PodName", "PolicyFacts", "Result", "ResyncNeeded"]

STALE_INTERVALS: Final = 3
#: A window that is longer than this is no interval any more.
LATE_INTERVALS: Final = 1.5
MAX_NODES_NAMED: Final = 20
#: Records in a result; a report shows fewer.
RESULT_RECORDS: Final = 50
NOTHING_EARLIER: Final = earlier.Earlier()


class Aggregate:
    """Everything that is known of one policy's samples."""

    __slots__ = (
        "_base",
        "_began_ns",
        "_costs",
        "_earlier",
        "_events",
        "_generation",
        "_seen",
        "_sessions",
        "_tables",
        "facts",
    )

    def __init__(self, facts: PolicyFacts, before: earlier.Earlier = NOTHING_EARLIER) -> None:
        """``before``: what the operator before this one alone knew of the policy."""
        self.facts = facts
        self._earlier = before
        self._generation = facts.generation
        self._sessions: dict[str, tuple[int, int]] = {}  # node → (session, newest sequence)
        self._begin()

    def _begin(self) -> None:
        interval = self.facts.interval_ms
        outputs = self.facts.outputs
        events_kind = plan_pb2.Output.EVENTS
        self._tables = {o.name: tables.TableState(o, interval_ms=interval) for o in outputs if o.kind != events_kind}
        self._events = {o.name: events.EventState(o, interval_ms=interval) for o in outputs if o.kind == events_kind}
        self._base = 0  # the number of the first record of each output
        self._costs = costs.Costs()
        self._began_ns = 0  # when the first sample of this generation came
        self._seen: dict[str, int] = {}  # node → when its newest sample of this generation came

    def update(self, facts: PolicyFacts) -> None:
        """The policy has changed: a newer generation starts afresh, the same one only learns new facts."""
        self.facts = facts
        if facts.generation > self._generation:
            self._generation = facts.generation
            self._begin()

    def apply(self, node: str, session: int, batch: stream_pb2.Batch, received_ns: int) -> bool:
        """Merge what the batch says of this policy; False for one that was merged before, or is of an older
        stream.

        ``session`` is the number that the operator gave the stream: a later stream of a node has a larger
        one. Raises ColumnsError (the node sent what cannot be) and ResyncNeeded (the node has to begin a new
        stream).
        """
        newest = self._sessions.get(node, (-1, -1))
        if (session, batch.sequence) <= newest:
            return False
        uid = self.facts.uid
        sampled: set[str] = set()
        if not self._base:
            self._base = max(received_ns // 1000, 1)  # more than a record a microsecond does not come
            for each in self._events.values():
                each.base = self._base
        for table in batch.tables:
            if table.policy_uid == uid and self._current(table.generation):
                table_state = self._tables.get(table.output)
                if table_state is None:
                    raise columns.ColumnsError(f"policy {self.facts.name}: no output {table.output[:64]!r} of rows")
                table_state.apply(node, session, table, time_ns=batch.time_ns, received_ns=received_ns)
                sampled.add(table.output)
        for chunk in batch.events:
            if chunk.policy_uid == uid and self._current(chunk.generation):
                event_state = self._events.get(chunk.output)
                if event_state is None:
                    raise columns.ColumnsError(f"policy {self.facts.name}: no output {chunk.output[:64]!r} of events")
                event_state.apply(node, session, chunk, time_ns=batch.time_ns, received_ns=received_ns)
                sampled.add(chunk.output)
        runs = self._apply_cost(node, batch)
        self._sessions[node] = (session, batch.sequence)
        # One that sent no sample of this generation yet may run the one before, whose samples are not counted.
        if sampled or (runs and (node in self._seen or not self.facts.outputs)):
            self._seen[node] = max(received_ns, self._seen.get(node, 0))
            self._began_ns = self._began_ns or received_ns
            for name, state in self._states():
                if name not in sampled:
                    state.touch(node, time_ns=batch.time_ns, received_ns=received_ns)
        return True

    def forget(self, node: str) -> None:
        """The node has left the cluster: its counts stay in the totals; its cost, its sample and its gauges do not.

        Should it come back in the same epoch before it is folded, its rows take the place of those that it left.
        """
        self._seen.pop(node, None)
        for state in self._tables.values():
            state.forget(node)

    def fold(self, node: str) -> None:
        """The node was forgotten and has no stream: nothing but its counts is kept. No result is another for it.

        Should it come back in the same epoch, its first sample is where its counts go on from, and a gap says so;
        records, losses and skipped runs are cumulative numbers, which go on without one.
        """
        self.forget(node)
        self._sessions.pop(node, None)
        self._costs.fold(node)
        for _, state in self._states():
            state.fold(node)

    def events_since(self, output: str, cursor: int, *, names: Names, limit: int = events.MOST_KEPT) -> events.Page:
        """Records of an events output from ``cursor`` on (0: all that are kept). Raises KeyError for another output."""
        return self._events[output].since(cursor, names, limit=limit)

    @property
    def foreign(self) -> int:
        """Rows that nodes sent of pods which are on other nodes; known once a result was asked for."""
        return sum(state.foreign for _, state in self._states())

    @property
    def event_outputs(self) -> tuple[str, ...]:
        """The outputs that ``events_since`` knows."""
        return tuple(self._events)

    def result(self, now_ns: int, *, selected_nodes: Set[str], names: Names) -> Result:
        """The merged result at ``now_ns``; ``selected_nodes`` are all that should run the policy, failed ones too."""
        oldest_ns = now_ns - STALE_INTERVALS * self.facts.interval_ms * 1_000_000
        # As coverage counts them: what ran it until just now is in no window, nor in its cost.
        fresh = [node for node, seen_ns in self._seen.items() if seen_ns >= oldest_ns and node in selected_nodes]
        outputs = tuple(self._output(output.name, fresh, selected_nodes, names) for output in self.facts.outputs)
        cost = self._costs.result(fresh)
        coverage = self._coverage(selected_nodes, set(fresh))
        counting = [o for o in outputs if o.output.kind != plan_pb2.Output.GAUGE]
        since = [output.since_ns for output in outputs if output.since_ns]
        return Result(
            facts=self.facts,
            time_ns=now_ns,
            since_ns=min(since, default=0),
            outputs=outputs,
            coverage=coverage,
            settled=not coverage.missing_count or 0 < self._began_ns < oldest_ns,
            # A sum of some nodes' runs would be no rate of the fleet.
            rate_per_second=(cost.runs_known and cost.runs_per_second)
            or (counting[0].rate_per_second if counting else 0.0),
            lost=self._lost(),
            uncounted=tuple(sorted({text for output in outputs for text in output.uncounted})[: tables.MAX_UNCOUNTED]),
            gaps=self._gaps(),
            cost=cost,
            window_seconds=self._window_seconds(fresh),
        )

    def _states(self) -> Iterable[tuple[str, tables.TableState | events.EventState]]:
        yield from self._tables.items()
        yield from self._events.items()

    def _current(self, generation: int) -> bool:
        """Is a sample of this generation counted? No plan but ours makes a newer one: a node's word starts nothing."""
        return generation == self._generation

    def _apply_cost(self, node: str, batch: stream_pb2.Batch) -> bool:
        """Costs of the instance; True where it says that the node runs this very plan."""
        runs = False
        for stat in batch.instances:
            if self.facts.uid in stat.policy_uids:
                self._costs.apply(node, self.facts.uid, stat, batch)
                runs = runs or stat.digest == self.facts.digest
        return runs

    def _output(self, name: str, fresh: Iterable[str], selected: Set[str], names: Names) -> OutputResult:
        state: tables.TableState | events.EventState
        if name in self._events:
            state = self._events[name]
            found = state.result(names, fresh=fresh, records=RESULT_RECORDS)
        else:
            state = self._tables[name]
            found = state.result(names, fresh=fresh, qualified=self.facts.cluster)
        known = self._earlier.generation == self._generation
        forgotten = self._earlier.forgotten.get(name, 0) if known else 0
        uncounted = (earlier.words(name, forgotten), *found.uncounted) if forgotten else found.uncounted
        return replace(found, retired=state.retired(selected), forgotten=forgotten, uncounted=uncounted)

    def _lost(self) -> int:
        # Every output of a program carries what the program counts: the largest is the policy's, not the sum. What one
        # ring lost, or its reader dropped, all outputs of that ring have.
        tables, records = self._tables.values(), self._events.values()
        rings: dict[str, int] = {}
        for state in records:
            rings[state.map] = max(state.lost_by_ring, rings.get(state.map, 0))
        return (
            max((*(state.lost for state in tables), *(state.lost_before_ring for state in records)), default=0)
            + max((state.lost_by_program for state in records), default=0)
            + sum(rings.values())
            + self._costs.missed
        )

    def _window_seconds(self, fresh: Iterable[str]) -> float:
        """An interval; where a node was away for longer, the longest of the windows that stand in the result."""
        found = [
            state.nodes[node].window.seconds for _, state in self._states() for node in fresh if node in state.nodes
        ]
        interval, longest = self.facts.interval_ms / 1000, round(max(found, default=0.0))
        return longest if longest > LATE_INTERVALS * interval else interval

    def _coverage(self, selected: Set[str], fresh: Set[str]) -> Coverage:
        missing = sorted(node for node in selected if node not in self._seen)
        stale = sorted(node for node in selected if node in self._seen and node not in fresh)
        return Coverage(
            sampled=len(selected & fresh),
            selected=len(selected),
            missing=tuple(missing[:MAX_NODES_NAMED]),
            missing_count=len(missing),
            stale=tuple(stale[:MAX_NODES_NAMED]),
            stale_count=len(stale),
        )

    def _gaps(self) -> tuple[NodeGap, ...]:
        # One that has not ended yet ends, for each output, when that was read last.
        told = ((node, gap) for _, states in self._states() for node, gaps in states.gaps() for gap in gaps)
        return tuple(NodeGap(node, *gap) for node, gap in departed.newest_gaps(told))
