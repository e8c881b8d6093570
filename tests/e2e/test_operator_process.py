"""The operator as a process against a real API server, with agents that are real to the wire and have no kernel.

What the cluster's tests show with real agents is shown here without: apply → push → status → report, deletion, restarts
while the API server is away, and everything that must be refused. Needs the binaries of tests/cluster.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import tempfile
import urllib.error
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from probefleet_core import earlier
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.fakes import control_plane, operator_process
from tests.fakes.agent import FakeAgent, counter_table, everything_ready
from tests.fakes.control_plane import ControlPlane
from tests.fakes.operator_process import OperatorProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

NAMESPACE = "probefleet"
POLICIES = "/apis/probefleet.io/v1alpha1/namespaces/shop/probepolicies"
REPORTS = "/apis/probefleet.io/v1alpha1/namespaces/shop/probereports"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    with tempfile.TemporaryDirectory() as folder, control_plane.running(Path(folder)) as running:
        running.install_crds(ROOT / "charts" / "probefleet" / "files" / "crds")
        running.create("/api/v1/namespaces", {"metadata": {"name": "shop"}})
        running.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        running.add_node("node1", labels={"pool": "web"})
        running.add_node("node2")
        yield running


def process_of(plane: ControlPlane, folder: Path, name: str, *options: str, **more: Any) -> OperatorProcess:
    """An operator with a catalog of one probe, so that these tests wait for no other."""
    catalog = folder / "bpf"
    catalog.mkdir(exist_ok=True)
    for each in ("syscount", "include"):
        if not (catalog / each).exists():
            (catalog / each).symlink_to(ROOT / "bpf" / each)
    return OperatorProcess(
        plane.kubeconfig,
        folder / f"{name}.log",
        options=("--report-seconds=0.5", f"--catalog={catalog}", *options),
        environment={"PROBEFLEET_CATALOG_OBJECTS": str(ROOT / "build" / "bpf")},
        **more,
    )


@pytest.fixture
def operator(plane: ControlPlane, tmp_path: Path) -> Iterator[OperatorProcess]:
    process = process_of(plane, tmp_path, "operator")
    with operator_process.running(process):
        yield process
    for policy in plane.request("GET", POLICIES)["items"]:
        plane.request("DELETE", f"{POLICIES}/{policy['metadata']['name']}")


@asynccontextmanager
async def agent_of(
    plane: ControlPlane, operator: OperatorProcess, node: str, **options: Any
) -> AsyncIterator[FakeAgent]:
    """An agent on a node, connected."""
    options = {"ca": plane.ca_bundle(NAMESPACE), "token": plane.agent_token(NAMESPACE, node), **options}
    async with FakeAgent(f"127.0.0.1:{operator.port}", node, **options) as agent:
        await agent.connect()
        yield agent


def manifest(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"program": {"catalog": {"name": "syscount"}}, "interval": "1s", **spec},
    }


def apply(plane: ControlPlane, name: str, **spec: Any) -> dict[str, Any]:
    plane.kubectl("apply", "-f", "-", stdin=json.dumps(manifest(name, **spec)))
    return plane.request("GET", f"{POLICIES}/{name}")


async def eventually(read: Callable[[], Any], wanted: Callable[[Any], Any], *, seconds: float = 20) -> Any:
    """Read until it is as wanted; the API server is polled as a user polls it."""
    seen: Any = None
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    seen = await asyncio.to_thread(read)
                    if wanted(seen):
                        return seen
                except (urllib.error.HTTPError, KeyError) as problem:
                    seen = problem
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"never as wanted; last seen: {seen!r}")


def has_policy(*names: str) -> Callable[[stream_pb2.Push], bool]:
    return lambda push: sorted(plan.name for plan in push.plans) == sorted(names)


def first_counter(plan: plan_pb2.Plan) -> plan_pb2.Output:
    return next(each for each in plan.outputs if each.kind in (plan_pb2.Output.COUNTER, plan_pb2.Output.TOPK))


def keys_for(output: plan_pb2.Output, pods: list[str]) -> list[stream_pb2.Column]:
    """Key columns as the agent sends them: identities as uids, other fields a constant."""
    from probefleet_core.keys import wire_columns  # what the aggregator asks for

    columns = []
    for name in wire_columns(output.group_by):
        if name != "node":
            texts = pods if name == "pod_uid" else [f"{name}-0"] * len(pods)
            columns.append((name, texts))
    return [string_column(name, texts) for name, texts in columns]


def string_column(name: str, texts: list[str]) -> stream_pb2.Column:
    import numpy as np
    from probefleet_wire import columns

    distinct = list(dict.fromkeys(texts))
    index = np.array([distinct.index(text) for text in texts], dtype=np.uint32)
    return stream_pb2.Column(name=name, strings=stream_pb2.Strings(distinct=distinct, index=columns.pack(index)))


def counted(plan: plan_pb2.Plan, counts: dict[str, int]) -> stream_pb2.Table:
    """A table of the plan's first counter: pod uid → count."""
    output = first_counter(plan)
    table = counter_table(plan, output.name, counts)
    del table.keys[:]
    table.keys.extend(keys_for(output, list(counts)))
    return table


