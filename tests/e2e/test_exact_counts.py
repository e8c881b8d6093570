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


def test_a_pod_that_lives_half_a_second_is_counted_by_name(namespace: str) -> None:
    kube.apply(kube.policy("syscount", namespace, SYSCOUNT))
    kube.wait_programmed("syscount", namespace)
    kube.apply(kube.pod("brief", namespace, ["calls", "rare", "997"], node="node3"))
    kube.kubectl("wait", "pod/brief", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    kube.kubectl("delete", "pod", "brief", "-n", namespace, "--wait=true")
    status = kube.eventually(
        lambda: (found := kube.report("syscount", namespace)) and kube.totals(found, "calls") and found,
        "the brief pod's calls",
    )
    assert kube.totals(status, "calls") == {("brief",): 997}
