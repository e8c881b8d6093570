"""End-to-end test 5, second half, and 4 for the whole release: what happens to the cluster itself.

A certificate of one's own, an upgrade to agents without privilege, two operators, and back; an API server that is gone,
a node that comes and dies, the end of the release. These disturb every other policy of the cluster, so the file's name
makes them the last. Each says which values it wants (`having`), and those that want the same follow each other:
replacing all pods takes 20 s.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.kubebox import settings
from tests.e2e import agents, kube
from tests.e2e.surviving import SYSCOUNT, finish_counting, finish_recording, recording, start_counting
from tests.e2e.test_lifecycle import PROGRAM

pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(420)]

NODES = (1, 2, 3)
JOINING = 4
#: A node that joins runs every matching policy so soon after its agent is Ready; Kubernetes tells that time in seconds.
JOIN_SECONDS = 10 + 1
#: Those of the chart but SYS_RESOURCE: maps need it before Linux 5.11 only, and a sandboxed machine has it not to give.
CAPABILITIES = ["BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH", "SYSLOG"]
#: Nodes of the test cluster share a kernel, and this program counts all that it sees: by process; one is the pod's, and
#: nobody else on the machine makes so many calls.
INLINE_CALLS = 1013
INLINE: dict[str, Any] = {
    "scope": "Cluster",
    "nodes": {"selector": {"matchLabels": {"kubernetes.io/hostname": "node3"}}},
    "interval": "1s",
    "outputs": [{"name": "calls", "from": {"map": "calls"}, "counter": {}, "groupBy": ["key"], "limit": 50}],
    "program": {
        "bcc": {
            "source": """BPF_HASH(calls, u32, u64);
TRACEPOINT_PROBE(syscalls, sys_enter_sched_get_priority_max)
{
    calls.increment(bpf_get_current_pid_tgid() >> 32);
    return 0;
}
"""
        }
    },
}
#: So long the operator lives without an API server.
OUTAGE_SECONDS = 10
PINNED = Path("/sys/fs/bpf/probefleet")
#: Run in a node's mount namespace: kernel ids of all programs that Probefleet pinned there.
_PINNED_PROGRAMS = """
import json, sys
from pathlib import Path
from probefleet_agent.kernel import syscall
found = set()
for path in Path(sys.argv[1]).rglob("*"):
    if path.name.startswith("prog_"):
        with syscall.obj_get(str(path)) as fd:
            found.add(syscall.program_info(fd).id)
    elif path.name.startswith("link"):
        with syscall.obj_get(str(path)) as fd:
            found.add(syscall.link_info(fd).prog_id)
print(json.dumps(sorted(found)))
"""


def cluster(*words: str, seconds: float = 240) -> str:
    """What tests/cluster/cluster prints."""
    return kube.run(str(kube.ROOT / "tests/cluster/cluster"), *words, seconds=seconds).stdout


#: Values, as `helm get values` shows them. On the way there agents are replaced one by one, as on a fleet.
WITHOUT_PRIVILEGE = {"agent": {"privileged": False, "capabilities": CAPABILITIES, "maxUnavailable": 1}}
TWO_OPERATORS = {"operator": {"replicas": 2}}
OWN_CERTIFICATE = {"operator": {"tlsSecret": "own-certificate"}}


def having(*more: dict[str, Any]) -> None:
    """The release with these values besides the tests' own, everything of it ready. Nothing is done where it is so."""
    wanted: dict[str, Any] = yaml.safe_load(kube.VALUES.read_text())
    for values in more:
        for part, each in values.items():
            wanted[part] = {**wanted.get(part, {}), **each}
    status = kube.run("helm", "status", "probefleet", "-n", kube.SYSTEM, "-o", "json", check=False).stdout
    release = json.loads(status or "{}")
    if release.get("info", {}).get("status") != "deployed" or release.get("config") != wanted:
        upgrade(wanted)


