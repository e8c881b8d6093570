"""One operator and many agents: `make scale`. Real gRPC over loopback with TLS, a real operator; ends by itself.

Out: for a policy that comes to all nodes, when it was on the last of them (p50, p99); and for a time of load, what the
operator took of a core and of memory, and how often it wrote to the API server. Held against what it is built for
(`LIMITS`); the exit status says whether it kept them.

Not real: the API server (tests/fakes/api_server.py in this process, so that 5,000 nodes and their tokens cost little)
and the agents' kernels (agents.py). Agents share this machine's cores with the operator: its times include theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
from aiohttp import web

from tests.fakes.api_server import FakeApiServer, review
from tests.fakes.operator_parts import raw_policy
from tests.fakes.operator_process import OperatorProcess

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = "probefleet"
POLICIES = "/apis/probefleet.io/v1alpha1/namespaces/shop/probepolicies"
LIMITS = {"everywhere_p99_seconds": 5.0, "cores": 0.6, "rss_mib": 500.0, "api_writes_per_second": 5.0}
OUTPUTS = [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["workload"]}]


class Tokens(dict[str, Any]):
    """Every token is its node's name."""

    def get(self, token: str, default: Any = None) -> Any:
        return review(token)


class ScaleApiServer(FakeApiServer):
    """The fake, with the discovery that kopf asks for."""

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        found = DISCOVERY.get(request.path)
        return web.json_response(found) if found is not None else await super()._handle(request)


def resources(namespaced: bool, **kinds: str) -> dict[str, Any]:
    """What discovery says of one group's version."""
    verbs = ["get", "list", "watch", "create", "update", "patch", "delete"]
    return {
        "resources": [
            {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": namespaced, "verbs": verbs}
            for plural, kind in kinds.items()
        ]
    }


def group(name: str, version: str) -> dict[str, Any]:
    """One group, with its one version."""
    said = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [said], "preferredVersion": said}


# kopf waits until namespaces and CRDs are among what it finds.
DISCOVERY: dict[str, Any] = {
    "/api": {"versions": ["v1"]},
    "/api/v1": resources(False, namespaces="Namespace"),
    "/apis": {"groups": [group("probefleet.io", "v1alpha1"), group("apiextensions.k8s.io", "v1")]},
    "/apis/apiextensions.k8s.io/v1": resources(False, customresourcedefinitions="CustomResourceDefinition"),
    "/apis/probefleet.io/v1alpha1": resources(True, probepolicies="ProbePolicy", probemaps="ProbeMap"),
}


def fill(fake: FakeApiServer, agents: int, pods: int) -> None:
    """Nodes that are ready, and their pods."""
    for number in range(agents):
        name = f"node-{number:05}"
        conditions = [{"type": "Ready", "status": "True"}]
        fake.put(
            f"/api/v1/nodes/{name}", {"metadata": {"uid": name, "labels": {}}, "status": {"conditions": conditions}}
        )
        for pod in range(pods):
            uid = f"pod-{number:05}-{pod}"
            owner = {"kind": "StatefulSet", "name": f"set-{pod}", "uid": f"set-{pod}", "controller": True}
            metadata = {"namespace": "shop", "uid": uid, "labels": {"app": f"a{pod}"}, "ownerReferences": [owner]}
            fake.put(f"/api/v1/namespaces/shop/pods/{uid}", {"metadata": metadata, "spec": {"nodeName": name}})
    fake.history.clear()  # watches begin after the lists
    fake.page_size = 5_000


