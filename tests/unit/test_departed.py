"""Nodes that have left for good: no result is another for it, and none is counted twice that comes back."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probefleet_core import departed, keys, result, tables
from probefleet_core.aggregate import Aggregate, Result
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.fakes.samples import PODS, SECOND, START, UID, FakeNode, chunk, counter, facts

O = plan_pb2.Output  # noqa: E741
OUTPUTS = (counter("pod"), counter("node", name="by_node"), counter("pod", name="held", kind=O.GAUGE))


def plain(value: Any) -> Any:
    """Values that compare as a whole: arrays as lists, results as dicts."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def ask(aggregate: Aggregate, at_seconds: float, *nodes: str) -> Result:
    return aggregate.result(int(START + at_seconds * SECOND), selected_nodes=frozenset(nodes), names=PODS.get)


def rows(aggregate: Aggregate, at_seconds: float = 0, output: int = 0) -> dict[result.Labels, int]:
    total = ask(aggregate, at_seconds).outputs[output].total
    return {label: int(weight) for label, weight in zip(total.labels, total.weights, strict=True)}


def send(aggregate: Aggregate, node: FakeNode, at: float, **more: Any) -> None:
    batch = node.batch(at, **more)
    assert aggregate.apply(node.name, node.session, batch, batch.time_ns)


def fleet_sample(node: FakeNode, at: int, draw: st.DrawFn) -> stream_pb2.Batch:
    """One batch of all outputs, with every number that a node can tell."""
    numbers = st.integers(0, 5)
    batch = node.batch(at, lost=node.lost_so_far)
    (first,) = batch.tables
    first.uncounted.extend([f"{node.name} lost what nobody counts"] * draw(st.integers(0, 1)))
    for index in range(draw(st.integers(0, 3))):
        first.gaps.add(start_ns=START + index * SECOND, end_ns=START + at * SECOND, why=f"gap {index}")
    for output in OUTPUTS[1:]:
        other = batch.tables.add()
        other.CopyFrom(first)
        other.output = output.name
        if output.name == "by_node":
            del other.keys[:]
    node.lost_so_far += draw(numbers)
    node.records += draw(numbers)
    said = chunk(
        [at * 1000 + 48 * each for each in range(draw(numbers))], epoch=node.epoch, counted_before=node.records
    )
    said.start_position = at * 1000
    said.end_position = said.end_position or at * 1000
    said.submitted, said.lost, said.dropped = node.records + 7, node.lost_so_far, draw(numbers)
    batch.events.append(said)
    stat = batch.instances.add(
        digest="d1", policy_uids=[UID], epoch=node.epoch, runs=at * 100, stats_time_ns=at * SECOND
    )
    stat.recursion_misses = node.lost_so_far
    return batch


class Node(FakeNode):
    lost_so_far = 3
    records = 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_folding_makes_no_difference_to_any_result(data: st.DataObject) -> None:
    policy = facts(*OUTPUTS, counter(name="execs", kind=O.EVENTS))
    policy = replace(policy, digest="d1")
    kept, folded = Aggregate(policy), Aggregate(policy)
    names = [f"n{index}" for index in range(data.draw(st.integers(1, 6)))]
    here = {name: Node(name) for name in names}
    gone: list[str] = []
    for step in range(1, data.draw(st.integers(2, 8))):
        for node in here.values():
            happening = data.draw(st.sampled_from(["count", "count", "count", "restart", "reboot"]))
            if happening == "restart":
                node.restart_stream(node.session + 1)
            elif happening == "reboot":
                node.reboot(node.session + 1, f"boot-{step}:1", START + step * 10 * SECOND)
                node.lost_so_far = node.records = 0
            for _ in range(data.draw(st.integers(0, 3))):
                node.add(data.draw(st.sampled_from(sorted(PODS))), count=data.draw(st.integers(1, 1000)))
            batch = fleet_sample(node, step * 10, data.draw)
            for each in (kept, folded):
                assert each.apply(node.name, node.session, batch, batch.time_ns)
        for name in data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
            if here.pop(name, None):
                gone.append(name)
                kept.forget(name)
                folded.forget(name)
        for merged in (kept, folded):
            for each in ask(merged, step * 10).outputs:  # of no node that is here
                assert each.retired == (0 if each.output.kind == O.GAUGE else each.total.whole)
        for name in data.draw(st.permutations(gone)):
            if data.draw(st.booleans()):
                folded.fold(name)
        for at in (step * 10, step * 10 + 35):
            assert plain(ask(folded, at, *here)) == plain(ask(kept, at, *here))


