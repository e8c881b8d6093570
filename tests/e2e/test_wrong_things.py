"""End-to-end test 7: what is wrong is said in words that help, where the user looks; everything else keeps running.

Each mistake is applied next to a healthy policy. What the API server can know is refused by `kubectl apply`; the rest
is in the policy's status (a refusal, or a failure with the node) and in an Event.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.e2e import kube

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

HEALTHY = {
    "program": {"catalog": {"name": "syscount", "parameters": {"syscalls": "sched_get_priority_max"}}},
    "interval": "1s",
}
LICENCE = 'char LICENSE[] SEC("license") = "GPL";\n'
COUNTS = """
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 64);
    __type(key, u32);
    __type(value, u64);
} counts SEC(".maps");
"""

BCC_EXECS = """BPF_HASH(execs, u32);
TRACEPOINT_PROBE(syscalls, sys_enter_execve)
{
    return 0;
}
"""
NOTHING = f"""#include <probefleet.h>
{COUNTS}
SEC("tp_btf/sched_switch")
int on(void *ctx)
{{
    return 0;
}}
{LICENCE}"""


@pytest.fixture(scope="module")
def healthy(installed: str) -> Iterator[str]:
    """A namespace with a policy that works; it still does when all mistakes were made."""
    name = f"wrong-{uuid.uuid4().hex[:6]}"
    kube.kubectl("create", "namespace", name)
    kube.apply(kube.policy("healthy", name, HEALTHY))
    kube.kubectl("wait", "ppol/healthy", "-n", name, "--for=condition=Ready", "--timeout=60s")
    yield name
    kube.kubectl("wait", "ppol/healthy", "-n", name, "--for=condition=Ready", "--timeout=30s")
    kube.kubectl("delete", "ppol", "--all", "-n", name, "--wait=true")
    kube.kubectl("delete", "namespace", name, "--wait=false")


def of_c(source: str, **spec: Any) -> dict[str, Any]:
    """The spec of a policy with a program in C."""
    return {"scope": "Cluster", "program": {"c": {"source": source}}, "interval": "1s", **spec}


def of_bcc(source: str, **spec: Any) -> dict[str, Any]:
    """The spec of a policy with a BCC program."""
    return {"scope": "Cluster", "program": {"bcc": {"source": source}}, "interval": "1s", **spec}


def accepted(policy: dict[str, Any]) -> dict[str, str]:
    """The condition Accepted."""
    conditions = policy.get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == "Accepted"), {"status": "Unknown"})


def check_healthy(namespace: str) -> None:
    """The neighbour does not notice."""
    conditions = {
        each["type"]: each["status"] for each in kube.get("probepolicy", "healthy", namespace)["status"]["conditions"]
    }
    assert conditions["Accepted"] == conditions["Programmed"] == "True"


def check_event(name: str, namespace: str, *words: str) -> None:
    """An Event says the same, about this policy."""

    def told() -> str | None:
        listed = json.loads(kube.kubectl("get", "events", "-n", namespace, "-o", "json"))["items"]
        mine = [each for each in listed if each["involvedObject"]["name"] == name and each["type"] == "Warning"]
        notes = [f"{each['reason']}: {each['message']}" for each in mine]
        return next((note for note in notes if all(word in note for word in words)), None)

    kube.eventually(told, f"an Event on {name} with {words}", seconds=20)


def refused_in_status(name: str, namespace: str, spec: dict[str, Any], *words: str) -> str:
    """Apply; the operator refuses with these words, in the condition Accepted."""
    kube.apply(kube.policy(name, namespace, spec))

    def answered() -> dict[str, Any] | None:
        policy = kube.get("probepolicy", name, namespace)
        return policy if accepted(policy)["status"] != "Unknown" else None

    found = kube.eventually(answered, f"an answer to {name}")
    said = accepted(found)
    assert said["status"] == "False", found["status"]
    for word in words:
        assert word in said["message"], said["message"]
    assert found["status"]["columns"]["status"] == "Invalid"
    check_event(name, namespace, words[0])
    check_healthy(namespace)
    kube.kubectl("delete", "ppol", name, "-n", namespace, "--wait=false")
    return str(said["message"])


def failed_on_nodes(name: str, namespace: str, spec: dict[str, Any], reason: str, *words: str) -> dict[str, Any]:
    """Apply; the nodes refuse, for this reason, with these words and a node's name."""
    kube.apply(kube.policy(name, namespace, spec))

    def failures() -> list[dict[str, Any]]:
        policy = kube.get("probepolicy", name, namespace)
        assert accepted(policy)["status"] != "False", accepted(policy)
        found: list[dict[str, Any]] = policy.get("status", {}).get("failures", [])
        return found

    failure = kube.eventually(failures, f"{name} fails on a node")[0]
    assert failure["reason"] == reason, failure
    for word in words:
        assert word in failure["message"], failure["message"]
    assert failure["example"] in ("node1", "node2", "node3")
    check_event(name, namespace, reason)
    check_healthy(namespace)
    kube.kubectl("delete", "ppol", name, "-n", namespace, "--wait=false")
    return failure