def upgrade(values: dict[str, Any]) -> None:
    """helm upgrade --install, until everything of the new revision is ready."""
    kube.run(
        "helm", "upgrade", "--install", "probefleet", str(kube.ROOT / "charts/probefleet"), "--namespace", kube.SYSTEM,
        "--create-namespace", "--values", "-", "--wait", "--timeout", "3m", stdin=yaml.safe_dump(values), seconds=200,
    )  # fmt: skip
    kube.kubectl("rollout", "status", "-n", kube.SYSTEM, "daemonset/probefleet-agent", "--timeout=120s", seconds=130)


def instances(number: int) -> set[str]:
    """Digests of what is pinned on a node, seen from the node and not from its agent."""
    return set(cluster("on", str(number), "ls", str(PINNED / "instances")).split())


def pinned_programs(number: int) -> set[int]:
    """Kernel ids of the programs of a node's pins."""
    return set(json.loads(cluster("on", str(number), sys.executable, "-c", _PINNED_PROGRAMS, str(PINNED))))


def kernel_programs() -> set[int]:
    """Kernel ids of all programs; the nodes share the kernel."""
    done = kube.run("bpftool", "--json", "prog", "list")
    return {int(each["id"]) for each in json.loads(done.stdout)}


def coverage(name: str, namespace: str) -> dict[str, Any]:
    """Of how many nodes a report is, and of which it is not."""
    found: dict[str, Any] = kube.report(name, namespace).get("coverage", {})
    return found


def covered(namespace: str, sampled: int, selected: int, *, seconds: float = 60) -> None:
    """Wait until the report of `syscount` is of so many nodes."""

    def right() -> bool:
        found = coverage("syscount", namespace)
        return (found.get("sampled"), found.get("selected")) == (sampled, selected)

    kube.eventually(right, f"coverage {sampled}/{selected}", seconds=seconds)


def count_once(name: str, namespace: str, node: str, *, calls: int = 997) -> None:
    """So many calls of a new pod are in the report of `syscount`, and no other of this pod."""
    kube.apply(kube.pod(name, namespace, ["calls", "rare", str(calls)], node=node))
    kube.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    kube.eventually(
        lambda: kube.totals(kube.report("syscount", namespace), "calls").get((name,)) == calls,
        f"{calls} calls of {name}",
    )


def count_static(namespace: str, number: int) -> str:
    """997 calls of a static pod, which only the kubelet makes, are in the report of `syscount`; its name."""
    node = settings.layout(None).node(settings.NodeNumber(number))
    manifest = kube.pod("static", namespace, ["calls", "rare", "997"])
    (node.static_pods / "static.yaml").write_text(yaml.safe_dump(manifest))
    name = f"static-{node.name}"
    kube.eventually(lambda: kube.get("pod", name, namespace), "the kubelet shows its static pod")
    kube.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    kube.eventually(
        lambda: kube.totals(kube.report("syscount", namespace), "calls").get((name,)) == 997, f"997 calls of {name}"
    )
    return name


# A certificate of one's own.


def make_certificate(folder: Path) -> None:
    """ca.crt, tls.crt and tls.key, as somebody else's authority makes them."""
    name = f"probefleet-operator.{kube.SYSTEM}.svc"
    new = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    own = ("-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.crt"))
    kube.run(*new, "-subj", "/CN=somebody's authority", *own)
    signed = ("-CA", str(folder / "ca.crt"), "-CAkey", str(folder / "ca.key"), "-addext", f"subjectAltName=DNS:{name}")
    files = ("-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt"))
    kube.run(*new, "-subj", "/CN=operator", *signed, "-addext", "basicConstraints=critical,CA:FALSE", *files)