async def test_apply_push_status_report_delete(plane: ControlPlane, operator: OperatorProcess) -> None:
    web = plane.add_pod("shop", "web-1", "node1", labels={"app": "web"})["metadata"]["uid"]
    cart = plane.add_pod("shop", "cart-1", "node2", labels={"app": "cart"})["metadata"]["uid"]
    async with agent_of(plane, operator, "node1") as one, agent_of(plane, operator, "node2") as two:
        apply(plane, "calls", outputs=[{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["pod"]}])
        first, second = await one.pushed(has_policy("calls")), await two.pushed(has_policy("calls"))
        assert len(first.blobs) == 1
        assert web in first.known_pod_uids
        assert [list(each.pod_uids) for each in second.selections] == [[cart]], (
            "only this namespace's pods of this node"
        )
        status = await eventually(
            lambda: plane.request("GET", f"{POLICIES}/calls")["status"], lambda seen: seen["nodes"]["ready"] == 2
        )
        assert status["observedGeneration"] == 1
        assert {each["type"]: each["status"] for each in status["conditions"]}["Programmed"] == "True"

        await one.send_batch(tables=[counted(first.plans[0], {web: 997})])
        await two.send_batch(tables=[counted(second.plans[0], {cart: 23})])
        await one.acknowledged(1)
        await two.acknowledged(1)
        report = await eventually(
            lambda: plane.request("GET", f"{REPORTS}/calls"),
            lambda seen: seen["status"]["columns"]["coverage"] == "2/2",
        )
        total = report["status"]["outputs"][0]["total"]
        assert total["value"] == 1020
        assert {row["key"][0]: row["value"] for row in total["rows"]} == {"web-1": 997, "cart-1": 23}
        assert report["metadata"]["ownerReferences"][0]["name"] == "calls"
        # A new stream sends everything again, and that changes nothing.
        await one.disconnect()
        await one.connect()
        await one.send_status(everything_ready(first))
        await one.send_batch(tables=[counted(first.plans[0], {web: 997})])
        await one.acknowledged(1)
        base, token = "/query/v1/namespaces/shop/probepolicies/calls", report["status"]["query"]["token"]
        live = json.loads(operator.get(f"{base}/report", token=token)[1])
        assert live["status"]["outputs"][0]["total"]["value"] == 1020

        assert not [line for line in operator.log() if line["event"] in ("cannot write", "cannot render")]
        plane.request("DELETE", f"{POLICIES}/calls")
        gone = await one.pushed(has_policy())
        assert (gone.term, gone.version > first.version) == (first.term, True)
        await eventually(lambda: plane.request("GET", REPORTS)["items"], lambda seen: not seen)


async def test_an_edit_is_one_new_push_with_the_new_generation(plane: ControlPlane, operator: OperatorProcess) -> None:
    async with agent_of(plane, operator, "node1") as agent:
        apply(plane, "edited", nodes={"selector": {"matchLabels": {"pool": "web"}}})
        await agent.pushed(has_policy("edited"))
        apply(plane, "edited", nodes={"selector": {"matchLabels": {"pool": "web"}}}, interval="2s")
        push = await agent.pushed(lambda push: any(plan.interval_ms == 2000 for plan in push.plans))
        assert push.plans[0].generation == 2
        assert not push.blobs, "the object went over this stream already"
        await eventually(
            lambda: plane.request("GET", f"{POLICIES}/edited")["status"],
            lambda seen: seen["observedGeneration"] == 2 and seen["nodes"]["updated"] == 1,
        )


