"""What the end-to-end tests say to a real API server: through kubectl and helm, as a user does; and how they wait.

Who waits reads an object several times a second, and that without kubectl: it takes 150 ms of a CPU to start.
"""

from __future__ import annotations

import functools
import http
import json
import os
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import kubernetes
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = "probefleet-system"
TEST_IMAGE = os.environ.get("PROBEFLEET_TEST_IMAGE", "localhost/probefleet-test:dev")
VALUES = Path(os.environ.get("PROBEFLEET_TEST_VALUES", ROOT / "tests/e2e/values.yaml"))
T = TypeVar("T")


def run(*command: str, stdin: str = "", check: bool = True, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """A command, its output as text; a failure shows what it said."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def kubectl(*arguments: str, stdin: str = "", check: bool = True, seconds: float = 120) -> str:
    """What kubectl prints."""
    return run("kubectl", *arguments, stdin=stdin, check=check, seconds=seconds).stdout


def apply(*manifests: Mapping[str, Any]) -> None:
    """kubectl apply."""
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests))


def refused(manifest: Mapping[str, Any], *arguments: str) -> str:
    """kubectl apply, which must fail: what it says."""
    done = run("kubectl", "apply", "-f", "-", *arguments, stdin=yaml.safe_dump(dict(manifest)), check=False)
    assert done.returncode, f"accepted: {done.stdout}"
    return done.stderr


#: Where the API server has the kinds that tests read.
_RESOURCES = {
    "configmap": ("/api/v1", "configmaps"),
    "lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "node": ("/api/v1", "nodes"),
    "pod": ("/api/v1", "pods"),
    "probemap": ("/apis/probefleet.io/v1alpha1", "probemaps"),
    "probepolicy": ("/apis/probefleet.io/v1alpha1", "probepolicies"),
    "probereport": ("/apis/probefleet.io/v1alpha1", "probereports"),
    "serviceaccount": ("/api/v1", "serviceaccounts"),
}


@functools.cache
def _client() -> kubernetes.client.ApiClient:
    return kubernetes.config.new_client_from_config()


def raw(path: str) -> str:
    """What `kubectl get --raw` prints; "" where there is no such thing."""
    client = _client()
    request = client.param_serialize("GET", path, auth_settings=["BearerToken"])
    response = client.call_api(*request, _request_timeout=60)
    text = str(response.read().decode())
    if response.status == http.HTTPStatus.NOT_FOUND:
        return ""
    assert response.status == http.HTTPStatus.OK, f"{path}: {response.status} {text}"
    return text


def get(kind: str, name: str, namespace: str = "") -> dict[str, Any]:
    """One object, {} where there is none, nor a name to ask for."""
    if not name:
        return {}
    group, plural = _RESOURCES[kind]
    place = f"{group}/namespaces/{namespace}" if namespace else group
    found: dict[str, Any] = json.loads(raw(f"{place}/{plural}/{name}") or "{}")
    return found


def pods(namespace: str, selector: str) -> list[dict[str, Any]]:
    """The pods with these labels."""
    path = f"/api/v1/namespaces/{namespace}/pods?labelSelector={urllib.parse.quote(selector)}"
    found: list[dict[str, Any]] = json.loads(raw(path))["items"]
    return found


def eventually(question: Callable[[], T | None], what: str, *, seconds: float = 60) -> T:
    """The first answer that is not empty; asked again and again, since not every question has an event to wait for."""
    ends = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > ends:
            raise AssertionError(f"waited {seconds:.0f} s in vain for: {what}")
        time.sleep(0.25)


def policy(name: str, namespace: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """A ProbePolicy."""
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": dict(spec),
    }


def pod(
    name: str,
    namespace: str,
    command: Sequence[str],
    *,
    node: str = "",
    labels: Mapping[str, str] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A pod of the test image that runs one command once."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels or {"app": name})},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "nodeSelector": {"kubernetes.io/hostname": node} if node else {},
            "containers": [
                {
                    "name": "main",
                    "image": TEST_IMAGE,
                    "imagePullPolicy": "IfNotPresent",
                    "command": list(command),
                    "stdin": True,
                }
            ],
            **spec,
        },
    }


def wait_programmed(name: str, namespace: str, *, seconds: int = 60) -> dict[str, Any]:
    """Wait as a user would, with kubectl wait; the policy."""
    kubectl(
        "wait",
        f"probepolicy/{name}",
        "-n",
        namespace,
        "--for=condition=Programmed",
        f"--timeout={seconds}s",
        seconds=seconds + 10,
    )
    return get("probepolicy", name, namespace)


def report(name: str, namespace: str) -> dict[str, Any]:
    """The report's status, {} while there is none."""
    found: dict[str, Any] = get("probereport", name, namespace).get("status", {})
    return found


def totals(status: Mapping[str, Any], output: str) -> dict[tuple[str, ...], int]:
    """Total value by key of one output."""
    for each in status.get("outputs", []):
        if each["name"] == output:
            rows = {tuple(row["key"]): int(row["value"]) for row in each["total"].get("rows", [])}
            if int((each["total"].get("other") or {}).get("value", 0)):
                rows["(other)",] = int(each["total"]["other"]["value"])
            return rows
    return {}


def metric(name: str, **labels: str) -> float:
    """A sample of the operator's /metrics, read as Prometheus would, through the API server; 0 where there is none."""
    path = f"/api/v1/namespaces/{SYSTEM}/services/probefleet-operator:http/proxy/metrics"
    text = raw(path)
    assert text, f"nothing at {path}"
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    return 0.0


def events_of(status: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of its output of events, {} while there is none."""
    return next((each.get("events", {}) for each in status.get("outputs", []) if each["kind"] == "events"), {})
