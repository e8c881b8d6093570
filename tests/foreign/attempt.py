"""Policies in, what came of each out: loaded and attached by the engine, a dozen at once, and read before and after a
workload.

Runs in the VM, begun by ``on_kernel``. Programs for BCC come compiled already (``compiled`` in the job): BCC takes 15
s a program on an emulated CPU, and gives the same bytes on a fast one, from the same kernel's types. Everything else
is as it is on a node.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any
from unittest import mock

from probefleet_agent import engine
from probefleet_agent.kernel import bcc, bcc_headers
from probefleet_cli import measurement, preparation
from probefleet_cli.failures import BadInput, Failure
from probefleet_cli.sources import Source
from probefleet_core import catalog
from probefleet_wire import bpftrace_script
from probefleet_wire.v1 import stream_pb2

from tests.foreign import on_kernel

#: So many at once: more probes on every system call, and an emulated machine does little else.
BATCH = 18
WORKLOAD = [sys.executable, "-m", "tests.foreign.workload"]


def shown(status: dict[str, Any]) -> dict[str, Any]:
    """What can change in a report: numbers by output."""
    numbers: dict[str, Any] = {}
    for output in status["outputs"]:
        if "events" in output:
            numbers[output["name"]] = output["events"]["received"]
        else:
            numbers[output["name"]] = output["total"]
    return numbers


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The outputs whose numbers are others. A bpftrace script that has tables may print the time each second, whatever
    it counts: its lines alone say nothing.
    """
    found = sorted(name for name in after if before.get(name) != after[name])
    return [] if found == [bpftrace_script.LINES] and len(after) > 1 else found


def _numbers(prepared: list[preparation.Prepared], measured: measurement.Measurement) -> dict[str, dict[str, Any]]:
    return {each.policy.name: shown(report) for each, report in zip(prepared, measured.reports(), strict=True)}


def main() -> None:
    """OUT, shared with the host: policies.json and compiled.pickle come there, results.json goes. With a second
    argument the host is first told what this kernel has.
    """
    out = Path(sys.argv[1])
    with subprocess.Popen(WORKLOAD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as work:
        if sys.argv[2:]:
            subprocess.run([str(Path(__file__).with_name("vm_facts.sh"))], check=True)
            (out / "told").touch()
        assert work.stdin is not None and work.stdout is not None
        assert work.stdout.readline() == "ready\n"
        on_kernel.wait_for(out / "ready")
        _attempt(out, work.stdin, work.stdout)
        work.stdin.close()


def _attempt(out: Path, work: IO[str], worked: IO[str]) -> None:
    policies: dict[str, dict[str, Any]] = json.loads((out / "policies.json").read_text())
    made: dict[str, Any] = pickle.loads((out / "compiled.pickle").read_bytes())
    mock.patch.object(bcc, "_run", lambda text, source, *_: made[source]).start()
    mock.patch.object(bcc_headers, "tree", lambda *_, **__: Path("/nonexistent")).start()
    results: dict[str, dict[str, Any]] = {}
    prepared = []
    for name, policy in policies.items():
        try:
            prepared += preparation.prepare([Source(name, policy)], catalog=catalog.Catalog({}))
        except BadInput as error:
            results[name] = {"state": "refused", "why": str(error)[-300:]}
    batches = [prepared[at : at + BATCH] for at in range(0, len(prepared), BATCH)]
    while batches:
        some = batches.pop(0)
        try:
            results |= _batch(some, work, worked)
        except Failure as error:
            # One that breaks the reading must not take the others with it.
            print(f"attempt: {len(some)} programs: {error}", file=sys.stderr)
            if len(some) == 1:
                results[some[0].policy.name] = {"state": "fails", "why": str(error)}
            else:
                batches += [some[: len(some) // 2], some[len(some) // 2 :]]
        (out / "results.json").write_text(json.dumps(results, indent=1))


def _engine(folder: Path, cgroup_root: str) -> engine.Engine:
    """Without statistics: the kernel patches itself to switch them, and emulated CPUs that samplers interrupt all the
    time may panic over it (an int3 of the patch that another CPU has finished meanwhile).
    """
    return engine.Engine.open(bpffs=folder, cgroup_root=cgroup_root, node=measurement.node_name(), stats=False)


def _batch(some: list[preparation.Prepared], work: IO[str], worked: IO[str]) -> dict[str, dict[str, Any]]:
    """These at once: loaded, read, worked, read again."""
    began = time.monotonic()
    with measurement.measure(some, opener=_engine) as measured:
        loaded = time.monotonic()
        measured.sample(force=True)
        before = _numbers(some, measured)
        read = time.monotonic()
        work.write("go\n")
        work.flush()
        assert worked.readline() == "done\n"
        done = time.monotonic()
        measured.sample_rest()
        after = _numbers(some, measured)
        results = {
            each.policy.name: _result(status, changed(before[each.policy.name], after[each.policy.name]))
            for each, status in zip(some, measured.statuses(), strict=True)
        }
    ended = time.monotonic()
    took = f"loaded in {loaded - began:.0f} s, read in {read - loaded:.0f}, worked for {done - read:.0f}"
    print(f"attempt: {len(some)} programs: {took}, read and removed in {ended - done:.0f}", file=sys.stderr, flush=True)
    return results


def _result(status: stream_pb2.PolicyStatus, outputs: list[str]) -> dict[str, Any]:
    if status.state == stream_pb2.PolicyStatus.READY:
        return {"state": "changes" if outputs else "loads", "outputs": outputs}
    return {"state": "fails", "why": f"{status.reason}: {status.message}", "log": status.log_tail[-600:]}


if __name__ == "__main__":
    main()
