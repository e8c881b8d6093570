"""What is measured while something ends that has to make no difference: counts of two nodes in one namespace, records
of a ring, each with a number of its own, a script that the kernel ends with the agent, and a program of two policies.

Each has a beginning, and an end that fails unless every number is exact. For `test_restarts` and `test_zz_cluster`.
What is measured takes minutes unless it is hurried: it goes on while things are being ended, however slow the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from tests.e2e import kube

NODE = "node1"
ON_NODE = {"selector": {"matchLabels": {"kubernetes.io/hostname": NODE}}}

#: The pods that count, and where.
COUNTING = {"web": "node1", "cart": "node2"}
#: So many are waited for where things are to go on: at eight a second.
SOME_RECORDS = 29
SYSCOUNT = {
    "scope": "Namespace",
    "program": {"catalog": {"name": "syscount", "parameters": {"syscalls": "sched_get_priority_max"}}},
    "interval": "1s",
    "outputs": [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["pod"]}],
}


#: 997 calls, four a second, until they are hurried.
SLOW_CALLS = ["calls", "rare", "997", "--pause", "250000", "--hurry"]


def hurry(namespace: str, *pods: str) -> None:
    """Let these, which are at work, do the rest of it in two or three seconds; they have ended then."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: kube.kubectl("attach", "-i", name, "-n", namespace, stdin="h"), pods))
    ended = ("--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    kube.kubectl("wait", *(f"pod/{name}" for name in pods), "-n", namespace, *ended)


def start_counting(namespace: str) -> None:
    """Two pods begin to make 997 calls each."""
    kube.apply(kube.policy("syscount", namespace, SYSCOUNT))
    kube.wait_programmed("syscount", namespace)
    kube.apply(*(kube.pod(name, namespace, SLOW_CALLS, node=node) for name, node in COUNTING.items()))
    kube.eventually(
        lambda: len(kube.totals(kube.report("syscount", namespace), "calls")) == 2, "first counts of both pods"
    )


def counted(namespace: str) -> int:
    """Calls of both pods until now."""
    return sum(kube.totals(kube.report("syscount", namespace), "calls").values())


def finish_counting(namespace: str) -> None:
    """All 1,994 were counted, once."""
    assert counted(namespace) < 2 * 997, "it was over before anything was ended"
    hurry(namespace, *COUNTING)

    def complete() -> bool:
        status = kube.report("syscount", namespace)
        whole = status.get("columns", {}).get("coverage") == "3/3"
        return whole and kube.totals(status, "calls") == {("web",): 997, ("cart",): 997}

    try:
        kube.eventually(complete, "997 calls of each pod, of 3/3 nodes", seconds=90)
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *kube.report("syscount", namespace)["summary"]])) from None
    # And it stays so: nothing is counted twice by what comes late.
    status = kube.report("syscount", namespace)
    assert kube.totals(status, "calls") == {("web",): 997, ("cart",): 997}
    assert status["columns"]["lost"] == "0"


# Events: records of a ring, each with a number of its own.


def received(namespace: str) -> int:
    """How many records the report has been told of."""
    return int(kube.events_of(kube.report("execs", namespace)).get("received", 0))


@contextlib.contextmanager
def recording(namespace: str) -> Iterator[subprocess.Popen[str]]:
    """23 programs have been started on node2, and 997 are being started on node1: the one who starts those."""
    kube.apply(
        kube.pod("busy", namespace, ["execs", "997", "--hold", "--pause", "120000", "--hurry"], node="node1"),
        kube.pod("quiet", namespace, ["execs", "23", "--hold"], node="node2"),
    )
    kube.kubectl("wait", "pod/busy", "pod/quiet", "-n", namespace, "--for=condition=Ready", "--timeout=60s")
    # The pods wait before the policy comes: neither their own start nor the sandboxes' is to be recorded.
    kube.apply(kube.policy("execs", namespace, {"program": {"catalog": {"name": "execsnoop"}}, "interval": "1s"}))
    kube.wait_programmed("execs", namespace)
    kube.kubectl("attach", "-i", "quiet", "-n", namespace, stdin="go")
    kube.eventually(lambda: received(namespace) == 23, "23 records")
    command = ["kubectl", "attach", "-i", "busy", "-n", namespace]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as attached:
        try:
            assert attached.stdin is not None
            attached.stdin.write("g")
            attached.stdin.flush()
            kube.eventually(lambda: received(namespace) > 23 + SOME_RECORDS, "the first records of node1")
            yield attached
        finally:
            attached.kill()


