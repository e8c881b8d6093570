"""The aggregator: none lost, none doubled, whatever comes twice, late, anew or after a reboot."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probefleet_agent.samples import Classified, Rows
from probefleet_core import keys, result, tables
from probefleet_core.aggregate import Aggregate, PodName, PolicyFacts, Result, ResyncNeeded
from probefleet_wire import columns
from probefleet_wire.columns import ColumnsError
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.fakes.samples import PODS, SECOND, START, UID, FakeNode, chunk, counter, facts

O = plan_pb2.Output  # noqa: E741


def apply(aggregate: Aggregate, node: FakeNode, batch: stream_pb2.Batch, session: int | None = None) -> bool:
    return aggregate.apply(node.name, node.session if session is None else session, batch, batch.time_ns)


def ask(aggregate: Aggregate, at_seconds: float, *nodes: str) -> Result:
    return aggregate.result(
        int(START + at_seconds * SECOND), selected_nodes=frozenset(nodes or ("a", "b")), names=PODS.get
    )


def table_of(rows: result.Rows) -> dict[result.Labels, int]:
    return {label: int(weight) for label, weight in zip(rows.labels, rows.weights, strict=True)}


def totals(aggregate: Aggregate, output: int = 0) -> dict[result.Labels, int]:
    return table_of(ask(aggregate, 0).outputs[output].total)


def test_counts_of_two_nodes_come_together_by_workload() -> None:
    aggregate = Aggregate(facts(counter("workload")))
    a, b = FakeNode("a"), FakeNode("b")
    a.add("uid-web-1", count=997)
    b.add("uid-web-2", count=23)
    b.add("uid-cart", count=5)
    apply(aggregate, a, a.batch(10))
    apply(aggregate, b, b.batch(10))
    out = ask(aggregate, 11).outputs[0]
    assert table_of(out.total) == {("web",): 1020, ("cart",): 5}
    assert table_of(out.window) == {("web",): 1020, ("cart",): 5}  # counting began within the window
    assert out.rate_per_second == pytest.approx(102.5)
    assert out.window.rates.tolist() == pytest.approx([102.0, 0.5])
    assert out.since_ns == START


def test_the_window_is_the_last_interval_and_the_total_everything() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=100)
    apply(aggregate, a, a.batch(10))
    a.add("uid-web-1", count=7)
    a.add("uid-cart", count=1)
    apply(aggregate, a, a.batch(20))
    out = ask(aggregate, 20).outputs[0]
    assert table_of(out.total) == {("web-1",): 107, ("cart-0",): 1}
    assert table_of(out.window) == {("web-1",): 7, ("cart-0",): 1}
    apply(aggregate, a, a.batch(30))
    out = ask(aggregate, 30).outputs[0]
    assert (table_of(out.window), out.rate_per_second, out.total.whole) == ({}, 0.0, 108)


def test_a_sample_before_its_time_makes_no_shorter_window() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a, shown = FakeNode("a"), []
    for at in (10, 13, 20, 24, 30):  # at 13 and 24 there is a push: what was counted is sent before it
        a.add("uid-web-1", count=7)
        apply(aggregate, a, a.batch(at))
        shown.append(ask(aggregate, at).outputs[0].window.whole)
    assert shown == [7, 7, 14, 14, 14]


def test_a_window_that_is_longer_than_an_interval_is_shown_as_long_as_it_is() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    for at, seconds in ((10, 10), (21, 10), (321, 300), (331, 10)):  # for five minutes there was no stream
        a.add("uid-web-1", count=at)
        apply(aggregate, a, a.batch(at))
        result = ask(aggregate, at)
        assert (result.window_seconds, result.outputs[0].window.whole) == (seconds, at)
    assert ask(aggregate, 400).window_seconds == 10, "no window is fresh"


def test_a_node_that_samples_without_end_within_an_interval_fills_no_memory() -> None:
    aggregate = Aggregate(facts(counter("pod"), counter(name="execs", kind=O.EVENTS)))
    a = FakeNode("a")
    for at in range(1, 400):
        a.add("uid-web-1", count=1)
        a.add("uid-web-2", count=at % 23 == 0)
        batch = a.batch(at / 100)
        batch.events.append(chunk([at * 48]))
        apply(aggregate, a, batch)
    for _, state in aggregate._states():
        assert len(state.nodes["a"].window._growing) <= 2
    apply(aggregate, a, a.batch(10))
    out = ask(aggregate, 10)
    assert table_of(out.outputs[0].window) == {("web-1",): 399, ("web-2",): 17}
    assert out.outputs[1].window.whole == 399


def test_a_first_sample_long_after_the_beginning_is_no_window() -> None:
    aggregate = Aggregate(facts(counter()))
    a = FakeNode("a", keys=())
    a.add(count=1_000_000)
    apply(aggregate, a, a.batch(3600))  # an operator that has just started
    out = ask(aggregate, 3600).outputs[0]
    assert (out.rate_per_second, out.window.whole, out.total.whole) == (0.0, 0, 1_000_000)
    a.add(count=50)
    apply(aggregate, a, a.batch(3610))
    assert ask(aggregate, 3610).outputs[0].rate_per_second == 5.0


def test_a_batch_that_comes_twice_changes_nothing() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=3)
    first = a.batch(10)
    a.add("uid-web-1", count=4)
    second = a.batch(20)
    assert apply(aggregate, a, first)
    assert apply(aggregate, a, second)
    assert not apply(aggregate, a, second)
    assert not apply(aggregate, a, first)
    assert totals(aggregate) == {("web-1",): 7}


def test_a_new_stream_replaces_and_the_old_one_is_fenced() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=3)
    a.add("?", count=2)
    apply(aggregate, a, a.batch(10))
    late = a.batch(15)
    # The agent restarts, and knows by now whose the two were.
    a.restart_stream(2)
    del a.values[("?",)]
    a.add("uid-web-1", count=4)
    apply(aggregate, a, a.batch(20))
    assert totals(aggregate) == {("web-1",): 7}
    assert not apply(aggregate, a, late, session=1)
    out = ask(aggregate, 20).outputs[0]
    # Seen over the change of streams: 3 → 7.
    assert table_of(out.window) == {("web-1",): 4}
    assert out.rate_per_second == pytest.approx(0.4)


def test_the_rest_of_a_new_stream_may_come_in_a_second_table_of_the_same_time() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=3)
    a.add("uid-cart", count=5)
    apply(aggregate, a, a.batch(10))
    a.restart_stream(2)
    whole, a.values = a.values, {("uid-web-1",): [3]}
    apply(aggregate, a, a.batch(20))
    a.values = whole
    a.add("uid-cart", count=1)
    apply(aggregate, a, a.batch(20))
    out = ask(aggregate, 20).outputs[0]
    assert table_of(out.total) == {("cart-0",): 6, ("web-1",): 3}
    assert table_of(out.window) == {("cart-0",): 1}


def test_a_reboot_keeps_what_was_counted_before() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=900)
    before = a.batch(10, lost=3)
    apply(aggregate, a, before)
    a.reboot(2, "boot-2:4", START + 100 * SECOND)
    a.add("uid-web-1", count=97)
    apply(aggregate, a, a.batch(110, lost=2))
    out = ask(aggregate, 110).outputs[0]
    assert table_of(out.total) == {("web-1",): 997}
    assert (out.lost, out.since_ns) == (5, START)
    assert out.rate_per_second == pytest.approx(9.7)
    # The ended epoch does not come back, not even in a newer stream.
    before.sequence = 50
    apply(aggregate, a, before)
    assert totals(aggregate) == {("web-1",): 997}


def test_an_instance_that_is_loaded_anew_begins_an_epoch_within_the_stream() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=5)
    apply(aggregate, a, a.batch(10))
    sequence = a.sequence
    a.reboot(1, "boot-1:8", START + 11 * SECOND)
    a.sequence = sequence
    a.add("uid-cart", count=6)
    apply(aggregate, a, a.batch(20))
    assert totals(aggregate) == {("web-1",): 5, ("cart-0",): 6}


def test_a_newer_generation_starts_afresh() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a, b = FakeNode("a"), FakeNode("b", generation=2, epoch="boot-1:9", since_ns=START + 20 * SECOND)
    a.add("uid-web-1", count=5)
    apply(aggregate, a, a.batch(10))
    aggregate.update(facts(counter("pod"), generation=2))
    b.add("uid-web-2", count=7)
    apply(aggregate, b, b.batch(30))
    apply(aggregate, a, a.batch(30))  # not updated yet: not merged, not covered
    out = ask(aggregate, 31)
    assert totals(aggregate) == {("web-2",): 7}
    assert (out.coverage.sampled, out.coverage.missing, out.since_ns) == (1, ("a",), START + 20 * SECOND)


def test_a_node_that_speaks_of_a_generation_that_nobody_planned_takes_nothing_from_the_others() -> None:
    aggregate = Aggregate(facts(counter("pod"), counter(name="execs", kind=O.EVENTS)))
    a, liar = FakeNode("a"), FakeNode("b", generation=2**63 - 1)
    for at in (10, 20):
        a.add("uid-web-1", count=5)
        liar.add("uid-web-1", count=7)
        for node in (a, liar):
            batch = node.batch(at)
            batch.events.append(chunk([at * 48]))
            batch.events[0].generation = node.generation
            apply(aggregate, node, batch)
    out = ask(aggregate, 21)
    assert table_of(out.outputs[0].total) == {("web-1",): 10}
    assert (out.outputs[1].total.whole, out.coverage.missing) == (2, ("b",))


def test_an_update_of_the_policy_starts_afresh_only_with_a_newer_generation() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=5)
    apply(aggregate, a, a.batch(10))
    aggregate.update(facts(counter("pod")))
    assert totals(aggregate) == {("web-1",): 5}
    aggregate.update(facts(counter("pod"), generation=2))
    assert totals(aggregate) == {}


# Whatever the order.


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[str, int, stream_pb2.Batch]], dict[result.Labels, int]]:
    """Each node's batches in order, over restarts and reboots, and what was truly counted."""
    truth: dict[result.Labels, int] = {}
    lines: list[list[tuple[str, int, stream_pb2.Batch]]] = []
    for name in ("a", "b", "c"):
        node, line, session = FakeNode(name), [], 1
        for step in range(draw(st.integers(1, 6))):
            happening = draw(st.sampled_from(["count", "count", "restart", "reboot"]))
            if happening != "count" and step:
                session += 1
                if happening == "restart":
                    node.restart_stream(session)
                else:
                    node.reboot(session, f"boot-{session}:1", START + step * 10 * SECOND)
            for _ in range(draw(st.integers(0, 3))):
                pod = draw(st.sampled_from(sorted(PODS)))
                count = draw(st.integers(1, 1000))
                node.add(pod, count=count)
                label = (PODS[pod].name if pod != "uid-far" else "web-1",)
                truth[label] = truth.get(label, 0) + count
            line.append((name, session, node.batch(10 + step * 10)))
        lines.append(line)
    # Any interleaving of nodes, and any earlier batch once more at any later time.
    merged = []
    while any(lines):
        line = draw(st.sampled_from([line for line in lines if line]))
        merged.append(line.pop(0))
        if draw(st.booleans()):
            merged.append(draw(st.sampled_from(merged)))
    return merged, truth