# What the compiler finds.


def test_c_that_does_not_compile(healthy: str) -> None:
    source = NOTHING.replace("return 0", "return nothing")
    line = source[: source.index("nothing")].count("\n") + 1
    said = refused_in_status("typo", healthy, of_c(source), f":{line}:12: error: ", "undeclared identifier 'nothing'")
    assert "return nothing;" in said
    assert "^" in said


def test_bcc_that_does_not_compile(healthy: str) -> None:
    source = BCC_EXECS.replace("return 0", "return nothing")
    failure = failed_on_nodes("bcc-typo", healthy, of_bcc(source), "CompileFailed", ":4:12: error: ", "'nothing'")
    assert "^" in failure["message"]


def test_include_of_a_host_file(healthy: str) -> None:
    said = refused_in_status(
        "shadow", healthy, of_c('#include "/etc/shadow"\n'), ":1:10: ", "#include of a host file: /etc/shadow"
    )
    assert "root:" not in said


def test_incbin_of_a_host_file(healthy: str) -> None:
    source = f'#include <probefleet.h>\n__asm__(".incbin \\"/etc/shadow\\"");\n{LICENCE}'
    said = refused_in_status("incbin", healthy, of_c(source), ".incbin of a host file: /etc/shadow")
    assert "assembly may read no files" in said


def test_a_macro_bomb(healthy: str) -> None:
    lines = ["#define A0 1 + 1"] + [f"#define A{n} A{n - 1} + A{n - 1}" for n in range(1, 40)]
    refused_in_status(
        "bomb", healthy, of_c("\n".join(lines) + "\nint bomb = A39;\n"), "and was stopped: is there a macro"
    )


# What the kernel finds.


def test_a_program_that_the_verifier_refuses(healthy: str) -> None:
    body = "    u32 key = 0;\n    u64 *count = bpf_map_lookup_elem(&counts, &key);\n\n    *count += 1;\n    return 0;"
    source = NOTHING.replace("    return 0;", body)
    line = source[: source.index("*count +=")].count("\n") + 1
    says = f"verifier refused on at line {line}: count may be null. Test the pointer first."
    failure = failed_on_nodes("unsafe", healthy, of_c(source), "VerifierRefused", says)
    assert f"; *count += 1; @ unsafe.bpf.c:{line}" in failure["log"]
    assert "R0 invalid mem access 'map_value_or_null'" in failure["log"]


def test_an_attach_point_that_does_not_exist(healthy: str) -> None:
    source = NOTHING.replace("tp_btf/sched_switch", "tracepoint/syscalls/sys_enter_opennat")
    failed_on_nodes(
        "nowhere",
        healthy,
        of_c(source, outputs=[{"name": "counts", "from": {"map": "counts"}, "counter": {}}]),
        "NoSuchAttachPoint",
        "no tracepoint syscalls:sys_enter_opennat on this kernel",
        "near: sys_enter_openat",
    )


# What the planner finds.


def test_an_unknown_catalog_name(healthy: str) -> None:
    spec = {"program": {"catalog": {"name": "syscuont"}}}
    refused_in_status("slip", healthy, spec, "spec.program.catalog.name", '"syscuont"', "Did you mean syscount")


