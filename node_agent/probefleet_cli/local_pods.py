"""Pods of this machine without asking Kubernetes: names and uids as the kubelet writes them into /var/log.

``<pods>/<namespace>_<pod>_<uid>/`` names pods, and ``<containers>/<pod>_<namespace>_<container>-<id>.log`` links name
containers (kubelet's pkg/kubelet/kuberuntime, "legacy" symlinks, still made by every release). ``run -n`` selects by
namespace with it, and reports show names instead of uids. Workloads are not known here: a pod stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from probefleet_core import result

PODS = Path("/var/log/pods")
CONTAINERS = Path("/var/log/containers")
_POD = re.compile(r"(?P<namespace>[a-z0-9-]+)_(?P<name>[a-z0-9.-]+)_(?P<uid>[0-9a-f-]{32,36})")
_CONTAINER = re.compile(
    r"(?P<pod>[a-z0-9.-]+)_(?P<namespace>[a-z0-9-]+)_(?P<container>[a-z0-9-]+)-(?P<id>[0-9a-f]{64})\.log"
)


@dataclass(frozen=True, slots=True)
class LocalPods:
    """What was found, by uid."""

    names: Mapping[str, result.PodName] = field(default_factory=dict)

    def name_of(self, uid: str) -> result.PodName | None:
        """For ``Aggregate.result``."""
        return self.names.get(uid)

    def of_namespace(self, namespace: str) -> tuple[str, ...]:
        """Uids of its pods, sorted."""
        return tuple(sorted(uid for uid, pod in self.names.items() if pod.namespace == namespace))

    @property
    def namespaces(self) -> tuple[str, ...]:
        """All that have a pod here, sorted."""
        return tuple(sorted({pod.namespace for pod in self.names.values()}))


def find(pods: Path = PODS, containers: Path = CONTAINERS) -> LocalPods:
    """Look again; folders that are not there mean that there is no pod."""
    ids: dict[tuple[str, str], dict[str, str]] = {}
    for entry in _names(containers):
        if found := _CONTAINER.fullmatch(entry):
            ids.setdefault((found["namespace"], found["pod"]), {})[found["id"]] = found["container"]
    names: dict[str, result.PodName] = {}
    for entry in _names(pods):
        if found := _POD.fullmatch(entry):
            here = ids.get((found["namespace"], found["name"]), {})
            names[found["uid"]] = result.PodName(found["namespace"], found["name"], containers=here)
    return LocalPods(names)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
