"""``probefleet run -n`` and ``-l``: exact counts of the pods that are meant, also of those that come later, and words
where there are none. Pods are cgroups named as the kubelet names them, and a container runtime that is a fake behind a
real socket says what they are called; tests/e2e/test_one_node.py asks a real one."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.container_runtime import FakeRuntime, serving
from tests.kernel.test_cli_run import RARE, finish, start, total, wait_until_attached
from tests.workloads import run as workloads

WEB, CART, LATE, STRANGER, STATIC = (
    *(f"0f1e2d3c-0000-4000-8000-00000000000{number}" for number in (1, 2, 3, 4)), "7d1c5a0e7d6c4b0e9c8f1f4f53d2c1ab",
)  # fmt: skip
POLICY = """
apiVersion: probefleet.io/v1alpha1
kind: ProbePolicy
metadata: {name: calls, namespace: shop}
spec:
  pods: {selector: {matchLabels: {app: web}}}
  program: {catalog: {name: syscount, parameters: {syscalls: sched_get_priority_max}}}
  outputs: [{name: calls, from: {map: calls}, counter: {}, groupBy: [pod]}]
"""


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeRuntime, Path]]:
    # For the whole module, because gRPC keeps descriptors of its own for as long as the process lives.
    fake, socket = FakeRuntime(), tmp_path_factory.mktemp("cri") / "cri.sock"
    with serving(socket, fake):
        yield fake, socket


@pytest.fixture
def fake(listening: tuple[FakeRuntime, Path]) -> FakeRuntime:
    made, _ = listening
    made.sandboxes, made.containers, made.calls = [], [], []
    return made


@pytest.fixture
def endpoint(listening: tuple[FakeRuntime, Path]) -> str:
    return f"--runtime-endpoint={listening[1]}"


@contextmanager
def pods(*uids: str) -> Iterator[dict[str, Path]]:
    """A container's cgroup of each, by its pod's uid."""
    with ExitStack() as stack:
        name = "kubepods/burstable/pod{}/" + "5e" * 32
        yield {uid: stack.enter_context(workloads.in_cgroup(name.format(uid))) for uid in uids}


def rows(report: dict[str, Any], output: str = "calls") -> dict[str, int]:
    found = next(each for each in report["status"]["outputs"] if each["name"] == output)
    return {row["key"][0]: int(row["value"]) for row in found["total"]["rows"]}


def interrupted(process: subprocess.Popen[str], *, status: int = 0) -> tuple[dict[str, Any], str]:
    process.send_signal(signal.SIGINT)
    said, errors = finish(process, status=status)
    return json.loads(said), errors


def test_only_the_pods_with_these_labels_count_and_under_their_workloads_name(fake: FakeRuntime, endpoint: str) -> None:
    fake.add(WEB, "shop", "web-7d9f-x2x4z", {"app": "web", "pod-template-hash": "7d9f"}, "nginx")
    fake.add(CART, "shop", "cart", {"app": "cart"})
    fake.add(STRANGER, "other", "web", {"app": "web"})
    with pods(WEB, CART, STRANGER) as cgroups:
        process = start(
            "run", "syscount", "-n", "shop", "-l", "app=web", endpoint, "--set", f"syscalls={RARE}", "-o", "json"
        )
        wait_until_attached(process)
        for uid, count in ((WEB, 997), (CART, 23), (STRANGER, 101)):
            workloads.run("calls", "rare", count, cgroup=cgroups[uid])
        report, errors = interrupted(process)
    assert total(report, "calls") == 997
    assert rows(report) == {"shop/web": 997}
    assert errors == ""


def test_pods_that_come_while_it_runs_count_whole_and_one_that_went_keeps_its_name(
    fake: FakeRuntime, endpoint: str
) -> None:
    fake.add(WEB, "shop", "web", {"app": "web"})
    with pods(WEB, LATE, CART) as cgroups:
        process = start("run", "syscount", "-l", "app", endpoint, "--set", f"syscalls={RARE}", "-o", "json")
        wait_until_attached(process)
        workloads.run("calls", "rare", 997, cgroup=cgroups[WEB])
        fake.remove("web")
        # They count before anybody knows them: what is unknown is kept until it has a name.
        workloads.run("calls", "rare", 23, cgroup=cgroups[LATE])
        workloads.run("calls", "rare", 101, cgroup=cgroups[CART])
        fake.add(LATE, "shop", "late", {"app": "late"})
        fake.add(CART, "shop", "cart", {"tier": "db"})
        report, errors = interrupted(process)
    assert rows(report) == {"shop/web": 997, "shop/late": 23}
    assert errors == ""


def test_a_policys_own_selector_is_kept_on_one_machine_too(fake: FakeRuntime, endpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    fake.add(WEB, "shop", "web-1", {"app": "web"})
    fake.add(CART, "shop", "cart-1", {"app": "cart"})
    with pods(WEB, CART) as cgroups:
        process = start("run", path, endpoint, "-o", "json")
        wait_until_attached(process)
        for uid, count in ((WEB, 997), (CART, 23)):
            workloads.run("calls", "rare", count, cgroup=cgroups[uid])
        report, _ = interrupted(process)
    assert rows(report) == {"web-1": 997}


def test_a_static_pod_is_counted_by_its_name(fake: FakeRuntime, endpoint: str) -> None:
    fake.add(STATIC, "kube-system", "etcd-node1", {"component": "etcd"})
    with pods(STATIC) as cgroups:
        process = start("run", "syscount", "-n", "kube-system", endpoint, "--set", f"syscalls={RARE}", "-o", "json")
        wait_until_attached(process)
        workloads.run("calls", "rare", 997, cgroup=cgroups[STATIC])
        report, _ = interrupted(process)
    assert rows(report) == {"kube-system/etcd-node1": 997}


def test_without_a_choice_pods_have_their_names_and_the_host_counts(fake: FakeRuntime, endpoint: str) -> None:
    fake.add(WEB, "shop", "web", {"app": "web"})
    with pods(WEB) as cgroups:
        process = start("run", "syscount", endpoint, "--set", f"syscalls={RARE}", "-o", "json")
        wait_until_attached(process)
        workloads.run("calls", "rare", 997, cgroup=cgroups[WEB])
        workloads.run("calls", "rare", 23)
        report, _ = interrupted(process)
    found = rows(report)
    assert found["shop/web"] == 997
    assert found["(host)"] >= 23


def test_where_no_pod_came_that_was_asked_for_it_ends_with_2(fake: FakeRuntime, endpoint: str) -> None:
    fake.add(WEB, "shop", "web", {"app": "web"})
    process = start("run", "syscount", "-n", "shop", "-l", "app=wbe", endpoint, "--for", "1s")
    said, errors = finish(process, status=2)
    assert "== syscount ==" in said, "the report is printed all the same"
    first, last = errors.splitlines()
    assert first.endswith("-n shop -l app=wbe: no such pod is here yet; any that comes is counted. "
                          "Namespaces with pods here: shop")  # fmt: skip
    assert last.endswith("-n shop -l app=wbe: nothing was counted, because no such pod was here")


def test_without_a_runtime_labels_end_with_2_and_what_to_do(tmp_path: Path) -> None:
    process = start("run", "syscount", "-l", "app=web", f"--runtime-endpoint={tmp_path}/no.sock", "--for", "1s")
    _, errors = finish(process, status=2)
    assert f"{tmp_path}/no.sock: is not there" in errors and "crictl info" in errors


def test_a_runtime_that_falls_silent_is_said(fake: FakeRuntime, endpoint: str) -> None:
    import grpc

    fake.add(WEB, "shop", "web", {"app": "web"})
    with pods(WEB) as cgroups:
        process = start("run", "syscount", "-n", "shop", endpoint, "--set", f"syscalls={RARE}", "-o", "json")
        wait_until_attached(process)
        fake.refuses = grpc.StatusCode.UNAVAILABLE
        try:
            workloads.run("calls", "rare", 997, cgroup=cgroups[WEB])
            report, errors = interrupted(process)
        finally:
            fake.refuses = None
    assert rows(report) == {"shop/web": 997}, "what was known is"
    assert "fake 0 at " in errors and "does not answer: refused by the test, since " in errors