@settings(max_examples=60, deadline=None)
@given(histories())
def test_order_and_repetition_of_samples_make_no_difference(
    history: tuple[list[tuple[str, int, stream_pb2.Batch]], dict[result.Labels, int]],
) -> None:
    samples, truth = history
    aggregate = Aggregate(facts(counter("pod")))
    for node, session, batch in samples:
        aggregate.apply(node, session, batch, batch.time_ns)
    assert totals(aggregate) == truth


# Groups and names.


@pytest.mark.parametrize(
    ("group_by", "cluster", "expected"),
    [
        ((), False, {(): 31}),
        (("node",), False, {("a",): 26, ("b",): 5}),
        (("namespace",), False, {("shop",): 11, ("far",): 4, ("(host)",): 10, ("(unknown)",): 6}),
        (("workload",), False, {("web",): 9, ("cart",): 6, ("(host)",): 10, ("(unknown)",): 6}),
        (("workload",), True, {("shop/web",): 5, ("far/web",): 4, ("shop/cart",): 6, ("(host)",): 10, ("(unknown)",): 6}),  # noqa: E501
        (
            ("namespace", "workload"),
            True,
            {("shop", "web"): 5, ("far", "web"): 4, ("shop", "cart"): 6, ("(host)",) * 2: 10, ("(unknown)",) * 2: 6},
        ),
        (("pod",), False, {("web-1",): 9, ("cart-0",): 6, ("(host)",): 10, ("(unknown)",): 2, ("uid-gone",): 4}),
        (("container",), False, {("nginx",): 4, ("sidecar",): 1, ("(unknown)",): 4 + 2 + 6, ("(host)",): 10, ("c9",): 4}),  # noqa: E501
        (("key.port",), False, {(80,): 16, (443,): 15}),
        (("pod", "key.port"), False, {
            ("web-1", 80): 4 + 4, ("web-1", 443): 1, ("cart-0", 80): 1, ("cart-0", 443): 5, ("(host)", 443): 3,
            ("(host)", 80): 7, ("(unknown)", 443): 2, ("uid-gone", 443): 4,
        }),
    ],
)  # fmt: skip
def test_rows_are_grouped_as_asked(
    group_by: tuple[str, ...], cluster: bool, expected: dict[result.Labels, int]
) -> None:
    aggregate = Aggregate(facts(counter(*group_by), cluster=cluster))
    a, b = (FakeNode(name, keys=("pod_uid", "container_id", "key.port")) for name in "ab")
    for node, pod, container, port, count in [
        (a, "uid-web-1", "c1", 80, 4),
        (a, "uid-web-1", "c2", 443, 1),
        (a, "uid-far", "", 80, 4),
        (a, "", "", 80, 7),
        (a, "", "", 443, 3),
        (a, "?", "", 443, 2),
        (b, "uid-cart", "", 443, 5),
        (a, "uid-cart", "", 80, 1),
        (a, "uid-gone", "c9", 443, 4),
    ]:
        node.add(pod, container, port, count=count)
    apply(aggregate, a, a.batch(10))
    apply(aggregate, b, b.batch(10))
    assert totals(aggregate) == expected