def test_a_certificate_of_ones_own_and_back_lose_and_double_no_count(namespace: str, tmp_path: Path) -> None:
    make_certificate(tmp_path)
    files = [f"--from-file={name}={tmp_path / name}" for name in ("ca.crt", "tls.crt", "tls.key")]
    kube.kubectl("create", "secret", "generic", "own-certificate", "-n", kube.SYSTEM, *files)
    try:
        kube.apply(kube.policy("syscount", namespace, SYSCOUNT))
        kube.wait_programmed("syscount", namespace)
        count_once("before", namespace, "node1")
        own = kube.get("configmap", "probefleet-ca", kube.SYSTEM)["data"]["ca.crt"]
        for name, values, authority in (
            ("own", [OWN_CERTIFICATE], (tmp_path / "ca.crt").read_text()),
            ("after", [], own),
        ):
            having(*values)
            kube.eventually(
                lambda authority=authority: (
                    kube.get("configmap", "probefleet-ca", kube.SYSTEM)["data"]["ca.crt"].strip() == authority.strip()
                ),
                "agents are told of the authority",
            )
            # The kubelet takes a minute or two to bring the file to where agents read it; new ones have it at once.
            kube.kubectl("rollout", "restart", "-n", kube.SYSTEM, "daemonset/probefleet-agent")
            kube.kubectl("rollout", "status", "-n", kube.SYSTEM, "daemonset/probefleet-agent", seconds=130)
            covered(namespace, 3, 3)
            count_once(name, namespace, "node2")
        counts = {("before",): 997, ("own",): 997, ("after",): 997}
        assert kube.totals(kube.report("syscount", namespace), "calls") == counts
    finally:
        kube.kubectl("delete", "secret", "own-certificate", "-n", kube.SYSTEM)


def test_helm_test_passes(installed: str) -> None:
    said = kube.run("helm", "test", "probefleet", "--namespace", installed, "--logs", seconds=120).stdout
    assert said.count("TEST SUITE:") == said.count("Succeeded") == said.count("POD LOGS: probefleet-test") == 1
    assert "operator: ok" in said


# An upgrade, to agents without privilege.


def test_helm_upgrade_loses_and_doubles_nothing(namespace: str, other_namespace: str, plugin: Path) -> None:
    having()
    with recording(other_namespace) as attached:
        start_counting(namespace)
        before = agents.pods()
        having(WITHOUT_PRIVILEGE)
        assert not set(before.values()) & set(agents.pods().values()), "every agent is another one"
        listed = finish_recording(other_namespace, attached)
        # What was pinned with privilege is read without.
        finish_counting(namespace)
    assert sorted(listed) == list(range(997))


def test_the_capabilities_mode_counts_exactly_and_does_not_guess_the_cost(namespace: str) -> None:
    having(WITHOUT_PRIVILEGE)
    contexts = json.loads(kube.kubectl("get", "daemonset/probefleet-agent", "-n", kube.SYSTEM, "-o", "json"))
    context = contexts["spec"]["template"]["spec"]["containers"][0]["securityContext"]
    assert context["privileged"] is False
    assert context["capabilities"] == {"drop": ["ALL"], "add": CAPABILITIES}
    fresh: dict[str, Any] = {**SYSCOUNT}
    fresh["program"] = {"catalog": {"name": "syscount", "parameters": {"syscalls": "sched_get_priority_max,getpgid"}}}
    kube.apply(kube.policy("fresh", namespace, fresh), kube.policy("inline", namespace, INLINE))
    kube.wait_programmed("fresh", namespace)
    # Compiled by the agent itself, which then may not become another user and so drops what it has instead.
    kube.wait_programmed("inline", namespace)
    kube.apply(kube.pod("third", namespace, ["calls", "rare", str(INLINE_CALLS)], node="node3"))

    def counted() -> bool:
        fresh, inline = kube.report("fresh", namespace), kube.report("inline", namespace)
        pods, processes = kube.totals(fresh, "calls"), kube.totals(inline, "calls")
        return pods == {("third",): INLINE_CALLS} and list(processes.values()).count(INLINE_CALLS) == 1

    kube.eventually(counted, f"{INLINE_CALLS} calls in both policies' reports")

    def unknown() -> bool:
        cost = kube.report("fresh", namespace).get("cost", {})
        return (cost.get("overhead"), cost.get("nodesKnown"), cost.get("nodesUnknown")) == ("unknown", 0, 3)

    kube.eventually(unknown, "a cost that says `unknown`")


# Two operators.


def leader() -> str:
    """The pod that holds the Lease."""
    return str(kube.get("lease", "probefleet-operator", kube.SYSTEM)["spec"]["holderIdentity"]).partition("_")[0]


