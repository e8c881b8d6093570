"""The agent's one stream: dials the operator, says Hello, carries pushes to the engine and batches to the operator.

::

    operator ── Push ──▶ engine.apply ──▶ Status ──▶ operator
                Ack  ──▶ engine.acknowledge
    tick ─────────────▶ engine.collect ──▶ Batch ──▶ operator

The engine is synchronous: every call of it runs in one worker thread, one after the other. Without an operator the
node keeps what it has; programs go on counting, and the next stream sends everything that is due. Reconnects are
spread by jitter, since five thousand agents lose one operator at the same moment.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
import structlog
from probefleet_wire.v1 import stream_pb2, stream_pb2_grpc

from probefleet_agent.engine import Engine
from probefleet_agent.errors import ProbefleetError

log = structlog.get_logger("session")
T = TypeVar("T")

#: Rings are looked at this often; tables when their interval is over.
TICK_SECONDS = 0.2
#: A push with its objects; the operator takes as much.
MAX_MESSAGE_BYTES = 16 << 20
_MOST_SECONDS, _LEAST_SECONDS = 30.0, 0.5
#: What waits to be sent: a status, and the batches of the window.
_QUEUE = 16


@dataclass(frozen=True, slots=True)
class Dial:
    """Where the operator is, and how the agent shows who it is."""

    target: str  # host:port
    ca_file: Path
    token_file: Path
    server_name: str = ""  # where the certificate names another host than ``target``


class Session:
    """Keeps one stream to the operator, for as long as ``run`` runs."""

    def __init__(self, engine: Engine, dial: Dial) -> None:
        self._engine = engine
        self._dial = dial
        # All of the engine is this thread's: it changes what others would look at.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._line = asyncio.Lock()  # from a batch's number to its place in the queue

    async def run(self) -> None:
        """Dial, again and again, until cancelled."""
        wait = _LEAST_SECONDS
        try:
            while True:
                started = time.monotonic()
                try:
                    await self._stream()
                    log.info("the operator ended the stream")
                except (grpc.aio.AioRpcError, OSError, ProbefleetError) as error:
                    log.warning("no stream to the operator", target=self._dial.target, error=_words(error, self._dial))
                except Exception:
                    # A bug of ours must not stop the node's counting: a new stream begins afresh.
                    log.exception("the stream broke")
                # A stream that held for a while was a good one: the operator was merely replaced.
                wait = _LEAST_SECONDS if time.monotonic() - started > _MOST_SECONDS else min(wait * 2, _MOST_SECONDS)
                await asyncio.sleep(random.uniform(wait / 2, wait))
        finally:
            self._worker.shutdown(wait=True)

    async def _stream(self) -> None:
        # Both are read anew: kubelet renews the token, the operator its CA.
        credentials = grpc.ssl_channel_credentials(self._dial.ca_file.read_bytes())
        token = self._dial.token_file.read_text().strip()
        options: list[tuple[str, str | int]] = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.bdp_probe", 0),
        ]
        if self._dial.server_name:
            options.append(("grpc.ssl_target_name_override", self._dial.server_name))
        async with grpc.aio.secure_channel(self._dial.target, credentials, options=options) as channel:
            outgoing: asyncio.Queue[stream_pb2.FromAgent] = asyncio.Queue(_QUEUE)
            await outgoing.put(stream_pb2.FromAgent(hello=await self._call(self._engine.hello)))
            # The operator pushes to nobody who has not said what he runs: it could not know what to keep.
            await outgoing.put(stream_pb2.FromAgent(status=await self._call(self._engine.status)))
            call = stream_pb2_grpc.FleetStub(channel).Session(  # type: ignore[no-untyped-call]  # generated code
                _drain(outgoing), metadata=(("authorization", f"Bearer {token}"),)
            )
            # Whichever ends first ends the other: a stream that nobody samples for is no stream.
            tasks = [
                asyncio.create_task(self._listen(call, outgoing), name="listener"),
                asyncio.create_task(self._sample(outgoing), name="sampler"),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for task in done:
                task.result()

    async def _listen(
        self, call: AsyncIterable[stream_pb2.FromOperator], outgoing: asyncio.Queue[stream_pb2.FromAgent]
    ) -> None:
        async for message in call:
            await self._receive(message, outgoing)

    async def _receive(self, message: stream_pb2.FromOperator, outgoing: asyncio.Queue[stream_pb2.FromAgent]) -> None:
        if message.WhichOneof("message") == "ack":
            await self._call(lambda: self._engine.acknowledge(message.ack.sequence))
            return
        # What the old instances counted last, before they go.
        await self._send(lambda: self._last(message.push), outgoing)
        status = await self._call(lambda: self._apply(message.push))
        await outgoing.put(stream_pb2.FromAgent(status=status))

    def _last(self, push: stream_pb2.Push) -> stream_pb2.Batch | None:
        return self._engine.collect(time.time_ns(), force=True, complete=self._engine.ends_a_process(push))

    def _apply(self, push: stream_pb2.Push) -> stream_pb2.Status:
        self._engine.apply(push, wait=False)
        return self._engine.status()

    async def _sample(self, outgoing: asyncio.Queue[stream_pb2.FromAgent]) -> None:
        turns = await self._call(lambda: self._engine.turns)
        while True:
            await self._send(lambda: self._engine.collect(time.time_ns()), outgoing)
            if (now := await self._call(lambda: self._engine.turns)) != turns:
                turns = now
                status = await self._call(self._engine.status)
                await outgoing.put(stream_pb2.FromAgent(status=status))
            # A ring of 16 MB is full within 0.3 s of a million records a second.
            await asyncio.sleep(0 if self._engine.behind else TICK_SECONDS)

    async def _send(
        self, collect: Callable[[], stream_pb2.Batch | None], outgoing: asyncio.Queue[stream_pb2.FromAgent]
    ) -> None:
        """One batch, in the order of numbers: one that is overtaken would be taken for one that came before."""
        async with self._line:
            batch = await self._call(collect)
            if batch is not None:
                await outgoing.put(stream_pb2.FromAgent(batch=batch))

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)


async def _drain(outgoing: asyncio.Queue[stream_pb2.FromAgent]) -> AsyncIterator[stream_pb2.FromAgent]:
    while True:
        yield await outgoing.get()


def _words(error: Exception, dial: Dial) -> str:
    if not isinstance(error, grpc.aio.AioRpcError):
        return str(error)
    details = error.details() or ""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return (
            f"the operator's certificate is not signed by a CA of {dial.ca_file}, or is for another name than "
            f"{dial.server_name or dial.target.rpartition(':')[0]!r}: nothing was sent to it, and what runs here goes "
            f"on. Is the file that of this cluster's operator (ConfigMap probefleet-ca)? ({details})"
        )
    return f"{error.code().name}: {details}"
