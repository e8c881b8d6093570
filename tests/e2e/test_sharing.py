"""One map in the kernel, two policies: BCC writes, CO-RE reads. (Two policies of one program: `test_restarts`.)

What is pinned is asked of the agent's own pod on the node, whose bpffs it is.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.e2e import agents, kube

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NODE = "node1"
ON_NODE = {"selector": {"matchLabels": {"kubernetes.io/hostname": NODE}}}
UID = 61023  # of nobody else on this machine

PROBE_MAP = {"type": "hash", "maxEntries": 1024, "key": "u32 uid", "value": "u64 execs"}
WRITER = """
BPF_HASH(execs, u32, u64, 1024);

TRACEPOINT_PROBE(syscalls, sys_enter_execve)
{
    u32 uid = bpf_get_current_uid_gid();

    execs.increment(uid);
    return 0;
}
"""
# The call was counted before the new program begins: so what is read here is exact, too.
READER = """
#include <probefleet.h>

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, u32);
    __type(value, u64);
} execs SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, user_id_t);
    __type(value, u64);
} seen SEC(".maps");

SEC("tp_btf/sched_process_exec")
int on_exec(void *ctx)
{
    u32 uid = bpf_get_current_uid_gid();
    u64 *count = bpf_map_lookup_elem(&execs, &uid);

    if (count)
        bpf_map_update_elem(&seen, &uid, count, BPF_ANY);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
"""

_PINS = """
import json, pathlib
from probefleet_agent.kernel import syscall

def users(root):
    for path in root.glob("*/prog_*"):
        with syscall.obj_get(str(path)) as fd:
            yield str(path), list(syscall.program_info(fd).map_ids)

root = pathlib.Path("/sys/fs/bpf/probefleet")
maps = {}
for path in root.glob("maps/*/map_map"):
    with syscall.obj_get(str(path)) as fd:
        maps[path.parent.name] = syscall.map_info(fd).id
print(json.dumps({"maps": maps, "programs": dict(users(root / "instances"))}))
"""


def agent() -> str:
    """The name of the node's agent pod."""
    return agents.pods()[NODE]


def pins() -> dict[str, Any]:
    """What the node has pinned: ProbeMaps (uid → kernel map id), and programs (path → kernel map ids)."""
    shell = ("-n", kube.SYSTEM, "exec", agent(), "--", "/opt/probefleet/venv/bin/python3", "-c", _PINS)
    found: dict[str, Any] = json.loads(kube.kubectl(*shell))
    return found


def probe_map(name: str, namespace: str) -> dict[str, Any]:
    """A ProbeMap that counts by uid."""
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbeMap",
        "metadata": {"name": name, "namespace": namespace},
        "spec": PROBE_MAP,
    }


