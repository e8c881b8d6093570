"""An agent without a kernel: a real gRPC stream over real TLS to a real operator.

Real: the channel, the token as call metadata, every message. It does what the test tells it: says Hello, notes pushes,
answers them with what `answer` returns, sends batches that the test builds (`counter_table`). Not here: programs, maps,
adoption, the pod filter, re-sending of unacknowledged batches, jittered reconnects.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np
from probefleet_wire import columns
from probefleet_wire.v1 import plan_pb2, stream_pb2, stream_pb2_grpc

Answer = Callable[[stream_pb2.Push], stream_pb2.Status]
#: What gRPC's client says instead of the server's status where it was writing at the moment that the stream ended.
STATUS_LOST = "Internal error from Core"


def everything_ready(push: stream_pb2.Push) -> stream_pb2.Status:
    """What an agent says whose kernel takes everything."""
    return stream_pb2.Status(
        term=push.term,
        version=push.version,
        policies=[
            stream_pb2.PolicyStatus(
                policy_uid=plan.policy_uid,
                generation=plan.generation,
                digest=plan.instance.digest,
                state=stream_pb2.PolicyStatus.READY,
            )
            for plan in push.plans
        ],
    )


class FakeAgent:
    """One node's agent. `async with` opens the channel; `connect` begins a stream."""

    def __init__(
        self,
        target: str,
        node: str,
        *,
        ca: bytes,
        token: str,
        server_name: str = "localhost",
        kernel: str = "6.12.0",
        answer: Answer | None = everything_ready,
    ) -> None:
        self.node, self.kernel, self.answer = node, kernel, answer
        self._target, self._ca, self._token, self._server_name = target, ca, token, server_name
        self.pushes: list[stream_pb2.Push] = []
        self.acks: list[int] = []
        self.applied = (0, 0)
        self.closed: grpc.aio.AioRpcError | None = None
        self.ended = asyncio.Event()
        self._changed = asyncio.Condition()
        self._writing = asyncio.Lock()  # gRPC takes one write at a time
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self.sequence = 0

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.secure_channel(
            self._target,
            grpc.ssl_channel_credentials(self._ca),
            options=[
                ("grpc.ssl_target_name_override", self._server_name),
                ("grpc.max_receive_message_length", 16 << 20),
                ("grpc.max_send_message_length", 64 << 20),
            ],
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.disconnect()
        if self._channel is not None:
            await self._channel.close(None)

    async def connect(
        self, *, hello: bool = True, protocol: int = 1, node: str | None = None, deaf: bool = False
    ) -> None:
        """Begin a stream and say Hello; answers of the operator are noted from now on. `deaf`: it takes none."""
        assert self._channel is not None
        self.sequence = 0
        self.acks.clear()
        self.closed = None
        self.ended = asyncio.Event()
        stub = stream_pb2_grpc.FleetStub(self._channel)  # type: ignore[no-untyped-call]  # generated code
        metadata = [("authorization", f"Bearer {self._token}")] if self._token else []
        self._call = stub.Session(metadata=metadata)
        self._reader = None if deaf else asyncio.create_task(self._read(), name=f"fake-agent-{self.node}")
        if hello:
            await self.send(
                stream_pb2.FromAgent(
                    hello=stream_pb2.Hello(
                        protocol=protocol,
                        node=self.node if node is None else node,
                        boot_id="b00t",
                        agent_version="fake",
                        kernel_release=self.kernel,
                        machine="x86_64",
                        cpus=2,
                        kernel_build="#1",
                        applied_term=self.applied[0],
                        applied_version=self.applied[1],
                    )
                )
            )

    async def disconnect(self) -> None:
        """End the stream, as a process that ends does."""
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None

    async def told_why(self, attempt: Callable[[], Awaitable[None]]) -> grpc.aio.AioRpcError:
        """Why the operator ends the stream of an attempt, made again where the client has lost its answer."""
        for _ in range(10):
            await attempt()
            error = await self.refused()
            if error.details() != STATUS_LOST:
                return error
        raise AssertionError("the client lost the operator's answer ten times")

    async def send(self, message: stream_pb2.FromAgent) -> None:
        """One message; what the operator thinks of it shows in `closed`."""
        try:
            async with self._writing:
                await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the stream has ended: its reader says why

    async def send_status(self, status: stream_pb2.Status) -> None:
        await self.send(stream_pb2.FromAgent(status=status))

    async def send_batch(
        self,
        *,
        tables: Sequence[stream_pb2.Table] = (),
        events: Sequence[stream_pb2.EventChunk] = (),
        instances: Sequence[stream_pb2.InstanceStat] = (),
        time_ns: int = 0,
    ) -> None:
        self.sequence += 1
        batch = stream_pb2.Batch(
            sequence=self.sequence,
            time_ns=time_ns or time.time_ns(),
            tables=tables,
            events=events,
            instances=instances,
        )
        await self.send(stream_pb2.FromAgent(batch=batch))

    async def pushed(
        self, wanted: Callable[[stream_pb2.Push], bool] = lambda _: True, *, seconds: float = 15
    ) -> stream_pb2.Push:
        """The first push from now on, or the newest noted, that is as wanted."""
        async with asyncio.timeout(seconds), self._changed:
            while not (self.pushes and wanted(self.pushes[-1])):
                await self._changed.wait()
            return self.pushes[-1]

    async def acknowledged(self, sequence: int, *, seconds: float = 15) -> None:
        """Wait for the ack of a batch."""
        async with asyncio.timeout(seconds), self._changed:
            while not (self.acks and self.acks[-1] >= sequence):
                await self._changed.wait()

    async def refused(self, *, seconds: float = 15) -> grpc.aio.AioRpcError:
        """Wait for the stream's end and answer with its reason."""
        async with asyncio.timeout(seconds):
            await self.ended.wait()
        assert self.closed is not None, "the stream ended without a reason"
        return self.closed

    async def _read(self) -> None:
        try:
            async for message in self._call:
                if message.WhichOneof("message") == "push":
                    push = message.push
                    if self.answer is not None:
                        await self.send_status(self.answer(push))
                    self.applied = (push.term, push.version)
                    self.pushes.append(push)
                else:
                    self.acks.append(message.ack.sequence)
                async with self._changed:
                    self._changed.notify_all()
        except grpc.aio.AioRpcError as problem:
            self.closed = problem
        finally:
            self.ended.set()


def counter_table(
    plan: plan_pb2.Plan,
    output: str,
    counts: dict[str, int],
    *,
    key: str = "pod_uid",
    epoch: str = "b00t:7",
    first_new_row: int = 0,
    since_ns: int = 0,
    lost: int = 0,
) -> stream_pb2.Table:
    """A table of a counter with one string column as key."""
    names = list(counts)
    return stream_pb2.Table(
        policy_uid=plan.policy_uid,
        output=output,
        epoch=epoch,
        first_new_row=first_new_row,
        new_rows=len(names),
        keys=[
            stream_pb2.Column(
                name=key,
                strings=stream_pb2.Strings(distinct=names, index=columns.pack(np.arange(len(names), dtype=np.uint32))),
            )
        ],
        rows=columns.pack(np.arange(first_new_row, first_new_row + len(names), dtype=np.uint32)),
        width=1,
        values=columns.pack(np.array(list(counts.values()), dtype=np.uint64)),
        since_ns=since_ns or time.time_ns() - 10_000_000_000,
        lost=lost,
        generation=plan.generation,
    )