def finish_recording(namespace: str, attached: subprocess.Popen[str]) -> list[int]:
    """All 1,020 are in the total, and nothing was lost; the numbers of node1's that can be listed, oldest first."""
    assert received(namespace) < 1020, "it was over before anything was ended"
    attached.communicate("ho", timeout=60)  # one byte hurries it, another lets it end
    kube.kubectl("wait", "pod/busy", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")

    def complete() -> bool:
        status = kube.report("execs", namespace)
        return status.get("columns", {}).get("coverage") == "3/3" and received(namespace) >= 1020

    try:
        kube.eventually(complete, "1,020 records, of 3/3 nodes", seconds=90)
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *kube.report("execs", namespace)["summary"]])) from None
    status = kube.report("execs", namespace)
    events = kube.events_of(status)
    assert {name: int(events[name]) for name in ("received", "lost", "dropped")} == {
        "received": 1020, "lost": 0, "dropped": 0,
    }  # fmt: skip
    assert status["gaps"] == []
    return listed(namespace)


def listed(namespace: str) -> list[int]:
    """The numbers of node1's records that `probefleet events` lists, oldest first."""
    lines = kube.kubectl("probefleet", "events", "execs", "-n", namespace, "-o", "json").splitlines()
    records = [json.loads(line) for line in lines]
    # Each started program is told which one it is: "execs exit 7".
    return [int(record["arguments"].split()[2]) for record in records if record["pod"] == "busy"]


# A script: the kernel ends it with the agent's process.

SCRIPT = """
tracepoint:syscalls:sys_enter_sched_get_priority_max
/comm == "calls" && args->policy == 61/
{
    @calls[pid] = count();
}
"""


def scripted(namespace: str) -> list[int]:
    """Calls by process; other pods, of this test or another, ask for another policy of the scheduler."""
    return list(kube.totals(kube.report("script", namespace), "calls").values())


def start_script(namespace: str) -> None:
    """A bpftrace script on node1 has counted 211 calls of a pod."""
    spec = {
        "scope": "Cluster",
        "nodes": ON_NODE,
        "program": {"bpftrace": {"script": SCRIPT}},
        "interval": "1s",
    }
    kube.apply(kube.policy("script", namespace, spec))
    kube.wait_programmed("script", namespace)
    kube.apply(kube.pod("before", namespace, ["calls", "rare", "211", "61"], node="node1"))
    kube.eventually(lambda: scripted(namespace) == [211], "211 calls of the first pod")
    assert kube.report("script", namespace)["gaps"] == []


def finish_script(namespace: str, killed: float) -> None:
    """The report shows the gap since the agent was killed; what was counted before stays, and counting goes on."""

    def gap() -> dict[str, str] | None:
        return next(iter(kube.report("script", namespace)["gaps"]), None)

    # The kubelet lets a container that ended often wait longer each time: 10 s, 20 s, 40 s, …
    shown = kube.eventually(gap, "a gap in the report", seconds=150)
    assert (shown["node"], shown["why"]) == ("node1", "bpftrace ends with the agent's process")
    start, end = (datetime.fromisoformat(shown[each]).timestamp() for each in ("start", "end"))
    # The agent notes each second that it lives; by then the next one has begun.
    assert killed - 5 < start < end < time.time()
    assert any(line.startswith("gap on node1: ") for line in kube.report("script", namespace)["summary"])
    kube.apply(kube.pod("after", namespace, ["calls", "rare", "307", "61"], node="node1"))
    # What was counted before stays.
    kube.eventually(lambda: sorted(scripted(namespace)) == [211, 307], "307 calls of the second pod")


# One program, two policies that came one after the other.

#: A call that no other policy counts, here or in tests beside these, so that the program is of these two.
SHARED_CALL = ("sched_getparam", {"x86_64": 143, "aarch64": 121}[os.uname().machine])
SHARED: dict[str, Any] = {
    "nodes": ON_NODE,
    "program": {"catalog": {"name": "syscount", "parameters": {"syscalls": SHARED_CALL[0]}}},
    "interval": "1s",
    "outputs": [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["pod"]}],
}


def call_shared(pod: str, namespace: str, count: int) -> None:
    """A pod makes so many of these calls."""
    kube.apply(kube.pod(pod, namespace, ["calls", str(SHARED_CALL[1]), str(count)], node=NODE))
    kube.kubectl("wait", f"pod/{pod}", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")


def shared(policy: str, namespace: str) -> dict[str, int]:
    """What a policy's report says of each pod, once it covers the node."""
    status = kube.report(policy, namespace)
    covered = status.get("columns", {}).get("coverage") == "1/1"
    return {key[0]: value for key, value in kube.totals(status, "calls").items()} if covered else {}


def expect_shared(namespace: str, what: str, **pods: dict[str, int]) -> None:
    """Both reports come to say these numbers, and no others."""

    def exact() -> bool:
        return {name: shared(name, namespace) for name in pods} == pods

    kube.eventually(exact, what, seconds=90)
