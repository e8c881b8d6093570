"""What stands around the operator's controller and planner, as far as they ask: nodes and pods, plans, a compiler.

Models: lists that are complete or not; a node's labels and readiness; pods by node; plans that are there, missing or
under way; compilations that succeed, fail, wait or are unavailable. Does not model: watches and tombstones
(inventory.py), names, what a compiler makes of C (objects are given), the API server, time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from probefleet_core import endpoints, placement, values
from probefleet_operator import api, errors, identity, inventory, session
from probefleet_wire.v1 import plan_pb2, stream_pb2


def raw_policy(name: str, generation: int = 1, namespace: str = "shop", **spec: object) -> api.Json:
    """A ProbePolicy as the API server has it; its uid is its name."""
    return {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": name,
            "generation": generation,
            "resourceVersion": str(generation),
            "creationTimestamp": "2026-05-01T00:00:00Z",
        },
        "spec": {"program": {"catalog": {"name": "syscount"}}, **spec},
    }


def raw_map(name: str, generation: int = 1, namespace: str = "shop", **spec: object) -> api.Json:
    """A ProbeMap, likewise."""
    made = raw_policy(name, generation, namespace)
    shape = {"type": "hash", "maxEntries": 64, "key": "u32", "value": "u64"}
    return {**made, "kind": "ProbeMap", "spec": {**shape, **spec}}


def open_session(
    node: str,
    *,
    number: int = 1,
    term: int = 7,
    applied: tuple[int, int] = (0, 0),
    cpus: int = 2,
    addresses: endpoints.Endpoints | None = None,
) -> session.Session:
    """An agent's session, of a pod `agent-NODE`; needs a running loop."""
    hello = stream_pb2.Hello(
        protocol=1,
        node=node,
        kernel_release="6.12",
        kernel_build="#1",
        machine="x86_64",
        cpus=cpus,
        applied_term=applied[0],
        applied_version=applied[1],
    )
    who = identity.Identity(node, f"u-{node}", f"agent-{node}", f"agent-{node}", 0.0)
    return session.Session(hello, who, number=number, term=term, blob_of=lambda sha256: b"zstd", addresses=addresses)


@dataclass
class FakeInventory:
    """Nodes and pods that the test sets."""

    complete: bool = True
    found: dict[str, inventory.Node] = field(default_factory=dict)
    pods_by_node: dict[str, list[placement.Pod]] = field(default_factory=dict)
    endpoints: endpoints.Endpoints = field(default_factory=endpoints.Endpoints)

    def add(self, *names: str, ready: bool = True) -> None:
        for name in names:
            self.found[name] = inventory.Node(f"u-{name}", name, {}, ready, "6.12", "amd64")

    def nodes(self) -> Collection[inventory.Node]:
        return self.found.values()

    def node(self, name: str) -> inventory.Node | None:
        return self.found.get(name)

    def pods_of(self, node: str) -> Collection[placement.Pod]:
        return self.pods_by_node.get(node, [])

    def pods(self) -> Iterator[placement.Pod]:
        for pods in self.pods_by_node.values():
            yield from pods


@dataclass
class FakePlans:
    """Plans that the test sets; `refreshed` counts how often the controller asked for new ones."""

    plans: list[placement.Candidate] = field(default_factory=list)
    idle: bool = True
    refreshed: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)  # set each time

    def add(self, uid: str, digest: str = "d1", *, ttl_ms: int = 0, created_ns: int = 0, shares: str = "") -> None:
        """A policy for all nodes, planned; ``shares``: a ProbeMap's uid."""
        policy = values.ProbePolicy(
            uid=values.PolicyUid(uid),
            namespace="shop",
            name=uid,
            generation=1,
            created_ns=created_ns,
            deleting=False,
            scope=values.Scope.CLUSTER,
            program=values.CatalogProgram("syscount"),
            ttl_ms=ttl_ms,
        )
        instance = plan_pb2.Instance(digest=digest, object=plan_pb2.CoreObject(sha256=f"sha-{digest}"))
        plan = plan_pb2.Plan(policy_uid=uid, namespace="shop", name=uid, generation=1, instance=instance)
        probe_maps = (plan_pb2.ProbeMap(uid=shares, sha256=f"sha-{shares}"),) if shares else ()
        if shares:
            instance.shared_maps.add(map="shared", probe_map_uid=shares)
            plan.instance.CopyFrom(instance)
        self.plans.append(placement.Candidate(policy.uid, "shop", uid, policy, plan, probe_maps))

    def candidates(self) -> list[placement.Candidate]:
        return self.plans

    def refresh(self) -> None:
        self.refreshed += 1
        self.asked.set()


@dataclass
class FakeToolchain:
    """A compiler that gives what it was given: an object, or a ToolchainError; `hold` makes it wait."""

    objects: dict[str, bytes | errors.ToolchainError] = field(default_factory=dict)  # by file name
    asked: list[str] = field(default_factory=list)
    hold: asyncio.Event | None = None

    async def compiled(self, source: str, file_name: str) -> bytes:
        return await self._answer(file_name)

    async def from_config_map(self, namespace: str, reference: values.ConfigMapKey, sha256: str) -> bytes:
        return await self._answer(f"{namespace}/{reference.name}/{reference.key}")

    async def _answer(self, name: str) -> bytes:
        self.asked.append(name)
        if self.hold is not None:
            await self.hold.wait()
        found = self.objects[name]
        if isinstance(found, errors.ToolchainError):
            raise found
        return found
