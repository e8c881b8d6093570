"""Nodes and pods: who is there, what they are called, whose they are.

Five watches flow in (reflector.py); names flow out: `nodes()` to the controller for placement, `pods_of(node)` for
selections, `identity(pod_uid)` to aggregate and report for rows that the agents keyed by pod uid. Deleted pods are
kept an hour as tombstones, because counts of a pod outlive it.

A pod's *workload* is the owner that a person would name: ReplicaSet → Deployment, Job → CronJob, StatefulSet,
DaemonSet; a pod without an owner is its own workload.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from probefleet_core import endpoints, placement, values

from probefleet_operator import api, reflector

TOMBSTONE_SECONDS = 3600.0
MAX_CONTAINERS = 64  # remembered of one pod: it may be in a crash loop for days
MAX_SHARED = 20_000
MAX_TOMBSTONES = 200_000  # 100 bytes each: a cluster that churns 55 pods a second


@dataclass(frozen=True, slots=True)
class Node:
    """What placement asks of a node."""

    uid: str
    name: str
    labels: Mapping[str, str]
    ready: bool
    kernel: str
    machine: str


@dataclass(frozen=True, slots=True)
class Owner:
    """A controller reference."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Pod(placement.Pod):
    """What selections ask of a pod (one object for both: there are many), and names. No node: not scheduled yet."""

    name: str
    owner: Owner | None
    containers: Mapping[str, str]  # container id (hex, without its scheme) → container name
    finished: bool  # Succeeded or Failed: its containers are gone, its counts are not
    addresses: tuple[str, ...] = ()  # its own: none of a pod in its node's network, which has the node's
    mirror: bool = False  # of a static pod: its uid is its manifest's, which several nodes may have


@dataclass(frozen=True, slots=True)
class Owned:
    """A ReplicaSet or Job: only the owner above it matters."""

    uid: str
    owner: Owner | None


class Shared:
    """One object where the API server sends many that are alike: replicas have the same labels and the same owner.

    Of 50,000 pods that is half of what they take. Nobody changes what is shared.
    """

    def __init__(self) -> None:
        self._labels: dict[tuple[tuple[str, str], ...], Mapping[str, str]] = {}
        self._owners: dict[Owner, Owner] = {}

    def labels(self, labels: Mapping[str, str]) -> Mapping[str, str]:
        """The same labels, or container names."""
        if len(self._labels) >= MAX_SHARED:
            self._labels.clear()  # those that are in use stay with their users
        key = tuple(labels.items())
        known = self._labels.get(key)
        if known is None:
            known = self._labels[key] = {sys.intern(name): sys.intern(value) for name, value in key}
        return known

    def owner(self, metadata: api.Json) -> Owner | None:
        """The owner reference marked as controller."""
        for reference in metadata.get("ownerReferences") or ():
            if reference.get("controller"):
                if len(self._owners) >= MAX_SHARED:
                    self._owners.clear()
                found = Owner(sys.intern(reference["kind"]), reference["name"], reference["uid"])
                return self._owners.setdefault(found, found)
        return None


_shared = Shared()
_NO_CONTAINERS: Mapping[str, str] = {}


def trim_node(raw: api.Json) -> Node:
    """A Node object, of which the heartbeat is left out: a node that only beats is an unchanged node."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions") or ())
    info = status.get("nodeInfo") or {}
    return Node(
        uid=metadata["uid"],
        name=metadata["name"],
        labels=metadata.get("labels") or {},
        ready=ready,
        kernel=info.get("kernelVersion", ""),
        machine=info.get("architecture", ""),
    )


def trim_pod(raw: api.Json) -> Pod:
    """A Pod object without what neither names nor selects."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    containers = {
        found.partition("://")[2]: sys.intern(container["name"])
        for group in ("containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses")
        for container in status.get(group) or ()
        for found in _container_ids(container)
    }
    # A static pod's cgroup is named by its config hash; the kubelet tells it in this annotation of the mirror pod.
    static_uid = (metadata.get("annotations") or {}).get("kubernetes.io/config.mirror")
    return Pod(
        uid=values.PodUid(static_uid or metadata["uid"]),
        name=metadata["name"],
        namespace=sys.intern(metadata["namespace"]),
        node=values.NodeName(sys.intern(spec.get("nodeName", ""))),
        labels=_shared.labels(metadata.get("labels") or {}),
        owner=_shared.owner(metadata),
        containers=containers or _NO_CONTAINERS,
        finished=status.get("phase") in ("Succeeded", "Failed"),
        addresses=()
        if spec.get("hostNetwork")
        else tuple(each["ip"] for each in status.get("podIPs") or () if each.get("ip")),
        mirror=bool(static_uid),
    )