async def test_suspend_and_ttl_remove_programs_and_keep_the_policy(
    plane: ControlPlane, operator: OperatorProcess
) -> None:
    async with agent_of(plane, operator, "node1") as agent:
        apply(plane, "short", ttl="2s")
        apply(plane, "paused", suspend=True)
        await agent.pushed(has_policy("short"))
        await agent.pushed(has_policy())
        status = await eventually(
            lambda: plane.request("GET", f"{POLICIES}/short")["status"],
            lambda seen: {each["type"]: each["reason"] for each in seen["conditions"]}["Ready"] == "Expired",
        )
        assert status["columns"]["status"] == "Expired"
        await eventually(
            lambda: plane.request("GET", f"{POLICIES}/paused")["status"]["columns"]["status"],
            lambda seen: seen == "Suspended",
        )


COUNTED = {"outputs": [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["pod"]}]}


def total_of(plane: ControlPlane, name: str) -> dict[str, Any]:
    """The status of its report, and in it `calls`, which is what its only output has in total."""
    status: dict[str, Any] = plane.request("GET", f"{REPORTS}/{name}")["status"]
    (output,) = status["outputs"]
    return {**status, "calls": output["total"]["value"], **{name: output.get(name, 0) for name in earlier.FIELDS}}


async def test_what_was_counted_stays_while_suspended_and_when_the_operator_is_another(
    plane: ControlPlane, operator: OperatorProcess
) -> None:
    pod = plane.add_pod("shop", "web-1", "node1")["metadata"]["uid"]
    async with agent_of(plane, operator, "node1") as agent:
        apply(plane, "measured", **COUNTED)
        push = await agent.pushed(has_policy("measured"))
        await agent.send_batch(tables=[counted(push.plans[0], {pod: 997})])
        await eventually(lambda: total_of(plane, "measured"), lambda seen: seen["calls"] == 997)
        apply(plane, "measured", suspend=True, **COUNTED)
        nothing = await agent.pushed(has_policy())
        await eventually(
            lambda: plane.request("GET", f"{POLICIES}/measured")["status"],
            lambda seen: (seen["observedGeneration"], seen["columns"]["status"]) == (2, "Suspended"),
        )
        # Each decision is followed by all reports, which carry whole seconds.
        suspended = datetime.now(UTC)
        await asyncio.sleep(1 - suspended.microsecond / 1e6)
        apply(plane, "later")
        kept = await eventually(
            lambda: total_of(plane, "measured"), lambda seen: datetime.fromisoformat(seen["time"]) > suspended
        )
        assert (kept["calls"], kept["retired"], kept["columns"]["coverage"]) == (997, 997, "0/0")
        assert (kept["columns"]["rate"], kept["outputs"][0]["window"]["value"]) == ("0/s", 0), "of no node"
        operator.kill()
        operator.start()
        operator.wait_ready()
        apply(plane, "another")
        await eventually(lambda: plane.request("GET", f"{REPORTS}/another"), lambda seen: "status" in seen)
        assert total_of(plane, "measured")["calls"] == 997, "no node can tell it again"
        await agent.connect()
        await agent.send_status(everything_ready(nothing))
        apply(plane, "measured", suspend=False, **COUNTED)
        await eventually(lambda: total_of(plane, "measured"), lambda seen: seen["observedGeneration"] == 3)
        assert total_of(plane, "measured")["calls"] == 0, "an edit counts anew"


async def test_what_only_the_operator_before_knew_is_said_to_be_missing(
    plane: ControlPlane, operator: OperatorProcess
) -> None:
    plane.add_node("node3")
    pods = {node: plane.add_pod("shop", f"web-{node}", node)["metadata"]["uid"] for node in ("node1", "node3")}
    async with agent_of(plane, operator, "node1") as agent:
        async with agent_of(plane, operator, "node3") as other:
            apply(plane, "fleet", **COUNTED)
            for each, node, calls in ((agent, "node1", 997), (other, "node3", 23)):
                before = await each.pushed(has_policy("fleet"))
                await each.send_batch(tables=[counted(before.plans[0], {pods[node]: calls})])
            await eventually(lambda: total_of(plane, "fleet"), lambda seen: seen["calls"] == 1020)
        plane.request("DELETE", "/api/v1/nodes/node3")
        left = await eventually(lambda: total_of(plane, "fleet"), lambda seen: seen["retired"])
        assert (left["calls"], left["retired"], left["columns"]["lost"]) == (1020, 23, "0")
        operator.kill()
        operator.start()
        operator.wait_ready()
        await agent.connect()
        await agent.send_status(everything_ready(before))
        again = await agent.pushed(lambda push: push.term > before.term and has_policy("fleet")(push))
        await agent.send_batch(tables=[counted(again.plans[0], {pods["node1"]: 997})])
        now = await eventually(lambda: total_of(plane, "fleet"), lambda seen: seen["calls"] == 997)
        assert (now["retired"], now["forgotten"], now["columns"]["lost"]) == (0, 23, "0+?")
        assert now["uncounted"] == [earlier.words("calls", 23)]


