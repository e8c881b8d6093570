"""A container runtime that is real to the wire (gRPC over a unix socket, CRI's own names and numbers) and has no
containers: it lists what a test puts into it.

Not modelled: filters (we send none), images, exec, stats, events, and every call that would change something: those are
UNIMPLEMENTED, so a client that made one would fail. Sandboxes do not become NOTREADY and are not collected by time; a
test takes them out. What a real containerd answers is tried in tests/e2e/test_one_node.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
from probefleet_wire.cri import runtime_pb2, runtime_pb2_grpc


class FakeRuntime(runtime_pb2_grpc.RuntimeServiceServicer):
    """Its sandboxes and containers, how often it was asked, and how it misbehaves."""

    def __init__(self) -> None:
        self.sandboxes: list[runtime_pb2.PodSandbox] = []
        self.containers: list[runtime_pb2.Container] = []
        self.calls: list[str] = []
        #: It refuses lists with this, until it is None again.
        self.refuses: grpc.StatusCode | None = None
        #: It answers lists when this is set only.
        self.answers = threading.Event()
        self.answers.set()

    def add(
        self, uid: str, namespace: str, name: str, labels: Mapping[str, str], *containers: str, created_at: int = 1
    ) -> None:
        """A pod with running containers."""
        identity = f"{len(self.sandboxes):064x}"
        own = {
            "io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.uid": uid,
        }  # fmt: skip
        metadata = runtime_pb2.PodSandboxMetadata(name=name, uid=uid, namespace=namespace)
        self.sandboxes.append(
            runtime_pb2.PodSandbox(id=identity, metadata=metadata, created_at=created_at, labels={**own, **labels})
        )
        for container in containers:
            self.containers.append(
                runtime_pb2.Container(
                    id=f"{0xC0 << 240 | len(self.containers):064x}",
                    pod_sandbox_id=identity,
                    metadata=runtime_pb2.ContainerMetadata(name=container),
                )
            )

    def remove(self, name: str) -> None:
        """The kubelet removed the pod."""
        gone = {each.id for each in self.sandboxes if each.metadata.name == name}
        self.sandboxes = [each for each in self.sandboxes if each.id not in gone]
        self.containers = [each for each in self.containers if each.pod_sandbox_id not in gone]

    def Version(
        self, request: runtime_pb2.VersionRequest, context: grpc.ServicerContext
    ) -> runtime_pb2.VersionResponse:
        self.calls.append("Version")
        return runtime_pb2.VersionResponse(runtime_name="fake", runtime_version="0")

    def ListPodSandbox(
        self, request: runtime_pb2.ListPodSandboxRequest, context: grpc.ServicerContext
    ) -> runtime_pb2.ListPodSandboxResponse:
        self._asked("ListPodSandbox", context)
        return runtime_pb2.ListPodSandboxResponse(items=self.sandboxes)

    def ListContainers(
        self, request: runtime_pb2.ListContainersRequest, context: grpc.ServicerContext
    ) -> runtime_pb2.ListContainersResponse:
        self._asked("ListContainers", context)
        return runtime_pb2.ListContainersResponse(containers=self.containers)

    def _asked(self, call: str, context: grpc.ServicerContext) -> None:
        self.calls.append(call)
        if self.refuses is not None:
            context.abort(self.refuses, "refused by the test")
        assert self.answers.wait(30)


@contextmanager
def serving(socket: Path, fake: FakeRuntime | None) -> Iterator[None]:
    """It listens there; without a fake it is a server that speaks no CRI, as containerd with its plugin off."""
    server = grpc.server(ThreadPoolExecutor(4))
    if fake is not None:
        runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(fake, server)  # type: ignore[no-untyped-call]  # generated
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    try:
        yield
    finally:
        if fake is not None:
            fake.answers.set()
        server.stop(None).wait(10)
