"""Policies run as ``probefleet run`` runs them, in this process: manifest → plan → engine → report.

How kernel tests ask for what a user sees: rows of an output by their keys, exactly.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probefleet_cli import local_pods, measurement, preparation, sources

Manifest = dict[str, Any]
HEAD = """#include <probefleet.h>
char LICENSE[] SEC("license") = "GPL";
static const u32 only = PID;
static __always_inline bool ours(void) { return bpf_get_current_pid_tgid() >> 32 == only; }
#define ON_CALL SEC("tracepoint/syscalls/sys_enter_getppid") int on_call(void *ctx)
"""


def c_policy(source: str, name: str = "test", **spec: Any) -> Manifest:
    """A policy of scope Cluster whose C asks ``ours()``: this process only; ``ON_CALL`` is getppid's tracepoint."""
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": name},
        "spec": {
            "scope": "Cluster",
            "program": {"c": {"source": HEAD.replace("PID", str(os.getpid())) + source}},
            **spec,
        },
    }


#: The same text gives the same object: a policy that is pushed again is not compiled again.
_compiled = functools.cache(preparation.compile_source)


def prepare(*manifests: Manifest) -> list[preparation.Prepared]:
    """Planned, or BadInput with all that is wrong."""
    given = [sources.Source(f"test {index}", manifest) for index, manifest in enumerate(manifests)]
    return preparation.prepare(given, catalog=sources.load_catalog(), compile_source=_compiled)


class Run:
    """Policies that run until the ``with`` block ends."""

    def __init__(self, measured: measurement.Measurement) -> None:
        self.measured = measured
        self._version = 1

    def apply(self, *manifests: Manifest) -> None:
        """Push these in place of what ran."""
        self._version += 1
        prepared = prepare(*manifests)
        push = preparation.push(prepared, pods=local_pods.find(), namespace=None, version=self._version)
        self.measured.engine.apply(push)
        self.measured.prepared = prepared
        self.require_ready()

    def require_ready(self) -> None:
        """Fail with the agent's words where a policy does not run."""
        for status in self.measured.statuses():
            assert status.reason == "" and status.digest, f"{status.reason}: {status.message}\n{status.log_tail}"

    def output(self, name: str, policy: int = 0) -> dict[str, Any]:
        """An output of the report of now."""
        self.measured.sample_rest()
        found: dict[str, Any] = next(
            each for each in self.measured.reports()[policy]["outputs"] if each["name"] == name
        )
        return found

    def rows(self, name: str, policy: int = 0) -> dict[tuple[str, ...], int]:
        """key columns → value of an output's total."""
        return {tuple(map(str, row["key"])): row["value"] for row in self.output(name, policy)["total"]["rows"]}


@contextlib.contextmanager
def run(*manifests: Manifest, ready: bool = True) -> Iterator[Run]:
    """Load, attach, count; gone at the end."""
    with measurement.measure(prepare(*manifests)) as measured:
        found = Run(measured)
        if ready:
            found.require_ready()
        yield found


def folder() -> Path:
    """Where this process's runs are pinned."""
    return Path(f"/sys/fs/bpf/probefleet-run-{os.getpid()}")
