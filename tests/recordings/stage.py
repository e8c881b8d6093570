"""Where a recording is taken: a real API server and operator, a relay, agents on this kernel, pods by hand.

record.py makes a `Stage` for each scenario (scenarios.py), which starts agents, writes pods, applies policies and
waits for what a user would see. Nothing of it is left: no agent, cgroup or pin.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.control_plane import ControlPlane
from tests.fakes.operator_process import OperatorProcess
from tests.recordings import frames
from tests.recordings.relay import Relay
from tests.workloads import run as workloads

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE, SHOP, OTHER = "probefleet", "shop", "elsewhere"
API = "/apis/probefleet.io/v1alpha1/namespaces"
WAIT_SECONDS = 60.0
Json = dict[str, Any]


@dataclass
class Stage:
    """One scenario's surroundings."""

    plane: ControlPlane
    operator: OperatorProcess
    relay: Relay
    folder: Path
    cgroups: Path  # the tree of all nodes of this recording
    pins: Path
    objects: list[Json] = field(default_factory=list)  # policies and ProbeMaps, each version once
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    readings: list[Path] = field(default_factory=list)

    def agent(self, node: str) -> subprocess.Popen[bytes]:
        """Start the agent of a node."""
        token, root = self.folder / f"{node}.token", self.cgroups / node
        token.write_text(self.plane.agent_token(NAMESPACE, node))
        root.mkdir(exist_ok=True)
        bpffs = self.pins / node
        bpffs.mkdir(exist_ok=True)
        readings = self.folder / f"readings-{len(self.readings) + 1}"
        self.readings.append(readings)
        with (self.folder / f"{node}.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.recordings.agent", str(readings)),
                    *(f"--operator=127.0.0.1:{self.relay.port}", "--server-name=localhost", f"--node={node}"),
                    *(f"--ca-file={self.relay.ca_file}", f"--token-file={token}", f"--bpffs={bpffs}"),
                    f"--cgroup-root=/{root.relative_to(workloads.cgroup2_mount())}",
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def pod(self, namespace: str, name: str, node: str) -> Path:
        """A pod of the API server, and its container's cgroup on this machine."""
        owner = {"kind": "StatefulSet", "name": name.rpartition("-")[0], "uid": f"owner-of-{name}"}
        uid = self.plane.add_pod(namespace, name, node, owner=owner)["metadata"]["uid"]
        cgroup = self.cgroups / node / "kubepods" / f"pod{uid}" / secrets.token_hex(32)
        cgroup.mkdir(parents=True)
        return cgroup

    def pods(self) -> Json:
        """Every pod that the API server has: by uid, what the operator knows of it."""
        return {
            pod["metadata"]["uid"]: {
                "namespace": pod["metadata"]["namespace"],
                "name": pod["metadata"]["name"],
                "node": pod["spec"]["nodeName"],
                "workload": pod["metadata"].get("ownerReferences", [{"name": pod["metadata"]["name"]}])[0]["name"],
            }
            for pod in self.plane.request("GET", "/api/v1/pods")["items"]
        }

    def apply(self, kind: str, name: str, spec: Json) -> None:
        """kubectl apply."""
        body = {"apiVersion": "probefleet.io/v1alpha1", "kind": kind, "metadata": {"name": name, "namespace": SHOP}}
        self.plane.kubectl("apply", "-f", "-", stdin=json.dumps({**body, "spec": spec}))
        made = self.read(f"{kind.lower()[:-1] + 'ies' if kind.endswith('y') else kind.lower() + 's'}/{name}")
        metadata = {
            key: made["metadata"][key] for key in ("name", "namespace", "uid", "generation", "creationTimestamp")
        }
        self.objects.append({**body, "metadata": metadata, "spec": made["spec"]})

    def read(self, path: str) -> Json:
        """An object of namespace shop; {} while it is not there."""
        try:
            return self.plane.request("GET", f"{API}/{SHOP}/{path}")
        except urllib.error.HTTPError as problem:
            if problem.code != 404:
                raise
            return {}

    def condition(self, name: str, kind: str, generation: int = 1) -> bool:
        """Whether a policy's condition is True for that generation."""
        status = self.read(f"probepolicies/{name}").get("status", {})
        found = {each["type"]: each for each in status.get("conditions", [])}
        return found.get(kind, {}).get("status") == "True" and status["observedGeneration"] == generation

    def total(self, policy: str, output: str) -> int:
        """The whole of an output in the report, 0 while not every node is in it."""
        status = self.read(f"probereports/{policy}").get("status", {})
        sampled, _, selected = status.get("columns", {}).get("coverage", "0/1").partition("/")
        found = [each for each in status.get("outputs", []) if each["name"] == output]
        return int(found[0]["total"]["value"]) if found and sampled == selected else 0

    async def until(self, holds: Callable[[], Any], what: str) -> None:
        """Read until it is so; the API server is polled as a user polls it."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not await asyncio.to_thread(holds):
            if time.monotonic() > deadline:
                logs = "".join(path.read_text()[-3000:] for path in self.folder.glob("*.log"))
                raise SystemExit(f"never: {what}\n{logs}")
            await asyncio.sleep(0.1)  # as `kubectl get` in a loop: not every question has an event

    async def removed(self, *policies: str) -> None:
        """Delete policies and wait until every agent says that it runs nothing."""
        for name in policies:
            await asyncio.to_thread(self.plane.request, "DELETE", f"{API}/{SHOP}/probepolicies/{name}")
        await self.until(lambda: all(not status.policies for status in self.newest()), "every agent runs nothing")

    def newest(self) -> list[Any]:
        """The last status of each node's last stream."""
        recorded = frames.Recording({}, tuple(self.relay.entries))
        last = {hello.node: stream for stream, hello in recorded.hellos().items()}
        told = {entry.stream: status for entry, status in recorded.statuses()}
        return [told[stream] for stream in last.values() if stream in told]


@contextlib.contextmanager
def held(cgroup: Path | None, *argv: str, user: int | None = None) -> Iterator[Callable[[], None]]:
    """A workload that waits in its cgroup; the function lets it go and returns when it is done."""
    process = subprocess.Popen(
        [str(workloads.binary(argv[0])), "--hold", *argv[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        user=user,
        bufsize=0,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    assert stdout.readline().startswith(b"ready")
    if cgroup is not None:
        workloads.place(process.pid, cgroup)

    def go() -> None:
        stdin.write(b"g")
        assert stdout.readline().startswith(b"done")

    try:
        yield go
    finally:
        stdin.close()
        process.wait(30)
        stdout.close()


@contextlib.asynccontextmanager
async def stage_of(plane: ControlPlane, operator: OperatorProcess) -> AsyncIterator[Stage]:
    """A stage, and nothing of it left: no agent, cgroup or pin."""
    unique = f"probefleet-recording-{os.getpid()}-{time.monotonic_ns()}"
    cgroups, pins = workloads.cgroup2_mount() / unique, Path("/sys/fs/bpf") / unique
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ca = plane.ca_bundle(NAMESPACE)
        async with Relay(folder, f"127.0.0.1:{operator.port}", ca) as relay:
            cgroups.mkdir()
            pins.mkdir()
            stage = Stage(plane, operator, relay, folder, cgroups, pins)
            try:
                yield stage
            finally:
                for process in stage.processes:
                    process.terminate()
                for process in stage.processes:
                    process.wait(20)
                shutil.rmtree(pins)  # unlinks pins and removes folders, as bpffs can
                for path in sorted((each for each in cgroups.rglob("*") if each.is_dir()), reverse=True):
                    path.rmdir()
                cgroups.rmdir()