def test_a_name_that_comes_late_is_put_to_its_row() -> None:
    aggregate = Aggregate(facts(counter("pod"), counter("container", name="other")))
    a = FakeNode("a", keys=("pod_uid", "container_id"))
    a.add("uid-new", "c7", count=3)
    batch = a.batch(10)
    other = stream_pb2.Table()
    other.CopyFrom(batch.tables[0])
    other.output = "other"
    batch.tables.append(other)
    apply(aggregate, a, batch)
    known: dict[str, PodName] = {}

    def rows() -> list[result.Labels]:
        merged = aggregate.result(START + 10 * SECOND, selected_nodes={"a"}, names=known.get)
        return [output.total.labels[0] for output in merged.outputs]

    assert rows() == [("uid-new",), ("c7",)]
    known["uid-new"] = PodName("shop", "new-1")
    assert rows() == [("new-1",), ("c7",)]
    known["uid-new"] = PodName("shop", "new-1", containers={"c7": "main"})
    assert rows() == [("new-1",), ("main",)]


def test_a_map_without_a_cgroup_belongs_to_nobody_known() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a", keys=())
    a.add(count=3)
    apply(aggregate, a, a.batch(10))
    assert totals(aggregate) == {("(unknown)",): 3}


def test_histograms_are_merged_slot_by_slot_and_may_grow() -> None:
    aggregate = Aggregate(facts(counter("workload", kind=O.HISTOGRAM, histogram=plan_pb2.Histogram())))
    a, b = FakeNode("a"), FakeNode("b")
    a.add("uid-web-1", slot=2, width=4, count=10)
    b.add("uid-web-2", slot=2, width=6, count=1)
    b.add("uid-web-2", slot=5, width=6, count=2)
    apply(aggregate, a, a.batch(10))
    apply(aggregate, b, b.batch(10))
    a.add("uid-web-1", slot=3, width=4, count=1)
    a.add("uid-cart", slot=3, width=4, count=1)
    apply(aggregate, a, a.batch(20))
    a.restart_stream(2)
    a.add("uid-web-1", slot=0, width=4, count=1)
    apply(aggregate, a, a.batch(30))
    out = ask(aggregate, 30).outputs[0]
    assert out.total.labels == (("web",), ("cart",))
    assert out.total.values.tolist() == [[1, 0, 11, 1, 0, 2], [0, 0, 0, 1, 0, 0]]
    assert out.window.values.tolist() == [[1, 0, 1, 0, 0, 2]]  # each node's own last interval
    assert out.total.sum.tolist() == [1, 0, 11, 2, 0, 2]
    assert len(out.bounds[0]) == 6


def test_who_waited_for_long_comes_before_who_waited_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "MAX_ROWS", 1)
    aggregate = Aggregate(facts(counter("workload", kind=O.HISTOGRAM, histogram=plan_pb2.Histogram())))
    a = FakeNode("a")
    a.add("uid-web-1", slot=2, width=22, count=997)
    a.add("uid-cart", slot=20, width=22, count=23)
    apply(aggregate, a, a.batch(10))
    total = ask(aggregate, 10).outputs[0].total
    assert total.labels == (("cart",),)
    assert total.weights.tolist() == [23]
    assert total.other is not None and total.other.sum() == 997


@pytest.mark.parametrize(("merge", "expected"), [(O.SUM, 3 + 9 + 4), (O.MAX, 9), (O.MIN, 3), (O.LATEST, 4)])
def test_gauges_merge_as_they_say(merge: int, expected: int) -> None:
    aggregate = Aggregate(facts(counter("workload", kind=O.GAUGE, merge=merge)))
    for name, value, at in (("a", 3, 10), ("b", 9, 12), ("c", 4, 15)):
        node = FakeNode(name)
        node.values = {("uid-web-1",): [99]}
        apply(aggregate, node, node.batch(at - 10))
        node.values = {("uid-web-1",): [value]}
        apply(aggregate, node, node.batch(at))
    out = ask(aggregate, 15, *"abc").outputs[0]
    assert table_of(out.total) == table_of(out.window) == {("web",): expected}
    stale = ask(aggregate, 43.5, *"abc").outputs[0]  # only c is fresh
    assert table_of(stale.window) == {("web",): 4}
    assert table_of(stale.total) == {("web",): expected}
    assert ask(aggregate, 100, *"abc").outputs[0].window.labels == ()


def test_what_no_node_runs_any_more_is_in_no_window() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    for name in "ab":
        node = FakeNode(name)
        node.add("uid-web-1", count=10)
        apply(aggregate, node, node.batch(10))
        node.add("uid-web-1", count=997)
        apply(aggregate, node, node.batch(20))
    both, one = ask(aggregate, 20), ask(aggregate, 20, "a")
    none = aggregate.result(START + 20 * SECOND, selected_nodes=frozenset(), names=PODS.get)
    assert [each.outputs[0].window.whole for each in (both, one, none)] == [2 * 997, 997, 0]
    assert [each.outputs[0].total.whole for each in (both, one, none)] == [2 * 1007] * 3
    assert [each.outputs[0].retired for each in (both, one, none)] == [0, 1007, 2 * 1007]
    assert [each.coverage.sampled for each in (both, one, none)] == [2, 1, 0]
    assert (none.rate_per_second, none.cost.known_nodes) == (0, 0)


def test_what_a_node_held_leaves_the_cluster_with_it_and_what_it_counted_stays() -> None:
    for kind, left in ((O.GAUGE, 3), (O.COUNTER, 12)):
        aggregate = Aggregate(facts(counter("workload", kind=kind)))
        for name, value in (("a", 3), ("b", 9)):
            node = FakeNode(name)
            node.values = {("uid-web-1",): [value]}
            apply(aggregate, node, node.batch(10))
        aggregate.forget("b")
        assert table_of(ask(aggregate, 11).outputs[0].total) == {("web",): left}