def test_histograms_and_stacks_stay_in_the_sum() -> None:
    outputs = counter("pod", kind=O.HISTOGRAM), counter("pod", name="stacks", kind=O.STACKS)
    aggregate = Aggregate(facts(*outputs))
    slots, stacks = FakeNode("a"), FakeNode("a", keys=("pod_uid", "stack"), output="stacks")
    slots.add("uid-web-1", slot=2, count=23, width=4)
    stacks.add("uid-web-1", "main;read", count=997)
    batch = slots.batch(10)
    batch.tables.extend(stacks.batch(10).tables)
    aggregate.apply("a", 1, batch, batch.time_ns)
    aggregate.fold("a")
    histogram, folded = ask(aggregate, 20).outputs
    assert histogram.total.values.tolist() == [[0, 0, 23, 0]]
    assert (folded.total.labels, folded.total.whole) == ((("web-1", "main;read"),), 997)


def test_a_node_that_comes_back_in_the_same_epoch_is_not_counted_twice() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=900)
    send(aggregate, a, 10, lost=5)
    aggregate.fold("a")
    a.add("uid-web-1", count=90)  # while it is away
    a.add("uid-cart", count=4)
    a.restart_stream(2)
    send(aggregate, a, 600, lost=6)
    assert rows(aggregate, 600) == {("web-1",): 900}
    said = ask(aggregate, 600, "a")
    assert (said.lost, said.outputs[0].window.whole) == (6, 0)
    (gap,) = said.gaps
    assert (gap.node, gap.start_ns, gap.end_ns) == ("a", START + 10 * SECOND, START + 600 * SECOND)
    assert gap.why == tables.RETURNED
    a.add("uid-web-1", count=7)
    a.add("uid-cart", count=3)
    send(aggregate, a, 610, lost=8)
    said = ask(aggregate, 610, "a")
    assert rows(aggregate, 610) == {("web-1",): 907, ("cart-0",): 3}
    assert (said.lost, said.outputs[0].window.whole, said.outputs[0].rate_per_second) == (8, 10, 1.0)
    # A new stream, another departure, another return, and a reboot: all as before.
    a.restart_stream(3)
    a.add("uid-web-1", count=1)
    send(aggregate, a, 620, lost=8)
    assert rows(aggregate, 620) == {("web-1",): 908, ("cart-0",): 3}
    aggregate.fold("a")
    a.restart_stream(4)
    send(aggregate, a, 900, lost=8)
    assert (rows(aggregate, 900), ask(aggregate, 900).lost) == ({("web-1",): 908, ("cart-0",): 3}, 8)
    assert [gap.end_ns for gap in ask(aggregate, 900).gaps] == [START + 600 * SECOND, START + 900 * SECOND]
    a.reboot(5, "boot-2:7", START + 990 * SECOND)
    a.add("uid-web-1", count=92)
    send(aggregate, a, 1000, lost=1)
    assert (rows(aggregate, 1000), ask(aggregate, 1000).lost) == ({("web-1",): 1000, ("cart-0",): 3}, 9)


def test_a_node_that_comes_back_in_another_epoch_counts_as_new() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=900)
    send(aggregate, a, 10, lost=5)
    old = a.batch(15)
    aggregate.fold("a")
    a.reboot(2, "boot-2:7", START + 600 * SECOND)
    a.add("uid-web-1", count=97)
    send(aggregate, a, 610, lost=2)
    said = ask(aggregate, 610, "a")
    assert (rows(aggregate), said.lost, said.gaps, said.outputs[0].window.whole) == ({("web-1",): 997}, 7, (), 97)
    # What had ended does not come back.
    old.sequence = 50
    assert aggregate.apply("a", 2, old, old.time_ns)
    assert rows(aggregate) == {("web-1",): 997}


