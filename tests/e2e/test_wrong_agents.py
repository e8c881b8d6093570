"""End-to-end test 7, agents: who is not an agent of this cluster, or says what it may not, harms nobody.

Each speaks to the installed operator through a port-forward, while a policy counts 997 calls on node3; when all are
done, the counts are exact. What they did is in the operator's log and metrics, and an Event of the agent's pod where a
token says whose it is.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from probefleet_wire.v1 import stream_pb2

from tests.e2e import agents, kube
from tests.e2e.surviving import SLOW_CALLS, hurry
from tests.fakes.agent import FakeAgent

pytestmark = [pytest.mark.e2e, pytest.mark.quiet, pytest.mark.timeout(120)]

AUDIENCE = "probefleet-agent"
SERVER_NAME = f"probefleet-operator.{kube.SYSTEM}.svc"
SYSCOUNT = {
    "program": {"catalog": {"name": "syscount", "parameters": {"syscalls": "sched_get_priority_max"}}},
    "interval": "1s",
    "outputs": [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["pod"]}],
}


@pytest.fixture(scope="module")
def counting(installed: str) -> Iterator[str]:
    """A namespace in which 997 calls are counted while the tests of this module run; at its end, all of them were."""
    name = f"strangers-{uuid.uuid4().hex[:6]}"
    kube.kubectl("create", "namespace", name)
    kube.apply(kube.policy("syscount", name, SYSCOUNT))
    kube.wait_programmed("syscount", name)
    kube.apply(kube.pod("web", name, SLOW_CALLS, node="node3"))
    kube.eventually(lambda: kube.totals(kube.report("syscount", name), "calls"), "the first counts")
    yield name
    hurry(name, "web")

    def complete() -> bool:
        status = kube.report("syscount", name)
        whole = status["columns"]["coverage"] == "3/3"  # who was stopped has come back
        return whole and kube.totals(status, "calls") == {("web",): 997}

    kube.eventually(complete, "997 calls, of 3/3 nodes")
    assert kube.report("syscount", name)["columns"]["lost"] == "0"
    kube.kubectl("delete", "ppol", "--all", "-n", name, "--wait=true")
    kube.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def port(counting: str) -> Iterator[int]:
    """The operator's gRPC port, on this machine."""
    with forwarded() as found:
        yield found


