"""The chart's resources on a real API server: what it takes, what it says to what it does not take, and who may.

Golden texts lie in tests/golden: `messages/<case>.kubectl.txt` and `explain/<field>.txt`; PROBEFLEET_GOLDEN=write
writes them anew. Needs kube-apiserver, kubectl and etcd (see tests/fakes/control_plane.py), no node.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import control_plane

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden"
EXPLAINED = ["ppol.spec", "ppol.spec.program", "ppol.spec.outputs", "ppol.spec.attach", "prep.status", "pmap.spec"]


class Cluster:
    """kubectl against the test's own API server."""

    def __init__(self, running: control_plane.ControlPlane) -> None:
        self._running = running

    def kubectl(self, *arguments: str, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self._running.bin / "kubectl"), f"--kubeconfig={self._running.kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            raise AssertionError(done.stderr)
        return done

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json").stdout)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = control_plane.binaries()
    assert found, "kube-apiserver and kubectl are missing: run tests/cluster/cluster once, or set PROBEFLEET_KUBE_BIN"
    running = control_plane.ControlPlane(folder=tmp_path_factory.mktemp("api"), bin=found)
    running.start()
    try:
        cluster = Cluster(running)
        cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "charts/probefleet/files/crds"))
        cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        template = (ROOT / "charts/probefleet/templates/admission.yaml").read_text()
        # The template's few words by hand: so this needs no helm.
        text = re.sub(r"\{\{-? ?/\*.*?\*/ ?-?\}\}|\{\{- .*?\}\}", "", template, flags=re.DOTALL)
        cluster.kubectl("apply", "-f", "-", stdin=re.sub(r"\{\{.*?\}\}", "test", text))
        for name in ("view", "admin"):
            cluster.kubectl("create", "namespace", name)
        yield cluster
    finally:
        running.stop()


def compare(text: str, golden: Path) -> None:
    if os.environ.get("PROBEFLEET_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()


OURS = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if "probefleet.io" in path.read_text()]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_examples_are_taken(cluster: Cluster, path: Path) -> None:
    cluster.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(path))


@pytest.mark.parametrize("path", sorted((GOLDEN / "messages").glob("*.yaml")), ids=lambda path: path.stem)
def test_mistakes_are_answered_with_what_to_write(cluster: Cluster, path: Path) -> None:
    done = cluster.kubectl("apply", "--validate=strict", "-f", "-", stdin=path.read_text(), check=False)
    assert done.returncode == 1
    # The API server lists what it found in no certain order.
    first, *rest = done.stderr.replace('"STDIN"', '"policy.yaml"').splitlines(keepends=True)
    compare("".join([first, *sorted(rest)]), path.with_suffix(".kubectl.txt"))


@pytest.mark.parametrize("field", EXPLAINED)
def test_explain_reads_like_documentation(cluster: Cluster, field: str) -> None:
    compare(cluster.kubectl("explain", field).stdout, GOLDEN / "explain" / f"{field}.txt")


