"""What the operator makes of batches: nothing that a node said is taken for heard, and was not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from probefleet_core import aggregate, values
from probefleet_operator import controller, errors, inventory, kube, planning, results
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.fakes.operator_parts import FakeInventory, open_session
from tests.fakes.samples import INTERVAL_MS, SECOND, START, UID, chunk, counter

POLICY = values.PolicyUid(UID)
PLAN = plan_pb2.Plan(policy_uid=UID, name="p", generation=1, interval_ms=INTERVAL_MS)
PLAN.outputs.append(counter(name="execs", kind=plan_pb2.Output.EVENTS))


class Parts:
    """Results with one policy, planned or not yet, on the nodes that select it."""

    def __init__(self) -> None:
        self.entry, self.nodes = SimpleNamespace(planned=None, policy=None), {"a"}
        self.streams: set[str] = set()
        self.inventory = FakeInventory()
        control = SimpleNamespace(desired=lambda: {POLICY: frozenset(self.nodes)}, sessions=lambda: self.streams)
        plans, unasked = SimpleNamespace(entries={POLICY: self.entry}), cast("Any", None)
        self.results = results.Results(
            cast("controller.Controller", control),
            cast("planning.Planning", plans),
            cast("inventory.Inventory", self.inventory),
            cast("kube.Recorder", unasked),
        )

    def plan(self) -> None:
        self.entry.planned = SimpleNamespace(plan=PLAN)
        self.results.refresh()

    def total(self) -> int:
        merged = self.results.aggregate_of(POLICY)
        assert merged is not None
        (output,) = merged.result(START + 20 * SECOND, selected_nodes={"a"}, names={}.get).outputs
        return output.total.whole


def batch(sequence: int, *chunks: stream_pb2.EventChunk) -> stream_pb2.Batch:
    return stream_pb2.Batch(sequence=sequence, time_ns=START + 10 * SECOND, events=chunks)


@pytest.mark.parametrize("why", ["not planned", "not selected"])
async def test_what_was_said_before_it_could_be_taken_in_is_said_again(why: str) -> None:
    parts = Parts()
    if why == "not planned":
        later = parts.plan
    else:
        parts.plan()
        parts.nodes.clear()
        later = lambda: parts.nodes.add("a")  # noqa: E731
    first, said = open_session("a", number=1), chunk([0, 48], start_position=0, counted_before=0)
    parts.results.batch_received(first, batch(1, said), 0)
    later()
    assert parts.total() == 0
    quiet = batch(2)
    quiet.instances.add(policy_uids=[UID])
    with pytest.raises(errors.StreamOutdated, match="begin a new stream"):
        parts.results.batch_received(first, quiet, 0)
    parts.results.batch_received(open_session("a", number=2), batch(1, said), 0)
    assert parts.total() == 2


async def test_a_node_is_folded_when_it_is_gone_and_has_had_no_stream_for_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts, now, folded = Parts(), [1000.0], list[str]()
    monkeypatch.setattr(results.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(aggregate.Aggregate, "fold", lambda _, node: folded.append(node))

    def later(seconds: float) -> list[str]:
        now[0] += seconds
        parts.results.refresh()
        return folded

    parts.inventory.add("gone", "back", "talks", "away")
    parts.plan()
    parts.streams = {"talks"}
    for name in ("gone", "back", "talks"):
        del parts.inventory.found[name]
    assert later(1) == later(results.FOLD_SECONDS - 1) == []
    parts.inventory.add("back")
    assert later(2) == ["gone"]
    parts.streams = set()
    assert later(results.FOLD_SECONDS - 1) == ["gone"], "it had a stream until now"
    assert later(2) == ["gone", "talks"]
    assert later(10 * results.FOLD_SECONDS) == ["gone", "talks"], "a node without a stream is none that has left"
    assert not parts.results._left
