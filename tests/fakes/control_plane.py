"""A real etcd and a real kube-apiserver on loopback, in a temporary folder: for tests of what needs real semantics.

Real: everything that the API server itself does (storage, watches, server-side apply, CRD validation and pruning,
TokenRequest and TokenReview, RBAC, admission). Not here: controllers, so nothing is garbage-collected and no
ServiceAccount comes by itself; a scheduler; kubelets, so no pod runs and nodes stay as the test writes them.

The binaries are those of tests/cluster (`kube-apiserver`, `kubectl`) and Debian's `etcd`; PROBEFLEET_KUBE_BIN names
another folder.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AUDIENCE = "probefleet-agent"


def binaries() -> Path | None:
    """The folder with kube-apiserver and kubectl, or None."""
    given = os.environ.get("PROBEFLEET_KUBE_BIN")
    caches = [Path(given)] if given else sorted(Path.home().glob(".cache/probe*/**/kube-apiserver"), reverse=True)
    for found in caches:
        folder = found if found.is_dir() else found.parent
        if (folder / "kube-apiserver").exists():
            return folder
    return None


def free_port() -> int:
    """A TCP port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_pki(folder: Path) -> None:
    """A CA, the API server's certificate, an administrator's, and the key of ServiceAccount tokens."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *curve, "-days", "2", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test")
    for name, subject in (("server", "/CN=kube-apiserver"), ("admin", "/O=system:masters/CN=admin")):
        (folder / f"{name}.ext").write_text(
            "subjectAltName=DNS:localhost,DNS:kubernetes.default.svc,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth"
        )
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "2", "-out", f"{name}.crt", "-extfile", f"{name}.ext"),
        )
    openssl("genrsa", "-out", "sa.key", "2048")


@dataclass
class ControlPlane:
    """The pair of processes. `stop_api`/`start_api` make the API server go away and come back with all its data."""

    folder: Path
    bin: Path
    etcd_port: int = field(default_factory=free_port)
    api_port: int = field(default_factory=free_port)
    etcd: subprocess.Popen[bytes] | None = None
    api: subprocess.Popen[bytes] | None = None

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self.api_port}"

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "admin.kubeconfig"

    def start(self) -> None:
        make_pki(self.folder)
        peer = free_port()
        with (self.folder / "etcd.log").open("wb") as log:
            self.etcd = subprocess.Popen(
                [
                    shutil.which("etcd") or "/usr/bin/etcd",
                    f"--data-dir={self.folder / 'etcd'}",
                    f"--listen-client-urls=http://127.0.0.1:{self.etcd_port}",
                    f"--advertise-client-urls=http://127.0.0.1:{self.etcd_port}",
                    f"--listen-peer-urls=http://127.0.0.1:{peer}",
                    f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
                    f"--initial-cluster=default=http://127.0.0.1:{peer}",
                    "--unsafe-no-fsync",
                ],
                stdout=log,
                stderr=log,
            )
        self.start_api()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [
                {
                    "name": "c",
                    "cluster": {"server": self.server, "certificate-authority": str(self.folder / "ca.crt")},
                }
            ],
            "users": [
                {
                    "name": "u",
                    "user": {
                        "client-certificate": str(self.folder / "admin.crt"),
                        "client-key": str(self.folder / "admin.key"),
                    },
                }
            ],
        }
        self.kubeconfig.write_text(json.dumps(config))

    def start_api(self) -> None:
        with (self.folder / "apiserver.log").open("ab") as log:
            self.api = subprocess.Popen(
                [
                    str(self.bin / "kube-apiserver"),
                    f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
                    f"--secure-port={self.api_port}",
                    "--bind-address=127.0.0.1",
                    "--advertise-address=127.0.0.1",
                    f"--client-ca-file={self.folder / 'ca.crt'}",
                    f"--tls-cert-file={self.folder / 'server.crt'}",
                    f"--tls-private-key-file={self.folder / 'server.key'}",
                    f"--service-account-key-file={self.folder / 'sa.key'}",
                    f"--service-account-signing-key-file={self.folder / 'sa.key'}",
                    "--service-account-issuer=https://kubernetes.default.svc",
                    "--service-cluster-ip-range=10.96.0.0/16",
                    "--authorization-mode=RBAC",
                    "--endpoint-reconciler-type=none",
                ],
                stdout=log,
                stderr=log,
            )
        self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.request("GET", "/readyz")
                return
            except (OSError, urllib.error.URLError) as problem:
                assert self.api is not None
                if self.api.poll() is not None or time.monotonic() > deadline:
                    tail = (self.folder / "apiserver.log").read_text()[-3000:]
                    raise RuntimeError(f"kube-apiserver did not start: {problem}\n{tail}") from problem
                time.sleep(0.1)  # there is no event to wait for: it has no way to say that it listens

    def stop_api(self) -> None:
        _end(self.api)
        self.api = None

    def stop(self) -> None:
        self.stop_api()
        _end(self.etcd)
        self.etcd = None

    def request(
        self, method: str, path: str, body: Any = None, *, content_type: str = "application/json"
    ) -> dict[str, Any]:
        """One request as administrator; raises urllib's HTTPError."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        context.load_cert_chain(self.folder / "admin.crt", self.folder / "admin.key")
        request = urllib.request.Request(
            self.server + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": content_type},
        )
        with urllib.request.urlopen(request, context=context, timeout=10) as response:
            data = response.read()
            return json.loads(data) if data.startswith(b"{") else {"text": data.decode()}

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        """kubectl as administrator; raises CalledProcessError with its output."""
        done = subprocess.run(
            [str(self.bin / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def create(self, path: str, body: Any) -> dict[str, Any]:
        """Create an object, or take the one that is there."""
        try:
            return self.request("POST", path, body)
        except urllib.error.HTTPError as problem:
            if problem.code != 409:
                raise AssertionError(problem.read().decode()) from problem
            return self.request("GET", f"{path}/{body['metadata']['name']}")

    def add_node(self, name: str, *, ready: bool = True, labels: dict[str, str] | None = None) -> None:
        node = {"metadata": {"name": name, "labels": {"kubernetes.io/os": "linux", **(labels or {})}}}
        self.create("/api/v1/nodes", node)
        self.request(
            "PATCH",
            f"/api/v1/nodes/{name}/status",
            {"status": {"conditions": [{"type": "Ready", "status": "True" if ready else "False", "reason": "Test"}]}},
            content_type="application/strategic-merge-patch+json",
        )

    def add_pod(
        self,
        namespace: str,
        name: str,
        node: str,
        *,
        account: str = "default",
        labels: dict[str, str] | None = None,
        owner: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A pod bound to a node; nothing runs it."""
        self.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        self.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": account}})
        metadata: dict[str, Any] = {"name": name, "labels": labels or {}}
        if owner:
            metadata["ownerReferences"] = [{"controller": True, "apiVersion": "apps/v1", **owner}]
        return self.create(
            f"/api/v1/namespaces/{namespace}/pods",
            {
                "metadata": metadata,
                "spec": {
                    "nodeName": node,
                    "serviceAccountName": account,
                    "automountServiceAccountToken": False,
                    "containers": [{"name": "main", "image": "none"}],
                },
            },
        )

    def agent_token(
        self, namespace: str, node: str, *, account: str = "probefleet-agent", audience: str = AUDIENCE
    ) -> str:
        """A token as the kubelet would project it into the agent's pod on a node."""
        pod = self.add_pod(namespace, f"agent-{account}-{node}", node, account=account)
        review = self.request(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenRequest",
                "spec": {
                    "audiences": [audience],
                    "boundObjectRef": {
                        "apiVersion": "v1",
                        "kind": "Pod",
                        "name": pod["metadata"]["name"],
                        "uid": pod["metadata"]["uid"],
                    },
                },
            },
        )
        return str(review["status"]["token"])

    def install_crds(self, folder: Path) -> None:
        """The CRDs of the chart, from charts/probefleet/files/crds."""
        self.kubectl("apply", "--server-side", "-f", str(folder))
        for plural in ("probepolicies", "probereports", "probemaps"):
            self.kubectl("wait", "--for=condition=Established", f"crd/{plural}.probefleet.io", "--timeout=20s")
        deadline = time.monotonic() + 30
        while "probepolicies" not in self.kubectl("api-resources", "--api-group=probefleet.io", "--cached=false"):
            if time.monotonic() > deadline:
                raise RuntimeError("the API server established the CRDs and does not list them")
            time.sleep(0.1)  # established comes before discovery, which tells nobody when it is done

    def ca_bundle(self, namespace: str, name: str = "probefleet-ca") -> bytes:
        """What agents would mount."""
        found = self.request("GET", f"/api/v1/namespaces/{namespace}/configmaps/{name}")
        return str(found["data"]["ca.crt"]).encode()

    def secret(self, namespace: str, name: str) -> dict[str, bytes]:
        found = self.request("GET", f"/api/v1/namespaces/{namespace}/secrets/{name}")
        return {key: base64.b64decode(value) for key, value in found["data"].items()}


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is None:
        return
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[ControlPlane]:
    """A control plane for the time of a `with`."""
    found = binaries()
    if found is None:
        raise RuntimeError(
            "no kube-apiserver: build the cluster's binaries (make cluster-build) or set PROBEFLEET_KUBE_BIN"
        )
    plane = ControlPlane(folder, found)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()
