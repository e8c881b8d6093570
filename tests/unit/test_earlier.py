"""What only an operator knew is in its report, and the next one's report says that it is gone."""

from __future__ import annotations

from typing import Any

import pytest
from probefleet_core import earlier, report
from probefleet_core.aggregate import Aggregate
from probefleet_wire.v1 import plan_pb2

from tests.fakes.samples import PODS, SECOND, START, UID, FakeNode, chunk, counter, facts

OUTPUTS = counter("pod"), counter(name="execs", kind=plan_pb2.Output.EVENTS)


def sampled(aggregate: Aggregate, *nodes: FakeNode, at: float) -> dict[str, Any]:
    """The report once these nodes, which are all that are selected, have sent what they have."""
    for node in nodes:
        batch = node.batch(at)
        batch.events.append(chunk([48 * index for index in range(5)], epoch=node.epoch))
        aggregate.apply(node.name, node.session, batch, batch.time_ns)
    here = {node.name for node in nodes}
    return report.status(aggregate.result(int(START + at * SECOND), selected_nodes=here, names=PODS.get))


def stored(status: dict[str, Any]) -> dict[str, Any]:
    """As the API server has it."""
    owner = {"kind": "ProbePolicy", "uid": UID, "name": "p", "apiVersion": "probefleet.io/v1alpha1"}
    return {"metadata": {"name": "p", "ownerReferences": [owner]}, "status": status}


def known_before(status: dict[str, Any]) -> earlier.Earlier:
    found = earlier.of_report(stored(status))
    assert found is not None
    assert found[0] == UID
    return found[1]


def nodes() -> tuple[FakeNode, FakeNode]:
    a, b = FakeNode("a"), FakeNode("b")
    a.add("uid-web-1", count=997)
    b.add("uid-cart", count=23)
    return a, b


def test_a_node_that_has_left_is_retired_and_then_forgotten_by_one_operator_after_the_other() -> None:
    a, b = nodes()
    first = Aggregate(facts(*OUTPUTS))
    whole = sampled(first, a, b, at=10)
    assert [each["total"]["value"] for each in whole["outputs"]] == [1020, 10]
    assert not any(name in each for each in whole["outputs"] for name in earlier.FIELDS)
    left = sampled(first, a, at=20)
    assert [(each["total"]["value"], each["retired"]) for each in left["outputs"]] == [(1020, 23), (10, 5)]
    assert left["columns"]["lost"] == "0"

    a.restart_stream(2)
    second = sampled(Aggregate(facts(*OUTPUTS), known_before(left)), a, at=40)
    assert [(each["total"]["value"], each["forgotten"]) for each in second["outputs"]] == [(997, 23), (5, 5)]
    assert not any("retired" in each for each in second["outputs"])
    said = [earlier.words("calls", 23), earlier.words("execs", 5)]
    assert second["uncounted"] == said
    assert second["columns"]["lost"] == "0+?"
    assert [line for line in second["summary"] if "earlier operator" in line] == [
        f"not counted: {each}" for each in said
    ]

    a.restart_stream(3)
    third = sampled(Aggregate(facts(*OUTPUTS), known_before(second)), a, at=60)
    assert [each["forgotten"] for each in third["outputs"]] == [23, 5], "it does not come back"


def test_what_was_counted_before_a_reboot_is_retired() -> None:
    a, _ = nodes()
    aggregate = Aggregate(facts(*OUTPUTS))
    sampled(aggregate, a, at=10)
    a.reboot(2, "boot-2:1", START + 15 * SECOND)
    a.add("uid-web-1", count=3)
    calls = sampled(aggregate, a, at=30)["outputs"][0]
    assert (calls["total"]["value"], calls["retired"]) == (1000, 997)


def test_an_edit_counts_anew_and_misses_nothing() -> None:
    a, b = nodes()
    first = Aggregate(facts(*OUTPUTS))
    sampled(first, a, b, at=10)
    before = known_before(sampled(first, a, at=20))
    a.restart_stream(2)
    a.generation = 2
    edited = sampled(Aggregate(facts(OUTPUTS[0], generation=2), before), a, at=40)
    assert not any(name in each for each in edited["outputs"] for name in earlier.FIELDS)


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"metadata": {"ownerReferences": []}, "status": {"since": "2026-11-27T03:12:00Z"}},
        {"metadata": {"ownerReferences": [{"kind": "ProbePolicy", "uid": UID}]}},
        {"metadata": {"ownerReferences": [{"kind": "ProbePolicy", "uid": UID}]}, "status": {"outputs": []}},
    ],
)
def test_a_report_in_which_nothing_is_counted_says_nothing(report: dict[str, Any]) -> None:
    assert earlier.of_report(report) is None
