"""End-to-end test 5: counting goes on, exactly, while agents and the operator are killed."""

from __future__ import annotations

import pytest

from tests.e2e import agents, kube

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SYSCOUNT = {
    "scope": "Namespace",
    "program": {"catalog": {"name": "syscount", "parameters": {"syscalls": "sched_get_priority_max"}}},
    "interval": "1s",
    "outputs": [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["pod"]}],
}
#: 997 calls, 15 ms apart: 15 s in which things can be killed.
SLOWLY = ["calls", "rare", "997", "--pause", "15000"]


def start_counting(namespace: str) -> None:
    kube.apply(kube.policy("syscount", namespace, SYSCOUNT))
    kube.wait_programmed("syscount", namespace)
    kube.apply(kube.pod("web", namespace, SLOWLY, node="node1"), kube.pod("cart", namespace, SLOWLY, node="node2"))
    kube.eventually(
        lambda: len(kube.totals(kube.report("syscount", namespace), "calls")) == 2, "first counts of both pods"
    )


def finish_counting(namespace: str) -> None:
    for name in ("web", "cart"):
        kube.kubectl(
            "wait", f"pod/{name}", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s"
        )

    def complete() -> bool:
        status = kube.report("syscount", namespace)
        whole = status.get("columns", {}).get("coverage") == "3/3"
        return whole and kube.totals(status, "calls") == {("web",): 997, ("cart",): 997}

    try:
        kube.eventually(complete, "997 calls of each pod, of 3/3 nodes", seconds=90)
    except AssertionError as error:
        raise AssertionError(f"{error}; the report says {kube.report('syscount', namespace)}") from None
    # And it stays so: nothing is counted twice by what comes late.
    status = kube.report("syscount", namespace)
    assert kube.totals(status, "calls") == {("web",): 997, ("cart",): 997}
    assert status["columns"]["lost"] == "0"


def test_kill_9_of_an_agent_loses_and_doubles_no_count(namespace: str) -> None:
    start_counting(namespace)
    agents.kill("node1")
    finish_counting(namespace)


def test_kill_9_of_the_operator_loses_and_doubles_no_count(namespace: str) -> None:
    start_counting(namespace)
    kube.kubectl(
        "delete", "pod", "-n", kube.SYSTEM, "-l", "app.kubernetes.io/component=operator", "--grace-period=0", "--force"
    )
    finish_counting(namespace)


def test_replacing_every_agent_loses_and_doubles_no_count(namespace: str) -> None:
    start_counting(namespace)
    kube.kubectl("rollout", "restart", "-n", kube.SYSTEM, "daemonset/probefleet-agent")
    kube.kubectl("rollout", "status", "-n", kube.SYSTEM, "daemonset/probefleet-agent", "--timeout=120s", seconds=130)
    finish_counting(namespace)
