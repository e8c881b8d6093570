"""The gRPC server: agents' streams in, sessions out.

An agent dials, shows its token as call metadata, says Hello within ten seconds, and has a `Session` until either side
ends it. What it says goes to a `Listener` (controller.py) in the main loop, message by message: the next one is read
only when the last one is merged, so a fast agent is slowed by HTTP/2's window and fills no queue of ours.

Nobody is trusted here: every message is bounded and counted, and a stream that breaks the contract is closed with a
reason that its operator can read, while the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from probefleet_core import endpoints
from probefleet_wire.v1 import stream_pb2

from probefleet_operator import authority, errors, identity, metrics, session

log = structlog.get_logger(__name__)

PROTOCOL = 1
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it
HELLO_SECONDS = 10.0
WRITE_SECONDS = 60.0  # an agent that takes nothing for so long is gone
CLOSE_SECONDS = 5.0  # to take what is on its way to it, and then the reason
# A push has programs in it. All at once, those of a policy for 5,000 nodes would take 150 MiB more for a moment, and
# leave the heap in pieces.
PUSHES_AT_ONCE = 32
TURN_SECONDS = 0.1  # so long an agent that does not take its push keeps others waiting
MAX_UNIDENTIFIED = 2_000  # streams that have not proved who they are
MAX_MESSAGES_PER_SECOND = 50.0
BURST_MESSAGES = 500.0
MOST_MIB = session.MAX_MESSAGE_BYTES >> 20  # gRPC itself ends a stream with a larger message
STRIKES = 200  # messages over the rate before the stream is closed; until then it is only slowed

SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", session.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", session.MAX_MESSAGE_BYTES),
    # Without these a stream that we read slowly lets 3.8 MB pile up, each.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65536),
    # A connection keeps buffers for its largest TLS record once it was used: 26 KiB less each than with 16 KiB.
    ("grpc.tsi.max_frame_size", 2048),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),
]


class Listener(Protocol):
    """Who hears what agents say. All calls come in the main loop; none may block."""

    def session_opened(self, opened: session.Session) -> None:
        """An agent has proved who it is and said Hello."""

    def session_closed(self, closed: session.Session, reason: str) -> None:
        """Its stream has ended."""

    def status_received(self, sender: session.Session, status: stream_pb2.Status) -> None:
        """It answered a push."""

    def batch_received(self, sender: session.Session, batch: stream_pb2.Batch, size_bytes: int) -> None:
        """It sent samples; when this returns they are merged and may be acknowledged.

        Raises ProtocolViolation for what cannot be, and StreamOutdated where the node has to begin a new stream.
        """


Complain = Callable[[identity.Identity, str], None]
"""Told of an agent, known by its token, that breaks the contract: where users look for it (an Event)."""


def _nobody(_: identity.Identity, __: str) -> None:
    """Nobody is told."""


class _Rate:
    """A token bucket of messages."""

    def __init__(self) -> None:
        self._tokens, self._at, self._strikes = BURST_MESSAGES, time.monotonic(), 0

    def delay_seconds(self) -> float:
        """How long to wait before the next read; raises ProtocolViolation when waiting did not help."""
        now = time.monotonic()
        self._tokens = min(BURST_MESSAGES, self._tokens + (now - self._at) * MAX_MESSAGES_PER_SECOND)
        self._at = now
        self._tokens -= 1
        if self._tokens >= BURST_MESSAGES / 2:
            self._strikes = 0  # it has calmed down
        if self._tokens >= 0:
            return 0.0
        self._strikes += 1
        if self._strikes > STRIKES:
            raise errors.ProtocolViolation(
                f"more than {MAX_MESSAGES_PER_SECOND:.0f} messages a second: collect them into fewer batches"
            )
        return -self._tokens / MAX_MESSAGES_PER_SECOND


class Fleet:
    """The service `probefleet.v1.Fleet` and the sessions that are open."""

    def __init__(
        self,
        *,
        reviewer: identity.Reviewer,
        listener: Listener,
        term: int,
        blob_of: session.BlobOf,
        addresses: endpoints.Endpoints | None = None,
        hello_seconds: float = HELLO_SECONDS,
        complain: Complain = _nobody,
    ) -> None:
        self._reviewer, self._listener, self._blob_of = reviewer, listener, blob_of
        self._term, self._addresses = term, addresses
        self._hello_seconds = hello_seconds
        self._complain = complain
        self._turns = asyncio.Semaphore(PUSHES_AT_ONCE)
        self._unidentified = 0
        self._opened = 0
        self.sessions: dict[str, session.Session] = {}
        self.draining = False

    def handlers(self) -> Any:
        """The service by hand: messages arrive as bytes, so that their size is known and bad ones get a good answer."""
        method = grpc.stream_stream_rpc_method_handler(self._session)
        return grpc.method_handlers_generic_handler("probefleet.v1.Fleet", {"Session": method})

    async def _session(self, _: object, context: Any) -> None:
        """One stream from its first byte to its last."""
        try:
            opened = await self._admit(context)
        except errors.IdentityRefused as refusal:
            await self._refuse(context, grpc.StatusCode.UNAUTHENTICATED, str(refusal))
            return
        except errors.ProtocolViolation as violation:
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(violation))
            return
        except errors.ApiError as problem:
            log.warning("identity cannot be checked", error=str(problem))
            await self._refuse(context, grpc.StatusCode.UNAVAILABLE, "the API server cannot be asked now: try again")
            return
        self._enter(opened)
        code, reason = grpc.StatusCode.OK, f"the stream broke, or one message had more than {MOST_MIB} MiB"
        try:
            code, reason = await self._converse(opened, context)
        except asyncio.CancelledError:
            if self.draining:
                reason = "the operator is shutting down"
            raise
        finally:
            self._leave(opened, reason)
        if code is not grpc.StatusCode.OK:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await context.abort(code, reason)
            except TimeoutError:
                log.warning("the agent does not take the reason why its stream ends", node=opened.node, reason=reason)

    async def _refuse(self, context: Any, code: grpc.StatusCode, reason: str) -> None:
        metrics.STREAMS_REFUSED.labels(code.name).inc()
        log.warning("stream refused", peer=context.peer(), code=code.name, reason=reason)
        await context.abort(code, reason)

    async def _admit(self, context: Any) -> session.Session:
        """Check token and Hello; raises IdentityRefused, ProtocolViolation or ApiError."""
        if self._unidentified >= MAX_UNIDENTIFIED or self.draining:
            raise errors.ApiUnavailable("too many streams are being identified")
        self._unidentified += 1
        try:
            token = bearer_of(context.invocation_metadata())
            who = await self._reviewer.identify(token)
            try:
                hello = await self._hello(context, who)
            except (errors.IdentityRefused, errors.ProtocolViolation) as problem:
                self._complain(who, str(problem))
                raise
            self._opened += 1
            return session.Session(
                hello,
                who,
                number=self._opened,
                term=self._term,
                blob_of=self._blob_of,
                addresses=self._addresses,
            )
        finally:
            self._unidentified -= 1

    async def _hello(self, context: Any, who: identity.Identity) -> stream_pb2.Hello:
        """A stream's first message; raises IdentityRefused or ProtocolViolation."""
        try:
            async with asyncio.timeout(self._hello_seconds):
                data = await context.read()
        except TimeoutError:
            raise errors.ProtocolViolation(f"no Hello within {self._hello_seconds:.0f} s") from None
        message = decode(data)
        if message.WhichOneof("message") != "hello":
            raise errors.ProtocolViolation("the first message of a stream must be Hello")
        check_hello(message.hello, who)
        return message.hello

    def _enter(self, opened: session.Session) -> None:
        if older := self.sessions.get(opened.node):
            older.close(grpc.StatusCode.ABORTED, "a newer session of this node has taken over")
            self._leave(older, "fenced by a newer session")
        self.sessions[opened.node] = opened
        metrics.SESSIONS.set(len(self.sessions))
        log.info(
            "session opened",
            node=opened.node,
            pod=opened.identity.pod,
            agent=opened.hello.agent_version,
            kernel=opened.hello.kernel_release,
            applied=(opened.hello.applied_term, opened.hello.applied_version),
        )
        self._listener.session_opened(opened)

    def _leave(self, closed: session.Session, reason: str) -> None:
        if self.sessions.get(closed.node) is not closed:
            return  # it was fenced and has left already
        del self.sessions[closed.node]
        metrics.SESSIONS.set(len(self.sessions))
        log.info("session closed", node=closed.node, reason=reason)
        self._listener.session_closed(closed, reason)

    async def _converse(self, opened: session.Session, context: Any) -> tuple[grpc.StatusCode, str]:
        """Read and write until one of them ends; answers with what to close by."""
        token = bearer_of(context.invocation_metadata())
        reader = asyncio.create_task(self._read(opened, context), name=f"read-{opened.node}")
        writer = asyncio.create_task(self._write(opened, context), name=f"write-{opened.node}")
        watcher = asyncio.create_task(self._watch_identity(opened, token), name=f"identity-{opened.node}")
        tasks = (reader, writer, watcher)
        waited: list[asyncio.Future[Any]] = [*tasks, opened.closing]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if opened.closing.done():
                closing = opened.closing.result()
                return closing.code, closing.reason
            for task in tasks:
                if task.done():
                    task.result()
            return grpc.StatusCode.OK, "the agent ended the stream"
        except errors.IdentityRefused as refusal:
            return grpc.StatusCode.UNAUTHENTICATED, str(refusal)
        except errors.ProtocolViolation as violation:
            metrics.STREAMS_REFUSED.labels("PROTOCOL").inc()
            log.warning("stream broke the contract", node=opened.node, reason=str(violation))
            self._complain(opened.identity, str(violation))
            return grpc.StatusCode.INVALID_ARGUMENT, str(violation)
        except errors.StreamOutdated as outdated:
            return grpc.StatusCode.ABORTED, str(outdated)
        except errors.OperatorError as problem:
            log.exception("session failed", node=opened.node)
            return grpc.StatusCode.INTERNAL, str(problem)
        except TimeoutError:
            return grpc.StatusCode.DEADLINE_EXCEEDED, f"the agent took nothing for {WRITE_SECONDS:.0f} s"
        except grpc.aio.UsageError as problem:  # the call ended under our hands
            return grpc.StatusCode.OK, f"the stream broke: {problem}"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, opened: session.Session, context: Any) -> None:
        rate = _Rate()
        while True:
            data = await context.read()
            if data is END:
                return
            self._take(opened, data)
            del data  # thousands of streams wait here, each with what it said last
            if delay := rate.delay_seconds():
                metrics.SLOWED.inc()
                await asyncio.sleep(delay)

    def _take(self, opened: session.Session, data: bytes) -> None:
        metrics.RECEIVED_BYTES.inc(len(data))
        message = decode(data)
        kind = message.WhichOneof("message")
        if kind == "batch":
            opened.expect(message.batch.sequence)
            self._listener.batch_received(opened, message.batch, len(data))
            opened.acknowledge(message.batch.sequence)
        elif kind == "status":
            opened.take_status(message.status)
            self._listener.status_received(opened, message.status)
        else:
            raise errors.ProtocolViolation(f"a stream says Hello once; then Status and Batch, not {kind or 'nothing'}")

    async def _write(self, opened: session.Session, context: Any) -> None:
        while True:
            if await opened.due() == "ack":
                await self._send(opened.ack(), context)
            else:
                with await self._turn():
                    await self._send(opened.push(), context)
                metrics.PUSHES.inc()

    async def _turn(self) -> contextlib.ExitStack:
        """Room to write a push, until the context ends or for TURN_SECONDS: a slow agent lets others go on."""
        await self._turns.acquire()
        turn = contextlib.ExitStack()
        turn.callback(self._turns.release)
        turn.callback(asyncio.get_running_loop().call_later(TURN_SECONDS, turn.close).cancel)
        return turn

    async def _send(self, message: stream_pb2.FromOperator, context: Any) -> None:
        data = message.SerializeToString()
        await _whole(asyncio.ensure_future(context.write(data)))
        metrics.SENT_BYTES.inc(len(data))

    async def _watch_identity(self, opened: session.Session, token: str) -> None:
        """Ask again when the token ends. The agent pod's deletion is heard of by its watch, not here."""
        while True:
            await asyncio.sleep(max(1.0, opened.identity.expires_at - time.time() + 1.0))
            try:
                opened.identity = await self._reviewer.identify(token, fresh=True)
            except errors.ApiError:
                # Nobody can tell: an agent that was good stays, as nothing else can come of it than reading on.
                await asyncio.sleep(30.0)
            except errors.IdentityRefused as refusal:
                raise errors.IdentityRefused(f"{refusal}: come back with the token of now") from None


