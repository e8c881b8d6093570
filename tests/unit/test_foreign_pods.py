"""A node is believed about its own pods only: what it says of others' is counted, under no name, and told."""

from __future__ import annotations

import dataclasses

import pytest
from probefleet_core import aggregate, events
from probefleet_core.result import PodName, Result
from probefleet_wire.v1 import plan_pb2

from tests.fakes.samples import PODS, SECOND, START, FakeNode, chunk, counter, facts

AT_A = {uid: dataclasses.replace(name, nodes=("a",)) for uid, name in PODS.items()}
WORDS = "node b sent counts of pods that are not on it: they are under (unknown)"


def asked(merged: aggregate.Aggregate, names: dict[str, PodName]) -> Result:
    return merged.result(START + 10 * SECOND, selected_nodes={"a", "b"}, names=names.get)


def counted(*nodes: FakeNode, group_by: str = "pod") -> aggregate.Aggregate:
    merged = aggregate.Aggregate(facts(counter(group_by)))
    for node in nodes:
        merged.apply(node.name, node.session, node.batch(10), START + 10 * SECOND)
    return merged


def totals(result: Result) -> dict[object, int]:
    total = result.outputs[0].total
    return {label[0]: int(value) for label, value in zip(total.labels, total.weights, strict=True)}


@pytest.mark.parametrize(
    ("group_by", "name"), [("pod", "web-1"), ("workload", "web"), ("namespace", "shop"), ("container", "nginx")]
)
def test_a_claim_on_another_nodes_pod_is_under_no_name(group_by: str, name: str) -> None:
    columns = ("pod_uid", "container_id") if group_by == "container" else ("pod_uid",)
    key = ("uid-web-1", "c1")[: len(columns)]
    honest, hostile = FakeNode("a", keys=columns), FakeNode("b", keys=columns)
    honest.add(*key, count=997)
    hostile.add(*key, count=23)
    merged = counted(honest, hostile, group_by=group_by)
    result = asked(merged, AT_A)
    assert totals(result) == {name: 997, "(unknown)": 23}
    assert result.outputs[0].uncounted == (WORDS,)
    assert merged.foreign == 1
    assert asked(merged, AT_A).outputs[0].uncounted == (WORDS,), "told once is told always"


def test_the_order_of_claims_makes_no_difference() -> None:
    honest, hostile = FakeNode("a"), FakeNode("b")
    honest.add("uid-web-1", count=997)
    hostile.add("uid-web-1", count=23)
    assert totals(asked(counted(hostile, honest), AT_A)) == {"web-1": 997, "(unknown)": 23}


def test_a_claim_before_anybody_knows_the_pod_is_judged_when_it_is_known() -> None:
    hostile = FakeNode("b")
    hostile.add("uid-web-1", count=23)
    merged = counted(hostile)
    assert totals(asked(merged, {})) == {"uid-web-1": 23}, "nobody can tell yet"
    assert totals(asked(merged, AT_A)) == {"(unknown)": 23}


def test_a_pod_of_half_a_second_has_its_name_when_its_news_come_after_its_counts() -> None:
    honest = FakeNode("a")
    honest.add("uid-web-1", count=997)
    merged = counted(honest)
    assert totals(asked(merged, {})) == {"uid-web-1": 997}
    assert totals(asked(merged, AT_A)) == {"web-1": 997}
    assert merged.foreign == 0


def test_a_static_pods_manifest_may_be_on_many_nodes() -> None:
    one, other = FakeNode("a"), FakeNode("b")
    one.add("uid-web-1", count=997)
    other.add("uid-web-1", count=23)
    both = {"uid-web-1": dataclasses.replace(PODS["uid-web-1"], nodes=("a", "b"))}
    assert totals(asked(counted(one, other), both)) == {"web-1": 1020}


def test_host_and_unknown_stay_one_row_of_all_nodes() -> None:
    one, other = FakeNode("a"), FakeNode("b")
    for node in (one, other):
        node.add("", count=5)
        node.add("?", count=7)
    assert totals(asked(counted(one, other), AT_A)) == {"(host)": 10, "(unknown)": 14}


def test_records_of_others_pods_have_no_names() -> None:
    output = plan_pb2.Output(name="execs", kind=plan_pb2.Output.EVENTS)
    merged = aggregate.Aggregate(facts(output))
    for node in ("a", "b"):
        batch = FakeNode(node).batch(10, empty=True)
        batch.events.append(chunk([48]))
        merged.apply(node, 1, batch, START + 10 * SECOND)
    result = asked(merged, AT_A)
    kept = result.outputs[0].events
    assert kept is not None
    found = {record["node"]: (record["namespace"], record["pod"], record["container"]) for record in kept.records}
    assert found == {"a": ("shop", "web-1", "nginx"), "b": ("(unknown)", "(unknown)", "(unknown)")}
    assert result.outputs[0].uncounted == (WORDS,)


def test_of_nodes_whose_records_were_judged_a_bounded_number_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_FOREIGN", 2)
    merged = aggregate.Aggregate(facts(counter(name="execs", kind=plan_pb2.Output.EVENTS)))
    for node in ("b", "c", "d"):
        batch = FakeNode(node).batch(10, empty=True)
        batch.events.append(chunk([0]))
        merged.apply(node, 1, batch, START + 10 * SECOND)
    asked(merged, AT_A)
    assert merged.foreign == 2
