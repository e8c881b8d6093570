"""Endpoints: which pod has which address, told to the nodes that ask, in changes that add up to the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_agent import endpoints as told
from probefleet_core import aggregate, endpoints, placement, result
from probefleet_operator import inventory, session
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2

PODS = [f"5f1c0de0-0000-4000-8000-00000000000{n}" for n in range(6)]
ADDRESSES = [f"10.0.0.{n}" for n in range(4)] + ["2001:db8::1"]


class Node:
    """What an agent has heard, by the agent's own code; without a kernel."""

    def __init__(self) -> None:
        self.agent = told.Endpoints()
        self.version = 0

    def hear(self, of: endpoints.Endpoints) -> stream_pb2.Endpoints:
        said = of.since(self.version)
        self.agent.hear(stream_pb2.Endpoints.FromString(said.SerializeToString()))
        self.version = of.version
        return said

    @property
    def holds(self) -> dict[bytes, int]:
        return dict(self.agent._said or {})


def whole(of: endpoints.Endpoints) -> dict[bytes, int]:
    said = of.since(0)
    addresses = [said.addresses[at : at + 16] for at in range(0, len(said.addresses), 16)]
    return dict(zip(addresses, columns.unpack(said.numbers, limit=1 << 17).tolist(), strict=True))


def test_a_pods_addresses_are_its_number_and_go_with_it() -> None:
    book, node = endpoints.Endpoints(), Node()
    assert book.put(PODS[0], ["10.0.0.1", "2001:db8::1"])
    assert node.hear(book).whole
    mapped = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 1])
    assert node.holds[mapped] == endpoints.number(PODS[0])
    assert len(node.holds) == 2
    assert not book.put(PODS[0], ["10.0.0.1", "2001:db8::1"]), "nothing is new"
    assert book.put(PODS[0], [])
    assert not node.hear(book).whole
    assert node.holds == {}
    assert book.pod(endpoints.number(PODS[0])) == PODS[0], "what it counted keeps its name"


def test_an_address_that_another_pod_has_by_now_stays_that_ones() -> None:
    book = endpoints.Endpoints()
    book.put(PODS[0], ["10.0.0.1"])
    book.put(PODS[1], ["10.0.0.1"])
    book.put(PODS[0], ["10.0.0.1"])  # its labels changed; the address is another's by now
    book.put(PODS[0], [])
    assert whole(book) == {endpoints.packed("10.0.0.1"): endpoints.number(PODS[1])}


@given(st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 4)), st.booleans()), max_size=40))
def test_changes_add_up_to_the_whole(steps: list[tuple[int, set[int], bool]]) -> None:
    book, node = endpoints.Endpoints(), Node()
    for pod, addresses, hears in steps:
        book.put(PODS[pod], [ADDRESSES[each] for each in addresses])
        if hears:
            node.hear(book)
            assert node.holds == whole(book)
    node.hear(book)
    assert node.holds == whole(book)


def test_a_node_that_missed_too_much_is_told_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "MAX_CHANGES", 4)
    book, node = endpoints.Endpoints(), Node()
    book.put(PODS[0], ["10.0.0.0"])
    node.hear(book)
    for last in range(1, 7):
        book.put(PODS[1], [f"10.0.1.{last}"])
    assert node.hear(book).whole
    assert node.holds == whole(book) and len(node.holds) == 2


def test_what_finds_no_room_is_counted_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "MAX_ENDPOINTS", 2)
    book, node = endpoints.Endpoints(), Node()
    for index, pod in enumerate(PODS[:3]):
        book.put(pod, [f"10.0.0.{index}"])
    assert node.hear(book).left_out == 1 and len(node.holds) == 2
    book.put(PODS[2], [])
    assert book.since(0).left_out == 0


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"addresses": b"short"}, "16 bytes each"),
        (
            {"addresses": bytes(32), "numbers": columns.pack(np.ones(1, "u8"))},
            "2 addresses of endpoints with 1",
        ),
        ({"numbers": columns.pack(np.ones(0, "u8"))}, "before all of them"),
    ],
)
def test_what_an_agent_cannot_take_is_refused(said: dict[str, Any], why: str) -> None:
    with pytest.raises(columns.ColumnsError, match=why):
        told.Endpoints().hear(stream_pb2.Endpoints(**said))


