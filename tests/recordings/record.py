"""Takes the recordings anew: `make record` (root; a kernel with tracepoints; the control plane's binaries).

Real: an etcd and a kube-apiserver, the operator as a process, agents as processes on this machine's kernel, programs,
workloads in cgroups, TLS. Not here: kubelets and a scheduler (pods are written with the node that they are on, and
their cgroups are made by hand), so two nodes share this kernel, each with its own part of the cgroup tree and its own
folder of pins. Every scenario makes numbers that are known before, and ends when the operator's report has them.
"""

from __future__ import annotations

import asyncio
import json
import platform
import re
import sys
import tempfile
from pathlib import Path

from tests.fakes import control_plane, operator_process
from tests.fakes.control_plane import ControlPlane
from tests.fakes.operator_process import OperatorProcess
from tests.recordings import frames, scenarios, stage
from tests.recordings.frames import Entry, Kind
from tests.workloads import run as workloads


def content_of(taken: stage.Stage, facts: stage.Json) -> list[Entry]:
    """The recording's entries: facts first, then everything by its time."""
    entries = list(taken.relay.entries)
    for number, path in enumerate(taken.readings, 1):
        lines = path.read_bytes().split(b"\n")[:-1]  # what has no end was being written when the kill came
        entries += [Entry(Kind.READING, number, json.loads(line)["time_ns"], line) for line in lines]
    entries.sort(key=lambda entry: entry.time_ns)
    known = json.dumps(facts, separators=(",", ":")).encode()
    entries.insert(0, Entry(Kind.FACTS, 0, 0, known))
    here = [str(stage.ROOT).encode(), str(stage.ROOT).encode().hex().encode(), platform.release().encode()]
    for entry in entries:
        for word in here:
            if word in entry.content:
                at = entry.content.index(word)
                raise SystemExit(f"an entry names this machine: {entry.content[max(0, at - 200) : at + 200]!r}")
    return entries


async def take(plane: ControlPlane, operator: OperatorProcess, name: str) -> None:
    """Run one scenario and write its file."""
    async with stage.stage_of(plane, operator) as taken:
        expected = await scenarios.SCENARIOS[name](taken)
        facts = {
            "about": (scenarios.SCENARIOS[name].__doc__ or "").strip(),
            "kernel": re.sub(r"^(\d+(?:\.\d+)*).*", r"\1", platform.release()),
            "nodes": {"node1": {"pool": "web"}, "node2": {}},
            "pods": taken.pods(),
            "objects": taken.objects,
            "expected": expected,
        }
        entries = content_of(taken, facts)
    size = frames.write(frames.FOLDER / f"{name}.frames", entries)
    print(f"{name}: {len(entries)} entries, {size:,} bytes: {facts['about']}", flush=True)


async def main(wanted: list[str]) -> None:
    """Record scenarios by name, or all."""
    workloads.build()
    with tempfile.TemporaryDirectory() as name, control_plane.running(Path(name)) as plane:
        plane.install_crds(stage.ROOT / "charts" / "probefleet" / "files" / "crds")
        for namespace in (stage.SHOP, stage.OTHER, stage.NAMESPACE):
            plane.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        plane.add_node("node1", labels={"pool": "web"})
        plane.add_node("node2")
        for each in wanted or scenarios.SCENARIOS:
            process = OperatorProcess(
                plane.kubeconfig,
                Path(name) / f"operator-{each}.log",
                namespace=stage.NAMESPACE,
                options=("--report-seconds=0.5", f"--catalog={stage.ROOT / 'bpf'}"),
                environment={"PROBEFLEET_CATALOG_OBJECTS": str(stage.ROOT / "build" / "bpf")},
            )
            with operator_process.running(process):
                await take(plane, process, each)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