def test_the_sample_with_which_it_goes_on_may_come_in_parts_and_begin_anew() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=3)
    a.add("uid-cart", count=5)
    send(aggregate, a, 10)
    aggregate.fold("a")
    whole = a.values
    for session, parts in ((2, 1), (3, 2)):  # the first stream broke before it had said all
        a.restart_stream(session)
        a.values = {("uid-web-1",): [3]}
        send(aggregate, a, 600 + session)
        if parts == 2:
            a.values = whole
            send(aggregate, a, 600 + session)
    assert rows(aggregate) == {("cart-0",): 5, ("web-1",): 3}
    (gap,) = ask(aggregate, 603).gaps
    assert (gap.start_ns, gap.end_ns) == (START + 10 * SECOND, START + 603 * SECOND)
    a.add("uid-cart", count=2)
    send(aggregate, a, 613)
    assert rows(aggregate) == {("cart-0",): 7, ("web-1",): 3}


def test_counts_of_nobody_that_get_a_name_after_the_return_make_no_row_below_zero() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("?", count=2)
    send(aggregate, a, 10)
    aggregate.fold("a")
    a.add("?", count=3)
    a.restart_stream(2)
    send(aggregate, a, 600)
    send(aggregate, a, 610)
    a.restart_stream(3)
    a.values = {("uid-web-1",): [5]}
    send(aggregate, a, 620)
    # It did count five: none is told twice.
    assert rows(aggregate) == {("web-1",): 5}


def test_records_losses_and_skipped_runs_go_on_without_a_gap() -> None:
    aggregate = Aggregate(facts(counter(name="execs", kind=O.EVENTS)))

    def say(session: int, at: int, misses: int, said: stream_pb2.EventChunk) -> Result:
        batch = stream_pb2.Batch(sequence=1, time_ns=START + at * SECOND, events=[said])
        batch.instances.add(digest="d1", policy_uids=[UID], epoch="boot-1:3", recursion_misses=misses)
        aggregate.apply("a", session, batch, batch.time_ns)
        return ask(aggregate, at)

    before = say(1, 10, 3, chunk([0, 48], counted_before=0, submitted=9, lost=4, lost_by_program=1, dropped=2))
    aggregate.fold("a")
    assert plain(ask(aggregate, 10)) | {"cost": 0} == plain(before) | {"cost": 0} | _without_node(before)
    again = chunk(
        [48, 96, 144], start_position=48, counted_before=1, submitted=12, lost=5, lost_by_program=2, dropped=2
    )
    after = say(2, 600, 5, again)
    events = after.outputs[0].events
    assert events is not None
    assert (events.received, events.submitted, events.lost, events.dropped) == (4, 12, 5, 2)
    assert [record["comm"] for record in events.records] == [f"cmd-{place}" for place in (0, 48, 96, 144)]
    assert (after.lost, after.gaps, after.outputs[0].window.whole) == (5 + 2 + 5, (), 0)


def _without_node(before: Result) -> dict[str, Any]:
    """What differs when a node has left: its window."""
    (output,) = before.outputs
    nothing = replace(
        output,
        rate_per_second=0.0,
        window=replace(output.window, values=np.array([[0]]), rates=np.array([0.0]), sum=np.array([0])),
    )
    return {"outputs": plain((nothing,)), "rate_per_second": 0.0}


@pytest.mark.no_cover  # others show its branches, and it takes three times as long while they are watched
def test_three_thousand_nodes_that_came_and_went_take_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departed, "MAX_REMEMBERED", 300)
    aggregate = Aggregate(facts(counter("workload"), counter(name="execs", kind=O.EVENTS)))
    node = FakeNode("a")
    node.add("", count=19)
    node.add("?", count=1)
    batch = node.batch(10, lost=1)
    batch.events.append(chunk([0], submitted=1))
    batch.instances.add(digest="d1", policy_uids=[UID], recursion_misses=1)
    gap = batch.tables[0].gaps.add(end_ns=START + 10 * SECOND, why="restart")
    sizes = []
    for number in range(1, 3_001):
        for each in (batch.tables[0], batch.events[0], batch.instances[0]):
            each.epoch = f"boot-{number}:7"
        batch.tables[0].uncounted[:] = [f"node {number} lost some"]
        gap.start_ns = START + number
        aggregate.apply(f"node-{number}", number, batch, batch.time_ns)
        aggregate.fold(f"node-{number}")
        if number == 900:
            tracemalloc.start()
        elif number in (2_000, 3_000):
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    # By then what is remembered, and the records that are kept, are those of the last 300.
    assert sizes[1] - sizes[0] < 33_000, "33 bytes a node; with its rows it is 3,000"
    said = ask(aggregate, 20)
    assert sum(rows(aggregate).values()) == 60_000
    assert (said.lost, said.outputs[1].total.whole) == (6_000, 3_000)
    for state in (*aggregate._tables.values(), *aggregate._events.values()):
        assert not state.nodes
    assert len(aggregate._tables["calls"]._counted) == len(aggregate._events["execs"]._rings_before) == 300
    assert len(said.gaps) == departed.MAX_GAPS
    assert not aggregate._sessions and not aggregate._seen and not aggregate._costs._nodes


