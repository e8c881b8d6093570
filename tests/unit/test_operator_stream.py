"""Streams of good and bad agents, over real gRPC and TLS; the API server behind TokenReview is a fake."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
from probefleet_core import placement
from probefleet_operator import authority, errors, identity, session, stream
from probefleet_wire.v1 import plan_pb2, stream_pb2

from tests.fakes.agent import FakeAgent
from tests.fakes.api_server import FakeApiServer, review

TERM = 7
ACCOUNT = "system:serviceaccount:probefleet:probefleet-agent"


@dataclass
class Heard:
    """A listener that notes what it hears."""

    opened: list[session.Session] = field(default_factory=list)
    closed: list[tuple[str, str]] = field(default_factory=list)
    statuses: list[stream_pb2.Status] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    refuse: Exception | None = None

    def session_opened(self, opened: session.Session) -> None:
        self.opened.append(opened)

    def session_closed(self, closed: session.Session, reason: str) -> None:
        self.closed.append((closed.node, reason))

    def status_received(self, _: session.Session, status: stream_pb2.Status) -> None:
        self.statuses.append(status)

    def batch_received(self, _: session.Session, batch: stream_pb2.Batch, __: int) -> None:
        if self.refuse:
            raise self.refuse
        self.batches.append(batch.sequence)


@dataclass
class Setup:
    """A served fleet."""

    fleet: stream.Fleet
    heard: Heard
    server: FakeApiServer
    port: int
    ca: bytes
    issued: list[authority.ServerCertificate]
    complaints: list[str]

    def agent(self, node: str = "node1", *, token: str = "good", ca: bytes | None = None, **options: Any) -> FakeAgent:
        return FakeAgent(f"127.0.0.1:{self.port}", node, ca=ca or self.ca, token=token, **options)


@asynccontextmanager
async def serving(*, blobs: dict[str, bytes] | None = None, hello_seconds: float = 10.0) -> AsyncIterator[Setup]:
    fake = FakeApiServer(tokens={"good": review("node1"), "other": review("node2")})
    issuer = authority.new_issuer(authority.utc_now())
    issued = [authority.issue(issuer, ["localhost"], authority.utc_now())]
    heard = Heard()
    complaints: list[str] = []
    async with fake.running() as client:
        fleet = stream.Fleet(
            reviewer=identity.Reviewer(client, audience="probefleet-agent", account=ACCOUNT),
            listener=heard,
            term=TERM,
            blob_of=(blobs or {}).get,
            hello_seconds=hello_seconds,
            complain=lambda who, problem: complaints.append(f"{who.pod}: {problem}"),
        )
        server, port = await stream.serve(fleet, "127.0.0.1:0", certificate=lambda: issued[-1])
        try:
            yield Setup(fleet, heard, fake, port, issuer.certificate_pem, issued, complaints)
        finally:
            await server.stop(0.2)


async def until(condition: Any) -> None:
    """Give other tasks turns until something is so."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def plan(uid: str, sha256: str = "") -> plan_pb2.Plan:
    return plan_pb2.Plan(
        policy_uid=uid,
        namespace="shop",
        name=uid,
        generation=3,
        instance=plan_pb2.Instance(digest=f"d-{uid}", object=plan_pb2.CoreObject(sha256=sha256) if sha256 else None),
    )


def desire(*plans: plan_pb2.Plan) -> session.Desire:
    return session.Desire(placement.NodeState(plans=plans), ("pod-a",))


async def test_a_push_reaches_the_agent_with_its_blobs_once() -> None:
    async with serving(blobs={"s1": b"one", "s2": b"two"}) as setup, setup.agent() as agent:
        await agent.connect()
        await until(lambda: setup.heard.opened)
        opened = setup.heard.opened[0]
        opened.desire(desire(plan("p1", "s1")))
        first = await agent.pushed()
        assert (first.term, first.version) == (TERM, 1)
        assert [(blob.sha256, blob.zstd) for blob in first.blobs] == [("s1", b"one")]
        assert list(first.known_pod_uids) == ["pod-a"]
        opened.desire(desire(plan("p1", "s1"), plan("p2", "s2")))
        second = await agent.pushed(lambda push: len(push.plans) == 2)
        assert [blob.sha256 for blob in second.blobs] == ["s2"], "s1 was carried by this stream already"
        assert second.version > first.version
        await until(lambda: len(setup.heard.statuses) == 2)