async def test_a_failure_stands_in_the_status_and_as_an_event(plane: ControlPlane, operator: OperatorProcess) -> None:
    def refused(push: stream_pb2.Push) -> stream_pb2.Status:
        said = everything_ready(push)
        for each in said.policies:
            each.state = stream_pb2.PolicyStatus.FAILED
            each.reason, each.message = "VerifierRefused", "syscount: R1 invalid mem access"
            each.log_tail = "0: (bf) r6 = r1"
        return said

    async with agent_of(plane, operator, "node1", answer=refused), agent_of(plane, operator, "node2"):
        apply(plane, "broken")
        status = await eventually(
            lambda: plane.request("GET", f"{POLICIES}/broken")["status"], lambda seen: seen["failures"]
        )
        assert status["failures"][0]["reason"] == "VerifierRefused"
        assert status["failures"][0]["example"] == "node1"
        events = "/apis/events.k8s.io/v1/namespaces/shop/events"
        found = await eventually(
            lambda: [each for each in plane.request("GET", events)["items"] if each["regarding"]["name"] == "broken"],
            bool,
        )
        assert "node node1" in found[0]["note"]
        assert found[0]["reason"] == "VerifierRefused"


async def test_a_policy_that_cannot_be_planned_is_refused_in_words(
    plane: ControlPlane, operator: OperatorProcess
) -> None:
    async with agent_of(plane, operator, "node1") as agent:
        apply(plane, "misspelt", program={"catalog": {"name": "syscuont"}})
        apply(plane, "fine")
        await agent.pushed(lambda push: any(plan.name == "fine" for plan in push.plans))
        status = await eventually(
            lambda: plane.request("GET", f"{POLICIES}/misspelt")["status"],
            lambda seen: seen["columns"]["status"] == "Invalid",
        )
        accepted = next(each for each in status["conditions"] if each["type"] == "Accepted")
        assert "syscount" in accepted["message"], "it says what was probably meant"


