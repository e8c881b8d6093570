"""Pods of this machine without asking Kubernetes: who they are, and which of them a choice means. Pure, but ``find``.

Two sources, both of the node itself. The container runtime (``container_runtime``) knows names, labels and containers.
The kubelet writes names and uids into /var/log: ``<pods>/<namespace>_<pod>_<uid>/`` names pods, and
``<containers>/<pod>_<namespace>_<container>-<id>.log`` links name containers (kubelet's pkg/kubelet/kuberuntime,
"legacy" symlinks, still made by every release); labels are not among them. Neither knows owners: a pod's workload is
read off the labels that Kubernetes' own controllers put on their pods, else the pod stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from probefleet_core import result, values

PODS = Path("/var/log/pods")
CONTAINERS = Path("/var/log/containers")
#: Of pods that are gone the longest, no more are remembered than a filter map has room for.
MAX_REMEMBERED = 16_384
_POD = re.compile(r"(?P<namespace>[a-z0-9-]+)_(?P<name>[a-z0-9.-]+)_(?P<uid>[0-9a-f-]{32,36})")
_CONTAINER = re.compile(
    r"(?P<pod>[a-z0-9.-]+)_(?P<namespace>[a-z0-9-]+)_(?P<container>[a-z0-9-]+)-(?P<id>[0-9a-f]{64})\.log"
)
_SUFFIX = "[a-z0-9]{5}"


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One pod, as the container runtime knows it; ``containers`` maps ids to names, of all that the pod had here."""

    uid: str
    namespace: str
    name: str
    labels: Mapping[str, str]
    containers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LocalPods:
    """What was found, by uid. ``labels`` has the pods whose labels are known."""

    names: Mapping[str, result.PodName] = field(default_factory=dict)
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def name_of(self, uid: str) -> result.PodName | None:
        """For ``Aggregate.result``."""
        return self.names.get(uid)

    def chosen(self, namespace: str = "", labels: values.Selector | None = None) -> tuple[str, ...]:
        """Uids of the pods of a namespace ("": of all) that have these labels, sorted.

        One whose labels nobody has told is chosen only where none are asked for.
        """
        asked = labels or values.Selector()
        return tuple(
            sorted(
                uid
                for uid, pod in self.names.items()
                if namespace in ("", pod.namespace)
                and (asked == values.Selector() or (uid in self.labels and asked.matches(self.labels[uid])))
            )
        )

    @property
    def namespaces(self) -> tuple[str, ...]:
        """All that have a pod here, sorted."""
        return tuple(sorted({pod.namespace for pod in self.names.values()}))

    def then(self, newer: LocalPods) -> LocalPods:
        """Both together. What is newer counts; a pod that is gone keeps its name, labels and containers."""
        names = {uid: pod for uid, pod in self.names.items() if uid not in newer.names}
        for uid, pod in newer.names.items():
            before = self.names.get(uid)
            names[uid] = _together(before, pod) if before else pod
        for uid in list(names)[: max(0, len(names) - MAX_REMEMBERED)]:
            del names[uid]
        labels = {uid: found for uid, found in {**self.labels, **newer.labels}.items() if uid in names}
        return LocalPods(names, labels)


def find(pods: Path = PODS, containers: Path = CONTAINERS) -> LocalPods:
    """Look into the kubelet's folders; where they are not, there is no pod."""
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


def of_runtime(sandboxes: Iterable[Sandbox]) -> LocalPods:
    """What a container runtime listed."""
    names, labels = {}, {}
    for each in sandboxes:
        kind, workload = workload_of(each.name, each.labels)
        names[each.uid] = result.PodName(each.namespace, each.name, kind, workload, containers=each.containers)
        labels[each.uid] = each.labels
    return LocalPods(names, labels)


def workload_of(name: str, labels: Mapping[str, str]) -> tuple[str, str]:
    """Kind and name of a pod's workload, as far as its labels tell: they name the controller, its part of the pod's
    name says which. ("Pod", its own name) where they do not."""
    template = labels.get("pod-template-hash")
    if template and (found := re.fullmatch(rf"(.+)-{re.escape(template)}-{_SUFFIX}", name)):
        return "Deployment", found[1]
    if labels.get("statefulset.kubernetes.io/pod-name") == name and (found := re.fullmatch(r"(.+)-\d+", name)):
        return "StatefulSet", found[1]
    job = labels.get("batch.kubernetes.io/job-name") or labels.get("job-name")
    if job and name.startswith(f"{job}-"):
        return "Job", job
    of_daemon = {"controller-revision-hash", "pod-template-generation"} <= labels.keys()
    if of_daemon and (found := re.fullmatch(rf"(.+)-{_SUFFIX}", name)):
        return "DaemonSet", found[1]
    return "Pod", name


def _together(before: result.PodName, now: result.PodName) -> result.PodName:
    known = now if now.workload or not before.workload else before
    return result.PodName(
        now.namespace, now.name, known.workload_kind, known.workload, {**before.containers, **now.containers}
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:  # not there, or not for everybody to see
        return []
