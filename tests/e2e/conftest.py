"""Probefleet on a real cluster, installed by helm as a user does. Skips nothing: without a cluster these tests fail.

Tests run beside each other, in namespaces of their own. Those marked `quiet` are disturbed by such a load, and follow;
those marked `alone` disturb the release or the cluster: `make test-e2e` runs them last, one by one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import kube

#: On the namespace of the release: the images that its pods have.
IMAGES = "test.probefleet.io/images"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> str:
    """The chart, installed or upgraded to this tree's images; the system namespace. It stays for the next run."""
    assert os.environ.get("KUBECONFIG"), (
        "no cluster: run these as `make test-e2e` (it makes one), or name yours by KUBECONFIG"
    )
    if os.environ.get("PROBEFLEET_TEST_INSTALLED"):
        return kube.SYSTEM  # while writing tests: what runs is taken as it is
    # One of the workers of a run installs it, the others wait for it.
    done = tmp_path_factory.getbasetemp().parent / f"installed-{testrun_uid}"
    with done.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            _install()
            done.touch()
    return kube.SYSTEM


def _install() -> None:
    there = json.loads(kube.raw(f"/api/v1/namespaces/{kube.SYSTEM}") or "{}")
    kube.run(
        "helm", "upgrade", "--install", "probefleet", str(kube.ROOT / "charts/probefleet"), "--namespace", kube.SYSTEM,
        "--create-namespace", "--values", str(kube.VALUES), "--wait", "--timeout", "3m", seconds=200,
    )  # fmt: skip
    images = _images()
    if there and (not images or there["metadata"].get("annotations", {}).get(IMAGES) != images):
        # They carry one tag: after a rebuild the pods have to be replaced.
        kube.kubectl("-n", kube.SYSTEM, "rollout", "restart", "deployment,daemonset")
    for each in kube.kubectl("-n", kube.SYSTEM, "get", "deployment,daemonset", "-o", "name").split():
        kube.kubectl("-n", kube.SYSTEM, "rollout", "status", each, "--timeout=120s", seconds=130)
    kube.kubectl("annotate", "namespace", kube.SYSTEM, f"{IMAGES}={images}", "--overwrite")


def _images() -> str:
    """Which ones were built last; "" where they come from elsewhere."""
    elsewhere = "PROBEFLEET_TEST_VALUES" in os.environ
    built = [] if elsewhere else sorted((kube.ROOT / "build/images").glob("*.inputs"))
    return hashlib.sha256("".join(path.read_text() for path in built).encode()).hexdigest() if built else ""


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Path:
    """kubectl finds its plugins on PATH."""
    folder = kube.ROOT / ".venv/bin"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@contextlib.contextmanager
def new_namespace(prefix: str) -> Iterator[str]:
    """A namespace while it lasts; its policies are gone before it is."""
    name = f"{prefix}-{uuid.uuid4().hex[:6]}"
    kube.kubectl("create", "namespace", name)
    yield name
    kube.kubectl("delete", "probepolicy", "--all", "-n", name, "--wait=true", seconds=60)
    kube.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def namespace(installed: str) -> Iterator[str]:
    """A namespace of the test's own."""
    with new_namespace("shop") as name:
        yield name


@pytest.fixture
def other_namespace(installed: str) -> Iterator[str]:
    """Another one, whose pods must not count."""
    with new_namespace("other") as name:
        yield name


@pytest.fixture
def scripts_namespace(installed: str) -> Iterator[str]:
    """A third one, whose pods are neither counted nor recorded."""
    with new_namespace("scripts") as name:
        yield name
