"""End-to-end test 8: kprobes and kretprobes in a VM's kernel, by an agent that is connected to a real operator, exact.

The operator and the API server run here; the agent runs under Debian's 6.1 (tests/kernel/vm), where kprobes are, and
reaches them over TLS. What else passes between host and guest are files of the guest's shared folder: the agent's
token and CA, `go` and `stop` in; its log, and `removed` when no link is pinned any more, out.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.error
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import kube
from tests.fakes import control_plane, operator_process
from tests.fakes.control_plane import ControlPlane
from tests.fakes.operator_process import OperatorProcess
from tests.kernel import vm, vm_kernels
from tests.workloads import run as workloads

pytestmark = [pytest.mark.e2e, pytest.mark.vm, pytest.mark.timeout(360)]

#: Linux 6.1: from 5.15 on kprobes count on while the agent is gone.
KERNEL = "bookworm"
NAMESPACE, NODE = "probefleet", "vm"
RESOURCES = "/apis/probefleet.io/v1alpha1/namespaces/shop"
CALLS = workloads.BINARIES / "calls"

# sched_get_priority_max: of SCHED_FIFO (1) it is 99, of -1 it fails with EINVAL. Nothing else calls it, but the agent
# where it measures what hooks cost: of SCHED_OTHER, for which it is 0.
CORE = """
#include <probefleet.h>

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, u32);
    __type(value, u64);
} calls SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 64);
    __type(key, s64);
    __type(value, u64);
} answers SEC(".maps");

SEC("kprobe/__x64_sys_sched_get_priority_max")
int on_call(struct pt_regs *ctx)
{
    u32 zero = 0;

    probefleet_add(&calls, &zero, 1);
    return 0;
}

