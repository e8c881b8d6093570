"""End-to-end test 1: pods on several nodes make exactly known numbers of calls; one report says just them."""

from __future__ import annotations

import pytest

from tests.e2e import kube

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SYSCOUNT = {
    "scope": "Namespace",
    "program": {"catalog": {"name": "syscount", "parameters": {"syscalls": "sched_get_priority_max"}}},
    "interval": "1s",
    "outputs": [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["pod"]}],
}


def test_1020_calls_of_two_pods_on_two_nodes_and_nothing_of_a_third(namespace: str, other_namespace: str) -> None:
    kube.apply(kube.policy("syscount", namespace, SYSCOUNT))
    kube.wait_programmed("syscount", namespace)
    kube.apply(
        kube.pod("web", namespace, ["calls", "rare", "997"], node="node1"),
        kube.pod("cart", namespace, ["calls", "rare", "23"], node="node2"),
        kube.pod("stranger", other_namespace, ["calls", "rare", "101"], node="node1"),
    )
    for name, place in (("web", namespace), ("cart", namespace), ("stranger", other_namespace)):
        kube.kubectl("wait", f"pod/{name}", "-n", place, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")

    def counted() -> dict[str, object] | None:
        status = kube.report("syscount", namespace)
        complete = status.get("columns", {}).get("coverage") == "3/3"
        return status if complete and sum(kube.totals(status, "calls").values()) >= 1020 else None

    status = kube.eventually(counted, "1,020 calls in the report, of 3/3 nodes", seconds=60)
    assert kube.totals(status, "calls") == {("web",): 997, ("cart",): 23}
    assert status["columns"]["lost"] == "0"  # type: ignore[index]


def test_prometheus_reads_what_the_report_says(namespace: str) -> None:
    kube.apply(kube.policy("syscount", namespace, SYSCOUNT))
    kube.wait_programmed("syscount", namespace)
    kube.apply(kube.pod("web", namespace, ["calls", "rare", "997"], node="node1"))
    kube.eventually(lambda: kube.totals(kube.report("syscount", namespace), "calls") == {("web",): 997}, "997 calls")
    who = {"namespace": namespace, "policy": "syscount"}
    assert kube.metric("probefleet_output_total", **who, output="calls", pod="web") == 997
    assert kube.metric("probefleet_policy_coverage_ratio", **who) == 1
    assert kube.metric("probefleet_policy_lost_total", **who) == 0


def test_one_workload_is_counted_by_everything_that_it_is_part_of(namespace: str) -> None:
    groups: dict[str, list[str]] = {
        "whole": [],
        "node": ["node"],
        "namespace": ["namespace"],
        "workload": ["workload"],
        "container": ["container"],
        "call": ["key.syscall"],
        "all": ["node", "namespace", "workload", "container", "key.syscall"],
    }
    outputs = [
        {"name": name, "from": {"map": "calls"}, "counter": {}, "groupBy": groups_by}
        for name, groups_by in groups.items()
    ]
    kube.apply(kube.policy("syscount", namespace, {**SYSCOUNT, "outputs": outputs}))
    kube.wait_programmed("syscount", namespace)
    # Two replicas of a Deployment: each waits for a byte, makes its calls, and is started anew when it has ended.
    kube.apply(deployment("web", namespace, ["calls", "rare", "23", "--hold"], replicas=2))
    kube.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=60s")
    pods = kube.kubectl("get", "pods", "-n", namespace, "-l", "app=web", "-o", "name").split()
    nodes = {kube.get("pod", each.removeprefix("pod/"), namespace)["spec"]["nodeName"] for each in pods}
    assert len(pods) == len(nodes) == 2
    for each in pods:
        kube.kubectl("attach", "-i", each, "-n", namespace, stdin="go")
    wanted = {
        "whole": {(): 46},
        "node": {(node,): 23 for node in nodes},
        "namespace": {(namespace,): 46},
        "workload": {("web",): 46},
        "container": {("main",): 46},
        "call": {("sched_get_priority_max",): 46},
        "all": {(node, namespace, "web", "main", "sched_get_priority_max"): 23 for node in nodes},
    }

    def counted() -> dict[str, dict[tuple[str, ...], int]] | None:
        status = kube.report("syscount", namespace)
        found = {name: kube.totals(status, name) for name in groups}
        return found if sum(found["call"].values()) >= 46 else None

    assert kube.eventually(counted, "46 calls of two replicas") == wanted


def deployment(name: str, namespace: str, command: list[str], *, replicas: int) -> dict[str, object]:
    """A Deployment of the test image, one pod a node."""
    spec = kube.pod(name, namespace, command)["spec"]
    spread = {
        "labelSelector": {"matchLabels": {"app": name}},
        "topologyKey": "kubernetes.io/hostname",
    }
    spec |= {
        "restartPolicy": "Always",
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [spread]}},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": spec},
        },
    }


def test_a_pod_that_lives_half_a_second_is_counted_by_name(namespace: str) -> None:
    kube.apply(kube.policy("syscount", namespace, SYSCOUNT))
    kube.wait_programmed("syscount", namespace)
    kube.apply(kube.pod("brief", namespace, ["calls", "rare", "997"], node="node3"))
    kube.kubectl("wait", "pod/brief", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    kube.kubectl("delete", "pod", "brief", "-n", namespace, "--wait=true")

    def counted() -> dict[tuple[str, ...], int] | None:
        found = kube.totals(kube.report("syscount", namespace), "calls")
        return found if sum(found.values()) >= 997 else None

    assert kube.eventually(counted, "the brief pod's calls") == {("brief",): 997}
