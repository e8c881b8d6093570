"""What the operator says: a policy's status, Prometheus' families, the query API's answers."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from probefleet_core import aggregate, placement, result, values
from probefleet_operator import exposition, query, session, status
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2
from prometheus_client import CollectorRegistry, generate_latest

NOW = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)
KERNELS = [placement.KernelClass(release, "#1", "x86_64") for release in ("6.1.0", "6.12.0")]
READY, FAILED = stream_pb2.PolicyStatus.READY, stream_pb2.PolicyStatus.FAILED


def node(number: int, state: int | None = READY, *, generation: int = 2, message: str = "") -> status.NodeFacts:
    said = None
    if state is not None:
        said = stream_pb2.PolicyStatus(
            policy_uid="u",
            generation=generation,
            state=state,
            reason="VerifierRefused" if message else "",
            message=message,
        )
    return status.NodeFacts(values.NodeName(f"node{number}"), KERNELS[number % 2], state is not None, said)


def facts(*nodes: status.NodeFacts, **changes: Any) -> status.Facts:
    given: dict[str, Any] = {
        "generation": 2,
        "settled": True,
        "refusal": None,
        "suspended": False,
        "expired": False,
        "placed": True,
        "nodes": nodes,
        "held": [],
        "program": "catalog/syscount",
        "coverage": (len(nodes), len(nodes)),
        "rate": "2.1M/s",
        "overhead": "0.31%",
        "cost": None,
    }
    return status.Facts(**(given | changes))


def rendered(given: status.Facts, previous: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return status.status_of(given, previous=previous or [], now=NOW)


def conditions(body: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {each["type"]: (each["status"], each["reason"]) for each in body["conditions"]}


def test_all_is_well() -> None:
    body = rendered(facts(node(0), node(1)))
    assert body["columns"] == {
        "program": "catalog/syscount",
        "nodes": "2/2",
        "rate": "2.1M/s",
        "overhead": "0.31%",
        "status": "Ready",
        "failure": "",
    }
    assert {kind: state for kind, (state, _) in conditions(body).items()} == {
        "Accepted": "True",
        "Programmed": "True",
        "Reporting": "True",
        "WithinBudget": "True",
        "Ready": "True",
    }
    assert body["observedGeneration"] == 2
    assert [row["ready"] for row in body["kernels"]] == [1, 1]
    assert all("verifiedInstructions" not in row for row in body["kernels"]), "before Linux 5.16 nobody knows"


def test_the_kernels_say_what_their_verifiers_went_through() -> None:
    nodes = [node(0), node(1), node(2)]  # of two kernels in turn
    for each, count in zip(nodes, (997, 23, 991), strict=True):
        assert each.said is not None
        each.said.verified_instructions = count
    assert [row["verifiedInstructions"] for row in rendered(facts(*nodes))["kernels"]] == [997, 23]


@pytest.mark.parametrize(
    ("given", "word", "ready"),
    [
        (facts(refusal=("Invalid", "spec.program: no")), "Invalid", ("False", "Invalid")),
        (facts(settled=False, coverage=None), "Progressing", ("False", "Planning")),
        (facts(suspended=True), "Suspended", ("True", "Suspended")),
        (facts(expired=True), "Expired", ("False", "Expired")),
        (facts(coverage=None), "Degraded", ("False", "NoNodes")),
        (facts(node(0), node(1, generation=1), coverage=(2, 2)), "Progressing", ("False", "RollingOut")),
        (facts(node(0), coverage=None), "Progressing", ("False", "NoSamples")),
        (facts(node(0), node(1), coverage=(1, 2)), "Degraded", ("False", "Coverage")),
        (facts(node(0), node(1, None), coverage=(1, 2)), "Degraded", ("False", "NodesAway")),
        (facts(node(0), node(1, FAILED, message="no")), "Degraded", ("False", "NodesFailed")),
        (facts(node(0, FAILED, message="no"), coverage=(0, 1)), "Failed", ("False", "NodesFailed")),
        (facts(node(0, stream_pb2.PolicyStatus.DETACHED, message="x")), "Failed", ("False", "NodesFailed")),
    ],
)
def test_the_word_and_the_ready_condition(given: status.Facts, word: str, ready: tuple[str, str]) -> None:
    body = rendered(given)
    assert body["columns"]["status"] == word
    assert conditions(body)["Ready"] == ready


def test_a_condition_keeps_its_time_until_it_changes() -> None:
    first = rendered(facts(node(0)))
    old = [{**each, "lastTransitionTime": "2020-01-01T00:00:00Z"} for each in first["conditions"]]
    again = rendered(facts(node(0), node(1, FAILED, message="no")), old)
    times = {each["type"]: each["lastTransitionTime"] for each in again["conditions"]}
    assert times["Accepted"] == "2020-01-01T00:00:00Z"
    assert times["Programmed"] == "2026-05-01T00:00:00Z"


def test_failures_are_grouped_and_bounded_on_five_thousand_nodes() -> None:
    nodes = [node(number, FAILED, message=f"{'x' * 4000} kind {number % 30}") for number in range(5000)]
    body = rendered(facts(*nodes))
    assert len(body["failures"]) == status.MAX_FAILURES
    assert body["failures"][0]["nodes"] > 150
    assert len(json.dumps(body)) < 80_000
    assert body["nodes"] == {"desired": 5000, "updated": 0, "ready": 0, "failed": 5000}


def test_held_nodes_are_told_with_the_failure_that_holds_them() -> None:
    held = placement.Held(values.PolicyUid("u"), KERNELS[0], values.NodeName("node0"), "VerifierRefused", "no", 40)
    body = rendered(facts(node(0, FAILED, message="no"), held=[held]))
    assert body["failures"][0]["held"] == 40


def test_a_status_longer_than_any_screen_is_cut_where_it_comes_in() -> None:
    async def main() -> None:
        hello = stream_pb2.Hello(node="n")
        opened = session.Session(hello, None, number=1, term=1, blob_of=lambda _: None)
        long = stream_pb2.PolicyStatus(policy_uid="u", reason="r" * 9999, message="m" * 9999, log_tail="l" * 9999)
        opened.take_status(stream_pb2.Status(policies=[long]))
        assert opened.running is not None
        said = opened.running[values.PolicyUid("u")]
        assert (len(said.reason), len(said.message), len(said.log_tail)) == (128, 4096, 4096)

    asyncio.run(main())


def test_a_node_that_has_applied_a_higher_term_is_a_failure_that_says_what_to_do() -> None:
    async def main() -> None:
        hello = stream_pb2.Hello(node="n", applied_term=9, applied_version=3)
        opened = session.Session(hello, None, number=1, term=7, blob_of=lambda _: None)
        said = opened.said_of(values.PolicyUid("u"))
        assert opened.ahead and said is not None
        assert (said.state, said.reason) == (FAILED, "NewerOperator")
        assert "term 9; this operator's is 7" in said.message and "probefleet.io/term" in said.message
        body = rendered(facts(node(0), dataclasses.replace(node(1), said=said)))
        assert body["nodes"]["failed"] == 1 and body["failures"][0]["reason"] == "NewerOperator"

    asyncio.run(main())


def test_a_node_that_gets_ahead_during_its_session_is_noticed() -> None:
    async def main() -> None:
        opened = session.Session(stream_pb2.Hello(node="n"), None, number=1, term=7, blob_of=lambda _: None)
        opened.take_status(stream_pb2.Status(term=7, version=1))
        assert not opened.ahead and opened.said_of(values.PolicyUid("u")) is None
        opened.take_status(stream_pb2.Status(term=8, version=1))
        assert opened.ahead

    asyncio.run(main())


# Prometheus.


def merged(
    rows: int, *, kind: int = plan_pb2.Output.COUNTER, width: int = 1, at_seconds: float = 5.5, again: bool = True
) -> result.Result:
    """A real aggregate's result with that many rows, of a node whose first sample came at 2 s, and that samples on."""
    output = plan_pb2.Output(name="calls", map="calls", kind=kind, group_by=["key.port"], unit="calls")
    known = aggregate.Aggregate(
        aggregate.PolicyFacts(
            uid="u", namespace="shop", name="calls", generation=1, interval_ms=1000, outputs=(output,)
        )
    )
    table = stream_pb2.Table(
        policy_uid="u",
        output="calls",
        epoch="b:1",
        generation=1,
        new_rows=rows,
        keys=[stream_pb2.Column(name="key.port", integers=columns.pack(np.arange(rows, dtype=np.uint64)))],
        rows=columns.pack(np.arange(rows, dtype=np.uint32)),
        width=width,
        values=columns.pack(np.ones(rows * width, dtype=np.uint64) * 3),
        since_ns=1,
    )
    known.apply("node1", 1, stream_pb2.Batch(sequence=1, time_ns=2_000_000_000, tables=[table]), 2_000_000_000)
    if again:
        later = stream_pb2.Batch(sequence=2, time_ns=5_000_000_000)
        later.instances.add(policy_uids=["u"])
        known.apply("node1", 1, later, later.time_ns)
    return known.result(int(at_seconds * 1e9), selected_nodes={"node1", "node2"}, names=lambda _: None)


