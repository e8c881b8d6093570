"""End-to-end tests 2, 3 and 4: an inline BCC program counts exactly; edits roll out alone; deletion leaves nothing."""

from __future__ import annotations

import json
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.e2e import agents, kube

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

#: Nobody else on the machine has this user id.
RESERVED_UID = 64_917
EXECS = """
BPF_HASH(by_uid, u32, u64);
TRACEPOINT_PROBE(syscalls, sys_enter_execve) {
    u32 uid = bpf_get_current_uid_gid();
    by_uid.increment(uid);
    return 0;
}
"""
PROGRAM = """
#include <probefleet.h>
struct {{
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, cgroup_id_t);
	__type(value, u64);
}} seen SEC(".maps");

SEC("tp_btf/sched_process_exec")
int {name}(void *ctx)
{{
	cgroup_id_t cgroup = bpf_get_current_cgroup_id();

	if (probefleet_selected(cgroup))
		probefleet_add(&seen, &cgroup, 1);
	return 0;
}}
char LICENSE[] SEC("license") = "GPL";
"""


def test_execve_by_uid_of_an_inline_bcc_program_is_exact(namespace: str) -> None:
    kube.apply(
        kube.policy(
            "execs",
            namespace,
            {
                "scope": "Cluster",
                # The test cluster's nodes share a kernel, and this program does not ask whose event it is.
                "nodes": {"selector": {"matchLabels": {"kubernetes.io/hostname": "node1"}}},
                "program": {"bcc": {"source": EXECS}},
                "interval": "1s",
                "outputs": [{"name": "execs", "from": {"map": "by_uid"}, "counter": {}, "groupBy": ["key"]}],
            },
        )
    )
    kube.wait_programmed("execs", namespace)
    # How many execve the runtime itself makes as that user to start a container is its own business: measured first.
    start = execs_of_a_pod(namespace, "start", ["calls", "rare", "1"])
    assert start > 0
    assert execs_of_a_pod(namespace, "execs", ["execs", "23"]) == start + start + 23


def execs_of_a_pod(namespace: str, name: str, command: list[str]) -> int:
    """The report's total for the reserved user, in a sample from after the pod's end."""
    user = {"runAsUser": RESERVED_UID, "runAsGroup": RESERVED_UID, "runAsNonRoot": True}
    kube.apply(kube.pod(name, namespace, command, node="node1", securityContext=user))
    kube.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    # Two samples later: reports carry the time of their merge, the pod's end is before now.
    ended = datetime.now(UTC) + timedelta(seconds=2)

    def counted() -> int | None:
        status = kube.report("execs", namespace)
        fresh = status and datetime.fromisoformat(status["time"]) > ended
        return kube.totals(status, "execs").get((str(RESERVED_UID),)) if fresh else None

    return kube.eventually(counted, f"execs of uid {RESERVED_UID} in a later report")


