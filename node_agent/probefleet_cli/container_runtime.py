"""The machine's container runtime, asked which pods are here: namespace, name, uid, labels, containers' names.

It is the socket that the kubelet uses and crictl asks, so it takes root, but no credential of Kubernetes. Here it is
looked for; ``cri_client`` asks it, and is imported where there is one: gRPC takes longer to import than a machine
without pods takes to load its programs. ``pod_watch`` asks once a second while a run lasts, ``local_pods`` makes names
and choices of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probefleet_cli.failures import BadInput

if TYPE_CHECKING:
    from probefleet_cli.cri_client import Runtime

#: Where containerd, k3s' containerd, CRI-O and Docker's cri-dockerd listen.
WELL_KNOWN = (
    Path("/run/containerd/containerd.sock"),
    Path("/run/k3s/containerd/containerd.sock"),
    Path("/run/crio/crio.sock"),
    Path("/var/run/cri-dockerd.sock"),
)
#: crictl's own bound of an answer. A pod takes about a kilobyte of it.
MAX_ANSWER_BYTES = 16 << 20
ANSWER_SECONDS = 5.0


class NoRuntime(Exception):
    """No container runtime answers. ``tried``: each socket, and what became of it."""

    def __init__(self, tried: Sequence[tuple[Path, str]]) -> None:
        super().__init__("\n".join(f"  {path}: {why}" for path, why in tried))
        self.tried = tuple(tried)


class NoAnswer(Exception):
    """The runtime did not answer, or not in a way that can be understood."""


def socket_of(endpoint: str) -> Path:
    """``unix:///run/…`` or ``/run/…``, as crictl takes it; BadInput for anything else."""
    path = endpoint.removeprefix("unix://").removeprefix("unix:")
    if not path.startswith("/"):
        raise BadInput(
            f"--runtime-endpoint {endpoint}: this is no unix socket. Write its path, such as {WELL_KNOWN[0]}; "
            "`crictl info` and the kubelet's --container-runtime-endpoint say which one it is"
        )
    return Path(path)


def find(endpoint: str | None, *, places: Sequence[Path] = WELL_KNOWN) -> Runtime:
    """The runtime at ``endpoint``, or the first of the well-known places that answers; NoRuntime where none does."""
    tried: list[tuple[Path, str]] = []
    for path in (socket_of(endpoint),) if endpoint else places:
        if not path.is_socket():
            tried.append((path, "is no socket" if path.exists() else "is not there"))
            continue
        from probefleet_cli import cri_client

        try:
            return cri_client.Runtime(path)
        except NoAnswer as error:
            tried.append((path, str(error)))
    raise NoRuntime(tried)