SHARED = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, %s);
	__type(value, __u64);
} seen SEC(".maps");
SEC("tracepoint/syscalls/sys_enter_getppid")
int count(void *context)
{
	%s key = 1;
	__u64 one = 1, *value = bpf_map_lookup_elem(&seen, &key);
	if (value)
		__sync_fetch_and_add(value, 1);
	else
		bpf_map_update_elem(&seen, &key, &one, BPF_ANY);
	return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""


def shared_by(source: str) -> dict[str, Any]:
    return {
        "scope": "Cluster",
        "program": {"c": {"source": source}},
        "maps": [{"name": "seen", "share": {"probeMap": "seen"}}],
    }


async def test_c_is_compiled_maps_are_shared_and_mistakes_are_words(
    plane: ControlPlane, operator: OperatorProcess
) -> None:
    maps = "/apis/probefleet.io/v1alpha1/namespaces/shop/probemaps"
    plane.create(
        maps,
        {
            "apiVersion": "probefleet.io/v1alpha1",
            "kind": "ProbeMap",
            "metadata": {"name": "seen"},
            "spec": {"type": "hash", "maxEntries": 64, "key": "u32", "value": "u64"},
        },
    )

    def answer(push: stream_pb2.Push) -> stream_pb2.Status:
        said = everything_ready(push)
        for each in push.probe_maps:
            said.probe_maps.add(uid=each.uid, kernel_map_id=7, bytes=4096)
        return said

    async with agent_of(plane, operator, "node1", answer=answer) as agent:
        apply(plane, "writer", **shared_by(SHARED % ("__u32", "__u32")))
        push = await agent.pushed(has_policy("writer"))
        assert [each.name for each in push.probe_maps] == ["seen"]
        assert {blob.sha256 for each in agent.pushes for blob in each.blobs} == {
            push.plans[0].instance.object.sha256,
            push.probe_maps[0].sha256,
        }
        status = await eventually(
            lambda: plane.request("GET", f"{maps}/seen")["status"], lambda seen: seen["nodes"]["ready"] == 1
        )
        assert (status["policies"], status["bytes"]) == (["writer"], 4096)

        apply(plane, "misfit", **shared_by(SHARED % ("__u64", "__u64")))
        apply(plane, "typo", scope="Cluster", program={"c": {"source": "int main(void) { return x; }\n"}})
        for name, word in (("misfit", "does not fit"), ("typo", "undeclared identifier")):
            refused = await eventually(
                lambda name=name: plane.request("GET", f"{POLICIES}/{name}")["status"],
                lambda seen: seen["columns"]["status"] == "Invalid",
            )
            accepted = next(each for each in refused["conditions"] if each["type"] == "Accepted")
            assert word in accepted["message"]
        assert has_policy("writer")(agent.pushes[-1]), "what was refused was never pushed"
    plane.request("DELETE", f"{maps}/seen")


async def test_a_restart_while_the_api_server_is_away_removes_nothing(
    plane: ControlPlane, operator: OperatorProcess, tmp_path: Path
) -> None:
    async with agent_of(plane, operator, "node1") as agent:
        apply(plane, "stays")
        before = await agent.pushed(has_policy("stays"))
        operator.kill()
        plane.stop_api()
        try:
            operator.start()
            await eventually(
                lambda: operator.log_path.read_text(), lambda text: text.count("cannot reach the Lease") > 1
            )
            pushes = len(agent.pushes)
        finally:
            plane.start_api()
        operator.wait_ready()
        await agent.connect()
        # The agent says what it runs before it is pushed to.
        await agent.send_status(everything_ready(before))
        after = await agent.pushed(lambda push: push.term > before.term)
        assert all(plan.name == "stays" for push in agent.pushes[pushes:] for plan in push.plans)
        assert has_policy("stays")(after)
        assert after.plans[0].policy_uid == before.plans[0].policy_uid


async def test_while_the_api_server_is_away_sessions_and_counts_go_on(
    plane: ControlPlane, operator: OperatorProcess
) -> None:
    pod = plane.add_pod("shop", "web-1", "node1")["metadata"]["uid"]
    async with agent_of(plane, operator, "node1") as agent:
        apply(
            plane,
            "goes-on",
            interval="60s",
            outputs=[{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["pod"]}],
        )
        push = await agent.pushed(has_policy("goes-on"))
        pushes = len(agent.pushes)
        plane.stop_api()
        try:
            await agent.send_batch(tables=[counted(push.plans[0], {pod: 997})])
            await agent.acknowledged(1)
            assert len(agent.pushes) == pushes
        finally:
            plane.start_api()
        report = await eventually(
            lambda: plane.request("GET", f"{REPORTS}/goes-on")["status"],
            lambda seen: seen["outputs"][0]["total"]["value"] == 997,
            seconds=40,
        )
        assert report["columns"]["coverage"].startswith("1/")


async def test_a_node_that_joins_gets_every_matching_policy(plane: ControlPlane, operator: OperatorProcess) -> None:
    apply(plane, "everywhere")
    plane.add_node("node3")
    try:
        async with agent_of(plane, operator, "node1"), agent_of(plane, operator, "node3") as agent:
            await agent.pushed(has_policy("everywhere"), seconds=10)
    finally:
        plane.request("DELETE", "/api/v1/nodes/node3")


async def test_wrong_tokens_and_names_are_refused_and_logged_without_the_token(
    plane: ControlPlane, operator: OperatorProcess
) -> None:
    others = plane.agent_token(NAMESPACE, "node1", account="somebody")
    for_others = plane.agent_token(NAMESPACE, "node1", audience="https://kubernetes.default.svc")
    node1 = plane.agent_token(NAMESPACE, "node1")
    for token, node, words in (
        ("nonsense", "node1", "does not accept"),
        (others, "node1", "agents are"),
        (for_others, "node1", "does not accept"),
        (node1, "node2", "cannot speak for 'node2'"),
    ):
        async with agent_of(plane, operator, node, token=token) as agent:
            refusal = await agent.refused()
            assert refusal.code() is grpc.StatusCode.UNAUTHENTICATED
            assert words in (refusal.details() or "")
    text = operator.log_path.read_text()
    for secret in (others, for_others, node1):
        assert secret not in text
        assert secret.split(".")[2] not in text
    assert operator.log(), "every line is JSON"


async def test_garbage_and_oversized_messages_harm_nobody(plane: ControlPlane, operator: OperatorProcess) -> None:
    def shout() -> None:
        with socket.create_connection(("127.0.0.1", operator.port)) as raw:
            raw.sendall(bytes(range(256)) * 64)

    async with agent_of(plane, operator, "node1") as good, agent_of(plane, operator, "node2", answer=None) as bad:
        await asyncio.to_thread(shout)
        await bad.send_batch(events=[stream_pb2.EventChunk(positions=bytes(17 << 20))])
        assert (await bad.refused()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await good.send_batch()
        await good.acknowledged(1)
    assert operator.log(), "every line is JSON, whatever came in"


async def test_the_query_api_needs_the_reports_token(plane: ControlPlane, operator: OperatorProcess) -> None:
    async with agent_of(plane, operator, "node1") as agent:
        apply(plane, "asked")
        await agent.pushed(has_policy("asked"))
        report = await eventually(
            lambda: plane.request("GET", f"{REPORTS}/asked")["status"], lambda seen: seen["query"]["token"]
        )
        base, token = "/query/v1/namespaces/shop/probepolicies/asked", report["query"]["token"]
        assert operator.get(f"{base}/nodes")[0] == 403
        assert operator.get(f"{base}/nodes", token="x" + token[1:])[0] == 403
        assert operator.get(base.replace("asked", "other") + "/nodes", token=token)[0] == 403
        code, text = operator.get(f"{base}/nodes", token=token)
        assert code == 200
        rows = {row["name"]: row for row in json.loads(text)["nodes"]}
        assert rows["node1"]["state"] == "READY"
        assert rows["node2"]["reason"] == "NoAgent"
        assert json.loads(operator.get(f"{base}/report", token=token)[1])["kind"] == "ProbeReport"
        assert "probefleet_sessions 1.0" in operator.get("/metrics")[1]


async def test_a_second_replica_waits_and_takes_over_with_a_higher_term(
    plane: ControlPlane, operator: OperatorProcess, tmp_path: Path
) -> None:
    second = process_of(plane, tmp_path, "second", identity="operator-1")
    async with agent_of(plane, operator, "node1") as agent:
        apply(plane, "handed-over")
        before = await agent.pushed(has_policy("handed-over"))
        with operator_process.running(second):  # ready, because it could take over
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", second.port)).close()
            status, seconds = operator.stop()
            assert status == 0
            assert seconds < 3
            refusal = await agent.refused()
            assert refusal.code() is grpc.StatusCode.UNAVAILABLE
            await eventually(lambda: second.log_path.read_text(), lambda text: "listening for agents" in text)
            async with agent_of(plane, second, "node1") as moved:
                await moved.send_status(everything_ready(before))
                after = await moved.pushed(has_policy("handed-over"))
                assert after.term > before.term


def test_sigterm_ends_it_cleanly(plane: ControlPlane, operator: OperatorProcess) -> None:
    status, seconds = operator.stop(signal.SIGTERM)
    assert status == 0
    assert seconds < 3
    lines = operator.log()
    assert lines[-1]["event"] == "stopped"
    words = json.dumps(lines)
    assert "was never awaited" not in words
    assert "Task was destroyed" not in words
    lease = plane.request("GET", f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/probefleet-operator")
    assert not lease["spec"].get("holderIdentity"), "given up, so that the next one need not wait"


def test_the_ca_is_made_once_and_survives_restarts(
    plane: ControlPlane, operator: OperatorProcess, tmp_path: Path
) -> None:
    first = plane.secret(NAMESPACE, "probefleet-authority")["ca.crt"]
    operator.stop()
    with operator_process.running(process_of(plane, tmp_path, "again")) as again:
        assert plane.secret(NAMESPACE, "probefleet-authority")["ca.crt"] == first
        assert plane.ca_bundle(NAMESPACE) == first
        shown = subprocess.run(
            [
                *("openssl", "s_client", "-connect", f"127.0.0.1:{again.port}", "-alpn", "h2"),
                *("-verify_return_error", "-verify_hostname", "localhost", "-CAfile", "/dev/stdin"),
            ],
            input=first,
            capture_output=True,
            check=False,
        )
        assert b"Verify return code: 0" in shown.stdout or shown.returncode == 0
    operator.start()