async def test_an_object_comes_again_with_a_policy_that_comes_again() -> None:
    async with serving(blobs={"s1": b"one"}) as setup, setup.agent() as agent:
        await agent.connect()
        await until(lambda: setup.heard.opened)
        opened = setup.heard.opened[0]
        opened.desire(desire(plan("p1", "s1")))
        await agent.pushed(lambda push: len(push.plans) == 1)
        opened.desire(desire())
        emptied = await agent.pushed(lambda push: not push.plans)
        opened.desire(desire(plan("p2", "s1")))
        again = await agent.pushed(lambda push: push.version > emptied.version)
        assert [blob.sha256 for blob in again.blobs] == ["s1"], "an agent keeps the objects of its newest push only"


async def test_pushes_that_were_not_sent_yet_are_replaced_by_the_newest() -> None:
    async with serving() as setup, setup.agent() as agent:
        await agent.connect()
        await until(lambda: setup.heard.opened)
        for number in range(100):
            setup.heard.opened[0].desire(desire(*[plan(f"p{each}") for each in range(number)]))
        newest = await agent.pushed(lambda push: len(push.plans) == 99)
        assert newest.version == 1, "a hundred changes in one turn are one push"


async def test_a_few_pushes_are_written_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PUSHES_AT_ONCE", 1)
    monkeypatch.setattr(stream, "TURN_SECONDS", 60.0)
    async with serving(blobs={"large": bytes(8 << 20)}) as setup, setup.agent("node2", token="other") as agent:
        async with setup.agent() as first:
            await first.connect(deaf=True)
            await agent.connect()
            await until(lambda: len(setup.fleet.sessions) == 2)
            setup.fleet.sessions["node1"].desire(desire(plan("p1", "large")))
            await until(lambda: setup.fleet.sessions["node1"].version == 1)
            setup.fleet.sessions["node2"].desire(desire(plan("p2")))
            setup.fleet.sessions["node2"].desire(desire(plan("p3")))
            await agent.send_batch()
            await until(lambda: setup.heard.batches)
            assert setup.fleet.sessions["node2"].version == 0, "it is not even put together, before there is room"
        assert [each.name for each in (await agent.pushed()).plans] == ["p3"], "the newest of when its turn came"


async def test_an_agent_that_takes_nothing_keeps_others_waiting_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PUSHES_AT_ONCE", 1)
    blobs = {"large": bytes(8 << 20)}
    async with serving(blobs=blobs) as setup, setup.agent() as stuck, setup.agent("node2", token="other") as agent:
        await stuck.connect(deaf=True)
        await agent.connect()
        await until(lambda: len(setup.fleet.sessions) == 2)
        setup.fleet.sessions["node1"].desire(desire(plan("p1", "large")))
        await until(lambda: setup.fleet.sessions["node1"].version == 1)
        setup.fleet.sessions["node2"].desire(desire(plan("p2")))
        assert [each.name for each in (await agent.pushed()).plans] == ["p2"]
        assert "node1" in setup.fleet.sessions


async def test_objects_that_do_not_fit_one_push_come_with_the_next_and_are_kept_until_then() -> None:
    blobs = {f"s{number}": bytes(5 << 20) for number in range(4)}
    async with serving(blobs=blobs) as setup, setup.agent() as agent:
        await agent.connect()
        await until(lambda: setup.heard.opened)
        setup.heard.opened[0].desire(desire(*[plan(f"p{number}", f"s{number}") for number in range(4)]))
        last = await agent.pushed(lambda push: all(each.HasField("instance") for each in push.plans))
        first = agent.pushes[0]
        assert [each.policy_uid for each in first.plans] == ["p0", "p1", "p2", "p3"], (
            "none is missing, so none is removed"
        )
        assert [each.HasField("instance") for each in first.plans] == [True, True, False, False]
        carried = [blob.sha256 for push in agent.pushes for blob in push.blobs]
        assert sorted(carried) == ["s0", "s1", "s2", "s3"]
        assert last.version == 2


async def test_versions_go_on_where_the_agent_is_within_the_term() -> None:
    async with serving() as setup, setup.agent() as agent:
        agent.applied = (TERM, 41)
        await agent.connect()
        await until(lambda: setup.heard.opened)
        setup.heard.opened[0].desire(desire())
        assert (await agent.pushed()).version == 42


async def test_batches_are_acknowledged_when_they_are_merged() -> None:
    async with serving() as setup, setup.agent() as agent:
        await agent.connect()
        for _ in range(3):
            await agent.send_batch()
        await agent.acknowledged(3)
        assert setup.heard.batches == [1, 2, 3]


