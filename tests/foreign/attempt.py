"""Policies in, what came of each out: loaded and attached by the engine, a dozen at once, and read before and after a
workload.

Runs in the VM, started by ``run_bcc``. Programs for BCC come compiled already (``compiled`` in the job): BCC takes 15
s a program on an emulated CPU, and gives the same bytes on a fast one, from the same kernel's types. Everything else
is as it is on a node.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from probefleet_agent.kernel import bcc
from probefleet_cli import measurement, preparation
from probefleet_cli.failures import BadInput
from probefleet_cli.sources import Source
from probefleet_core import catalog
from probefleet_wire.v1 import stream_pb2

#: So many at once: more probes on every system call, and an emulated machine does little else.
BATCH = 12
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
    """The outputs whose numbers are others."""
    return sorted(name for name in after if before.get(name) != after[name])


def _numbers(prepared: list[preparation.Prepared], measured: measurement.Measurement) -> dict[str, dict[str, Any]]:
    return {each.policy.name: shown(report) for each, report in zip(prepared, measured.reports(), strict=True)}


def main() -> None:
    """JOB (a folder: policies.json, compiled.pickle) and OUT (results.json)."""
    job, out = Path(sys.argv[1]), Path(sys.argv[2])
    policies: dict[str, dict[str, Any]] = json.loads((job / "policies.json").read_text())
    made: dict[str, Any] = pickle.loads((job / "compiled.pickle").read_bytes())
    bcc._run = lambda text, source, *_: made[source]
    bcc.bcc_headers.tree = lambda *_, **__: Path("/nonexistent")
    results: dict[str, dict[str, Any]] = {}
    prepared = []
    for name, policy in policies.items():
        try:
            prepared += preparation.prepare([Source(name, policy)], catalog=catalog.Catalog({}))
        except BadInput as error:
            results[name] = {"state": "refused", "why": str(error)[-300:]}
    with subprocess.Popen(WORKLOAD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as work:
        assert work.stdin is not None and work.stdout is not None
        assert work.stdout.readline() == "ready\n"
        for at in range(0, len(prepared), BATCH):
            some = prepared[at : at + BATCH]
            with measurement.measure(some) as measured:
                measured.sample(force=True)
                before = _numbers(some, measured)
                work.stdin.write("go\n")
                work.stdin.flush()
                assert work.stdout.readline() == "done\n"
                measured.sample_rest()
                after = _numbers(some, measured)
                for each, status in zip(some, measured.statuses(), strict=True):
                    name = each.policy.name
                    results[name] = _result(status, changed(before[name], after[name]))
            (out / "results.json").write_text(json.dumps(results, indent=1))
        work.stdin.close()
    (out / "results.json").write_text(json.dumps(results, indent=1))


def _result(status: stream_pb2.PolicyStatus, outputs: list[str]) -> dict[str, Any]:
    if status.state == stream_pb2.PolicyStatus.READY:
        return {"state": "changes" if outputs else "loads", "outputs": outputs}
    return {"state": "fails", "why": f"{status.reason}: {status.message}", "log": status.log_tail[-600:]}


if __name__ == "__main__":
    main()