@pytest.mark.parametrize("merge", [O.SUM, O.MAX, O.MIN, O.LATEST])
def test_what_is_gone_on_one_node_leaves_the_gauge_to_the_others(merge: int) -> None:
    aggregate = Aggregate(facts(counter("workload", kind=O.GAUGE, merge=merge)))
    a, b = FakeNode("a"), FakeNode("b")
    for node, value in ((a, 3), (b, 2 if merge == O.MIN else 9)):
        node.values = {("uid-web-1",): [value], ("uid-cart",): [1]}
        apply(aggregate, node, node.batch(10))
    gone = b.batch(20)
    gone.tables[0].gone = columns.pack(np.array([0, 1], np.uint32))
    apply(aggregate, b, gone)
    assert table_of(ask(aggregate, 20).outputs[0].window) == {("web",): 3, ("cart",): 1}
    gone = a.batch(21)
    gone.tables[0].gone = columns.pack(np.array([1], np.uint32))
    apply(aggregate, a, gone)
    assert table_of(ask(aggregate, 21).outputs[0].window) == {("web",): 3}
    a.values["uid-cart",] = [5]
    apply(aggregate, a, a.batch(31))
    assert table_of(ask(aggregate, 31).outputs[0].window) == {("web",): 3, ("cart",): 5}


def test_gauges_may_be_negative_and_do_not_outlive_their_epoch() -> None:
    aggregate = Aggregate(facts(counter(kind=O.GAUGE)))
    for session, (value, epoch) in enumerate([(-5, "e1"), (-7, "e2")]):
        table = stream_pb2.Table(policy_uid=UID, output="calls", epoch=epoch, new_rows=1, generation=1)
        table.rows, table.values = columns.pack(np.array([0], np.uint32)), columns.pack(np.array([value], np.int64))
        aggregate.apply("a", session, stream_pb2.Batch(sequence=1, time_ns=START, tables=[table]), START)
        assert ask(aggregate, 0).outputs[0].total.values.tolist() == [[value]]


def test_beyond_a_thousand_rows_the_rest_is_one_and_totals_stay_exact() -> None:
    aggregate = Aggregate(facts(counter("key.pid", kind=O.TOPK)))
    a = FakeNode("a", keys=("key.pid",))
    for pid in range(1500):
        a.add(pid, count=pid + 1)
    apply(aggregate, a, a.batch(10))
    total = ask(aggregate, 10).outputs[0].total
    assert (len(total.labels), total.labels[0], total.other_count) == (1000, (1499,), 500)
    assert total.other is not None
    assert total.other.tolist() == [sum(range(1, 501))]
    assert total.whole == sum(range(1, 1501))


def test_what_found_no_room_on_its_node_is_other_whatever_it_is_grouped_by() -> None:
    aggregate = Aggregate(facts(counter("node", "pod", "key.port")))
    for name in ("a", "b"):
        node = FakeNode(name, keys=("pod_uid", "key.port"))
        node.add("uid-web-1", 0, count=23)
        node.add("", 0, count=7)
        batch = node.batch(10)
        batch.tables[0].other_row = 2
        apply(aggregate, node, batch)
        node.add("", 0, count=3)
        apply(aggregate, node, node.batch(20))
    assert totals(aggregate) == {
        (name, *key): count for name in ("a", "b") for key, count in ((("web-1", 0), 23), (("(other)", "(other)"), 10))
    }


def test_keys_beyond_the_bound_are_counted_under_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_NODE_KEYS", 10)
    aggregate = Aggregate(facts(counter("key.pid", kind=O.TOPK)))
    a = FakeNode("a", keys=("key.pid",))
    for pid in range(25):
        a.add(pid, count=2)
    apply(aggregate, a, a.batch(10))
    a.add(3)
    for pid in range(10, 25):
        a.add(pid)
    apply(aggregate, a, a.batch(20))
    out = ask(aggregate, 20).outputs[0]
    assert (len(out.total.labels), out.total.whole, out.total.other_count) == (10, 50 + 16, 1)
    assert out.total.other is not None
    assert out.total.other.tolist() == [30 + 15]
    assert any("(other)" in text for text in out.uncounted)
    a.restart_stream(2)
    apply(aggregate, a, a.batch(30))
    assert ask(aggregate, 30).outputs[0].total.whole == 66


# Coverage, losses, gaps, cost.


def test_coverage_names_who_is_missing_and_who_is_late() -> None:
    aggregate = Aggregate(facts(counter()))
    for name, at in (("a", 0), ("b", 40)):
        node = FakeNode(name, keys=())
        node.add()
        apply(aggregate, node, node.batch(at))
    gone = FakeNode("gone", keys=())
    gone.add()
    apply(aggregate, gone, gone.batch(40))
    coverage = ask(aggregate, 41, "a", "b", "c").coverage
    assert coverage == result.Coverage(1, 3, missing=("c",), missing_count=1, stale=("a",), stale_count=1)
    many = aggregate.result(START, selected_nodes={f"n{i:02}" for i in range(50)}, names=PODS.get).coverage
    assert (many.missing_count, len(many.missing), many.missing[0]) == (50, 20, "n00")


def test_a_node_where_nothing_happens_still_covers() -> None:
    aggregate = Aggregate(facts(counter("pod"), counter("pod", name="events", kind=O.EVENTS)))
    a = FakeNode("a")
    a.add("uid-web-1", count=10)
    apply(aggregate, a, a.batch(10))
    apply(aggregate, a, a.batch(12, empty=True, runs=True))  # speaks of another policy between
    assert ask(aggregate, 12).outputs[0].rate_per_second == 1.0
    for at in (20, 30, 40, 50):
        apply(aggregate, a, a.batch(at, empty=True, runs=True))
    now = ask(aggregate, 50, "a")
    assert (now.coverage.sampled, now.outputs[0].rate_per_second) == (1, 0.0)
    a.add("uid-web-1", count=5)
    apply(aggregate, a, a.batch(60))
    assert ask(aggregate, 60).outputs[0].rate_per_second == 0.5
    b = FakeNode("b")
    apply(aggregate, b, b.batch(60, empty=True))  # nothing of this policy in it
    assert ask(aggregate, 60, "b").coverage.sampled == 0


def test_a_gap_that_goes_on_is_one_as_long_as_it_is_known_to_be() -> None:
    aggregate = Aggregate(facts(counter(), counter(name="execs", kind=O.EVENTS)))
    a = FakeNode("a", keys=())
    a.add()
    batch = a.batch(10)
    batch.tables[0].gaps.add(start_ns=START, end_ns=START + 10 * SECOND, why="detached")
    batch.events.append(chunk([0]))
    batch.events[0].gaps.add(start_ns=START, end_ns=START + 9 * SECOND, why="detached")
    apply(aggregate, a, batch)
    assert ask(aggregate, 11).gaps == (result.NodeGap("a", START, START + 10 * SECOND, "detached"),)