async def test_a_newer_session_of_a_node_fences_the_older() -> None:
    async with serving() as setup, setup.agent() as older, setup.agent() as newer:
        await older.connect()
        await until(lambda: setup.heard.opened)
        await newer.connect()
        refusal = await older.refused()
        assert refusal.code() is grpc.StatusCode.ABORTED
        assert "newer session" in refusal.details()
        await until(lambda: len(setup.heard.opened) == 2)
        assert setup.fleet.sessions["node1"] is setup.heard.opened[1]
        assert setup.heard.closed == [("node1", "fenced by a newer session")]


@pytest.mark.parametrize(
    ("token", "words"),
    [("bad", "does not accept"), ("", "no `authorization"), ("other", "cannot speak for 'node1'")],
)
async def test_a_stream_that_cannot_prove_its_node_is_refused(token: str, words: str) -> None:
    async with serving() as setup, setup.agent(token=token) as agent:
        await agent.connect(hello=token == "other")
        refusal = await agent.refused()
        assert refusal.code() is grpc.StatusCode.UNAUTHENTICATED
        assert words in refusal.details()
        assert not setup.heard.opened


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (review("node1", account="system:serviceaccount:default:default"), "agents are"),
        ({**review("node1"), "audiences": ["other"]}, "not made for audience"),
        (review(""), "names no node"),
    ],
)
async def test_a_token_of_another_kind_is_refused(status: dict[str, Any], words: str) -> None:
    async with serving() as setup, setup.agent(token="odd") as agent:
        setup.server.tokens["odd"] = status
        # No Hello: grpc.aio hides the server's reason from a client that is writing while the stream ends.
        await agent.connect(hello=False)
        assert words in (await agent.refused()).details()


async def test_while_the_api_server_is_away_streams_are_told_to_come_again() -> None:
    async with serving() as setup, setup.agent() as agent:
        setup.server.away = True
        assert (await agent.told_why(agent.connect)).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_token_is_reviewed_once() -> None:
    async with serving() as setup, setup.agent() as agent:
        for count in (1, 2, 3):
            await agent.connect()
            await until(lambda count=count: len(setup.heard.opened) == count)
            await agent.disconnect()
        assert len(setup.server.writes("POST")) == 1


async def test_an_agent_of_another_protocol_is_refused() -> None:
    async with serving() as setup, setup.agent() as agent:
        await agent.connect(protocol=2)
        refusal = await agent.refused()
        assert refusal.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "protocol 2" in refusal.details()


async def test_a_stream_without_hello_is_closed() -> None:
    async with serving(hello_seconds=0.2) as setup, setup.agent() as agent:
        await agent.connect(hello=False)
        assert "no Hello" in (await agent.refused()).details()


async def test_a_second_hello_closes_the_stream() -> None:
    async with serving() as setup, setup.agent() as agent:
        await agent.connect()
        await agent.send(stream_pb2.FromAgent(hello=stream_pb2.Hello(protocol=1, node="node1")))
        refusal = await agent.refused()
        assert refusal.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "says Hello once" in refusal.details()
        (complaint,) = setup.complaints
        assert "says Hello once" in complaint


async def test_who_speaks_for_another_node_is_told_of_and_who_is_unknown_is_not() -> None:
    async with serving() as setup:
        for token in ("bad", "other"):
            async with setup.agent(token=token) as agent:
                await agent.connect()
                await agent.refused()
        (complaint,) = setup.complaints
        assert complaint == "agent-node2: the token is of node 'node2' and cannot speak for 'node1'"


async def test_samples_that_cannot_be_close_only_their_stream() -> None:
    async with serving() as setup, setup.agent() as bad, setup.agent("node2", token="other") as good:
        await bad.connect()
        await good.connect()
        await until(lambda: len(setup.heard.opened) == 2)
        setup.heard.refuse = errors.ProtocolViolation("batch 1: row 7 of 3")
        await bad.send_batch()
        assert "row 7 of 3" in (await bad.refused()).details()
        setup.heard.refuse = None
        await good.send_batch()
        await good.acknowledged(1)


async def test_a_batch_that_is_missing_ends_the_stream_before_the_next_is_merged() -> None:
    async with serving() as setup, setup.agent() as agent:
        await agent.connect()
        await agent.send_batch()
        agent.sequence += 1  # one that got lost
        await agent.send_batch()
        assert "batch 3 came after 1" in (await agent.refused()).details()
        assert setup.heard.batches == [1]