def test_keys_of_departed_nodes_make_room_for_those_that_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_KEYS", 30)
    policy = facts(counter("workload"), counter("workload", name="held", kind=O.GAUGE), counter("pod", name="by_pod"))
    aggregate = Aggregate(policy)
    pods = {f"pod-{n}-{p}": result.PodName("shop", f"w{p}-{n}", "Job", f"w{p}") for n in range(50) for p in range(5)}
    stays = FakeNode("stays")
    names = {**pods, "pod-stays": result.PodName("shop", "w0-stays", "Job", "w0")}

    def ask_all() -> Result:
        return aggregate.result(START + 10 * SECOND, selected_nodes=frozenset(), names=names.get)

    for number in range(50):
        node = FakeNode(f"node-{number}", epoch=f"boot-{number}:7")
        for pod in range(5):
            node.add(f"pod-{number}-{pod}", count=pod + 1)
        stays.add("pod-stays", count=1)
        for each in (node, stays):
            batch = each.batch(10 + number)
            for output in policy.outputs[1:]:
                other = batch.tables.add()
                other.CopyFrom(batch.tables[0])
                other.output = output.name
            aggregate.apply(each.name, 1, batch, batch.time_ns)
        ask_all()
        aggregate.fold(node.name)
    by_workload, held, by_pod = ask_all().outputs
    expected: dict[result.Labels, int] = {(f"w{pod}",): 50 * (pod + 1) + 50 * (pod == 0) for pod in range(5)}
    assert dict(zip(by_workload.total.labels, by_workload.total.weights.tolist(), strict=True)) == expected
    assert by_workload.uncounted == held.uncounted == ()
    assert (held.total.labels, held.total.whole) == ((("w0",),), 50)
    # Each pod is a row of its own: of those that find no room the counts are one.
    assert by_pod.total.whole == 800
    assert by_pod.uncounted == ("keys beyond 30 are counted under (other)",)
    # One that comes back goes on in its rows, whatever number its keys have now.
    node.restart_stream(2)
    for at in (600, 610):
        node.add("pod-49-2", count=23)
        send(aggregate, node, at)
    expected[("w2",)] += 23
    by_workload = ask_all().outputs[0]
    assert dict(zip(by_workload.total.labels, by_workload.total.weights.tolist(), strict=True)) == expected


def test_what_pods_were_called_before_they_had_a_name_is_forgotten() -> None:
    aggregate, names = Aggregate(facts(counter("pod"))), dict[str, result.PodName]()

    def total() -> dict[result.Labels, int]:
        rows = aggregate.result(START, selected_nodes=frozenset(), names=names.get).outputs[0].total
        return dict(zip(rows.labels, rows.weights.tolist(), strict=True))

    for number in range(1, 201):
        node = FakeNode(f"node-{number}", epoch=f"boot-{number}:7")
        node.add(f"uid-{number}", count=1)
        node.add("", count=2)
        send(aggregate, node, 10)
        assert total()[(f"uid-{number}",)] == 1
        names[f"uid-{number}"] = result.PodName("shop", f"web-{number % 2}")
        assert total() == {("(host)",): 2 * number, ("web-1",): (number + 1) // 2} | (
            {("web-0",): number // 2} if number > 1 else {}
        )
        aggregate.fold(node.name)
    kept = aggregate._tables["calls"]._keys
    assert len(kept) <= 6
    assert len(kept._rows) <= 2 * len(kept)
