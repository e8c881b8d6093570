"""The scripts of Debian's bpftrace as policies: the text as it is. Called by ``run``."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

PACKAGE = "bpftrace"


def scripts() -> list[Path]:
    """The package's own."""
    listed = subprocess.run(["dpkg", "-L", PACKAGE], check=True, capture_output=True, text=True).stdout.split()
    return sorted(Path(each) for each in listed if each.endswith(".bt"))


def policy(path: Path) -> dict[str, Any]:
    """A user would write it down so."""
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": f"bpftrace-{path.stem}", "namespace": "default"},
        "spec": {"scope": "Cluster", "program": {"bpftrace": {"script": path.read_text()}}, "interval": "1s"},
    }