def test_the_other_replica_takes_over_and_loses_and_doubles_no_count(namespace: str) -> None:
    having(WITHOUT_PRIVILEGE, TWO_OPERATORS)
    kube.eventually(lambda: "pod" if kube.get("pod", leader(), kube.SYSTEM) else "", "one of the two leads")
    start_counting(namespace)
    killed = leader()
    kube.kubectl("delete", "pod", killed, "-n", kube.SYSTEM, "--grace-period=0", "--force")
    kube.eventually(lambda: leader() not in ("", killed), "the other one leads")
    finish_counting(namespace)


# No API server.


def operator_pids() -> set[int]:
    """The operator's processes, on whichever node: without an API server only the kernel knows."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            inside = "/probefleet-node" in (path / "cgroup").read_text()
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # ended in between
        if inside and any(word.endswith(b"probefleet-operator") for word in words):
            found.add(int(path.name))
    return found


@pytest.fixture
def api_server() -> Iterator[None]:
    """It is there again, whatever the test did."""
    yield
    cluster("start-apiserver")
    kube.eventually(lambda: kube.run("kubectl", "get", "--raw", "/readyz", check=False).stdout == "ok", "API server")
    wait_controllers()


def wait_controllers() -> None:
    """Until Kubernetes' controllers are at work again: without its ServiceAccount no pod is made in a namespace."""
    name = f"again-{uuid.uuid4().hex[:6]}"
    kube.kubectl("create", "namespace", name)
    try:
        kube.eventually(lambda: kube.get("serviceaccount", "default", name), "ServiceAccount of a new namespace")
    finally:
        kube.kubectl("delete", "namespace", name, "--wait=false")


@pytest.mark.usefixtures("api_server")
def test_an_operator_that_starts_without_an_api_server_takes_nothing_from_nodes(namespace: str) -> None:
    having()  # one operator again, and agents with privilege
    start_counting(namespace)
    before = {number: instances(number) for number in NODES}
    assert all(before.values()), before
    programs = {number: pinned_programs(number) for number in NODES}
    first = operator_pids()
    assert first

    cluster("stop-apiserver")
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    kube.eventually(lambda: operator_pids() - first, "the kubelet to start the operator again", seconds=60)
    ends = time.monotonic() + OUTAGE_SECONDS
    while time.monotonic() < ends:  # at every moment, not only at the end
        assert {number: instances(number) for number in NODES} == before
        time.sleep(1)
    assert {number: pinned_programs(number) for number in NODES} == programs, "the very same programs"
    cluster("start-apiserver")

    finish_counting(namespace)
    assert {number: pinned_programs(number) for number in NODES} == programs


# A node comes, and dies.


@pytest.fixture
def fourth_node() -> Iterator[str]:
    """Its name; it is neither there before nor after."""
    name = f"node{JOINING}"
    assert not kube.get("node", name), f"{name} is there already"
    yield name
    subprocess.run([str(kube.ROOT / "tests/cluster/cluster"), "leave", str(JOINING)], capture_output=True, check=False)
    kube.kubectl("delete", "node", name, "--ignore-not-found")
    # Its kubelet cannot say that its pods have ended, and Kubernetes waits a minute before it does.
    there = ("-n", kube.SYSTEM, "--field-selector", f"spec.nodeName={name}")
    kube.kubectl("delete", "pods", *there, "--grace-period=0", "--force")