async def _whole(write: asyncio.Future[None]) -> None:
    """A write, to its end, also where its task is cancelled meanwhile: gRPC sends no status after one that was given up
    half-way, and the agent would wait for the end of a stream that nobody reads. Raises TimeoutError.
    """
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await asyncio.shield(write)
    except asyncio.CancelledError:
        done, _ = await asyncio.wait([write], timeout=CLOSE_SECONDS)
        for each in done:
            each.exception()  # the call may have ended meanwhile, as is wanted
        raise
    finally:
        write.cancel()


def bearer_of(metadata: Any) -> str:
    """The token in call metadata; raises IdentityRefused where there is none."""
    found = [value for key, value in metadata or () if key == "authorization"]
    if len(found) != 1 or not isinstance(found[0], str) or not found[0].startswith("Bearer "):
        raise errors.IdentityRefused("the call metadata has no `authorization: Bearer TOKEN`")
    return found[0].removeprefix("Bearer ").strip()


def decode(data: Any) -> stream_pb2.FromAgent:
    """Bytes of one message; raises ProtocolViolation."""
    if not isinstance(data, bytes):
        raise errors.ProtocolViolation("the stream ended before it began")
    try:
        return stream_pb2.FromAgent.FromString(data)
    except DecodeError as problem:
        raise errors.ProtocolViolation(f"{len(data)} bytes that are no FromAgent message: {problem}") from None