def test_a_node_that_has_not_heard_of_an_edit_does_not_cover() -> None:
    aggregate = Aggregate(facts(counter()))
    a = FakeNode("a", keys=())
    a.add(count=23)
    apply(aggregate, a, a.batch(10, runs=True))
    aggregate.update(facts(counter(), generation=2))  # of the interval: the program is the same
    apply(aggregate, a, a.batch(20, runs=True))
    out = ask(aggregate, 20, "a")
    assert (out.coverage.sampled, out.coverage.missing, out.outputs[0].total.whole) == (0, ("a",), 0)
    a.generation, a._sent, a._sent_values = 2, [], {}
    apply(aggregate, a, a.batch(30, runs=True))
    out = ask(aggregate, 30, "a")
    assert (out.coverage.sampled, out.outputs[0].total.whole) == (1, 23)


def test_losses_of_all_outputs_of_a_program_are_the_largest_not_the_sum() -> None:
    aggregate = Aggregate(facts(counter(), counter(name="second")))
    for output in ("calls", "second"):
        node = FakeNode("a", keys=(), output=output, session={"calls": 1, "second": 2}[output])
        node.add()
        batch = node.batch(10, lost=12)
        batch.tables[0].uncounted.append("LRU eviction")
        batch.tables[0].gaps.add(start_ns=1, end_ns=5, why="the agent was away")
        batch.instances.add(digest="d1", policy_uids=[UID], recursion_misses=3)
        apply(aggregate, node, batch)
    out = ask(aggregate, 10)
    assert (out.lost, out.uncounted) == (15, ("LRU eviction",))
    assert out.gaps == (result.NodeGap("a", 1, 5, "the agent was away"),)


def test_what_a_program_lost_is_one_loss_in_its_tables_and_its_records() -> None:
    records = [
        counter(name=name, kind=O.EVENTS, map=ring) for name, ring in (("execs", "a"), ("again", "a"), ("b", "b"))
    ]
    aggregate = Aggregate(facts(counter(), *records))
    node = FakeNode("a", keys=())
    node.add()
    batch = node.batch(10, lost=7)  # maps that were full: no row, and no record
    for name, full, dropped in (("execs", 3, 1), ("again", 3, 2), ("b", 5, 0)):
        each = chunk([0], lost=11 + full, lost_before_ring=7, lost_by_program=11, dropped=dropped)
        each.output = name
        batch.events.append(each)
    apply(aggregate, node, batch)
    out = ask(aggregate, 11)
    assert out.lost == 7 + 11 + (3 + 2) + 5
    assert [each.lost for each in out.outputs] == [7, 22, 23, 23]


