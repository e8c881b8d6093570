"""CRI (``runtime.v1``) as far as ``container_runtime`` needs it: two calls, both of them lists; nothing on the machine
is changed. What comes is bounded and checked before anybody sees it: what is no pod's identity is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc
from probefleet_wire.cri import runtime_pb2, runtime_pb2_grpc

from probefleet_cli import container_runtime
from probefleet_cli.local_pods import Sandbox

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}")
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


class Runtime:
    """A runtime that answers. ``name`` is for people: ``containerd 1.6.20``. Use as a context manager."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        # grpc-go takes no socket's path as :authority.
        options = [
            ("grpc.default_authority", "localhost"),
            ("grpc.max_receive_message_length", container_runtime.MAX_ANSWER_BYTES),
        ]
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=options)
        self._stub = runtime_pb2_grpc.RuntimeServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        try:
            said = self._ask(self._stub.Version, runtime_pb2.VersionRequest())
        except BaseException:
            self.close()
            raise
        self.name = f"{said.runtime_name[:64]} {said.runtime_version[:64]}".strip()

    def pods(self) -> tuple[Sandbox, ...]:
        """All pods, also those that have ended and are not removed yet. Of a pod with several sandboxes the newest
        gives the labels. Raises NoAnswer."""
        listed = self._ask(self._stub.ListPodSandbox, runtime_pb2.ListPodSandboxRequest())
        # Asked second, so that no container is of a pod that was not listed.
        containers = self._ask(self._stub.ListContainers, runtime_pb2.ListContainersRequest())
        return tuple(_read(listed, containers))

    def close(self) -> None:
        """Let go of the socket."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _ask(call: Any, request: Any) -> Any:
        try:
            return call(request, timeout=container_runtime.ANSWER_SECONDS)
        except grpc.RpcError as error:
            raise container_runtime.NoAnswer(_why(error)) from error


def _read(
    listed: runtime_pb2.ListPodSandboxResponse, containers: runtime_pb2.ListContainersResponse
) -> Iterator[Sandbox]:
    pods: dict[str, runtime_pb2.PodSandbox] = {}
    uids: dict[str, str] = {}
    for each in sorted(listed.items, key=lambda each: each.created_at):
        known = each.metadata
        if _UID.fullmatch(known.uid) and _NAME.fullmatch(known.name) and _NAME.fullmatch(known.namespace):
            pods[known.uid] = each
            uids[each.id] = known.uid
    names: dict[str, dict[str, str]] = {}
    for container in containers.containers:
        uid = uids.get(container.pod_sandbox_id)
        if uid and _CONTAINER_ID.fullmatch(container.id) and _NAME.fullmatch(container.metadata.name):
            names.setdefault(uid, {})[container.id] = container.metadata.name
    for uid, pod in pods.items():
        yield Sandbox(uid, pod.metadata.namespace, pod.metadata.name, dict(pod.labels), names.get(uid, {}))


def _why(error: grpc.RpcError) -> str:
    """What a person can do something about."""
    code, details = error.code(), str(error.details())
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "speaks no CRI v1 (its CRI plugin is off, or it is older than containerd 1.6 or CRI-O 1.23)"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"does not answer within {container_runtime.ANSWER_SECONDS:g} s"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return f"answers with more than {container_runtime.MAX_ANSWER_BYTES >> 20} MiB"
    return f"does not answer: {details.rsplit('error: ', 1)[-1][:200]}"
