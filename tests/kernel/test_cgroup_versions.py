"""Whose pod an event is of, where cgroup2 is alone and where v1 hierarchies stand beside it: the same, exactly.

On a node of version 1 a pod has a folder in each v1 hierarchy and one in cgroup2's, at /sys/fs/cgroup/unified; a task's
cgroup2 is what `bpf_get_current_cgroup_id()` tells, and what pods are known by.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from probefleet_agent.kernel import cgroups
from probefleet_cli import local_pods, measurement
from probefleet_core import result

from tests.kernel import policies
from tests.kernel.support import needs
from tests.workloads import run as workloads

PODS = {name: str(uuid.UUID(int=number)) for number, name in enumerate(("web", "cart"), start=23)}
COUNTS = {"web": 997, "cart": 23}


def hierarchies(version: str) -> list[Path]:
    """Where hierarchies of this version are mounted."""
    lines = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return [Path(words[1]) for words in lines if words[2] == version]


def cgroup2_alone() -> bool:
    return not hierarchies("cgroup")


@pytest.fixture
def v1(tmp_path: Path) -> Iterator[list[Path]]:
    """The v1 hierarchies of this machine; where there are none, one as systemd mounts it on nodes of version 1."""
    if there := hierarchies("cgroup"):
        yield there
        return
    words = ["mount", "-t", "cgroup", "-o", "none,name=systemd", "cgroup", str(tmp_path)]
    subprocess.run(words, check=True, capture_output=True)
    try:
        yield [tmp_path]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@contextlib.contextmanager
def pod(uid: str, beside: list[Path]) -> Iterator[Path]:
    """The cgroup of a pod's container, as the kubelet and runc make it; in v1 hierarchies as well."""
    path = Path("kubepods") / "burstable" / f"pod{uid}" / f"{uuid.UUID(uid).int:064x}"
    with contextlib.ExitStack() as stack:
        for root in beside:
            stack.callback(remove, root, path)
            (root / path).mkdir(parents=True)
        top = cgroups.mount_point()
        stack.callback(remove, top, path)
        (top / path).mkdir(parents=True)
        yield path


def remove(root: Path, path: Path) -> None:
    """The folders that `mkdir(parents=True)` made; those that others use stay."""
    for folder in itertools.chain([path], path.parents):
        with contextlib.suppress(OSError):
            (root / folder).rmdir()


def counted(beside: list[Path]) -> dict[tuple[str, ...], int]:
    """By pod: what `syscount` says of a rare call that two pods, and this process, make."""
    names = {uid: result.PodName("shop", name) for name, uid in PODS.items()}
    known = measurement.Nobody(local_pods.LocalPods(names))  # nobody else is looked for
    policy = {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": "calls", "namespace": "shop"},
        "spec": {
            "program": {"catalog": {"name": "syscount", "parameters": {"syscalls": "sched_get_priority_max"}}},
            "outputs": [{"name": "calls", "from": {"map": "calls"}, "topk": {}, "groupBy": ["namespace", "pod"]}],
        },
    }
    with contextlib.ExitStack() as stack:
        made = {}
        for name, uid in PODS.items():
            path = stack.enter_context(pod(uid, beside))
            made[name] = stack.enter_context(workloads.start("calls", "rare", COUNTS[name]))
            for root in (*beside, cgroups.mount_point()):
                if not (root / "cpuset.cpus").exists():  # a new cpuset takes nobody before it is told its CPUs
                    (root / path / "cgroup.procs").write_text(str(made[name].pid))
        with measurement.measure(policies.prepare(policy), watch=known) as measured:
            run = policies.Run(measured)
            run.require_ready()
            for each in made.values():
                each.go()
                each.done()
            for _ in range(101):
                os.sched_get_priority_max(os.SCHED_OTHER)
            return run.rows("calls")


@pytest.mark.shows("besides/cgroup-v1")
def test_pods_are_told_apart_where_v1_hierarchies_are_beside(v1: list[Path]) -> None:
    assert counted(v1) == {("shop", "web"): 997, ("shop", "cart"): 23}


@pytest.mark.shows("besides/cgroup-v2")
def test_pods_are_told_apart_where_cgroup2_is_alone() -> None:
    needs(cgroup2_alone)
    assert counted([]) == {("shop", "web"): 997, ("shop", "cart"): 23}