def test_an_edit_rolls_out_one_instance_and_others_count_on(namespace: str) -> None:
    def syscount(calls: str) -> dict[str, object]:
        return {
            "scope": "Namespace",
            "program": {"catalog": {"name": "syscount", "parameters": {"syscalls": calls}}},
            "interval": "1s",
            "outputs": [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["key.syscall"]}],
        }

    kube.apply(
        kube.policy("stays", namespace, syscount("sched_get_priority_max")),
        kube.policy("edited", namespace, syscount("getpgid")),
    )
    for name in ("stays", "edited"):
        kube.wait_programmed(name, namespace)
    kube.apply(kube.pod("first", namespace, ["calls", "rare", "997"], node="node1"))
    kube.kubectl("wait", "pod/first", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    kube.apply(kube.policy("edited", namespace, syscount("sched_get_priority_max,getsid")))

    def rolled_out() -> bool:
        status = kube.get("probepolicy", "edited", namespace).get("status", {})
        return status.get("observedGeneration") == 2 and status.get("nodes", {}).get("ready") == 3

    kube.eventually(rolled_out, "generation 2 on 3 nodes")
    kube.apply(kube.pod("second", namespace, ["calls", "rare", "23"], node="node1"))
    kube.kubectl("wait", "pod/second", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    rare = ("sched_get_priority_max",)
    kube.eventually(
        lambda: kube.totals(kube.report("stays", namespace), "calls").get(rare) == 1020,
        "1,020 calls of the other policy",
    )
    # The edited one began afresh: it has what came after.
    kube.eventually(
        lambda: kube.totals(kube.report("edited", namespace), "calls").get(rare) == 23, "23 calls of the edited policy"
    )
    assert kube.report("edited", namespace)["observedGeneration"] == 2


#: After `kubectl delete` nothing of a policy is on any node.
DELETE_SECONDS = 5.0


def bpftool(kind: str) -> list[dict[str, Any]]:
    """All programs or links of the kernel, which the nodes share."""
    found: list[dict[str, Any]] = json.loads(kube.run("bpftool", "--json", kind, "list").stdout)
    return found


def test_suspend_and_ttl_take_the_programs_and_leave_policy_and_report(namespace: str) -> None:
    name = f"on_{uuid.uuid4().hex[:8]}"
    spec = {"scope": "Cluster", "program": {"c": {"source": PROGRAM.format(name=name)}}, "interval": "1s"}

    def running() -> list[str]:
        return [
            node
            for node in agents.pods()
            if name in agents.programs(node) or any(name in pin for pin in agents.pins(node))
        ]

    def state() -> str:
        return str(kube.get("probepolicy", "brief", namespace).get("status", {}).get("columns", {}).get("status"))

    kube.apply(kube.policy("brief", namespace, spec))
    kube.wait_programmed("brief", namespace)
    assert len(running()) == 3
    kube.kubectl("patch", "ppol", "brief", "-n", namespace, "--type=merge", "-p", '{"spec": {"suspend": true}}')
    kube.eventually(lambda: not running(), "the end of the program on every node", seconds=20)
    kube.eventually(lambda: state() == "Suspended", "a status that says so")

    kube.kubectl("patch", "ppol", "brief", "-n", namespace, "--type=merge", "-p", '{"spec": {"suspend": false}}')
    kube.wait_programmed("brief", namespace)
    assert len(running()) == 3

    # Of the policy's age: so long it has lived already.
    kube.kubectl("patch", "ppol", "brief", "-n", namespace, "--type=merge", "-p", '{"spec": {"ttl": "1s"}}')
    kube.eventually(lambda: not running(), "the end of the program on every node", seconds=20)
    kube.eventually(lambda: state() == "Expired", "a status that says so")
    assert kube.report("brief", namespace), "what was measured can still be read"


def test_deleting_leaves_no_program_link_or_pin_and_no_report(namespace: str) -> None:
    name = f"on_{uuid.uuid4().hex[:8]}"
    kube.apply(
        kube.policy("brief", namespace, {"scope": "Cluster", "program": {"c": {"source": PROGRAM.format(name=name)}}})
    )
    kube.wait_programmed("brief", namespace)
    before = {node: agents.pins(node) for node in agents.pods()}
    assert all(any(name in pin for pin in pins) for pins in before.values()), before
    programs = {each["id"] for each in bpftool("prog") if each.get("name") == name}
    links = {each["id"] for each in bpftool("link") if each.get("prog_id") in programs}
    assert len(programs) == len(links) == len(before) == 3
    kube.eventually(lambda: kube.report("brief", namespace), "a report")

    began = time.monotonic()
    kube.kubectl("delete", "probepolicy", "brief", "-n", namespace)

    def gone() -> bool:
        left = {each["id"] for each in bpftool("prog")} & programs | {each["id"] for each in bpftool("link")} & links
        return not left and not kube.get("probereport", "brief", namespace)

    kube.eventually(gone, f"the end of program {name}, its links and its report", seconds=2 * DELETE_SECONDS)
    took = time.monotonic() - began
    assert took <= DELETE_SECONDS
    assert [pin for node in before for pin in agents.pins(node) if name in pin] == []
    events = json.loads(kube.kubectl("get", "events", "-n", namespace, "-o", "json"))["items"]
    assert not [event for event in events if event.get("type") == "Warning" and "brief" in json.dumps(event)]
