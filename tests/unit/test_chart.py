"""The chart, rendered by helm: who may what, and what an agent is given. Schema errors are what a user would read."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_core.policy import parse_policy
from probefleet_operator import drain

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/probefleet"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "probefleet/cluster"


def helm() -> str:
    """helm on the PATH, or the one that the test cluster built."""
    found = shutil.which("helm") or next((str(path) for path in CACHE.glob("**/helm") if path.is_file()), None)
    if found is None:
        pytest.skip("no helm: install it, or run `tests/cluster/cluster build`")
    return found


@functools.cache
def render(*settings: str, chart: Path = CHART) -> list[dict[str, Any]]:
    arguments = [part for each in settings for part in ("--set", each)]
    done = subprocess.run(
        [helm(), "template", "p", str(chart), "-n", "system", "--kube-version", "1.34.0", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise ValueError(done.stderr)
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


def find(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def agent(*settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The agent's pod spec and its container."""
    spec = find(render(*settings), "DaemonSet", "probefleet-agent")["spec"]["template"]["spec"]
    return spec, spec["containers"][0]


def test_no_role_is_bound_to_agents() -> None:
    bound = {
        subject["name"]
        for each in render()
        if each["kind"] in ("RoleBinding", "ClusterRoleBinding")
        for subject in each["subjects"]
    }
    assert bound == {"probefleet-operator", "probefleet-drain"}


def test_agents_have_only_a_token_for_the_operator() -> None:
    spec, _ = agent()
    assert spec["automountServiceAccountToken"] is False
    sources = [source for volume in spec["volumes"] for source in volume.get("projected", {}).get("sources", ())]
    assert [source["serviceAccountToken"]["audience"] for source in sources] == ["probefleet-agent"]


def test_every_other_pod_is_restricted() -> None:
    pods = [
        each["spec"] if each["kind"] == "Pod" else each["spec"]["template"]["spec"]
        for each in render()
        if each["kind"] in ("Pod", "Job", "Deployment")
    ]
    assert len(pods) == 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_capabilities_mode_is_not_privileged_and_mounts_nothing_back() -> None:
    _, container = agent("agent.privileged=false")
    context = container["securityContext"]
    assert context["privileged"] is False
    assert context["capabilities"]["drop"] == ["ALL"]
    assert set(context["capabilities"]["add"]) == {
        "BPF", "PERFMON", "SYS_RESOURCE", "SYS_PTRACE", "DAC_READ_SEARCH", "SYSLOG",
    }  # fmt: skip
    assert all(mount.get("mountPropagation") != "Bidirectional" for mount in container["volumeMounts"])


def test_the_privileged_agent_shares_the_hosts_bpffs() -> None:
    _, container = agent()
    (bpffs,) = [mount for mount in container["volumeMounts"] if mount["name"] == "bpffs"]
    assert bpffs == {"name": "bpffs", "mountPath": "/sys/fs/bpf", "mountPropagation": "Bidirectional"}


def test_btf_files_of_the_node_are_mounted_where_the_agent_is_told() -> None:
    spec, container = agent("agent.btf.hostPath=/var/lib/btf")
    assert {"name": "btf", "hostPath": {"path": "/var/lib/btf", "type": "Directory"}} in spec["volumes"]
    assert {"name": "btf", "mountPath": "/etc/probefleet/btf", "readOnly": True} in container["volumeMounts"]
    assert {"name": "PROBEFLEET_BTF", "value": "/etc/probefleet/btf"} in container["env"]
    spec, container = agent()
    assert not any(each["name"] in ("btf", "PROBEFLEET_BTF") for each in [*spec["volumes"], *container["env"]])


def test_the_memory_limit_follows_the_budgets() -> None:
    _, container = agent("agent.memory.baseMiB=300", "agent.memory.policies=7", "agent.memory.mapMiBPerPolicy=11")
    assert container["resources"]["limits"]["memory"] == "377Mi"


def test_the_operator_may_touch_only_its_own_secret() -> None:
    objects = render()
    role = find(objects, "Role", "probefleet-operator")
    secrets = [rule for rule in role["rules"] if "secrets" in rule["resources"]]
    assert secrets == [
        {
            "apiGroups": [""],
            "resources": ["secrets"],
            "resourceNames": ["probefleet-authority"],
            "verbs": ["get", "patch"],
        }
    ]
    cluster = find(objects, "ClusterRole", "probefleet-operator")
    assert not any("secrets" in rule["resources"] or "*" in rule["resources"] for rule in cluster["rules"])


def test_programs_of_ones_own_come_with_no_built_in_role() -> None:
    for each in render():
        if each["kind"] != "ClusterRole":
            continue
        verbs = {verb for rule in each["rules"] for verb in rule["verbs"]}
        aggregated = any("aggregate-to" in label for label in each["metadata"]["labels"])
        assert not (aggregated and verbs & {"use-program", "use-cluster-scope"}), each["metadata"]["name"]