async def test_a_stream_that_is_closed_while_something_is_written_to_it_hears_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Hasty:
        """Closes the session as soon as anything is on its way to the agent."""

        def __init__(self, context: Any, opened: session.Session) -> None:
            self._context, self._opened = context, opened

        def __getattr__(self, name: str) -> Any:
            return getattr(self._context, name)

        async def write(self, data: bytes) -> None:
            self._opened.close(grpc.StatusCode.ABORTED, "begin a new stream")
            await self._context.write(data)

    converse = stream.Fleet._converse
    monkeypatch.setattr(stream.Fleet, "_converse", lambda fleet, opened, c: converse(fleet, opened, Hasty(c, opened)))
    async with serving() as setup, setup.agent() as agent:
        for _ in range(3):
            await agent.connect()
            await agent.send_batch()
            assert (await agent.refused()).details() == "begin a new stream"
            assert agent.acks == [1]
            await agent.disconnect()


async def test_bytes_that_are_no_message_close_the_stream() -> None:
    async with serving() as setup:
        credentials = grpc.ssl_channel_credentials(setup.ca)
        options = [("grpc.ssl_target_name_override", "localhost")]
        async with grpc.aio.secure_channel(f"127.0.0.1:{setup.port}", credentials, options=options) as channel:
            call = channel.stream_stream("/probefleet.v1.Fleet/Session")(metadata=[("authorization", "Bearer good")])
            await call.write(b"\xff\xff\xff garbage")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "no FromAgent message" in (caught.value.details() or "")


async def test_a_message_over_the_limit_is_refused_and_others_go_on() -> None:
    async with serving() as setup, setup.agent() as agent, setup.agent("node2", token="other") as other:
        await other.connect()
        await agent.connect()
        await until(lambda: len(setup.heard.opened) == 2)
        chunk = stream_pb2.EventChunk(policy_uid="p", positions=bytes(17 << 20))
        await agent.send_batch(events=[chunk])
        assert (await agent.refused()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await other.send_batch()
        await other.acknowledged(1)


async def test_garbage_on_the_port_harms_nobody() -> None:
    async with serving() as setup, setup.agent() as agent:
        await agent.connect()
        await until(lambda: setup.heard.opened)

        def shout() -> None:
            with socket.create_connection(("127.0.0.1", setup.port)) as raw:
                raw.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(range(256)) * 100)

        await asyncio.to_thread(shout)
        await agent.send_batch()
        await agent.acknowledged(1)


async def test_a_flood_is_slowed_and_then_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BURST_MESSAGES", 20.0)
    monkeypatch.setattr(stream, "MAX_MESSAGES_PER_SECOND", 1000.0)
    monkeypatch.setattr(stream, "STRIKES", 10)
    async with serving() as setup, setup.agent() as agent:
        await agent.connect()
        while not agent.ended.is_set():
            await agent.send_batch()
            await asyncio.sleep(0)
        # grpc.aio hides the server's reason from a client that is writing while the stream ends: ask this side.
        await until(lambda: setup.heard.closed)
        assert "messages a second" in setup.heard.closed[0][1]
        assert len(setup.heard.batches) >= 20


async def test_an_agent_with_another_ca_does_not_get_through() -> None:
    stranger = authority.new_issuer(authority.utc_now()).certificate_pem
    async with serving() as setup, setup.agent(ca=stranger) as agent:
        await agent.connect()
        assert (await agent.refused()).code() is grpc.StatusCode.UNAVAILABLE
        assert not setup.heard.opened


async def test_a_new_certificate_is_shown_without_a_restart() -> None:
    async with serving() as setup:
        successor = authority.new_issuer(authority.utc_now())
        setup.issued.append(authority.issue(successor, ["localhost"], authority.utc_now()))
        async with setup.agent(ca=successor.certificate_pem) as agent:
            await agent.connect()
            await until(lambda: setup.heard.opened)


async def test_a_session_ends_when_its_token_does() -> None:
    async with serving() as setup, setup.agent() as agent:
        await agent.connect()
        await until(lambda: setup.heard.opened)
        opened = setup.heard.opened[0]
        # The cached identity says that the token has just ended; the API server knows it no more.
        setup.server.tokens.clear()
        reviewer_wait = asyncio.create_task(setup.fleet._watch_identity(opened, "good"))
        opened.identity = identity.Identity("node1", "u", "p", "pu", expires_at=time.time() - 10)
        reviewer_wait.cancel()
        with pytest.raises(errors.IdentityRefused, match="come back"):
            await setup.fleet._watch_identity(opened, "good")


async def test_no_task_outlives_its_stream() -> None:
    before = asyncio.all_tasks()
    async with serving() as setup:
        for _ in range(3):
            async with setup.agent() as agent:
                await agent.connect()
                await until(lambda: "node1" in setup.fleet.sessions)
        await until(lambda: not setup.fleet.sessions)
        await until(lambda: not [each for each in asyncio.all_tasks() - before if "node1" in each.get_name()])