def test_cost_is_the_share_of_the_newest_window() -> None:
    aggregate = Aggregate(facts())

    def send(node: str, sequence: int, at: float, **stat: int) -> None:
        batch = stream_pb2.Batch(sequence=sequence, time_ns=int(START + at * SECOND))
        batch.agent_cpu_ns, batch.agent_rss_bytes = int(at * 0.01 * SECOND), 40 << 20
        cost_known = bool(stat.pop("known", 1))
        batch.instances.add(digest="d1", policy_uids=[UID, "other"], cost_known=cost_known, map_bytes=4096, **stat)
        aggregate.apply(node, 1, batch, batch.time_ns)

    send("a", 1, 10, runs=1000, run_time_ns=SECOND // 100, stats_time_ns=SECOND, hook_time_ns=10**6)
    send("a", 2, 20, runs=4000, run_time_ns=SECOND // 20, stats_time_ns=2 * SECOND, hook_time_ns=4 * 10**6)
    send("b", 1, 20, known=0)
    send("c", 1, 20)  # its first second of statistics is not over
    cost = ask(aggregate, 20, *"abc").cost
    assert (cost.known_nodes, cost.unknown_nodes, cost.max_node, cost.shared_by) == (1, 1, "a", 2)
    assert cost.measuring_nodes == 1
    assert cost.max_cores == pytest.approx(0.04 + 3000 * 1e-6)
    assert (cost.runs_per_second, cost.runs_known) == (3000, False)
    assert ask(aggregate, 20, *"abc").rate_per_second == 0, "it is not the fleet's"
    assert (cost.max_map_bytes, cost.total_map_bytes) == (4096, 3 * 4096)
    assert cost.max_agent_cores == pytest.approx(0.01)
    # Loaded anew: counts from zero.
    send("a", 3, 30, runs=500, run_time_ns=SECOND // 100, stats_time_ns=SECOND)
    assert ask(aggregate, 30, *"abc").cost.runs_per_second == 500
    send("a", 4, 55, runs=500, run_time_ns=SECOND // 100, stats_time_ns=SECOND)
    assert ask(aggregate, 55, *"abc").rate_per_second == 500  # statistics were off in between, others are not fresh
    aggregate.forget("a")
    assert ask(aggregate, 55, *"abc").cost.max_node == ""
    aggregate.forget("nobody")
    assert ask(aggregate, 400).cost == result.Cost()


def test_runs_that_were_skipped_count_once_whatever_becomes_of_node_agent_and_programs() -> None:
    aggregate = Aggregate(facts(counter()))
    lost = []
    for sequence, (epoch, misses) in enumerate(
        [("boot-1:7", 2), ("boot-1:7", 3), ("boot-2:5", 4), ("boot-2:5", 4), ("boot-2:9", 0), ("boot-2:9", 11)], 1
    ):
        if sequence == 4:
            aggregate.forget("a")  # its Node was deleted, and made anew
        batch = stream_pb2.Batch(sequence=sequence, time_ns=START + sequence * SECOND)
        batch.instances.add(digest="d1", policy_uids=[UID], recursion_misses=misses, epoch=epoch)
        aggregate.apply("a", 1, batch, START)
        lost.append(ask(aggregate, sequence).lost)
    # A reboot, and programs that were loaded anew for a map that grew, count from zero.
    assert lost == [2, 3, 3 + 4, 3 + 4, 3 + 4, 3 + 4 + 11]


def test_what_a_program_lost_stays_when_it_is_loaded_anew_with_the_same_map() -> None:
    """A ProbeMap outlives the programs that share it: its epoch goes on, and the new program counts from zero."""
    aggregate = Aggregate(facts(counter()))
    lost = []
    for sequence, (program, count) in enumerate([("1:7", 2), ("1:7", 3), ("1:9", 0), ("1:9", 4), ("2:1", 5)], 1):
        batch = stream_pb2.Batch(sequence=sequence, time_ns=START + sequence * SECOND)
        epoch = "2:3" if program == "2:1" else "1:5"
        batch.tables.add(
            policy_uid=UID, output="calls", generation=1, epoch=epoch, program_epoch=program, lost=count, width=1
        )
        aggregate.apply("a", 1, batch, START)
        lost.append(ask(aggregate, sequence).lost)
    assert lost == [2, 3, 3, 3 + 4, 3 + 4 + 5]


def test_runs_skipped_before_a_policy_joined_are_not_its_loss() -> None:
    aggregate = Aggregate(facts(counter()))
    for sequence, (misses, before) in enumerate([(5, 7), (7, 7), (10, 7), (10, 9)], 1):
        batch = stream_pb2.Batch(sequence=sequence, time_ns=START + sequence * SECOND)
        # The agent's figure is of its last window of statistics, which may be older than the joining.
        batch.instances.add(digest="d1", policy_uids=[UID], recursion_misses=misses, misses_before={UID: before})
        aggregate.apply("a", 1, batch, START)
        assert ask(aggregate, sequence).lost == [0, 0, 3, 4][sequence - 1]


def test_a_policy_that_left_a_node_and_joined_again_counts_both_times() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    a = FakeNode("a")
    a.add("uid-web-1", count=23)
    apply(aggregate, a, a.batch(10))
    # The same map, counted since the policy came anew: an epoch of its own.
    a.reboot(2, f"{a.epoch}:18af", START + 100 * SECOND)
    a.add("uid-web-1", count=5)
    apply(aggregate, a, a.batch(110))
    assert totals(aggregate) == {("web-1",): 28}


def test_the_fullest_map_of_fresh_nodes_is_named() -> None:
    aggregate = Aggregate(facts(counter()))
    for name, entries, at in (("a", 3, 300), ("b", 5, 300), ("old", 8, 10)):
        node = FakeNode(name, keys=())
        node.add()
        batch = node.batch(at)
        batch.tables[0].entries, batch.tables[0].max_entries = entries, 8
        apply(aggregate, node, batch)
    fill = ask(aggregate, 301).outputs[0].fullest
    assert fill == result.MapFill("b", 5, 8)
    assert fill.share == 5 / 8
    assert ask(aggregate, 400).outputs[0].fullest is None, "no sample is fresh"


# Events.


def send_events(
    aggregate: Aggregate, sequence: int, *chunks: stream_pb2.EventChunk, node: str = "a", at: int = 10
) -> None:
    batch = stream_pb2.Batch(sequence=sequence, time_ns=START + at * SECOND, events=chunks)
    aggregate.apply(node, 1, batch, batch.time_ns)


def events_aggregate() -> Aggregate:
    return Aggregate(facts(counter(name="execs", kind=O.EVENTS)))


def test_records_are_counted_once_by_their_position() -> None:
    aggregate = events_aggregate()
    send_events(aggregate, 1, chunk([0, 48, 96], submitted=3))
    send_events(aggregate, 2, chunk([48, 96, 144, 192], submitted=5, lost=2, dropped=1))  # overlaps
    send_events(aggregate, 3, chunk([0, 48], submitted=2))  # all old
    send_events(aggregate, 3, chunk([500], submitted=9))  # the batch was there already
    out = ask(aggregate, 10)
    events = out.outputs[0].events
    assert events is not None
    assert (events.received, events.submitted, events.lost, events.dropped, out.lost) == (5, 5, 2, 1, 3)
    assert [record["comm"] for record in events.records] == [f"cmd-{p}" for p in (0, 48, 96, 144, 192)]
    assert events.records[0] == {
        "node": "a", "time_ns": START, "comm": "cmd-0",
        "namespace": "shop", "workload": "web", "pod": "web-1", "container": "nginx",
    }  # fmt: skip
    assert out.outputs[0].rate_per_second == 0.5


def test_records_that_an_earlier_operator_has_are_a_gap_and_no_silence() -> None:
    aggregate = events_aggregate()
    send_events(aggregate, 1, chunk([4800, 4848], start_position=4800), at=10)
    send_events(aggregate, 2, chunk([4896], start_position=4896), at=20)
    out = ask(aggregate, 20)
    (gap,) = out.gaps
    assert (gap.node, gap.start_ns, gap.end_ns) == ("a", START, START + 10 * SECOND)
    assert "earlier operator" in gap.why
    send_events(aggregate, 1, chunk([0], start_position=0), node="b", at=20)
    assert len(ask(aggregate, 20).gaps) == 1


def test_a_total_holds_what_an_earlier_operator_had() -> None:
    aggregate = events_aggregate()
    # Node b has had no record since: it says so once, and its total is known.
    announced = chunk([], start_position=9600, end=9600, counted_before=200)
    send_events(aggregate, 1, announced, node="b")
    send_events(aggregate, 1, chunk([4800, 4848], start_position=4800, counted_before=95))
    send_events(aggregate, 2, chunk([4848, 4896], start_position=4848, counted_before=96))  # overlaps
    send_events(aggregate, 3, chunk([4800], start_position=4800, counted_before=95))  # all old
    out = ask(aggregate, 10)
    events = out.outputs[0].events
    assert events is not None
    assert (events.received, out.outputs[0].total.whole, out.gaps) == (298, 298, ())
    assert [record["comm"] for record in events.records] == ["cmd-4800", "cmd-4848", "cmd-4896"]
    # Another ring begins at zero, and what the old one had stays.
    send_events(aggregate, 4, chunk([0, 48], epoch="boot-1:9", counted_before=0))
    assert ask(aggregate, 10).outputs[0].total.whole == 300


def test_a_policy_that_joins_a_ring_in_use_has_no_gap() -> None:
    aggregate = events_aggregate()
    send_events(aggregate, 1, chunk([4800], start_position=4800, counted_before=0))
    assert (ask(aggregate, 10).gaps, ask(aggregate, 10).outputs[0].total.whole) == ((), 1)


def test_more_records_than_the_ring_has_bytes_are_refused() -> None:
    with pytest.raises(ColumnsError, match="too little room"):
        send_events(events_aggregate(), 1, chunk([4800], start_position=4800, counted_before=4801))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["send", "acknowledge", "stream", "operator"]), st.integers(1, 9)), max_size=20)
)
def test_totals_are_exact_whatever_comes_twice_and_whoever_was_the_operator(steps: list[tuple[str, int]]) -> None:
    aggregate, sequence = events_aggregate(), 0
    acknowledged = sent = most = 0  # records of one endless ring
    for step, count in steps:
        if step == "acknowledge":
            acknowledged = min(acknowledged + count, sent)
            continue
        if step == "operator":
            aggregate, sequence, most = events_aggregate(), 0, 0
        if step in ("operator", "stream"):
            # A new stream begins at what was acknowledged, and says so before any record comes.
            sent, count = acknowledged, 0
        positions = [48 * number for number in range(sent, sent + count)]
        told = chunk(positions, start_position=48 * sent, end=48 * (sent + count), counted_before=sent)
        sequence, sent = sequence + 1, sent + count
        send_events(aggregate, sequence, told)
        most = max(most, sent)
        assert ask(aggregate, 10).outputs[0].total.whole == most