def pod(name: str, *, host_network: bool = False, phase: str = "Running") -> inventory.Pod:
    return inventory.trim_pod(
        {
            "metadata": {"uid": f"u-{name}", "name": name, "namespace": "shop"},
            "spec": {"nodeName": "n1", "hostNetwork": host_network},
            "status": {"phase": phase, "podIPs": [{"ip": "10.0.0.9"}, {"ip": "2001:db8::9"}]},
        }
    )


def test_pods_in_their_nodes_network_have_no_address_of_their_own() -> None:
    assert pod("web").addresses == ("10.0.0.9", "2001:db8::9")
    assert pod("proxy", host_network=True).addresses == ()


def desire(shares: bool, version: int) -> session.Desire:
    plan = plan_pb2.Plan(policy_uid="p")
    maps = (plan_pb2.ProbeMap(uid=endpoints.UID),) if shares else ()
    return session.Desire(placement.NodeState(plans=(plan,), probe_maps=maps), (), version)


async def test_only_a_node_that_shares_the_map_hears_of_endpoints_and_then_of_changes() -> None:
    book = endpoints.Endpoints()
    book.put(PODS[0], ["10.0.0.1"])
    opened = session.Session(
        stream_pb2.Hello(node="n"),
        None,
        number=1,
        term=1,
        blob_of=lambda _: b"zstd",
        addresses=book,  # type: ignore[arg-type]
    )

    async def pushed(wanted: session.Desire) -> stream_pb2.Push:
        opened.desire(wanted)
        return opened.push().push

    assert not (await pushed(desire(False, 0))).HasField("endpoints")
    first = (await pushed(desire(True, 1))).endpoints
    assert first.whole and len(first.addresses) == 16
    assert not (await pushed(desire(True, 1))).HasField("endpoints"), "nothing is new"
    book.put(PODS[1], ["10.0.0.2"])
    second = (await pushed(desire(True, 2))).endpoints
    assert not second.whole and second.addresses == endpoints.packed("10.0.0.2")
    assert not (await pushed(desire(False, 0))).HasField("endpoints")
    assert (await pushed(desire(True, 3))).endpoints.whole, "its map has gone, and comes anew"


def test_the_report_names_the_pod_on_the_other_side_wherever_it_runs() -> None:
    output = plan_pb2.Output(name="calls", map="m", kind=plan_pb2.Output.TOPK, group_by=["key.other"])
    facts = result.PolicyFacts("p", "shop", "calls", 1, 1_000, (output,))
    merged = aggregate.Aggregate(facts)
    web, gone = (f"{endpoints.MARK}{endpoints.number(uid):016x}" for uid in PODS[:2])
    labels = [web, "(no pod)", gone]
    table = stream_pb2.Table(
        policy_uid="p", output="calls", epoch="b:1", new_rows=3, width=1, generation=1,
        keys=[columns.column("key.other", labels)],
        rows=columns.pack(np.arange(3, dtype="u4")),
        values=columns.pack(np.array([997, 23, 5], "u8")),
    )  # fmt: skip
    merged.apply("n1", 1, stream_pb2.Batch(sequence=1, time_ns=1, tables=[table]), 1)
    known = {web: result.PodName("shop", "web-1", nodes=("n2",))}
    found = merged.result(1, selected_nodes=frozenset({"n1"}), names=known.get).outputs[0].total
    assert dict(zip(found.labels, found.values[:, 0].tolist(), strict=True)) == {
        ("shop/web-1",): 997,
        ("(no pod)",): 23,
        (gone,): 5,
    }