class Worker:
    """A process of agents."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, words: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{words}\n".encode())
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise click.ClickException("a process of agents has ended: see above")
        return json.loads(line)

    async def end(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        await self._process.wait()


def cpu_seconds(pid: int) -> float:
    """What a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int, what: str = "VmRSS") -> float:
    """Memory of a process, now or (VmHWM) at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(what))) / 1024


def written(fake: FakeApiServer) -> Counter[str]:
    """Writes by what is written, reviews of tokens left out: those are asked once a connection."""
    return Counter(
        path.rsplit("/", 2)[-2] if path.endswith("/status") else path.rsplit("/", 2)[-1]
        for method, path in fake.requests
        if method != "GET" and not path.endswith("tokenreviews")
    )


async def ask_all(workers: list[Worker], words: str) -> list[Any]:
    return await asyncio.gather(*(worker.ask(words) for worker in workers))


async def everywhere(fake: FakeApiServer, workers: list[Worker], name: str, agents: int) -> dict[str, float]:
    """Apply a policy; seconds until it was pushed to the nodes. The first of the class goes first."""
    began = time.time()
    fake.put(f"{POLICIES}/{name}", raw_policy(name, interval="10s", outputs=OUTPUTS))
    times = sorted(each - began for found in await ask_all(workers, f"seen {name}") for each in found["times"])
    assert len(times) == agents
    return {"first": times[0], "p50": statistics.median(times), "p99": times[int(len(times) * 0.99)], "last": times[-1]}


async def measure(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The whole run."""
    agents, pods, seconds = options["agents"], options["pods"], options["seconds"]
    fake = ScaleApiServer(tokens=Tokens())
    fill(fake, agents, pods)
    result: dict[str, Any] = {"agents": agents, "pods": agents * pods}
    async with fake.running(), contextlib.AsyncExitStack() as stack:
        operator = operator_of(fake, folder)
        operator.start()
        stack.callback(lambda: operator.process and operator.stop(signal.SIGTERM))
        await asyncio.to_thread(operator.wait_ready, 120)
        assert operator.process is not None
        pid = operator.process.pid
        bundle = fake.objects[f"/api/v1/namespaces/{SYSTEM}/configmaps/probefleet-ca"]["data"]["ca.crt"]
        (folder / "ca.crt").write_text(bundle)
        workers = [
            await worker_of(folder, operator.port, agents, pods, n, options["workers"])
            for n in range(options["workers"])
        ]
        for worker in workers:
            stack.push_async_callback(worker.end)
        began, cpu = time.monotonic(), cpu_seconds(pid)
        answers = await ask_all(workers, "connected")
        result["connected"] = sum(each["connected"] for each in answers)
        result["connect_seconds"], result["connect_cpu_seconds"] = time.monotonic() - began, cpu_seconds(pid) - cpu
        if result["connected"] != agents:
            raise click.ClickException(f"{result['connected']} of {agents} connected: {answers}")
        cpu = cpu_seconds(pid)
        result["everywhere"] = await everywhere(fake, workers, "calls", agents)
        result["everywhere_cpu_seconds"] = cpu_seconds(pid) - cpu
        await ask_all(workers, f"load {options['warm_up']}")  # keys are new only once
        fake.requests.clear()
        began, cpu = time.monotonic(), cpu_seconds(pid)
        answers = await ask_all(workers, f"load {seconds}")
        took = time.monotonic() - began
        result["batches_per_second"] = sum(each["batches"] for each in answers) / took
        result["unacknowledged"] = sum(each["batches"] - each["acks"] for each in answers)
        result["cores"] = (cpu_seconds(pid) - cpu) / took
        result["rss_mib"], result["rss_most_mib"] = rss_mib(pid), rss_mib(pid, "VmHWM")
        result["api_writes_per_second"] = sum(written(fake).values()) / took
        result["api_writes"] = dict(written(fake))
        report = fake.objects["/apis/probefleet.io/v1alpha1/namespaces/shop/probereports/calls"]["status"]
        result["coverage"] = report["columns"]["coverage"]
    return result


def operator_of(fake: FakeApiServer, folder: Path) -> OperatorProcess:
    """The real operator on the fake API server, with a catalog of one probe."""
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": fake.base_url}}],
    }  # fmt: skip
    (folder / "kubeconfig").write_text(json.dumps(config))
    catalog = folder / "bpf"
    catalog.mkdir()
    for each in ("syscount", "include"):
        (catalog / each).symlink_to(ROOT / "bpf" / each)
    return OperatorProcess(
        folder / "kubeconfig",
        folder / "operator.log",
        namespace=SYSTEM,
        options=(f"--catalog={catalog}",),
        environment={"PROBEFLEET_CATALOG_OBJECTS": str(ROOT / "build" / "bpf")},
    )


async def worker_of(folder: Path, port: int, agents: int, pods: int, number: int, of: int) -> Worker:
    """The process of every `of`-th part of the agents."""
    first, end = agents * number // of, agents * (number + 1) // of
    arguments = [f"127.0.0.1:{port}", str(folder / "ca.crt"), str(first), str(end - first), str(pods)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.scale.agents", *arguments),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=16 << 20,
    )
    return Worker(process)


@click.command()
@click.option("--agents", default=5_000, show_default=True)
@click.option("--pods", default=10, show_default=True, help="Pods, and so rows, of each node.")
@click.option("--seconds", default=40, show_default=True, help="How long the load is measured.")
@click.option("--warm-up", default=15, show_default=True, help="How long it goes before that.")
@click.option("--workers", default=2, show_default=True, help="Processes of agents.")
@click.option("--at-most-seconds", default=600, show_default=True, help="End with an error after that.")
def main(**options: Any) -> None:
    """Measure one operator under many agents."""

    async def bounded() -> dict[str, Any]:
        async with asyncio.timeout(options["at_most_seconds"]):
            return await measure(options, Path(folder))

    with tempfile.TemporaryDirectory(prefix="probefleet-scale-") as folder:
        try:
            result = asyncio.run(bounded())
        except BaseException:
            log = Path(folder, "operator.log")
            print(log.read_text()[-3000:] if log.exists() else "", file=sys.stderr)
            raise
    found = {**result, "everywhere_p99_seconds": result["everywhere"]["p99"]}
    print(json.dumps(result, indent=2, default=str))
    over = {name: (found[name], limit) for name, limit in LIMITS.items() if found[name] > limit}
    for name, (value, limit) in over.items():
        print(f"over its limit: {name} {value:.2f} > {limit}")
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
