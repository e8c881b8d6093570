"""`kubectl probefleet` as a user has it who is no administrator: by the roles of the chart, through the API server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import kube

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

RUN = ("run", "syscount", "--set", "syscalls=sched_get_priority_max", "-o", "json")


def kubeconfig_of(account: str, namespace: str, folder: Path) -> Path:
    """A kubeconfig with this cluster's address and a ServiceAccount's token, and nothing else."""
    config = yaml.safe_load(kube.kubectl("config", "view", "--raw", "--flatten", "-o", "yaml"))
    token = kube.kubectl("create", "token", account, "-n", namespace).strip()
    cluster = config["clusters"][0]
    context = {"cluster": cluster["name"], "user": account, "namespace": namespace}
    path = folder / f"{account}.kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [cluster],
                "users": [{"name": account, "user": {"token": token}}],
                "contexts": [{"name": account, "context": context}],
                "current-context": account,
            }
        )
    )
    return path


def bind(name: str, namespace: str, cluster_role: str, account: str, of: str) -> dict[str, Any]:
    """A RoleBinding of a ClusterRole to a ServiceAccount."""
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": name, "namespace": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": cluster_role},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": of}],
    }


@pytest.fixture
def developer(namespace: str, plugin: Path, tmp_path: Path) -> Iterator[Path]:
    """Who may edit her namespace, and ask the operator."""
    kube.kubectl("create", "serviceaccount", "ann", "-n", namespace)
    query = f"ann-{namespace}"
    kube.apply(
        bind("ann", namespace, "edit", "ann", namespace),
        bind(query, kube.SYSTEM, "probefleet-query", "ann", namespace),
    )
    yield kubeconfig_of("ann", namespace, tmp_path)
    kube.kubectl("delete", "rolebinding", query, "-n", kube.SYSTEM)


def policies(namespace: str) -> list[str]:
    return kube.kubectl("get", "ppol", "-n", namespace, "-o", "name").split()


def test_a_developer_runs_a_probe_on_her_namespace_and_ctrl_c_deletes_it(namespace: str, developer: Path) -> None:
    environment = {**os.environ, "KUBECONFIG": str(developer)}
    kube.apply(kube.pod("web", namespace, ["calls", "rare", "997", "--hold"], node="node1", labels={"app": "web"}))
    kube.apply(kube.pod("cart", namespace, ["calls", "rare", "23", "--hold"], node="node2", labels={"app": "cart"}))
    kube.kubectl("wait", "pod/web", "pod/cart", "-n", namespace, "--for=condition=Ready", "--timeout=60s")
    command = ["kubectl", "probefleet", *RUN, "-l", "app=web"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        (policy,) = kube.eventually(lambda: policies(namespace), "the policy of the run")
        name = policy.partition("/")[2]
        spec = kube.get("probepolicy", name, namespace)["spec"]
        assert spec["ttl"] == "600s", "where the plugin is killed, the cluster ends it"
        kube.wait_programmed(name, namespace)
        for pod in ("web", "cart"):
            kube.kubectl("attach", "-i", pod, "-n", namespace, stdin="go")
        # What the report has, the plugin has: it asks once more when it ends.
        kube.eventually(
            lambda: 997 in kube.totals(kube.report(name, namespace), "calls").values(), "997 calls in the report"
        )
        run.send_signal(signal.SIGINT)
        said, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    report = json.loads(said)
    output = next(each for each in report["status"]["outputs"] if each["name"] == "calls")
    assert {tuple(row["key"]): int(row["value"]) for row in output["total"]["rows"]} == {
        ("web", "sched_get_priority_max"): 997
    }
    assert report["status"]["columns"]["coverage"] == "3/3"
    assert policies(namespace) == []
    kube.eventually(lambda: not kube.report(name, namespace), "the end of the report", seconds=20)


def test_she_may_not_measure_what_is_not_hers(namespace: str, other_namespace: str, developer: Path) -> None:
    def said(*words: str) -> str:
        command = ("kubectl", "probefleet", *words, "--kubeconfig", str(developer))
        done = kube.run(*command, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr

    assert "It takes the verb create on probepolicies.probefleet.io in this namespace" in said(
        *RUN, "--for", "1s", "-n", other_namespace
    )
    assert "may not use scope Cluster in namespace" in said(*RUN, "--for", "1s", "--cluster-scope")
    # Nor read another namespace's policy, though she may ask the operator: the token is in the report.
    kube.apply(kube.policy("theirs", other_namespace, {"program": {"catalog": {"name": "execsnoop"}}}))
    assert "cannot get resource" in said("events", "theirs", "-n", other_namespace)
    kube.kubectl("delete", "ppol", "theirs", "-n", other_namespace)


def test_without_the_role_for_queries_the_stored_report_is_shown_and_events_say_what_is_missing(
    namespace: str, plugin: Path, tmp_path: Path
) -> None:
    kube.kubectl("create", "serviceaccount", "bob", "-n", namespace)
    kube.apply(bind("bob", namespace, "edit", "bob", namespace))
    config = kubeconfig_of("bob", namespace, tmp_path)
    kube.apply(kube.policy("execs", namespace, {"program": {"catalog": {"name": "execsnoop"}}, "interval": "1s"}))
    kube.wait_programmed("execs", namespace)
    kube.eventually(lambda: kube.report("execs", namespace).get("query", {}).get("token"), "a report with its token")
    command = ("kubectl", "probefleet", "events", "execs", "--follow", "--kubeconfig", str(config))
    done = kube.run(*command, check=False)
    assert done.returncode == 1
    assert "It takes the verb get on services/proxy in the operator's namespace" in done.stderr
