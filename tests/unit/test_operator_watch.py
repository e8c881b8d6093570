"""Lists and watches: what is known, when it is complete, and that nothing vanishes by mistake."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from probefleet_operator import api, handlers, inventory, objects, reflector

from tests.fakes.api_server import FakeApiServer


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def pod(name: str, node: str = "node1", **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "shop", "uid": f"u-{name}", "labels": {"app": name}, **metadata},
        "spec": {"nodeName": node},
        "status": {"containerStatuses": [{"name": "main", "containerID": f"containerd://c-{name}"}]},
    }


def node(name: str, *, ready: bool = True) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {"metadata": {"name": name, "uid": f"u-{name}"}, "status": {"conditions": conditions}}


@asynccontextmanager
async def known(fake: FakeApiServer) -> AsyncIterator[tuple[inventory.Inventory, list[tuple[str, bool]]]]:
    """An inventory that watches the fake; with what it told of pods."""
    told: list[tuple[str, bool]] = []
    async with fake.running() as client:
        kept = inventory.Inventory(
            client, on_node=lambda _: None, on_pod=lambda each, gone: told.append((each.name, gone))
        )
        async with watching(kept):
            yield kept, told


@asynccontextmanager
async def watching(kept: inventory.Inventory) -> AsyncIterator[None]:
    """Its watches run, and its lists are complete."""

    async def watch() -> None:
        async with asyncio.TaskGroup() as tasks:
            kept.start(tasks)

    task = asyncio.create_task(watch())
    try:
        await kept.wait_complete()
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "BACKOFF_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(reflector, "BACKOFF_MAX_SECONDS", 0.02)


async def test_lists_come_in_pages_and_news_by_watch() -> None:
    fake = FakeApiServer(page_size=2)
    for number in range(5):
        fake.put(f"/api/v1/namespaces/shop/pods/p{number}", pod(f"p{number}"))
    async with known(fake) as (kept, _):
        assert len(kept.pods_of("node1")) == 5
        fake.put("/api/v1/namespaces/shop/pods/p5", pod("p5"))
        await until(lambda: len(kept.pods_of("node1")) == 6)


async def test_a_deleted_pod_is_still_known_by_name() -> None:
    fake = FakeApiServer()
    fake.put("/api/v1/namespaces/shop/pods/web", pod("web"))
    async with known(fake) as (kept, told):
        fake.delete("/api/v1/namespaces/shop/pods/web")
        await until(lambda: ("web", True) in told)
        gone = kept.pod("u-web")
        assert gone is not None
        assert gone.containers == {"c-web": "main"}
        assert [each.uid for each in kept.pods_of("node1")] == ["u-web"], "its counts may still be in the kernel"


async def test_a_container_that_was_started_anew_keeps_its_name() -> None:
    def status(now: str, before: str = "") -> dict[str, Any]:
        last = {"terminated": {"containerID": f"containerd://{before}"}} if before else {}
        return {"containerStatuses": [{"name": "main", "containerID": f"containerd://{now}", "lastState": last}]}

    fake = FakeApiServer()
    path = "/api/v1/namespaces/shop/pods/web"
    fake.put(path, {**pod("web"), "status": status("c-2", "c-1")})  # the operator came after the first one had ended
    async with known(fake) as (kept, _):

        def names() -> dict[str, str]:
            found = kept.pod("u-web")
            return dict(kept.containers(found)) if found else {}

        assert names() == {"c-1": "main", "c-2": "main"}
        for number in range(3, 101):
            fake.put(path, {**pod("web"), "status": status(f"c-{number}", f"c-{number - 1}")})
            await until(lambda number=number: f"c-{number}" in names())
        last = range(101 - inventory.MAX_CONTAINERS, 101)
        assert names() == {f"c-{number}": "main" for number in last}, "bounded: the newest"


async def test_tombstones_are_let_go_after_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeApiServer()
    fake.put("/api/v1/namespaces/shop/pods/old", pod("old"))
    fake.put("/api/v1/namespaces/shop/pods/new", pod("new"))
    async with known(fake) as (kept, told):
        anew = {"containerStatuses": [{"name": "main", "containerID": "containerd://c-anew"}]}
        fake.put("/api/v1/namespaces/shop/pods/old", {**pod("old"), "status": anew})
        await until(lambda: list(kept._containers) == ["u-old"])
        monkeypatch.setattr(inventory, "TOMBSTONE_SECONDS", -1.0)
        fake.delete("/api/v1/namespaces/shop/pods/old")
        await until(lambda: ("old", True) in told)
        assert kept.pod("u-old") is None
        assert not kept._containers
        assert [each.uid for each in kept.pods_of("node1")] == ["u-new"]


async def test_an_api_server_that_goes_away_and_comes_back_removes_nothing() -> None:
    fake = FakeApiServer()
    fake.put("/api/v1/namespaces/shop/pods/web", pod("web"))
    fake.put("/api/v1/nodes/node1", node("node1"))
    async with known(fake) as (kept, told):
        fake.away = True
        fake.drop_watches()
        asked = len(fake.requests)
        await until(lambda: len(fake.requests) > asked + 8)
        assert kept.pod("u-web") is not None
        assert kept.node("node1") is not None
        assert not any(gone for _, gone in told)
        fake.away = False
        fake.put("/api/v1/namespaces/shop/pods/later", pod("later"))
        await until(lambda: kept.pod("u-later") is not None)


async def test_what_vanished_while_the_watch_was_too_old_is_found_by_the_next_list() -> None:
    fake = FakeApiServer()
    fake.put("/api/v1/namespaces/shop/pods/web", pod("web"))
    fake.put("/api/v1/namespaces/shop/pods/cart", pod("cart"))
    async with known(fake) as (_, told):
        fake.away = True
        fake.drop_watches()
        del fake.objects["/api/v1/namespaces/shop/pods/web"]  # no watch hears of it
        fake.version += 10
        fake.oldest_version = fake.version
        fake.away = False
        await until(lambda: ("web", True) in told)
        assert ("cart", True) not in told


async def test_heartbeats_of_nodes_are_no_news() -> None:
    fake = FakeApiServer()
    fake.put("/api/v1/nodes/node1", node("node1"))
    changed: list[str] = []
    async with fake.running() as client:
        kept = inventory.Inventory(client, on_node=changed.append, on_pod=lambda *_: None)
        async with watching(kept):
            beaten = node("node1")
            beaten["status"]["conditions"][0]["lastHeartbeatTime"] = "later"
            fake.put("/api/v1/nodes/node1", beaten)
            fake.put("/api/v1/nodes/node2", node("node2"))
            await until(lambda: "node2" in changed)
        assert changed == ["node1", "node2"]


async def test_a_pods_workload_is_what_a_person_would_name() -> None:
    fake = FakeApiServer()

    def owner(kind: str, name: str) -> list[dict[str, Any]]:
        return [{"kind": kind, "name": name, "uid": f"u-{name}", "controller": True}]

    def put(plural: str, name: str, owners: list[dict[str, Any]]) -> None:
        group = "apps" if plural == "replicasets" else "batch"
        metadata = {"name": name, "uid": f"u-{name}", "ownerReferences": owners}
        fake.put(f"/apis/{group}/v1/namespaces/shop/{plural}/{name}", {"metadata": metadata})

    put("replicasets", "web-7d", owner("Deployment", "web"))
    put("jobs", "night-1", owner("CronJob", "night"))
    for name, owners in (
        ("web-7d-x", owner("ReplicaSet", "web-7d")),
        ("night-1-x", owner("Job", "night-1")),
        ("db-0", owner("StatefulSet", "db")),
        ("log-x", owner("DaemonSet", "log")),
        ("bare", []),
    ):
        fake.put(f"/api/v1/namespaces/shop/pods/{name}", pod(name, ownerReferences=owners))
    gone = pod("lost-5f-x", ownerReferences=owner("ReplicaSet", "lost-5f"))
    gone["metadata"]["labels"] = {"pod-template-hash": "5f"}
    fake.put("/api/v1/namespaces/shop/pods/lost-5f-x", gone)
    async with known(fake) as (kept, _):
        named = {}
        for name in ("web-7d-x", "night-1-x", "db-0", "log-x", "bare", "lost-5f-x"):
            found = kept.pod(f"u-{name}")
            assert found is not None
            workload = kept.workload(found)
            named[name] = f"{workload.kind}/{workload.name}"
        assert named == {
            "web-7d-x": "Deployment/web",
            "night-1-x": "CronJob/night",
            "db-0": "StatefulSet/db",
            "log-x": "DaemonSet/log",
            "bare": "Pod/bare",
            "lost-5f-x": "Deployment/lost",
        }


def test_a_static_pod_is_known_by_the_uid_that_its_cgroup_has() -> None:
    raw = pod("etcd", annotations={"kubernetes.io/config.mirror": "abc123"})
    assert inventory.trim_pod(raw).uid == "abc123"


async def test_a_pods_node_may_speak_for_it_also_when_it_is_gone_and_a_static_pods_uid_is_nobodys() -> None:
    fake = FakeApiServer()
    fake.put("/api/v1/namespaces/shop/pods/web", pod("web"))
    fake.put("/api/v1/namespaces/shop/pods/proxy", pod("proxy", annotations={"kubernetes.io/config.mirror": "abc"}))
    async with known(fake) as (kept, told):
        fake.delete("/api/v1/namespaces/shop/pods/web")
        await until(lambda: ("web", True) in told)
        found = {uid: kept.pod(uid) for uid in ("u-web", "abc")}
        assert {uid: each and kept.nodes_of(each) for uid, each in found.items()} == {"u-web": ("node1",), "abc": ()}


async def test_containers_of_a_static_pods_uid_have_names_on_all_nodes_that_have_it() -> None:
    fake = FakeApiServer()
    mirror = {"kubernetes.io/config.mirror": "abc"}
    async with known(fake) as (kept, told):
        for name in ("proxy-1", "proxy-2"):
            fake.put(f"/api/v1/namespaces/shop/pods/{name}", pod(name, f"node-of-{name}", annotations=mirror))
            await until(lambda name=name: (name, False) in told)
        found = kept.pod("abc")
        assert found is not None
        assert dict(kept.containers(found)) == {"c-proxy-1": "main", "c-proxy-2": "main"}


# Policies and ProbeMaps: whatever order events and lists come in.


def policy(uid: str, version: int, generation: int = 1) -> dict[str, Any]:
    return {"metadata": {"uid": uid, "name": uid, "resourceVersion": str(version), "generation": generation}}


def test_nothing_is_complete_before_both_kinds_have_been_listed() -> None:
    store = objects.ObjectStore()
    store.observe("ProbePolicy", policy("a", 1), gone=False)
    store.relisted("ProbePolicy", ["a"], known_before=[])
    assert not store.complete
    store.relisted("ProbeMap", [], known_before=[])
    assert store.complete


def test_an_object_that_came_after_the_list_began_is_not_missed_by_it() -> None:
    store = objects.ObjectStore()
    known_before = list(store.all("ProbePolicy"))
    store.observe("ProbePolicy", policy("young", 9), gone=False)
    store.relisted("ProbePolicy", [], known_before=known_before)
    assert "young" in store.all("ProbePolicy")


def test_an_object_under_deletion_counts_as_deleted() -> None:
    store = objects.ObjectStore()
    store.observe("ProbePolicy", policy("a", 1), gone=False)
    dying = policy("a", 2)
    dying["metadata"]["deletionTimestamp"] = "now"
    assert store.observe("ProbePolicy", dying, gone=False)
    assert not store.all("ProbePolicy")


def test_our_own_status_coming_back_is_no_news() -> None:
    store = objects.ObjectStore()
    assert store.observe("ProbePolicy", policy("a", 1), gone=False)
    assert not store.observe("ProbePolicy", policy("a", 2), gone=False)
    assert store.observe("ProbePolicy", policy("a", 3, generation=2), gone=False)


HISTORY = [("a", version, False) for version in range(1, 5)] + [("b", 6, False), ("b", 7, True), ("c", 8, False)]


@given(st.permutations(HISTORY), st.integers(0, len(HISTORY)))
def test_any_order_of_events_converges(order: list[tuple[str, int, bool]], listed_at: int) -> None:
    store = objects.ObjectStore()
    known_before: list[str] = []
    for position, (uid, version, gone) in enumerate([*order, ("", 0, False)]):
        if position == listed_at:
            store.relisted("ProbePolicy", ["a", "c"], known_before=known_before)
        if uid:
            store.observe("ProbePolicy", policy(uid, version, generation=version), gone=gone)
    found = store.all("ProbePolicy")
    assert {uid: raw["metadata"]["resourceVersion"] for uid, raw in found.items()} == {"a": "4", "c": "8"}


# What is kept, and where kopf lives.


def test_of_pods_and_nodes_only_what_names_and_selects_is_kept() -> None:
    long = ["x" * 1000] * 100
    bulky = {"managedFields": long, "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "y" * 100_000}}
    raw = pod("web", **bulky)
    raw["spec"] |= {"containers": [{"name": "main", "env": long}], "volumes": long}
    raw["status"] |= {"conditions": long}
    assert len(pickle.dumps(inventory.trim_pod(raw))) < 500
    machine = node("node1")
    machine["metadata"] |= bulky
    machine["status"] |= {"images": long, "volumesInUse": long}
    assert len(pickle.dumps(inventory.trim_node(machine))) < 500


async def test_kopf_has_a_thread_and_a_loop_of_its_own_and_hands_events_to_the_main_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main, blocked, go_on = asyncio.get_running_loop(), threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    async def operator(**_: Any) -> None:
        found["thread"], found["loop"] = threading.current_thread().name, asyncio.get_running_loop()
        blocked.set()
        go_on.wait(10)  # nothing turns in this loop now
        await kopf_thread._on_event("ProbePolicy", {"type": "ADDED", "object": {"metadata": {"name": "x"}}})

    def sink(kind: objects.Kind, raw: dict[str, Any], gone: bool) -> None:
        found["sink"] = (kind, raw["metadata"]["name"], gone, asyncio.get_running_loop())

    monkeypatch.setattr(handlers.kopf, "operator", operator)
    kopf_thread = handlers.KopfThread(api.Access(server="https://nowhere"), sink)
    kopf_thread.start()
    await asyncio.to_thread(blocked.wait, 10)
    turned = asyncio.Event()
    main.call_soon(turned.set)
    await asyncio.wait_for(turned.wait(), 5)
    assert "sink" not in found, "the main loop turns while kopf's is blocked"
    go_on.set()
    await until(lambda: "sink" in found)
    assert found["sink"] == ("ProbePolicy", "x", False, main)
    assert found["thread"] == "kopf" and found["loop"] is not main
    await kopf_thread.stop()
    assert kopf_thread.failure is None


def test_replicas_share_what_is_alike_and_nothing_else() -> None:
    owner = {"kind": "ReplicaSet", "name": "web-7d", "uid": "r1", "controller": True}
    alike = [
        inventory.trim_pod(pod(name, labels={"app": "web", "tier": "front"}, ownerReferences=[dict(owner)]))
        for name in ("web-1", "web-2")
    ]
    assert alike[0].labels is alike[1].labels
    assert alike[0].owner is alike[1].owner
    assert alike[0].owner == inventory.Owner("ReplicaSet", "web-7d", "r1")
    assert [each.containers for each in alike] == [{"c-web-1": "main"}, {"c-web-2": "main"}]
    other = inventory.trim_pod(pod("cart-1", labels={"app": "cart"}))
    assert (other.labels, other.owner) == ({"app": "cart"}, None)


def test_what_is_shared_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "MAX_SHARED", 3)
    shared = inventory.Shared()
    for number in range(23):
        assert shared.labels({"hash": str(number)}) == {"hash": str(number)}
        reference = {"kind": "Job", "name": f"job-{number}", "uid": f"j{number}", "controller": True}
        assert shared.owner({"ownerReferences": [reference]}) == inventory.Owner("Job", f"job-{number}", f"j{number}")
    assert len(shared._labels) <= 3
    assert len(shared._owners) <= 3
