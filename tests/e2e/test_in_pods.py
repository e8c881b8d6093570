"""What belongs to pods: files in their containers, as the container runtime laid them out, and their packets.

The pods stand and wait while the policy comes; one comes later. What pods do that are not selected is not counted. XDP
and TC in pods' own network are asked for in `tests/kernel/test_network.py`: an agent tells them from pods of the node's
network by pid 1, which belongs to no node of the test cluster, and which a sandbox may hide.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e import kube

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

IN_FILES = """
#include <probefleet.h>

#define CALLS(NAME)                            \\
    struct {                                   \\
        __uint(type, BPF_MAP_TYPE_HASH);       \\
        __uint(max_entries, 1024);             \\
        __type(key, cgroup_id_t);              \\
        __type(value, u64);                    \\
    } NAME SEC(".maps")

CALLS(functions);
CALLS(marks);

SEC("uprobe") int on_function(void *ctx)
{
    cgroup_id_t cgroup = bpf_get_current_cgroup_id();

    if (probefleet_selected(cgroup))
        probefleet_add(&functions, &cgroup, 1);
    return 0;
}

SEC("usdt") int on_mark(void *ctx)
{
    cgroup_id_t cgroup = bpf_get_current_cgroup_id();

    if (probefleet_selected(cgroup))
        probefleet_add(&marks, &cgroup, 1);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
"""
#: The program sees what comes to the pods that it is attached to, and counts what opens a connection to PORT.
PORT = 7211
ON_PACKETS = f"""
#include <probefleet.h>

struct {{
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 16);
    __type(key, port_t);
    __type(value, u64);
}} opened SEC(".maps");

SEC("cgroup_skb/ingress") int on_packet(struct __sk_buff *skb)
{{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct iphdr *ip = data;
    struct tcphdr *tcp = data + sizeof(*ip);
    port_t port = {PORT};

    if ((void *)(tcp + 1) <= end && ip->protocol == 6 && tcp->dest == bpf_htons(port) && tcp->syn && !tcp->ack)
        probefleet_add(&opened, &port, 1);
    return 0; /* "drop it", which nobody hears */
}}

char LICENSE[] SEC("license") = "GPL";
"""


def selected(namespace: str) -> dict[str, str]:
    """Labels that no other pod of the cluster has: the policies are of all namespaces."""
    return {"measured": namespace}


def start(namespace: str, pod: str) -> None:
    """A byte to a pod that waits for it."""
    kube.kubectl("attach", "-i", pod, "-n", namespace, stdin="go")


def wait_ready(namespace: str, *pods: str) -> None:
    """They run, and so wait for their byte, or serve."""
    names = [f"pod/{name}" for name in pods]
    kube.kubectl("wait", *names, "-n", namespace, "--for=condition=Ready", "--timeout=60s")


def test_functions_and_static_probes_of_files_in_pods_are_counted_exactly(namespace: str) -> None:
    def marks(name: str, count: int, node: str, *, labels: dict[str, str]) -> dict[str, Any]:
        return kube.pod(name, namespace, ["marks", "--hold", str(count)], node=node, labels=labels)

    labels = selected(namespace)
    kube.apply(
        marks("web", 997, "node1", labels=labels),
        marks("cart", 23, "node2", labels=labels),
        marks("stranger", 101, "node1", labels={"app": "stranger"}),
    )
    wait_ready(namespace, "web", "cart", "stranger")
    outputs = [
        {"name": name, "from": {"map": name}, "counter": {}, "groupBy": ["pod"]} for name in ("functions", "marks")
    ]
    spec: dict[str, Any] = {
        "scope": "Cluster",
        "pods": {"selector": {"matchLabels": labels}},
        "program": {"c": {"source": IN_FILES}},
        "attach": [
            {"program": "on_function", "uprobe": {"path": "/workloads/marks", "symbol": "one", "pods": True}},
            {
                "program": "on_mark",
                "usdt": {"path": "/workloads/marks", "provider": "marks", "name": "two", "pods": True},
            },
        ],
        "interval": "1s",
        "outputs": outputs,
    }
    kube.apply(kube.policy("in-files", namespace, spec))
    kube.wait_programmed("in-files", namespace)

    def counted() -> list[dict[tuple[str, ...], int]]:
        status = kube.report("in-files", namespace)
        whole = status.get("columns", {}).get("coverage") == "3/3"
        return [kube.totals(status, name) for name in ("functions", "marks")] if whole else []

    for name in ("web", "cart", "stranger"):
        start(namespace, name)
    expected = {(f"{namespace}/web",): 997, (f"{namespace}/cart",): 23}
    kube.eventually(lambda: counted() == [expected] * 2, "997 and 23 of both kinds, and nothing of a third pod")

    # One that comes later has its own file on its node, and its probe a second after it has come.
    def gap() -> bool:
        return any(each["node"] == "node3" for each in kube.report("in-files", namespace).get("gaps", []))

    kube.apply(marks("late", 211, "node3", labels=labels))
    wait_ready(namespace, "late")
    kube.eventually(gap, "the time before the probe of the pod that came is a gap")
    start(namespace, "late")
    expected[f"{namespace}/late",] = 211
    kube.eventually(lambda: counted() == [expected] * 2, "211 more of both kinds")

    # A pod's sandbox, which has no such file, stays a moment longer than its process.
    def whole() -> bool:
        status = kube.report("in-files", namespace)
        return (status["columns"]["lost"], status["uncounted"]) == ("0", [])

    kube.eventually(whole, "nothing is lost or not counted")


def test_packets_of_pods_are_counted_exactly_and_pass(namespace: str) -> None:
    labels = selected(namespace)
    serve = ["connects", "--serve", str(PORT), "0.0.0.0"]
    kube.apply(
        kube.pod("web", namespace, serve, node="node1", labels=labels),
        kube.pod("cart", namespace, serve, node="node2", labels=labels),
        kube.pod("stranger", namespace, serve, node="node1", labels={"app": "stranger"}),
    )
    wait_ready(namespace, "web", "cart", "stranger")
    addresses = {name: kube.get("pod", name, namespace)["status"]["podIP"] for name in ("web", "cart", "stranger")}
    spec: dict[str, Any] = {
        "scope": "Cluster",
        "pods": {"selector": {"matchLabels": labels}},
        "program": {"c": {"source": ON_PACKETS}},
        "attach": [{"program": "on_packet", "cgroupSkb": {"direction": "ingress", "pods": True}}],
        "interval": "1s",
        "outputs": [{"name": "opened", "from": {"map": "opened"}, "counter": {}, "groupBy": ["node"]}],
    }
    kube.apply(kube.policy("on-packets", namespace, spec))
    kube.wait_programmed("on-packets", namespace)

    counts = {"web": 97, "cart": 23, "stranger": 11}
    for name, count in counts.items():
        command = ["connects", str(count), str(PORT), addresses[name]]
        kube.apply(kube.pod(f"client-of-{name}", namespace, command, node="node2"))
    for name, count in counts.items():
        client = f"pod/client-of-{name}"
        kube.kubectl("wait", client, "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
        said = kube.kubectl("logs", client, "-n", namespace)
        assert f"connects={count} refused=0" in said, "every packet passed"

    def counted() -> dict[tuple[str, ...], int]:
        return kube.totals(kube.report("on-packets", namespace), "opened")

    kube.eventually(lambda: counted() == {("node1",): 97, ("node2",): 23}, "97 and 23, and nothing of a third pod")