def sharing(program: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
    """The spec of a policy whose map `execs` is the ProbeMap by-uid."""
    return {
        "scope": "Cluster",
        "nodes": ON_NODE,
        "program": program,
        "maps": [{"name": "execs", "share": {"probeMap": "by-uid"}}],
        "outputs": [{"gauge": {"merge": "max"}, "groupBy": ["key"], "limit": 50, **output}],
        "interval": "1s",
    }


def counted(name: str, namespace: str, output: str) -> int:
    """What the report says of our user."""
    rows = kube.totals(kube.report(name, namespace), output)
    return next((value for key, value in rows.items() if str(UID) in key[0]), 0)


def test_bcc_writes_what_core_reads_and_the_map_lives_as_long_as_it_has_a_user(namespace: str) -> None:
    # The pod waits before the policies come, so that its own start is not counted.
    user = {"runAsUser": UID, "runAsGroup": UID}
    kube.apply(kube.pod("starter", namespace, ["execs", "23", "--hold"], node=NODE, securityContext=user))
    kube.kubectl("wait", "pod/starter", "-n", namespace, "--for=condition=Ready", "--timeout=60s")
    writer = sharing({"bcc": {"source": WRITER}}, {"name": "execs", "from": {"map": "execs"}, "decode": {"key": "uid"}})
    reader = sharing({"c": {"source": READER}}, {"name": "seen", "from": {"map": "seen"}})
    kube.apply(
        probe_map("by-uid", namespace),
        kube.policy("writer", namespace, writer),
        kube.policy("reader", namespace, reader),
    )
    kube.wait_programmed("writer", namespace)
    kube.wait_programmed("reader", namespace)

    kube.kubectl("attach", "-i", "starter", "-n", namespace, stdin="go")
    kube.kubectl("wait", "pod/starter", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    kube.eventually(lambda: counted("writer", namespace, "execs") >= 23, "23 in the writer's report", seconds=30)
    kube.eventually(lambda: counted("reader", namespace, "seen") >= 23, "23 in the reader's report", seconds=30)
    assert (counted("writer", namespace, "execs"), counted("reader", namespace, "seen")) == (23, 23)

    # One kernel map: both programs hold its id.
    uid = kube.get("probemap", "by-uid", namespace)["metadata"]["uid"]
    there = pins()
    map_id = there["maps"][uid]
    assert sum(map_id in ids for ids in there["programs"].values()) == 2
    status = kube.eventually(
        lambda: (
            (found := kube.get("probemap", "by-uid", namespace).get("status", {}))
            and found["columns"]["nodes"] == "1/1"
            and found
        ),
        "the ProbeMap on its node",
    )
    assert status["policies"] == ["reader", "writer"]
    assert status["columns"] == {"nodes": "1/1", "users": "2", "status": "Ready"}

    # A third one declares another value.
    wide = READER.replace("__type(value, u64);\n} execs", "__type(value, u32);\n} execs")
    assert wide != READER
    kube.apply(
        kube.policy("third", namespace, sharing({"c": {"source": wide}}, {"name": "seen", "from": {"map": "seen"}}))
    )
    refusal = kube.eventually(lambda: accepted("third", namespace), "an answer to the third policy")
    assert refusal["status"] == "False"
    assert "spec.maps[0].share.probeMap" in refusal["message"]
    assert "its value is 4 bytes" in refusal["message"]
    assert "the ProbeMap's 8 bytes" in refusal["message"]
    # BCC's layout is known on the node only, which compares as strictly.
    narrow = WRITER.replace("u32, u64, 1024", "u32, u32, 1024")
    kube.apply(kube.policy("fourth", namespace, {**writer, "program": {"bcc": {"source": narrow}}}))
    failure = kube.eventually(
        lambda: kube.get("probepolicy", "fourth", namespace).get("status", {}).get("failures"),
        "the fourth policy's failure",
    )[0]
    assert (failure["reason"], failure["example"]) == ("LayoutMismatch", NODE)
    assert "4 bytes" in failure["message"]
    assert "8 bytes" in failure["message"]
    kube.kubectl("delete", "ppol", "third", "fourth", "-n", namespace)

    # The map stays for the one who is left, with what it held.
    kube.kubectl("delete", "ppol", "writer", "-n", namespace)
    kube.eventually(
        lambda: sum(map_id in ids for ids in pins()["programs"].values()) == 1, "the writer's end", seconds=30
    )
    assert pins()["maps"][uid] == map_id
    assert counted("reader", namespace, "seen") == 23
    kube.kubectl("delete", "ppol", "reader", "-n", namespace)
    kube.kubectl("delete", "probemap", "by-uid", "-n", namespace)
    kube.eventually(lambda: uid not in pins()["maps"], "the map's pin is gone", seconds=30)
    assert not any(map_id in ids for ids in pins()["programs"].values())


def test_a_shared_map_grows_under_its_programs(namespace: str) -> None:
    user = {"runAsUser": UID, "runAsGroup": UID}
    for name, execs in (("before", "97"), ("after", "23")):
        kube.apply(kube.pod(name, namespace, ["execs", execs, "--hold"], node=NODE, securityContext=user))
        kube.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=condition=Ready", "--timeout=60s")
    writer = sharing({"bcc": {"source": WRITER}}, {"name": "execs", "from": {"map": "execs"}, "decode": {"key": "uid"}})
    reader = sharing({"c": {"source": READER}}, {"name": "seen", "from": {"map": "seen"}})
    kube.apply(
        probe_map("by-uid", namespace),
        kube.policy("writer", namespace, writer),
        kube.policy("reader", namespace, reader),
    )
    kube.wait_programmed("writer", namespace)
    kube.wait_programmed("reader", namespace)
    kube.kubectl("attach", "-i", "before", "-n", namespace, stdin="go")
    kube.eventually(lambda: counted("writer", namespace, "execs") >= 97, "97 in the writer's report", seconds=30)
    uid = kube.get("probemap", "by-uid", namespace)["metadata"]["uid"]
    small = pins()["maps"][uid]

    larger = {**probe_map("by-uid", namespace), "spec": {**PROBE_MAP, "maxEntries": 4096}}
    kube.apply(larger)
    kube.eventually(lambda: pins()["maps"][uid] != small, "a larger map", seconds=60)
    there = pins()
    assert sum(there["maps"][uid] in ids for ids in there["programs"].values()) == 2
    assert not any(small in ids for ids in there["programs"].values())
    kube.kubectl("attach", "-i", "after", "-n", namespace, stdin="go")
    kube.eventually(lambda: counted("writer", namespace, "execs") >= 120, "120 in the writer's report", seconds=30)
    kube.eventually(lambda: counted("reader", namespace, "seen") >= 120, "120 in the reader's report", seconds=30)
    assert (counted("writer", namespace, "execs"), counted("reader", namespace, "seen")) == (120, 120)
    for name in ("writer", "reader"):
        (gap,) = kube.report(name, namespace)["gaps"]
        assert f"ProbeMap {namespace}/by-uid grew from 1,024 to 4,096 entries" in gap["why"]
    kube.kubectl("delete", "ppol", "writer", "reader", "-n", namespace)
    kube.kubectl("delete", "probemap", "by-uid", "-n", namespace)


def test_a_connection_is_counted_under_the_pod_on_the_other_side(namespace: str) -> None:
    """The example, from a pod on one node to a pod on another: what the map holds of it the operator told the agent."""
    (example,) = yaml.safe_load_all((kube.ROOT / "examples/connects-by-pod.yaml").read_text())
    spec = {**example["spec"], "nodes": ON_NODE, "interval": "1s"}
    kube.apply(kube.policy("connects", namespace, spec))
    kube.wait_programmed("connects", namespace)
    kube.apply(kube.pod("server", namespace, ["connects", "--serve", "7000", "0.0.0.0"], node="node2"))
    kube.kubectl("wait", "pod/server", "-n", namespace, "--for=condition=Ready", "--timeout=60s")
    address = kube.get("pod", "server", namespace)["status"]["podIP"]
    # What the node knows, asked of its own map.
    kube.eventually(
        lambda: address in dumped("endpoints", "endpoints"), f"{address} in the endpoints of {NODE}", seconds=30
    )
    kube.apply(kube.pod("client", namespace, ["connects", "23", "7000", address], node=NODE))
    kube.kubectl("wait", "pod/client", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")

    def rows() -> dict[tuple[str, ...], int]:
        return kube.totals(kube.report("connects", namespace), "connects")

    pair = (f"{namespace}/client", f"{namespace}/server")
    kube.eventually(lambda: rows().get(pair) == 23, f"23 of {pair}", seconds=30)
    kube.kubectl("delete", "ppol", "connects", "-n", namespace)
    kube.eventually(lambda: "endpoints" not in pins()["maps"], "the map has gone with its last user", seconds=30)


def dumped(policy: str, name: str) -> str:
    """A map of the node, as `probefleet map dump` shows it there."""
    shell = (
        "-n",
        kube.SYSTEM,
        "exec",
        agent(),
        "--",
        "/opt/probefleet/venv/bin/probefleet",
        "map",
        "dump",
        policy,
        name,
    )
    return kube.kubectl(*shell)


def accepted(name: str, namespace: str) -> dict[str, str] | None:
    """The condition Accepted, once it is decided."""
    conditions = kube.get("probepolicy", name, namespace).get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == "Accepted" and each["status"] != "Unknown"), None)