def _container_ids(status: api.Json) -> Iterator[str]:
    """The container's own and, where it was started anew, that of the one before: what it did is still counted."""
    last = ((status.get("lastState") or {}).get("terminated") or {}).get("containerID")
    for found in (last, status.get("containerID")):
        if found:
            yield found


def trim_owned(raw: api.Json) -> Owned:
    """A ReplicaSet's or Job's metadata."""
    return Owned(uid=raw["metadata"]["uid"], owner=_shared.owner(raw["metadata"]))


class Inventory:
    """The lists, with indexes. All methods belong to the main loop."""

    def __init__(self, client: api.Api, *, on_node: Callable[[str], None], on_pod: Callable[[Pod, bool], None]) -> None:
        """`on_node(name)` and `on_pod(pod, gone)` are told of everything that may change a node's desired state."""
        self._on_node, self._on_pod = on_node, on_pod
        self._nodes = reflector.Reflector(client, "/api/v1/nodes", trim=trim_node, sink=self._node_changed)
        self._pods = reflector.Reflector(client, "/api/v1/pods", trim=trim_pod, sink=self._pod_changed)
        self._replica_sets = reflector.Reflector(
            client, "/apis/apps/v1/replicasets", trim=trim_owned, sink=self._ignore, metadata_only=True
        )
        self._jobs = reflector.Reflector(
            client, "/apis/batch/v1/jobs", trim=trim_owned, sink=self._ignore, metadata_only=True
        )
        self.endpoints = endpoints.Endpoints()
        self._node_by_name: dict[str, Node] = {}
        self._pods_by_node: dict[str, dict[str, Pod]] = {}  # tombstones included
        self._tombstones: OrderedDict[str, tuple[float, Pod]] = OrderedDict()
        # All containers that were seen of a pod, by its uid, where its status does not have them all: it tells of the
        # last two only.
        self._containers: dict[str, Mapping[str, str]] = {}
        # Owners outlive their pods' counts only through the names already given.
        self._workload_names: dict[str, Owner] = {}

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to watch, as tasks of the caller's group."""
        for name, watch in (
            ("nodes", self._nodes),
            ("pods", self._pods),
            ("replicasets", self._replica_sets),
            ("jobs", self._jobs),
        ):
            tasks.create_task(watch.run(), name=f"watch-{name}")

    async def wait_complete(self) -> None:
        """Return when nodes and pods are wholly known, and owners as well."""
        for watch in (self._nodes, self._pods, self._replica_sets, self._jobs):
            await watch.complete.wait()

    @property
    def complete(self) -> bool:
        """Nodes and pods have been listed to the end at least once."""
        return self._nodes.complete.is_set() and self._pods.complete.is_set()

    def nodes(self) -> Collection[Node]:
        """All nodes."""
        return self._node_by_name.values()

    def node(self, name: str) -> Node | None:
        """One node by name."""
        return self._node_by_name.get(name)

    def pods_of(self, node: str) -> Collection[placement.Pod]:
        """The pods of a node, those deleted within the last hour included: their counts are still in the kernel."""
        return self._pods_by_node.get(node, {}).values()

    def pods(self) -> Iterator[placement.Pod]:
        """All pods that are bound to a node, in the same sense."""
        for pods in self._pods_by_node.values():
            yield from pods.values()

    def pod(self, uid: str) -> Pod | None:
        """A pod by uid, deleted within the last hour or not."""
        if found := self._pods.items.get(uid):
            return found
        buried = self._tombstones.get(uid)
        return buried[1] if buried else None

    def containers(self, pod: Pod) -> Mapping[str, str]:
        """Names of its containers by their ids, those that were started anew included."""
        return self._containers.get(pod.uid, pod.containers)

    def nodes_of(self, pod: Pod) -> tuple[str, ...]:
        """Who may speak for a pod: its node. Of a static pod's uid nobody can tell: several nodes may have it."""
        return () if pod.mirror else (pod.node,)

    def workload(self, pod: Pod) -> Owner:
        """The owner that a person would name."""
        owner = pod.owner
        if owner is None:
            return Owner("Pod", pod.name, pod.uid)
        above: reflector.Reflector[Owned] | None = {"ReplicaSet": self._replica_sets, "Job": self._jobs}.get(owner.kind)
        if above is None:
            return owner
        owned = above.items.get(owner.uid)
        if owned is not None:
            top = owned.owner or owner
            self._workload_names[owner.uid] = top
            return top
        if known := self._workload_names.get(owner.uid):
            return known
        return _guess(pod, owner)

    def _node_changed(self, node: Node, gone: bool) -> None:
        if gone:
            current = self._node_by_name.get(node.name)
            if current is not None and current.uid == node.uid:  # not one that came again under the name
                del self._node_by_name[node.name]
        else:
            self._node_by_name[node.name] = node
        self._on_node(node.name)

    def _pod_changed(self, pod: Pod, gone: bool) -> None:
        if pod.node:
            here = self._pods_by_node.setdefault(pod.node, {})
            self._remember_containers(pod, before=here.get(pod.uid))
            here[pod.uid] = pod
            self.workload(pod)  # learns the owner's name while the owner lives
        self.endpoints.put(pod.uid, () if gone or pod.finished or pod.mirror else pod.addresses)
        if gone:
            self._bury(pod)
        self._on_pod(pod, gone)

    def _remember_containers(self, pod: Pod, *, before: Pod | None) -> None:
        earlier = self._containers.get(pod.uid, before.containers if before else {})
        # Of a static pod's uid several nodes may have containers.
        if earlier.keys() <= pod.containers.keys() and not pod.mirror:
            self._containers.pop(pod.uid, None)
        else:
            both = {**earlier, **pod.containers}
            self._containers[pod.uid] = dict(list(both.items())[-MAX_CONTAINERS:])

    def _bury(self, pod: Pod) -> None:
        now = time.monotonic()
        if pod.node:
            self._tombstones[pod.uid] = (now, pod)
        while self._tombstones:
            buried_at, oldest = next(iter(self._tombstones.values()))
            if now - buried_at < TOMBSTONE_SECONDS and len(self._tombstones) <= MAX_TOMBSTONES:
                break
            del self._tombstones[oldest.uid]
            self._containers.pop(oldest.uid, None)
            if here := self._pods_by_node.get(oldest.node):
                here.pop(oldest.uid, None)
                if not here:
                    del self._pods_by_node[oldest.node]
        if len(self._workload_names) > MAX_TOMBSTONES:
            alive = self._replica_sets.items.keys() | self._jobs.items.keys()
            self._workload_names = {uid: owner for uid, owner in self._workload_names.items() if uid in alive}

    @staticmethod
    def _ignore(_: Owned, __: bool) -> None:
        """Owners are looked up when a name is asked for; their coming and going moves nothing."""


def _guess(pod: Pod, owner: Owner) -> Owner:
    """The Deployment of a ReplicaSet that went before we saw it: pods carry the hash that ends its name."""
    template = pod.labels.get("pod-template-hash")
    if owner.kind == "ReplicaSet" and template and owner.name.endswith(f"-{template}"):
        return Owner("Deployment", owner.name[: -len(template) - 1], "")
    return owner