def scraped(*results: result.Result, limit: int = 2000) -> str:
    registry = CollectorRegistry()
    registry.register(exposition.OutputsCollector(lambda: results, series_per_policy=limit))
    return generate_latest(registry).decode()


def test_counters_are_exported_with_their_keys() -> None:
    text = scraped(merged(2))
    assert 'probefleet_output_total{key_port="0",namespace="shop",output="calls",policy="calls"} 3.0' in text
    assert 'probefleet_policy_coverage_ratio{namespace="shop",policy="calls"} 0.5' in text


def test_counters_wait_until_all_nodes_have_come_or_could_have() -> None:
    for kind, family in (
        (plan_pb2.Output.COUNTER, "output_total{"), (plan_pb2.Output.HISTOGRAM, "output_distribution_count{")
    ):  # fmt: skip
        text = scraped(merged(2, kind=kind, at_seconds=2.5, again=False))
        assert 'probefleet_policy_coverage_ratio{namespace="shop",policy="calls"} 0.5' in text
        assert family not in text and "lost_total{" not in text
        text = scraped(merged(2, kind=kind))
        assert family in text and "lost_total{" in text
    text = scraped(merged(2, kind=plan_pb2.Output.GAUGE, at_seconds=2.5, again=False))
    assert "output_value{" in text, "it is of now"


