"""A compiled object from a ConfigMap: what `make` gave is what runs, counted exactly, or it is refused by its hash."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest

from tests.e2e import kube
from tests.e2e.test_wrong_things import accepted, check_event
from tests.kernel import support

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

# By process: nodes of the test cluster share a kernel, so others' calls are seen, too.
SOURCE = """
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, u32);
    __type(value, u64);
} calls SEC(".maps");

SEC("tracepoint/syscalls/sys_enter_sched_get_priority_max")
int on_call(void *ctx)
{
    u32 process = bpf_get_current_pid_tgid() >> 32;
    u64 one = 1, *count = bpf_map_lookup_elem(&calls, &process);

    if (count)
        __sync_fetch_and_add(count, 1);
    else
        bpf_map_update_elem(&calls, &process, &one, BPF_NOEXIST);
    return 0;
}
"""


def of_object(sha256: str) -> dict[str, Any]:
    """The spec of a policy that runs the ConfigMap's object, on the node of the pod."""
    return {
        "scope": "Cluster",
        "nodes": {"selector": {"matchLabels": {"kubernetes.io/hostname": "node2"}}},
        "program": {"object": {"sha256": sha256, "configMapKeyRef": {"name": "objects", "key": "calls.bpf.o"}}},
        "interval": "1s",
        "outputs": [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["key"], "limit": 50}],
    }


def test_an_object_of_a_config_map_counts_exactly_and_another_is_refused(namespace: str) -> None:
    data = support.compile_object(SOURCE)
    digest, other = hashlib.sha256(data).hexdigest(), hashlib.sha256(b"another").hexdigest()
    encoded = {"calls.bpf.o": base64.b64encode(data).decode()}
    metadata = {"name": "objects", "namespace": namespace}
    kube.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "binaryData": encoded})
    kube.apply(kube.policy("calls", namespace, of_object(digest)), kube.policy("another", namespace, of_object(other)))
    kube.wait_programmed("calls", namespace)
    kube.apply(kube.pod("web", namespace, ["calls", "rare", "1009"], node="node2"))

    def counted() -> bool:
        return list(kube.totals(kube.report("calls", namespace), "calls").values()).count(1009) == 1

    kube.eventually(counted, "1,009 calls of one process")

    words = (f"its bytes have sha256 {digest}, the policy asks for {other}", "spec.program.object.sha256")
    said = kube.eventually(lambda: accepted(kube.get("probepolicy", "another", namespace)).get("message"), "an answer")
    for word in words:
        assert word in said
    check_event("another", namespace, words[0])