def test_defaults_are_filled_in_and_status_is_its_own(cluster: Cluster) -> None:
    text = policy("defaults")
    cluster.kubectl("apply", "-f", "-", stdin=text)
    spec = cluster.get("ppol", "defaults")["spec"]
    assert (spec["scope"], spec["interval"], spec["suspend"]) == ("Namespace", "10s", False)
    assert spec["budget"] == {"cpu": "100m", "mapMemory": "32Mi"}
    status = {
        "conditions": [condition("Ready")],
        "columns": {"program": "catalog/x", "nodes": "1/1", "status": "Ready"},
    }
    cluster.kubectl(
        *("patch", "ppol", "defaults", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    )
    cluster.kubectl("wait", "--for=condition=Ready", "ppol/defaults", "--timeout=5s")
    shown = cluster.kubectl("get", "probefleet").stdout
    assert shown.splitlines()[0].split() == ["NAME", "PROGRAM", "NODES", "RATE", "OVERHEAD", "STATUS", "AGE"]
    assert "catalog/x" in shown


def test_a_probe_map_in_use_keeps_its_layout_and_grows(cluster: Cluster) -> None:
    def apply(name: str, kind: str, entries: int, rest: str) -> str:
        spec = f"{{type: {kind}, maxEntries: {entries}, {rest}}}"
        text = f"apiVersion: probefleet.io/v1alpha1\nkind: ProbeMap\nmetadata: {{name: {name}}}\nspec: {spec}\n"
        return str(cluster.kubectl("apply", "-f", "-", stdin=text, check=False).stderr)

    assert apply("fixed", "hash", 16, "key: u32 pid, value: u64 n") == ""
    assert apply("fixed", "hash", 16, "key: u32 pid, value: u64 n, policies: [other]") == ""
    assert "delete the ProbeMap and create it anew" in apply("fixed", "hash", 16, "key: u64 pid, value: u64 n")
    assert "cannot change its type, key or value" in apply("fixed", "lru-hash", 32, "key: u32 pid, value: u64 n")
    assert apply("fixed", "hash", 32, "key: u32 pid, value: u64 n") == ""
    assert "a map that programs use cannot shrink" in apply("fixed", "hash", 31, "key: u32 pid, value: u64 n")
    assert apply("ring", "queue", 16, "value: u64 n") == ""
    assert "a map of type queue cannot grow" in apply("ring", "queue", 32, "value: u64 n")


def condition(kind: str) -> dict[str, str]:
    return {"type": kind, "status": "True", "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}


def policy(name: str, program: str = "catalog: {name: x}", scope: str = "Namespace", **labels: str) -> str:
    return (
        "apiVersion: probefleet.io/v1alpha1\nkind: ProbePolicy\n"
        f"metadata: {{name: {name}, labels: {json.dumps(labels)}}}\n"
        f"spec: {{scope: {scope}, program: {{{program}}}}}\n"
    )


# Who may.

BCC = 'bcc: {source: "BPF_HASH(a, u32);"}'


@pytest.fixture(scope="module")
def users(cluster: Cluster) -> Cluster:
    """ann may apply policies, and nothing more; bob may see the whole cluster; eve may run programs of her own, too."""
    rules = {
        "ann": "create,get,patch,update",
        "bob": "create,get,patch,update,use-cluster-scope",
        "eve": "create,get,patch,update,use-cluster-scope,use-program",
    }
    for user, verbs in rules.items():
        resource = ["--resource=probepolicies.probefleet.io", "-n", "view"]
        text = cluster.kubectl(
            *("create", "role", user, f"--verb={verbs}", *resource, "--dry-run=client", "-o", "yaml")
        ).stdout
        cluster.kubectl("apply", "-f", "-", stdin=text)
        cluster.kubectl("create", "rolebinding", user, f"--role={user}", f"--user={user}", "-n", "view")
    return cluster


def apply(cluster: Cluster, user: str, text: str, *more: str) -> str:
    """What kubectl says to that user: an empty text where it was taken."""
    arguments = ("apply", "-n", "view", f"--as={user}", "-f", "-", *more)
    return cluster.kubectl(*arguments, stdin=text, check=False).stderr


def test_catalog_probes_need_no_more_than_create(users: Cluster) -> None:
    assert apply(users, "ann", policy("plain")) == ""


def test_scope_cluster_needs_its_verb(users: Cluster) -> None:
    said = apply(users, "ann", policy("wide", scope="Cluster"))
    compare(said, GOLDEN / "messages/verb-cluster-scope.kubectl.txt")
    assert apply(users, "bob", policy("wide", scope="Cluster")) == ""


def test_own_programs_need_their_verb(users: Cluster) -> None:
    said = apply(users, "bob", policy("mine", BCC, scope="Cluster"))
    compare(said, GOLDEN / "messages/verb-program.kubectl.txt")
    assert apply(users, "eve", policy("mine", BCC, scope="Cluster")) == ""


def test_verbs_are_asked_when_the_spec_changes_and_only_then(users: Cluster) -> None:
    assert apply(users, "eve", policy("theirs", BCC, scope="Cluster")) == ""
    labelled = policy("theirs", BCC, scope="Cluster", team="a")
    assert apply(users, "ann", labelled, "--server-side", "--force-conflicts") == "", "a label is no change of the spec"
    changed = policy("theirs", BCC.replace("u32", "u64"), scope="Cluster")
    assert "may not use program.bcc" in apply(users, "ann", changed)
    assert apply(users, "ann", policy("grows")) == ""
    assert "may not use scope Cluster" in apply(users, "ann", policy("grows", scope="Cluster"))