def test_a_gauge_of_a_node_that_is_silent_is_not_exported() -> None:
    assert "probefleet_output_value{" in scraped(merged(2, kind=plan_pb2.Output.GAUGE))
    assert "probefleet_output_value{" not in scraped(merged(2, kind=plan_pb2.Output.GAUGE, at_seconds=60))


def test_ends_of_buckets_are_whole() -> None:
    text = scraped(merged(1, kind=plan_pb2.Output.HISTOGRAM, width=26))
    ends = [float(end) for end in re.findall(r'le="([^"]+)"', text)]
    assert ends == [*(2.0**slot for slot in range(1, 26)), float("inf")]


def test_what_is_over_the_limit_is_left_out_and_counted() -> None:
    text = scraped(merged(100), limit=30)
    assert len(re.findall(r"^probefleet_output_total\{", text, re.M)) == 30
    assert 'probefleet_series_left_out{namespace="shop",policy="calls"} 70.0' in text


def test_histograms_have_cumulative_buckets() -> None:
    text = scraped(merged(1, kind=plan_pb2.Output.HISTOGRAM, width=4))
    buckets = re.findall(r'^probefleet_output_distribution_bucket\{.*le="([^"]+)".*\} (\S+)$', text, re.M)
    assert [float(count) for _, count in buckets] == [3.0, 6.0, 9.0, 12.0]
    assert buckets[-1][0] == "+Inf"
    assert "probefleet_output_distribution_count" in text


@pytest.mark.parametrize(
    ("group", "label"),
    [("key.dport", "key_dport"), ("namespace", "pod_namespace"), ("key", "key"), ("policy", "by_policy")],
)
def test_label_names(group: str, label: str) -> None:
    assert exposition.label_name(group) == label


# The query API.


class FakeSource:
    """Ten records that come in two halves; no aggregator behind it."""

    def __init__(self) -> None:
        self.records = [{"comm": f"c{number}"} for number in range(5)]
        self.news = asyncio.Event()

    def find(self, namespace: str, name: str) -> values.PolicyUid | None:
        return values.PolicyUid("u") if (namespace, name) == ("shop", "execs") else None

    def live_report(self, _: values.PolicyUid) -> dict[str, Any] | None:
        return None

    def node_rows(self, _: values.PolicyUid) -> list[dict[str, Any]]:
        return [{"name": "node1"}]

    def event_outputs(self, _: values.PolicyUid) -> tuple[str, ...]:
        return ("execs",)

    def event_page(self, _: values.PolicyUid, output: str, cursor: int) -> dict[str, Any]:
        if output != "execs":
            raise KeyError(output)
        return {"cursor": len(self.records), "missed": 0, "records": self.records[cursor:]}

    async def wait_news(self, seconds: float) -> None:
        self.news.clear()
        async with asyncio.timeout(seconds):
            await self.news.wait()


async def test_events_are_followed_line_by_line_from_a_cursor() -> None:
    source, tokens = FakeSource(), query.Tokens(b"key")
    answers = query.QueryApi()
    application = web.Application()
    application.router.add_routes(answers.routes())
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}/query/v1/namespaces/shop/probepolicies/execs"
    headers = {query.HEADER: tokens.of("u")}
    try:
        async with aiohttp.ClientSession(headers=headers) as client:
            async with client.get(f"{base}/nodes") as response:
                assert response.status == 503, "nobody leads yet"
            answers.source, answers.tokens = source, tokens
            async with client.get(f"{base}/events", params={"since": "3"}) as response:
                lines = (await response.text()).splitlines()
            assert [json.loads(line)["records"] for line in lines] == [[{"comm": "c3"}, {"comm": "c4"}]]
            async with client.get(f"{base}/events", params={"follow": "true"}) as response:
                first = json.loads(await response.content.readline())
                assert (first["cursor"], len(first["records"])) == (5, 5)
                source.records += [{"comm": "late"}]
                source.news.set()
                # News may come while the follower sleeps; the next ones wake it.
                waker = asyncio.create_task(wake(source))
                second = json.loads(await response.content.readline())
                waker.cancel()
                assert second["records"] == [{"comm": "late"}]
            for path, code in (("events?output=other", 404), ("events?since=x", 400), ("report", 404)):
                async with client.get(f"{base}/{path}") as response:
                    assert response.status == code
            async with client.get(f"{base}/nodes", headers={query.HEADER: "wrong"}) as response:
                assert response.status == 403
            async with client.get(f"{base.replace('execs', 'others')}/nodes") as response:
                assert response.status == 403, "as if it were there"
    finally:
        await runner.cleanup()


async def wake(source: FakeSource) -> None:
    while True:
        source.news.set()
        await asyncio.sleep(0.05)


def test_operator_is_no_package() -> None:
    assert not (Path(__file__).parents[2] / "operator" / "__init__.py").exists(), "it would shadow Python's own module"