def check_hello(hello: stream_pb2.Hello, who: identity.Identity) -> None:
    """An agent speaks this protocol and for its own node."""
    if hello.protocol != PROTOCOL:
        raise errors.ProtocolViolation(
            f"protocol {hello.protocol} is not spoken here, only {PROTOCOL}: bring agent and operator to one version"
        )
    if hello.node != who.node:
        raise errors.IdentityRefused(f"the token is of node {who.node!r} and cannot speak for {hello.node!r}")


async def serve(
    fleet: Fleet, bind: str, *, certificate: Callable[[], authority.ServerCertificate]
) -> tuple[grpc.aio.Server, int]:
    """Start the TLS server; answers with it and its port. `certificate` is asked at each handshake."""
    last = certificate()

    def configuration(of: authority.ServerCertificate) -> Any:
        return grpc.ssl_server_certificate_configuration([(of.key_pem, of.chain_pem)])

    def fetch() -> Any:
        # grpc's threads call this; None says "as before".
        nonlocal last
        current = certificate()
        if current is last:
            return None
        last = current
        return configuration(current)

    credentials = grpc.dynamic_ssl_server_credentials(configuration(last), fetch)
    server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=20_000)
    server.add_generic_rpc_handlers((fleet.handlers(),))
    port = server.add_secure_port(bind, credentials)
    if port == 0:
        raise errors.SettingsError(f"--bind {bind}: cannot listen there")
    await server.start()
    log.info("listening for agents", bind=bind, port=port)
    return server, port
