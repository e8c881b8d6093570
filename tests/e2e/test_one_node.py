"""One node of the cluster, measured by itself: `probefleet run -n -l` asks the node's real containerd which pods are
meant, without any credential of Kubernetes, and counts these alone, also those that come while it runs.

It runs in the node's mount and network namespaces, as on a machine that is a node. Of the test cluster: `cluster on`
leads there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cluster.kubebox import settings
from tests.e2e import kube

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NODE = settings.layout(None).node(settings.NodeNumber(1))
RARE = "sched_get_priority_max"
WELL_KNOWN = "/run/containerd/containerd.sock"


def on_node(*words: str) -> list[str]:
    """A command in the node's namespaces. Each step takes the other's place, so the process is the command itself."""
    return [str(kube.ROOT / "tests/cluster/cluster"), "on", str(NODE.number), *words]


def run(*words: str) -> list[str]:
    """`probefleet run` there. (The nodes share a kernel: what is below the node's cgroup is the node.)"""
    tool = (sys.executable, "-m", "probefleet_cli.main", "run", "syscount", "--set", f"syscalls={RARE}")
    return on_node(*tool, f"--cgroup-root=/{NODE.group}", "--output=json", *words)


@pytest.fixture
def well_known() -> Iterator[None]:
    """containerd's socket is where it is on any machine. /run is the node's own."""
    kube.run(*on_node("mkdir", "-p", os.path.dirname(WELL_KNOWN)))
    kube.run(*on_node("ln", "-sfn", str(NODE.socket), WELL_KNOWN))
    yield
    kube.run(*on_node("rm", WELL_KNOWN))


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """It is attached within the block, and at the end of it it has ended."""
    with subprocess.Popen(run(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            links = f"ls /sys/fs/bpf/probefleet-run-{process.pid}/probefleet/instances/*/link_*"

            def attached() -> bool:
                assert process.poll() is None, process.communicate()
                return kube.run(*on_node("sh", "-c", links), check=False).returncode == 0

            kube.eventually(attached, "programs of the run are attached", seconds=60)
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """Ctrl-C: the report, and what was said beside it."""
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return json.loads(said), errors


def calls(report: dict[str, Any]) -> dict[str, int]:
    """The total by the first part of the key."""
    found = next(each for each in report["status"]["outputs"] if each["name"] == "calls")
    return {row["key"][0]: int(row["value"]) for row in found["total"]["rows"]}


def wait_done(name: str, namespace: str) -> None:
    kube.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")


@pytest.mark.usefixtures("well_known")
def test_of_two_pods_the_one_with_these_labels_is_counted(namespace: str, other_namespace: str) -> None:
    x, z = {"app": "x", "tier": "web"}, {"app": "z"}
    kube.apply(
        kube.pod("web", namespace, ["calls", "rare", "997", "--hold"], node=NODE.name, labels=x),
        kube.pod("cart", namespace, ["calls", "rare", "23", "--hold"], node=NODE.name, labels=z),
        kube.pod("stranger", other_namespace, ["calls", "rare", "101", "--hold"], node=NODE.name, labels=x),
    )
    places = {"web": namespace, "cart": namespace, "stranger": other_namespace}
    for name, place in places.items():
        kube.kubectl("wait", f"pod/{name}", "-n", place, "--for=condition=Ready", "--timeout=60s")
    with running("-n", namespace, "-l", "app=x,tier!=db") as process:
        for name, place in places.items():
            kube.kubectl("attach", "-i", name, "-n", place, stdin="go")
            wait_done(name, place)
        report, errors = finish(process)
    assert calls(report) == {f"{namespace}/web": 997}
    assert report["status"]["lost"] == 0
    assert errors == ""


def test_pods_that_come_later_count_and_a_workload_has_its_name(namespace: str) -> None:
    labels = {"app": "late"}
    template = kube.pod("web", namespace, ["calls", "rare", "997", "--hold"], node=NODE.name, labels=labels)
    template["spec"]["restartPolicy"] = "Always"
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": template["spec"]},
        },
    }
    socket = f"--runtime-endpoint=unix://{NODE.socket}"
    with running("-n", namespace, "-l", "app in (late)", socket) as process:
        kube.apply(deployment, kube.pod("brief", namespace, ["calls", "rare", "23"], node=NODE.name, labels=labels))
        kube.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=60s")
        names = kube.kubectl("get", "pods", "-n", namespace, "-l", "pod-template-hash", "-o", "name").split()
        (name,) = (each.removeprefix("pod/") for each in names)
        kube.kubectl("attach", "-i", name, "-n", namespace, stdin="go")
        wait_done("brief", namespace)
        restarted = "{.status.containerStatuses[0].restartCount}"
        kube.kubectl("wait", f"pod/{name}", "-n", namespace, f"--for=jsonpath={restarted}=1", "--timeout=60s")
        report, errors = finish(process)
    assert calls(report) == {f"{namespace}/web": 997, f"{namespace}/brief": 23}
    assert "no such pod is here yet; any that comes is counted" in errors
