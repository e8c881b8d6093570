"""A relay between real agents and a real operator that keeps every frame: TLS on both sides, bytes as they are.

Agents dial it as they would the operator (its certificate is its own), tokens are passed on. Nothing is changed on the
way. What is *kept* is: without the bytes of objects (`Blob.zstd`; they are large and their names are in the plans),
and without the local part of the kernel's release.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
from probefleet_wire.v1 import stream_pb2

from tests.recordings.frames import Entry, Kind

METHOD = "/probefleet.v1.Fleet/Session"
LIMITS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]


@dataclass
class Relay:
    """`async with` it; agents dial `port` and trust `ca_file`."""

    folder: Path
    operator: str  # host:port
    operator_ca: bytes
    port: int = 0
    entries: list[Entry] = field(default_factory=list)
    _streams: int = 0
    _server: grpc.aio.Server | None = None

    @property
    def ca_file(self) -> Path:
        """The relay's certificate."""
        return self.folder / "relay.crt"

    async def __aenter__(self) -> Self:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
                *("-days", "2", "-keyout", "relay.key", "-out", "relay.crt", "-subj", "/CN=localhost"),
                *("-addext", "subjectAltName=DNS:localhost"),
            ],
            cwd=self.folder,
            check=True,
            capture_output=True,
        )
        key, certificate = (self.folder / "relay.key").read_bytes(), self.ca_file.read_bytes()
        self._server = grpc.aio.server(options=LIMITS)
        handler = grpc.stream_stream_rpc_method_handler(self._session)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("probefleet.v1.Fleet", {"Session": handler}),)
        )
        credentials = grpc.ssl_server_credentials([(key, certificate)])
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await self._server.stop(0.5)

    async def _session(self, _: object, context: Any) -> None:
        self._streams += 1
        number = self._streams
        metadata = [(key, value) for key, value in context.invocation_metadata() if key == "authorization"]
        options = [*LIMITS, ("grpc.ssl_target_name_override", "localhost")]
        credentials = grpc.ssl_channel_credentials(self.operator_ca)
        async with grpc.aio.secure_channel(self.operator, credentials, options=options) as channel:
            call = channel.stream_stream(METHOD)(metadata=metadata)
            up = asyncio.create_task(self._up(number, context, call), name=f"up-{number}")
            down = asyncio.create_task(self._down(number, call, context), name=f"down-{number}")
            try:
                await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (up, down):
                    task.cancel()
                await asyncio.gather(up, down, return_exceptions=True)

    async def _up(self, number: int, context: Any, call: Any) -> None:
        while isinstance(data := await context.read(), bytes):
            message = stream_pb2.FromAgent.FromString(data)
            if message.WhichOneof("message") == "hello":
                message.hello.kernel_release = re.sub(r"^(\d+(?:\.\d+)*).*", r"\1", message.hello.kernel_release)
            self._keep(Kind.AGENT, number, message.SerializeToString())
            await call.write(data)
        await call.done_writing()

    async def _down(self, number: int, call: Any, context: Any) -> None:
        while isinstance(data := await call.read(), bytes):
            message = stream_pb2.FromOperator.FromString(data)
            for blob in message.push.blobs if message.HasField("push") else ():
                blob.zstd = b""
            self._keep(Kind.OPERATOR, number, message.SerializeToString())
            await context.write(data)

    def _keep(self, kind: Kind, stream: int, content: bytes) -> None:
        self.entries.append(Entry(kind, stream, time.time_ns(), content))