def test_the_window_of_records_is_an_interval_however_often_they_come() -> None:
    aggregate = events_aggregate()
    for second in range(1, 35):
        send_events(aggregate, second, chunk([48 * (23 * second + at) for at in range(23)]), at=second)
        out = ask(aggregate, second, "a").outputs[0]
        assert out.rate_per_second == pytest.approx(23)
        assert out.window.whole == 23 * second if second < 9 else out.window.whole in (23 * 9, 23 * 10)


def test_records_stop_though_the_clock_is_set_back() -> None:
    aggregate = events_aggregate()
    send_events(aggregate, 1, chunk([0, 48]), at=3610)
    send_events(aggregate, 2, chunk([96, 144], start_position=96), at=3620)
    assert ask(aggregate, 3620, "a").outputs[0].rate_per_second == 0.2
    batch = stream_pb2.Batch(sequence=3, time_ns=START + 20 * SECOND)
    batch.instances.add(digest="d1", policy_uids=[UID])
    aggregate.apply("a", 1, batch, START + 3630 * SECOND)
    assert ask(aggregate, 3630, "a").outputs[0].rate_per_second == 0


def test_a_new_ring_begins_at_zero_and_the_old_counters_stay() -> None:
    aggregate = events_aggregate()
    old = chunk([0, 48], submitted=2, lost=4)
    send_events(aggregate, 1, old)
    send_events(aggregate, 2, chunk([0], epoch="boot-2:1", submitted=1, lost=1))
    send_events(aggregate, 3, old)
    events = ask(aggregate, 10).outputs[0].events
    assert events is not None
    assert (events.received, events.submitted, events.lost) == (3, 3, 5)


def test_what_a_program_counts_outlives_its_perf_buffer_and_counts_once() -> None:
    aggregate = events_aggregate()
    told = {"program_epoch": "boot-1:9", "lost_by_program": 3, "lost_before_ring": 5}
    send_events(aggregate, 1, chunk([0, 1], submitted=2, lost=3 + 7, **told))
    # The agent is replaced: its perf buffer ends, and the next one has lost 2 so far.
    send_events(aggregate, 2, chunk([0], epoch="boot-1:3:18af", submitted=4, lost=3 + 2, **told))
    out = ask(aggregate, 10)
    events = out.outputs[0].events
    assert events is not None
    assert (events.received, events.submitted, events.lost, out.lost) == (3, 4, 3 + 7 + 2, 3 + 5 + 7 + 2)


def test_a_ring_without_records_says_so() -> None:
    aggregate = events_aggregate()
    send_events(aggregate, 1, chunk([0, 48]), at=10)
    send_events(aggregate, 2, chunk([], end=96), at=20)
    out = ask(aggregate, 20, "a")
    assert (out.outputs[0].rate_per_second, out.outputs[0].total.whole, out.coverage.sampled) == (0.0, 2, 1)
    aggregate.apply(
        "a", 1, stream_pb2.Batch(sequence=3, time_ns=START + 30 * SECOND, instances=[
            stream_pb2.InstanceStat(digest="d1", policy_uids=[UID])]), START + 30 * SECOND,
    )  # fmt: skip
    assert ask(aggregate, 30, "a").coverage.sampled == 1


def test_followers_get_every_record_once_and_hear_of_those_that_are_gone() -> None:
    aggregate = events_aggregate()
    assert aggregate.event_outputs == ("execs",)
    cursor, seen, missed = 0, [], 0
    position = 0
    generator = random.Random(23)
    for sequence in range(1, 120):
        count = generator.choice([1, 7, 300])
        send_events(aggregate, sequence, chunk(range(position, position + count * 48, 48)))
        position += count * 48
        if generator.random() < 0.1:
            while True:
                page = aggregate.events_since("execs", cursor, names=PODS.get, limit=500)
                if not page.records:
                    break
                seen += [record["time_ns"] for record in page.records]
                missed, cursor = missed + page.missed, page.cursor
    page = aggregate.events_since("execs", cursor, names=PODS.get, limit=10_000)
    seen += [record["time_ns"] for record in page.records]
    missed += page.missed
    assert len(set(seen)) == len(seen)
    assert len(seen) + missed == position // 48
    assert missed > 0
    assert aggregate.events_since("execs", page.cursor, names=PODS.get).records == ()
    with pytest.raises(KeyError):
        aggregate.events_since("nothing", 0, names=PODS.get)


@pytest.mark.parametrize("what", ["edit", "operator"])
def test_a_cursor_of_before_skips_no_record_of_now(what: str) -> None:
    aggregate = events_aggregate()
    send_events(aggregate, 1, chunk(range(0, 500 * 48, 48)), at=10)
    cursor = aggregate.events_since("execs", 0, names=PODS.get).cursor
    if what == "edit":
        aggregate.update(facts(counter(name="execs", kind=O.EVENTS), generation=2))
    else:
        aggregate = events_aggregate()
    assert aggregate.events_since("execs", cursor, names=PODS.get).records == ()
    for sequence, count in ((2, 30), (3, 700)):
        told = chunk(range(sequence * 10**6, sequence * 10**6 + count * 48, 48))
        told.generation = 2 if what == "edit" else 1
        send_events(aggregate, sequence, told, at=20)
        page = aggregate.events_since("execs", cursor, names=PODS.get)
        assert (len(page.records), page.missed) == (count, 0)
        cursor = page.cursor


def test_of_a_large_chunk_only_the_newest_are_kept_and_all_are_counted() -> None:
    aggregate = events_aggregate()
    send_events(aggregate, 1, chunk(range(0, 5000 * 48, 48)))
    page = aggregate.events_since("execs", 0, names=PODS.get, limit=10_000)
    assert (len(page.records), page.records[-1]["comm"]) == (1000, f"cmd-{4999 * 48}")
    later = aggregate.events_since("execs", page.cursor - 23, names=PODS.get)
    assert (len(later.records), later.missed, later.cursor) == (23, 0, page.cursor)
    report = ask(aggregate, 10).outputs[0]
    assert report.events is not None
    assert (len(report.events.records), report.events.received) == (50, 5000)


def test_everything_that_is_kept_is_one_page() -> None:
    aggregate = events_aggregate()
    send_events(aggregate, 1, chunk(range(0, 999 * 48, 48)))
    send_events(aggregate, 2, chunk(range(999 * 48, 1998 * 48, 48)))
    page = aggregate.events_since("execs", 0, names=PODS.get)
    assert (len(page.records), page.records[-1]["comm"]) == (1998, f"cmd-{1997 * 48}")


