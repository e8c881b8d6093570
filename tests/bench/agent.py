"""What an agent takes with ten policies: ``python tests/bench/agent.py [SECONDS]``, as root.

The whole catalog with its defaults, and two of its probes with other parameters: ten policies, ten programs. Another
process plans them, as the operator would; this one holds what an agent does (the session and its gRPC too), reads
every interval, serializes the batches and has them acknowledged at once. Meanwhile two workloads make system calls and
processes. The goals: at most 80 MiB resident, at most 1 % of a CPU.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

PLANNER = """
import sys
from probefleet_cli import local_pods, preparation, sources
catalog = sources.load_catalog()
wanted = [(name, name, {}) for name in catalog.names]
wanted += [("counts", "syscount", {"latency": "false"}), ("stacks", "profile", {"frequency": "49"})]
given = []
for title, name, parameters in wanted:
    manifest = sources.of_catalog(name, catalog, scope="Cluster", interval="10s")
    manifest["metadata"]["name"], manifest["spec"]["program"]["catalog"]["parameters"] = title, parameters
    given.append(sources.Source(title, manifest))
prepared = preparation.prepare(given, catalog=catalog)
push = preparation.push(prepared, pods=local_pods.find(), namespace=None, version=1)
sys.stdout.buffer.write(push.SerializeToString())
"""
#: A busy node: some 100,000 system calls a second, and a few hundred processes.
LOAD = """
import ctypes, subprocess, time
call, until = ctypes.CDLL(None).sched_get_priority_max, time.monotonic() + float({seconds})
while time.monotonic() < until:
    for _ in range(1000):
        call(0)
    subprocess.run(["/bin/true"])
    time.sleep(0.005)  # a workload at a pace, not a wait
"""


def main(seconds: float = 60.0) -> None:
    """Print resident memory, and the CPU share of the agent's process."""
    planned = subprocess.run([sys.executable, "-c", PLANNER], check=True, capture_output=True).stdout

    # What the agent imports, and nothing of the planner.
    from probefleet_agent import session
    from probefleet_agent.engine import Engine
    from probefleet_agent.kernel import mounts
    from probefleet_wire import heap
    from probefleet_wire.v1 import stream_pb2

    heap.settle()  # as its `main` does

    folder = mounts.mount_bpffs() / "probefleet-bench-agent"
    folder.mkdir(exist_ok=True)
    with Engine.open(bpffs=folder) as engine:
        try:
            engine.hello()
            engine.apply(stream_pb2.Push.FromString(planned))
            states = [(each.state, each.message) for each in engine.status().policies]
            assert all(state == stream_pb2.PolicyStatus.READY for state, _ in states), states
            resident = [_resident_mib()]
            with subprocess.Popen([sys.executable, "-c", LOAD.replace("{seconds}", str(seconds))]):
                began, cpu_began, sent = time.monotonic(), _cpu_seconds(), 0
                while time.monotonic() < began + seconds:
                    batch = engine.collect(time.time_ns())
                    if batch is not None:
                        sent += len(stream_pb2.FromAgent(batch=batch).SerializeToString())
                        engine.acknowledge(batch.sequence)
                        resident.append(_resident_mib())
                    # At the pace of a session, which ticks as well.
                    time.sleep(0 if engine.behind else session.TICK_SECONDS)
                took, cpu = time.monotonic() - began, _cpu_seconds() - cpu_began
        finally:
            engine.remove_everything()
    folder.rmdir()
    print(
        f"{len(states)} policies: {resident[0]:.0f} MiB resident after loading, {max(resident):.0f} MiB at most; "
        f"{cpu / took:.2%} of a CPU; {sent / took / 1024:.1f} KiB/s to the operator"
    )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