SEC("kretprobe/__x64_sys_sched_get_priority_max")
int on_return(struct pt_regs *ctx)
{
    s64 answer = PT_REGS_RC(ctx);

    probefleet_add(&answers, &answer, 1);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
"""
# sched_get_priority_min, so that neither policy's program can do the other's counting.
BCC = """
#include <uapi/linux/ptrace.h>
BPF_HASH(answers, s64, u64);

int on_min(struct pt_regs *ctx)
{
    s64 answer = PT_REGS_RC(ctx);

    answers.increment(answer);
    return 0;
}
"""
OF_THE_AGENT = ("0",)
MIN_NUMBER = 147
#: Debian's kernel has only a clone of it, `finish_task_switch.isra.0`.
INLINED = "finish_task_switch"
# The arguments are the agent's command. Half of the calls come while no agent runs: the programs count on.
GUEST = f"""
set -eu
cd "$VM_OUT"
"$@" 2>>agent.log & agent=$!
wait_for() {{ until [ -e "$1" ]; do kill -0 $agent || exit 1; sleep 0.2; done; }}
trap 'kill $agent 2>/dev/null || true' EXIT
wait_for go
{CALLS} rare 503 1
{CALLS} rare 23 -1
kill -9 $agent
wait $agent || true
{CALLS} rare 494 1
{CALLS} {MIN_NUMBER} 23 1
"$@" 2>>agent.log & agent=$!
ls -d /sys/fs/bpf/probefleet/instances/*/link_*
while ls -d /sys/fs/bpf/probefleet/instances/*/link_* >/dev/null 2>&1; do [ ! -e stop ] || exit 1; sleep 0.2; done
touch removed
wait_for stop
kill $agent
wait $agent
"""


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    with tempfile.TemporaryDirectory() as folder, control_plane.running(Path(folder)) as running:
        running.install_crds(kube.ROOT / "charts" / "probefleet" / "files" / "crds")
        running.create("/api/v1/namespaces", {"metadata": {"name": "shop"}})
        running.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        running.add_node(NODE)
        yield running


@pytest.fixture
def operator(plane: ControlPlane, tmp_path: Path) -> Iterator[OperatorProcess]:
    process = OperatorProcess(
        plane.kubeconfig,
        tmp_path / "operator.log",
        namespace=NAMESPACE,
        options=("--report-seconds=0.5", f"--catalog={kube.ROOT / 'bpf'}"),
        environment={"PROBEFLEET_CATALOG_OBJECTS": str(kube.ROOT / "build" / "bpf")},
    )
    with operator_process.running(process):
        yield process


def start_guest(
    plane: ControlPlane, operator: OperatorProcess, out: Path, pool: ThreadPoolExecutor
) -> Future[vm.Completed]:
    """The guest, with an agent that dials the operator."""
    vm_kernels.fetch(KERNEL, refresh=False, say=print)
    (out / "token").write_text(plane.agent_token(NAMESPACE, NODE))
    (out / "ca.crt").write_bytes(plane.ca_bundle(NAMESPACE))
    agent = (
        *(sys.executable, "-m", "probefleet_agent.main", f"--operator={vm.HOST_ADDRESS}:{operator.port}"),
        *(f"--node={NODE}", "--server-name=localhost", "--token-file=token", "--ca-file=ca.crt"),
    )
    command = ["bash", "-c", GUEST, "guest", *agent]
    return pool.submit(vm.run, KERNEL, command, seconds=270, out=out, cwd=kube.ROOT)


def status_of(plane: ControlPlane, kind: str, name: str) -> dict[str, Any]:
    """An object's status, {} while there is none."""
    try:
        found: dict[str, Any] = plane.request("GET", f"{RESOURCES}/{kind}/{name}").get("status", {})
    except urllib.error.HTTPError as problem:
        if problem.code != 404:
            raise
        return {}
    return found


def apply(plane: ControlPlane, name: str, **spec: Any) -> None:
    """kubectl apply of a policy."""
    made = kube.policy(name, "shop", {"scope": "Cluster", "interval": "1s", **spec})
    plane.kubectl("apply", "-f", "-", stdin=json.dumps(made))


def wait_programmed(plane: ControlPlane, name: str, guest: Future[vm.Completed]) -> None:
    """Wait until the VM runs the policy's programs. A guest that ended, or a failure there, ends the wait."""

    def programmed() -> bool:
        assert not guest.done(), guest.result()
        status = status_of(plane, "probepolicies", name)
        assert not status.get("failures"), status["failures"]
        conditions = {each["type"]: each for each in status.get("conditions", [])}
        assert conditions.get("Accepted", {}).get("status") != "False", conditions
        return conditions.get("Programmed", {}).get("status") == "True"

    kube.eventually(programmed, f"{name} is Programmed", seconds=180)


def wait_refused(plane: ControlPlane, name: str, guest: Future[vm.Completed], words: str) -> str:
    """What the status says of the one node that cannot attach it, and an Event with the node's name says, too."""

    def refused() -> dict[str, Any] | None:
        assert not guest.done(), guest.result()
        return next(iter(status_of(plane, "probepolicies", name).get("failures", [])), None)

    failure = kube.eventually(refused, f"{name} is refused by the node", seconds=60)
    assert (failure["reason"], failure["nodes"], failure["example"]) == ("NoSuchAttachPoint", 1, NODE)
    message = str(failure["message"])
    assert message.startswith(words)

    def told() -> bool:
        events = plane.request("GET", "/apis/events.k8s.io/v1/namespaces/shop/events")["items"]
        notes = [each["note"] for each in events if each["regarding"]["name"] == name]
        return any(note.startswith(f"node {NODE} (6.") and words in note for note in notes)

    kube.eventually(told, f"an Event about {name} that names the node")
    return message


def wait_counted(
    plane: ControlPlane, name: str, answers: dict[tuple[str, ...], int], guest: Future[vm.Completed]
) -> dict[str, Any]:
    """The report's status, once it covers the node and has these answers: exactly, and beside the agent's own alone."""

    def counted() -> dict[str, Any] | None:
        assert not guest.done(), guest.result()
        status = status_of(plane, "probereports", name)
        complete = status.get("columns", {}).get("coverage") == "1/1"
        found = kube.totals(status, "answers")
        return status if complete and sum(found.get(key, 0) for key in answers) >= sum(answers.values()) else None

    status = kube.eventually(counted, f"{answers} in {name}'s report")
    found = kube.totals(status, "answers")
    assert {key: value for key, value in found.items() if key != OF_THE_AGENT} == answers
    return status


def test_kprobes_and_kretprobes_of_a_vm_are_in_the_report_exactly(
    plane: ControlPlane, operator: OperatorProcess, tmp_path: Path
) -> None:
    workloads.build()
    out = tmp_path / "out"
    out.mkdir()
    apply(
        plane,
        "core",
        program={"c": {"source": CORE}},
        outputs=[
            {"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": []},
            {"name": "answers", "from": {"map": "answers"}, "counter": {}, "groupBy": ["key"]},
        ],
    )
    apply(
        plane,
        "bcc",
        program={"bcc": {"source": BCC}},
        attach=[{"program": "on_min", "kretprobe": {"function": "__x64_sys_sched_get_priority_min"}}],
        outputs=[{"name": "answers", "from": {"map": "answers"}, "counter": {}, "groupBy": ["key"]}],
    )
    with ThreadPoolExecutor(1) as pool:
        guest = start_guest(plane, operator, out, pool)
        try:
            wait_programmed(plane, "core", guest)
            wait_programmed(plane, "bcc", guest)
            for name, function in (("misspelt", "tcp_sendmsgg"), ("inlined", INLINED)):
                apply(
                    plane, name, program={"c": {"source": CORE.replace("__x64_sys_sched_get_priority_max", function)}}
                )
            near = wait_refused(plane, "misspelt", guest, "no function tcp_sendmsgg on this kernel; near: ")
            assert "tcp_sendmsg" in near.split("near: ")[1].split(", ")
            words = (
                f"no function {INLINED} on this kernel; inlined: the compiler left no function of that name to attach"
            )
            assert f"near: {INLINED}." in wait_refused(plane, "inlined", guest, words)
            (out / "go").touch()
            core = wait_counted(plane, "core", {("99",): 997, ("-22",): 23}, guest)
            # Every call has returned, the agent's own as well.
            assert kube.totals(core, "calls") == {(): sum(kube.totals(core, "answers").values())}
            wait_counted(plane, "bcc", {("1",): 23}, guest)
            assert core["columns"]["lost"] == "0"

            for name in ("core", "bcc", "misspelt", "inlined"):
                plane.request("DELETE", f"{RESOURCES}/probepolicies/{name}")
            kube.eventually(lambda: (out / "removed").exists(), "no pin is left in the guest", seconds=30)
        finally:
            (out / "go").touch()
            (out / "stop").touch()
            done = guest.result()
    done.check()
    said = [json.loads(line)["event"] for line in (out / "agent.log").read_text().splitlines()]
    assert said.count("loaded") == said.count("adopted") == 2, "the second agent took over what the first one left"
    assert said[-1] == "stopped; nothing is left on this node"