@pytest.mark.parametrize(("keep", "policy"), [("true", "keep"), ("false", None)])
def test_a_switch_keeps_the_kinds(keep: str, policy: str | None) -> None:
    kinds = [each for each in render(f"crds.keep={keep}") if each["kind"] == "CustomResourceDefinition"]
    assert len(kinds) == 3
    assert {(each["metadata"].get("annotations") or {}).get("helm.sh/resource-policy") for each in kinds} == {policy}


def test_a_disruption_budget_only_where_there_is_a_second_replica() -> None:
    assert not [each for each in render() if each["kind"] == "PodDisruptionBudget"]
    assert [each for each in render("operator.replicas=2") if each["kind"] == "PodDisruptionBudget"]


def test_network_policies_let_in_agents_and_out_to_the_operator_alone() -> None:
    objects = render()
    operator = find(objects, "NetworkPolicy", "probefleet-operator")["spec"]
    agents = find(objects, "NetworkPolicy", "probefleet-agent")["spec"]
    labels = {name: of_component(objects, name) for name in ("operator", "agent")}
    assert operator["podSelector"]["matchLabels"].items() <= labels["operator"].items()
    assert agents["podSelector"]["matchLabels"].items() <= labels["agent"].items()
    grpc = next(rule for rule in operator["ingress"] if {"port": "grpc", "protocol": "TCP"} in rule["ports"])
    (peer,) = grpc["from"]
    assert peer["podSelector"]["matchLabels"].items() <= labels["agent"].items()
    assert not peer["podSelector"]["matchLabels"].items() <= labels["operator"].items()
    assert (agents["policyTypes"], agents["ingress"]) == (["Ingress", "Egress"], []), "nobody calls an agent"
    assert [rule["ports"][0]["port"] for rule in agents["egress"]] == [8443, 53], "the operator, and DNS"
    assert agents["egress"][0]["to"][0]["podSelector"]["matchLabels"].items() <= labels["operator"].items()
    assert not [each for each in render("networkPolicy.enabled=false") if each["kind"] == "NetworkPolicy"]


def of_component(objects: list[dict[str, Any]], name: str) -> dict[str, str]:
    """The labels of the operator's or the agents' pods."""
    kind = {"operator": "Deployment", "agent": "DaemonSet"}[name]
    labels: dict[str, str] = find(objects, kind, f"probefleet-{name}")["spec"]["template"]["metadata"]["labels"]
    return labels


def test_agents_run_everywhere_and_are_the_last_to_go() -> None:
    spec, _ = agent()
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["priorityClassName"] == "system-node-critical"
    objects = render("priorityClass.create=true", "priorityClass.name=ours", "priorityClass.value=997")
    assert find(objects, "PriorityClass", "ours")["value"] == 997
    pods = [find(objects, *each)["spec"]["template"]["spec"] for each in WORKLOADS]
    assert [pod["priorityClassName"] for pod in pods] == ["ours", "ours"]


WORKLOADS = (("Deployment", "probefleet-operator"), ("DaemonSet", "probefleet-agent"))


def test_the_notes_say_the_next_three_commands(tmp_path: Path) -> None:
    """helm renders notes for a cluster only: here they are a text within an object of the chart's."""
    chart = shutil.copytree(CHART, tmp_path / "chart")
    lines = (chart / "templates/NOTES.txt").read_text().splitlines()
    text = "kind: Notes\nmetadata: {name: notes}\ntext: |\n" + "".join(f"  {line}\n" for line in lines)
    (chart / "templates/notes.yaml").write_text(text)
    notes = find(render(chart=chart), "Notes", "notes")["text"]
    commands = [line.strip() for line in notes.splitlines() if re.match(r"\s+(helm|kubectl) ", line)]
    assert commands == [
        "helm test p --namespace system --logs",
        "kubectl apply --namespace default -f - <<'YAML'",
        "kubectl get probepolicies,probereports --namespace default",
    ]
    (policy,) = yaml.safe_load_all(notes.partition("<<'YAML'")[2].partition("YAML")[0])
    assert parse_policy(policy).name == "syscalls"


def test_helm_test_has_logs_to_show_and_uninstalling_takes_its_pod_away() -> None:
    """`helm test --logs` reads the logs of a pod of each test hook's name, after the hooks."""
    objects = render()
    (test,) = [each for each in objects if each["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
    assert test["kind"] == "Pod" and test["spec"]["automountServiceAccountToken"] is False
    assert test["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation"
    (rule,) = find(objects, "Role", "probefleet-drain")["rules"]
    assert (rule["resources"], rule["verbs"]) == (["pods"], ["delete"])
    assert rule["resourceNames"] == [test["metadata"]["name"]] == [drain.TEST_POD]
    assert find(objects, "RoleBinding", "probefleet-drain")["metadata"]["namespace"] == "system"
    (job,) = find(objects, "Job", "probefleet-drain")["spec"]["template"]["spec"]["containers"]
    assert "--namespace=system" in job["args"]


@pytest.mark.parametrize("setting", ["operator.replica=2", "agent.cgroupRoot=here", "operator.logLevel=loud"])
def test_values_that_mean_nothing_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=setting.split(".")[0]):
        render(setting)


def test_every_value_is_in_the_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    for name, value in values.items():
        assert set(value) == set(schema["properties"][name]["properties"]), name
