"""Events, one by one: a pod starts exactly 23 programs; report and kubectl plugin show 23 records with its name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import kube

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

EXECSNOOP = {"program": {"catalog": {"name": "execsnoop"}}, "interval": "1s"}


def test_23_programs_of_a_pod_are_23_records_in_report_and_plugin(namespace: str, plugin: Path) -> None:
    # The pod waits before the policy comes: neither its own start nor the sandbox's is to be counted.
    kube.apply(kube.pod("starter", namespace, ["execs", "23", "--hold"], node="node1"))
    kube.kubectl("wait", "pod/starter", "-n", namespace, "--for=condition=Ready", "--timeout=60s")
    kube.apply(kube.policy("execs", namespace, EXECSNOOP))
    kube.wait_programmed("execs", namespace)
    # One byte lets it begin, another one lets it end.
    kube.kubectl("attach", "-i", "starter", "-n", namespace, stdin="go")
    kube.kubectl("wait", "pod/starter", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")

    def reported() -> dict[str, Any] | None:
        status = kube.report("execs", namespace)
        complete = status.get("columns", {}).get("coverage") == "3/3"
        # Map and ring are read one after the other, and a report may come in between.
        received, starts = int(kube.events_of(status).get("received", 0)), sum(kube.totals(status, "execs").values())
        return status if complete and min(received, starts) >= 23 else None

    status = kube.eventually(reported, "23 records in the report, of 3/3 nodes")
    events = kube.events_of(status)
    assert {name: int(events[name]) for name in ("received", "lost", "dropped")} == {
        "received": 23,
        "lost": 0,
        "dropped": 0,
    }
    assert sum(kube.totals(status, "execs").values()) == 23
    assert len(events["records"]) == 23
    assert {record["pod"] for record in events["records"]} == {"starter"}
    # The workload executes itself as /proc/self/exe, and the kernel calls a command as its file.
    assert {record["command"] for record in events["records"]} == {"exe"}

    lines = kube.kubectl("probefleet", "events", "execs", "-n", namespace).splitlines()
    assert len(lines) == 23
    assert all("starter" in line for line in lines)


def test_events_are_followed_as_they_come(namespace: str, plugin: Path) -> None:
    names = ("first", "second")
    kube.apply(*(kube.pod(name, namespace, ["execs", "23", "--hold"], node="node2") for name in names))
    kube.kubectl("wait", "pod/first", "pod/second", "-n", namespace, "--for=condition=Ready", "--timeout=60s")
    kube.apply(kube.policy("execs", namespace, EXECSNOOP))
    kube.wait_programmed("execs", namespace)
    kube.eventually(lambda: kube.report("execs", namespace), "a report")
    command = ["kubectl", "probefleet", "events", "execs", "-n", namespace, "--follow", "-o", "json"]
    # Who is started in the background of a shell is started with Ctrl-C ignored; a person's terminal does not do that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    following = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert following.stdout is not None
        for name in names:
            kube.kubectl("attach", "-i", name, "-n", namespace, stdin="go")
            records = [json.loads(following.stdout.readline()) for _ in range(23)]
            assert {record["pod"] for record in records} == {name}
            assert [int(record["arguments"].split()[2]) for record in records] == list(range(23))
        following.send_signal(signal.SIGINT)
        assert following.communicate(timeout=20)[0] == ""
        assert following.returncode == 0, "Ctrl-C is how it ends"
    finally:
        signal.signal(signal.SIGINT, before)
        following.kill()
        following.communicate()


def test_the_plugin_lists_every_node_of_a_policy(namespace: str, plugin: Path) -> None:
    kube.apply(kube.policy("execs", namespace, EXECSNOOP))
    kube.wait_programmed("execs", namespace)
    kube.eventually(lambda: kube.report("execs", namespace), "a report")
    header, *rows = kube.kubectl("probefleet", "nodes", "execs", "-n", namespace).splitlines()
    assert header.split()[:4] == ["NODE", "STATE", "KERNEL", "AGENT"]
    assert [row.split()[:2] for row in sorted(rows)] == [[f"node{number}", "READY"] for number in (1, 2, 3)]
    assert all(os.uname().release in row for row in rows)


def test_a_policy_that_joins_a_running_program_has_no_records_from_before(namespace: str) -> None:
    def start(name: str) -> None:
        kube.kubectl("attach", "-i", name, "-n", namespace, stdin="go")
        kube.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded")

    def received(name: str) -> int:
        return int(kube.events_of(kube.report(name, namespace)).get("received", -1))

    pods = [kube.pod(name, namespace, ["execs", "23", "--hold"], node="node1") for name in ("first", "second")]
    kube.apply(*pods)
    kube.kubectl("wait", "pod/first", "pod/second", "-n", namespace, "--for=condition=Ready", "--timeout=60s")
    # Of one program: the second policy finds the ring of the first, and in it what was not yet acknowledged.
    kube.apply(kube.policy("early", namespace, {**EXECSNOOP, "interval": "10s"}))
    kube.wait_programmed("early", namespace)
    start("first")
    kube.apply(kube.policy("late", namespace, EXECSNOOP))
    kube.wait_programmed("late", namespace)
    start("second")
    kube.eventually(lambda: received("early") >= 46 and received("late") >= 23, "46 and 23 records")
    assert (received("early"), received("late")) == (46, 23)
    records = kube.events_of(kube.report("late", namespace))["records"]
    assert {record["pod"] for record in records} == {"second"}