def test_a_node_joins_and_dies(namespace: str, fourth_node: str) -> None:
    having()
    only_here = {**SYSCOUNT, "nodes": {"selector": {"matchLabels": {"kubernetes.io/hostname": fourth_node}}}}
    elsewhere = {**SYSCOUNT, "nodes": {"selector": {"matchLabels": {"kubernetes.io/hostname": "node2"}}}}
    of_all: dict[str, Any] = {
        "scope": "Cluster",
        "program": {"c": {"source": PROGRAM.format(name=f"on_{uuid.uuid4().hex[:8]}")}},
    }
    wanted: dict[str, tuple[dict[str, Any], int]] = {
        "syscount": (SYSCOUNT, 4),
        "own": (of_all, 4),
        "here": (only_here, 1),
        "elsewhere": (elsewhere, 1),
    }
    kube.apply(*(kube.policy(name, namespace, spec) for name, (spec, _) in wanted.items()))
    for name in ("syscount", "own", "elsewhere"):
        kube.wait_programmed(name, namespace)

    cluster("join", str(JOINING))

    def agent_ready() -> datetime | None:
        name = agents.pods().get(fourth_node)
        conditions = kube.get("pod", name, kube.SYSTEM).get("status", {}).get("conditions", []) if name else []
        ready = [each for each in conditions if each["type"] == "Ready" and each["status"] == "True"]
        return datetime.fromisoformat(ready[0]["lastTransitionTime"]) if ready else None

    def running() -> float | None:
        for name, (_, nodes) in wanted.items():
            if kube.get("probepolicy", name, namespace).get("status", {}).get("nodes", {}).get("ready") != nodes:
                return None
        return time.time()

    since = kube.eventually(agent_ready, "an agent on the new node")
    took = kube.eventually(running, "every matching policy on the new node") - since.timestamp()
    assert took <= JOIN_SECONDS
    count_once("newcomer", namespace, fourth_node)
    static = count_static(namespace, JOINING)
    covered(namespace, 4, 4)

    cluster("leave", str(JOINING))
    kube.kubectl("wait", f"node/{fourth_node}", "--for=condition=Ready=Unknown", "--timeout=90s")
    covered(namespace, 3, 4)
    missed = coverage("syscount", namespace)
    assert missed["missing"] + missed["stale"] == [fourth_node]
    kube.kubectl("delete", "node", fourth_node)
    covered(namespace, 3, 3)
    count_once("survivor", namespace, "node1")
    # What the dead node had counted is not taken back.
    counts = {("newcomer",): 997, (static,): 997, ("survivor",): 997}
    assert kube.totals(kube.report("syscount", namespace), "calls") == counts


# The end, and a new beginning.


def objects() -> set[str]:
    """Every object of any kind that bears our name, but Events and what Kubernetes makes by itself in our namespace."""
    kinds = kube.kubectl("api-resources", "--verbs=list", "-o", "name").split()
    kinds = [kind for kind in kinds if not kind.startswith("events")]
    listed = kube.kubectl("get", ",".join(kinds), "-A", "-o", "name", "--ignore-not-found", check=False).split()
    if "namespace/default" not in listed:
        return {"whatever kubectl cannot list while a kind goes"}
    ours = {name for name in listed if "probefleet" in name}
    return ours - {f"namespace/{kube.SYSTEM}"}


def test_uninstalling_leaves_nothing_and_it_can_be_installed_again(namespace: str) -> None:
    having()
    name = f"on_{uuid.uuid4().hex[:8]}"
    kube.apply(
        kube.policy("syscount", namespace, SYSCOUNT),
        kube.policy("own", namespace, {"scope": "Cluster", "program": {"c": {"source": PROGRAM.format(name=name)}}}),
    )
    for each in ("syscount", "own"):
        kube.wait_programmed(each, namespace)
    programs = set[int]().union(*(pinned_programs(number) for number in NODES))
    assert len(programs) >= 3 * len(NODES), "two policies and the cgroups' names on each node"
    assert programs <= kernel_programs()
    assert "customresourcedefinition.apiextensions.k8s.io/probepolicies.probefleet.io" in objects()

    try:
        kube.run(
            "helm", "uninstall", "probefleet", "--namespace", kube.SYSTEM, "--wait", "--timeout", "3m", seconds=200
        )
        kube.eventually(lambda: not programs & kernel_programs(), "the end of every program", seconds=20)
        for number in NODES:
            left = cluster("on", str(number), "find", "/sys/fs/bpf", "-mindepth", "1", "-name", "*probefleet*")
            assert not left, f"node{number}: {left}"
        try:
            kube.eventually(lambda: not objects(), "the end of every object", seconds=60)
        except AssertionError as error:
            raise AssertionError(f"{error}: left are {sorted(objects())}") from None
    finally:
        having()
    kube.apply(kube.policy("syscount", namespace, SYSCOUNT))
    kube.wait_programmed("syscount", namespace)
    count_once("again", namespace, "node3")