def test_a_map_too_large_for_the_budget(healthy: str) -> None:
    source = NOTHING.replace("max_entries, 64", "max_entries, 1000000")
    refused_in_status(
        "huge",
        healthy,
        of_c(source, budget={"mapMemory": "1Mi"}),
        "spec.budget.mapMemory",
        "counts",
        "the budget is",
    )


def test_a_bcc_map_too_large_for_the_budget(healthy: str) -> None:
    source = BCC_EXECS.replace("(execs, u32)", "(execs, u32, u64, 1000000)")
    failed_on_nodes(
        "bcc-huge", healthy, of_bcc(source, budget={"mapMemory": "1Mi"}), "MapTooLarge", "the largest is execs"
    )


def test_a_key_that_cannot_be_decoded(healthy: str) -> None:
    def outputs(decoder: str) -> list[dict[str, Any]]:
        decode = {"groupBy": ["key"], "decode": {"key": decoder}}
        return [{"name": "counts", "from": {"map": "counts"}, "counter": {}, **decode}]

    said = kube.refused(kube.policy("undecodable", healthy, of_c(NOTHING, outputs=outputs("ipv6"))))
    assert 'spec.outputs[0].decode.key: Unsupported value: "ipv6": supported values: "integer", "pid", "uid"' in said
    text = NOTHING.replace("__type(key, u32)", "__type(key, comm_t)")
    failed_on_nodes(
        "undecodable", healthy, of_c(text, outputs=outputs("pid")), "BadOutput", "decoder pid reads one number", "[16]"
    )


def test_an_output_of_a_map_that_is_not_there(healthy: str) -> None:
    outputs = [{"name": "counts", "from": {"map": "count"}, "counter": {}}]
    refused_in_status(
        "no-map", healthy, of_c(NOTHING, outputs=outputs), "spec.outputs[0].from.map", "Did you mean counts"
    )


# What the API server finds.


def test_two_kinds_at_once(healthy: str) -> None:
    spec = {"scope": "Cluster", "program": {"catalog": {"name": "syscount"}, "bcc": {"source": "BPF_HASH(a);"}}}
    said = kube.refused(kube.policy("two", healthy, spec))
    assert "spec.program" in said
    assert "more than one program: keep one of catalog bcc" in said
    check_healthy(healthy)


def test_a_source_of_two_megabytes(healthy: str) -> None:
    said = kube.refused(kube.policy("long", healthy, of_c("// long\n" * (1 << 18))), "--server-side")
    assert "Request entity too large" in said or "Too long: may not be more than 98304 bytes" in said, said[:2000]
    said = kube.refused(kube.policy("long", healthy, of_c("// long\n" * 12500)))
    assert "spec.program.c.source: Too long: may not be more than 98304 bytes" in said, said[-500:]
    check_healthy(healthy)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (of_bcc("BPF_HASH(a, u32);"), "may not use program.bcc in namespace"),
        ({"scope": "Cluster", "program": {"catalog": {"name": "syscount"}}}, "may not use scope Cluster in namespace"),
    ],
    ids=["a program of her own", "the whole cluster"],
)
def test_a_policy_by_someone_without_the_verb(healthy: str, spec: dict[str, Any], words: str) -> None:
    rights = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "ann", "namespace": healthy},
        "rules": [
            {
                "apiGroups": ["probefleet.io"],
                "resources": ["probepolicies"],
                "verbs": ["create", "get", "patch", "update", "delete"],
            }
        ],
    }
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "ann", "namespace": healthy},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "ann"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "ann"}],
    }
    kube.apply(rights, binding)
    said = kube.refused(kube.policy("hers", healthy, spec), "--as=ann")
    assert f"ann {words} {healthy}" in said
    assert "ask for a Role with the rule" in said
    # What she may, she may.
    kube.kubectl("apply", "--as=ann", "-f", "-", stdin=yaml.safe_dump(kube.policy("hers", healthy, HEALTHY)))
    kube.kubectl("delete", "ppol", "hers", "-n", healthy, "--as=ann", "--wait=false")
    check_healthy(healthy)