@contextmanager
def forwarded() -> Iterator[int]:
    """That port; anew for each that breaks a connection, since kubectl gives up then."""
    command = ["kubectl", "port-forward", "-n", kube.SYSTEM, "service/probefleet-operator", ":8443"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forward:
        assert forward.stdout is not None
        found = re.search(r"127\.0\.0\.1:(\d+)", forward.stdout.readline())
        assert found
        yield int(found[1])
        forward.terminate()


def authority() -> bytes:
    """The CA that agents are given."""
    return str(kube.get("configmap", "probefleet-ca", kube.SYSTEM)["data"]["ca.crt"]).encode()


def token_of(node: str, *, account: str = "probefleet-agent", audience: str = AUDIENCE) -> str:
    """A token as the kubelet gives it to the agent's pod of a node."""
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={agents.pods()[node]}")
    bound = bound if account == "probefleet-agent" else ()
    return kube.kubectl("create", "token", account, "-n", kube.SYSTEM, f"--audience={audience}", *bound).strip()


def operator_log() -> str:
    """All that the operator has said."""
    return kube.kubectl("logs", "-n", kube.SYSTEM, "deployment/probefleet-operator", "--tail=-1")


def unauthenticated() -> float:
    """How many streams the operator has refused for their token."""
    return kube.metric("probefleet_streams_refused_total", code="UNAUTHENTICATED")


def check_event(node: str, *words: str) -> None:
    """An Event of the agent's pod says it."""

    def said() -> bool:
        selector = f"reason=StreamRefused,regarding.name={agents.pods()[node]}"
        place = ("-n", kube.SYSTEM, "--field-selector", selector)
        items = json.loads(kube.kubectl("get", "events.events.k8s.io", *place, "-o", "json"))["items"]
        return any(all(word in item["note"] for word in words) for item in items)

    kube.eventually(said, f"an Event of the agent's pod on {node} with {words}", seconds=20)


@asynccontextmanager
async def stranger(port: int, node: str, token: str, *, hello: bool = True) -> AsyncIterator[FakeAgent]:
    """An agent that is real to the wire, connected. (grpc.aio hides a refusal's words from who is writing just then:
    who is refused before his Hello says none.)"""
    async with FakeAgent(f"127.0.0.1:{port}", node, ca=authority(), token=token, server_name=SERVER_NAME) as agent:
        await agent.connect(hello=hello)
        yield agent


@pytest.mark.parametrize(
    ("account", "audience", "words"),
    [
        ("", "", "the API server does not accept the token"),
        ("probefleet-agent", "https://kubernetes.default.svc", "the API server does not accept the token"),
        ("default", AUDIENCE, f"agents are 'system:serviceaccount:{kube.SYSTEM}:probefleet-agent'"),
    ],
)
async def test_a_wrong_token(port: int, account: str, audience: str, words: str) -> None:
    before = unauthenticated()
    token = token_of("node1", account=account, audience=audience) if account else "nonsense"
    async with stranger(port, "node1", token, hello=False) as agent:
        refusal = await agent.refused()
    assert refusal.code() is grpc.StatusCode.UNAUTHENTICATED
    assert words in (refusal.details() or "")
    log = operator_log()
    assert words in log
    assert token == "nonsense" or token.split(".")[2] not in log
    assert unauthenticated() == before + 1


async def test_another_nodes_name(port: int) -> None:
    words = "the token is of node 'node1' and cannot speak for 'node2'"
    async with stranger(port, "node2", token_of("node1")) as agent:
        refusal = await agent.refused()
    assert refusal.code() is grpc.StatusCode.UNAUTHENTICATED
    assert words in (refusal.details() or "")
    check_event("node1", words)


@pytest.mark.usefixtures("counting")
def test_garbage_on_the_port() -> None:
    garbage = bytes(range(256)) * 256
    with forwarded() as port, socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(garbage)
    context = ssl.create_default_context(cadata=authority().decode())
    context.set_alpn_protocols(["h2"])
    with (
        forwarded() as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname=SERVER_NAME) as secure,
        # The operator's HTTP/2 says good-bye, perhaps before all was sent: nothing hangs, nothing comes to the service.
        suppress(ssl.SSLEOFError, ConnectionError),
    ):
        secure.sendall(garbage)
        while secure.recv(65536):
            pass


async def test_a_stream_that_sends_more_than_it_may(port: int) -> None:
    token = token_of("node2")
    # The real one of node2 waits meanwhile: else it would take over again at once.
    with agents.stopped("node2"):
        async with stranger(port, "node2", token) as agent:

            async def send_too_much() -> None:
                await agent.disconnect()
                await agent.connect()
                await agent.send_batch(events=[stream_pb2.EventChunk(positions=bytes(17 << 20))])

            assert (await agent.told_why(send_too_much)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with stranger(port, "node2", token) as agent:
            for _ in range(800):
                await agent.send_batch()
            await agent.refused(seconds=60)
    words = "more than 50 messages a second: collect them into fewer batches"
    check_event("node2", "node node2", words)
    assert words in operator_log()


def test_a_wrong_ca(port: int, tmp_path: Path) -> None:
    """A real agent refuses an operator that it cannot trust, and says what to look at."""
    wrong, key, token = tmp_path / "ca.crt", tmp_path / "ca.key", tmp_path / "token"
    kube.run(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=another", "-days", "1",
        "-keyout", str(key), "-out", str(wrong),
    )  # fmt: skip
    token.write_text(token_of("node1"))
    folder = Path("/sys/fs/bpf") / f"probefleet-stranger-{uuid.uuid4().hex[:6]}"
    folder.mkdir()
    kube.eventually(
        lambda: kube.metric("probefleet_sessions") == 3, "all three agents, of which one was stopped just now"
    )
    command = [
        str(Path(sys.executable).with_name("probefleet-agent")), f"--operator=127.0.0.1:{port}", "--node=node1",
        f"--ca-file={wrong}", f"--token-file={token}", f"--server-name={SERVER_NAME}", f"--bpffs={folder}",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        said = next(line for line in map(json.loads, agent.stderr) if line["event"] == "no stream to the operator")
        agent.terminate()
        agent.communicate(timeout=20)
    assert agent.returncode == 0
    assert said["error"].startswith(f"the operator's certificate is not signed by a CA of {wrong}, or is for another")
    assert "nothing was sent to it, and what runs here goes on" in said["error"]
    folder.rmdir()  # it left nothing
    assert kube.metric("probefleet_sessions") == 3