def test_kept_records_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from probefleet_core import events

    monkeypatch.setattr(events, "KEEP_BYTES", 5_000)
    aggregate = events_aggregate()
    for sequence in range(1, 100):
        send_events(aggregate, sequence, chunk([sequence * 48]))
    page = aggregate.events_since("execs", 0, names=PODS.get)
    assert 1 < len(page.records) < 20
    assert page.records[-1]["comm"] == f"cmd-{99 * 48}"


# What a node must not do.


def table(**more: object) -> stream_pb2.Table:
    base: dict[str, object] = {
        "policy_uid": UID, "output": "calls", "epoch": "e", "generation": 1, "new_rows": 2, "width": 1,
        "keys": [columns.column("pod_uid", ["a", "b"])],
        "rows": columns.pack(np.array([0, 1], np.uint32)), "values": columns.pack(np.array([5, 6], np.uint64)),
    }  # fmt: skip
    return stream_pb2.Table(**(base | more))


def pack(values: list[int], dtype: type = np.uint64) -> bytes:
    return columns.pack(np.array(values, dtype))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (table(output="nonsense"), "no output 'nonsense' of rows"),
        (table(width=2000), "2000 values a row"),
        (table(width=2), "2 values a row"),
        (table(new_rows=1 << 31), "too many"),
        (table(keys=[]), None),
        (table(rows=pack([0, 0])), "do not ascend"),
        (table(rows=pack([1, 2])), "a row that has no key"),
        (table(gone=pack([2])), "a row that has no key"),
        (table(other_row=3), "row 2 of 2 new ones"),
        (table(rows=pack([0])), "2 values of uint64 for 1 rows"),
        (table(values=pack([5, -6], np.int64)), "unsigned"),
        (table(values=columns.pack([0.5, 1.5])), "float64"),
        (table(values=b""), "empty column"),
        (table(keys=[columns.column("pod_uid", ["a"])]), "1 values for 2 rows"),
    ],
)
def test_a_table_that_cannot_be_is_refused_and_changes_nothing(bad: stream_pb2.Table, words: str | None) -> None:
    aggregate = Aggregate(facts(counter("pod")))
    batch = stream_pb2.Batch(sequence=1, time_ns=START, tables=[bad])
    if words is None:
        assert aggregate.apply("evil", 1, batch, START)
        return
    with pytest.raises(ColumnsError, match=words):
        aggregate.apply("evil", 1, batch, START)
    assert totals(aggregate) == {}
    a = FakeNode("a")
    a.add("uid-cart", count=2)
    apply(aggregate, a, a.batch(1))
    assert totals(aggregate) == {("cart-0",): 2}


def test_a_key_without_its_column_is_refused() -> None:
    aggregate = Aggregate(facts(counter("key.port")))
    with pytest.raises(ColumnsError, match=r"without column 'key\.port'"):
        aggregate.apply("evil", 1, stream_pb2.Batch(sequence=1, tables=[table()]), START)


def test_wide_tables_are_bounded_by_the_keys_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_CELLS", 1000)
    aggregate = Aggregate(facts(counter("key.pid", kind=O.HISTOGRAM)))
    a = FakeNode("a", keys=("key.pid",))
    for pid in range(400):
        a.add(pid)
    apply(aggregate, a, a.batch(1))
    b = FakeNode("b", keys=("key.pid",))
    b.add(1, width=4)
    with pytest.raises(ColumnsError, match="too many for its keys"):
        apply(aggregate, b, b.batch(1))


def test_a_table_without_news_is_no_zero_to_an_aggregate_that_heard_none_of_the_stream() -> None:
    node = Rows(1, ())
    node.update(np.zeros((1, 4), np.uint8), np.array([997], np.uint64), _one_row)
    news = node.table()
    assert news is not None
    # The policy was edited while the first was under way: what counted from then on has not changed since.
    aggregate, table = Aggregate(facts(counter())), node.no_table()
    table.policy_uid, table.output, table.epoch, table.generation = UID, "calls", "boot-1:7", 1
    with pytest.raises(ResyncNeeded, match="begins with row 1"):
        aggregate.apply("a", 1, stream_pb2.Batch(sequence=2, time_ns=START, tables=[table]), START)


def _one_row(keys: npt.NDArray[np.uint8]) -> Classified:
    return Classified([()] * len(keys), np.zeros(len(keys), bool), np.zeros(len(keys), np.int64))


def test_rows_that_nobody_introduced_ask_for_a_new_stream() -> None:
    aggregate = Aggregate(facts(counter("pod")))
    with pytest.raises(ResyncNeeded, match="begins with row 3"):
        aggregate.apply("a", 1, stream_pb2.Batch(sequence=9, tables=[table(first_new_row=3)]), START)
    aggregate.apply("a", 1, stream_pb2.Batch(sequence=10, tables=[table()]), START)
    with pytest.raises(ResyncNeeded, match="row 7 comes after row 2"):
        aggregate.apply("a", 1, stream_pb2.Batch(sequence=11, tables=[table(first_new_row=7)]), START)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (chunk([48, 0], end=96), "do not ascend"),
        (chunk([0, 48], end=48), "after the chunk's end"),
        (stream_pb2.EventChunk(policy_uid=UID, output="no", generation=1), "no output 'no' of events"),
        (
            stream_pb2.EventChunk(
                policy_uid=UID, output="execs", generation=1, columns=[columns.column("c", [1])] * 65
            ),
            "65 columns",
        ),
        (
            stream_pb2.EventChunk(policy_uid=UID, output="execs", generation=1, columns=[columns.column("c", [1])]),
            "at most 0",
        ),
    ],
)
def test_a_chunk_that_cannot_be_is_refused(bad: stream_pb2.EventChunk, words: str) -> None:
    aggregate = events_aggregate()
    with pytest.raises(ColumnsError, match=words):
        send_events(aggregate, 1, bad)
    assert ask(aggregate, 10).outputs[0].total.whole == 0


def test_a_clock_that_is_set_back_begins_a_new_window() -> None:
    aggregate = Aggregate(facts(counter()))
    a = FakeNode("a", keys=())
    a.add(count=10)
    apply(aggregate, a, a.batch(100))
    a.add(count=10)
    apply(aggregate, a, a.batch(50))
    assert ask(aggregate, 100).outputs[0].rate_per_second == 0.0
    a.add(count=10)
    apply(aggregate, a, a.batch(60))
    assert ask(aggregate, 100).outputs[0].rate_per_second == 1.0


def test_facts_come_from_a_plan() -> None:
    plan = plan_pb2.Plan(policy_uid="u", name="n", namespace="s", generation=3, scope=plan_pb2.SCOPE_CLUSTER)
    plan.instance.digest = "dd"
    assert PolicyFacts.of(plan) == PolicyFacts("u", "s", "n", 3, 10_000, (), digest="dd", cluster=True)
