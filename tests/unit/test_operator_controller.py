"""The controller alone: what changes makes one decision, and each session hears what is new to it, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from probefleet_core import endpoints, placement, values
from probefleet_operator import controller, inventory, objects, session
from probefleet_wire.v1 import stream_pb2

from tests.fakes.operator_parts import FakeInventory, FakePlans, open_session, raw_policy

TERM = 7
READY = stream_pb2.PolicyStatus.READY


class Setup:
    """A controller with its parts; the store is complete unless the test says otherwise."""

    def __init__(self, *, complete: bool = True) -> None:
        self.store, self.inventory, self.plans = objects.ObjectStore(), FakeInventory(), FakePlans()
        if complete:
            self.complete()
        self.decisions = 0
        self._news = asyncio.Event()
        self.control = controller.Controller(self.store, term=TERM)
        self.control.connect(self.inventory, self.plans, on_decided=self._decided)

    def complete(self) -> None:
        for kind in ("ProbePolicy", "ProbeMap"):
            self.store.relisted(kind, [], known_before=[])

    def _decided(self) -> None:
        self.decisions += 1
        self._news.set()

    async def round(self) -> None:
        """Something changed; return when that has been decided."""
        before = self.decisions
        self.control.mark()
        async with asyncio.timeout(5):
            while self.decisions == before:
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def running(setup: Setup) -> AsyncIterator[Setup]:
    task = asyncio.create_task(setup.control.run())
    try:
        yield setup
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "SETTLE_SECONDS", 0.001)


async def push_of(opened: session.Session) -> stream_pb2.Push:
    async with asyncio.timeout(5):
        assert await opened.due() == "push"
        return opened.push().push


def names(push: stream_pb2.Push) -> list[str]:
    return [plan.name for plan in push.plans]


def waits(opened: session.Session) -> bool:
    """Nothing is to be written to this session."""
    return opened._desire is None


def ready(push: stream_pb2.Push) -> stream_pb2.Status:
    said = [
        stream_pb2.PolicyStatus(policy_uid=p.policy_uid, generation=1, digest=p.instance.digest, state=READY)
        for p in push.plans
    ]
    return stream_pb2.Status(term=push.term, version=push.version, policies=said)


async def test_nothing_is_pushed_before_all_lists_are_complete() -> None:
    async with running(Setup(complete=False)) as setup:
        setup.inventory.add("a")
        setup.plans.add("p")
        opened = open_session("a")
        setup.control.session_opened(opened)
        async with asyncio.timeout(5):
            while setup.plans.refreshed < 2:  # it has looked, and not decided
                setup.plans.asked.clear()
                setup.control.mark()
                await setup.plans.asked.wait()
        assert not setup.decisions and waits(opened) and not setup.control.complete
        setup.complete()
        await setup.round()
        assert names(await push_of(opened)) == ["p"]


async def test_what_a_session_was_told_is_not_told_again() -> None:
    async with running(Setup()) as setup:
        setup.inventory.add("a")
        setup.plans.add("p")
        opened = open_session("a")
        setup.control.session_opened(opened)
        await setup.round()
        await push_of(opened)
        await setup.round()
        assert waits(opened)
        again = open_session("a", number=2)
        setup.control.session_opened(again)
        await setup.round()
        assert names(await push_of(again)) == ["p"], "a new session knows nothing"


async def test_a_node_is_told_nothing_before_it_has_said_what_it_runs() -> None:
    async with running(Setup()) as setup:
        setup.inventory.add("a")
        opened = open_session("a", applied=(TERM - 1, 3))
        setup.control.session_opened(opened)
        await setup.round()
        assert waits(opened), "an empty push would remove all that it has"
        opened.take_status(stream_pb2.Status(term=TERM - 1, version=3))
        setup.control.status_received(opened, stream_pb2.Status())
        await setup.round()
        assert names(await push_of(opened)) == []


async def test_a_node_that_would_refuse_a_push_gets_none() -> None:
    async with running(Setup()) as setup:
        setup.inventory.add("a", "b")
        setup.plans.add("p")
        ahead, other = open_session("a", applied=(TERM + 1, 1)), open_session("b")
        ahead.take_status(stream_pb2.Status(term=TERM + 1, version=1))
        setup.control.session_opened(ahead)
        setup.control.session_opened(other)
        await setup.round()
        assert waits(ahead)
        assert names(await push_of(other)) == ["p"], "and it is nobody's first node"
        assert setup.control.desired()[values.PolicyUid("p")] == {"a", "b"}, "yet it is missed"


async def test_the_second_node_follows_when_the_first_is_ready() -> None:
    async with running(Setup()) as setup:
        setup.inventory.add("a", "b")
        setup.plans.add("p")
        first, second = open_session("a"), open_session("b")
        setup.control.session_opened(first)
        setup.control.session_opened(second)
        await setup.round()
        push = await push_of(first)
        assert (names(push), names(await push_of(second))) == (["p"], [])
        first.take_status(ready(push))
        setup.control.status_received(first, stream_pb2.Status())
        await setup.round()
        assert names(await push_of(second)) == ["p"]
        assert setup.control.runs(values.NodeName("b"), values.PolicyUid("p"))
        assert setup.control.pushed_objects() == {"sha-d1"}


async def test_a_pods_coming_is_told_to_its_node_alone() -> None:
    async with running(Setup()) as setup:
        setup.inventory.add("a", "b")
        here, there = open_session("a"), open_session("b")
        for opened in (here, there):
            setup.control.session_opened(opened)
        await setup.round()
        await push_of(here), await push_of(there)
        setup.inventory.pods_by_node["a"] = [placement.Pod(values.PodUid("web"), "shop", {}, values.NodeName("a"))]
        await setup.round()
        assert list((await push_of(here)).known_pod_uids) == ["web"]
        assert waits(there)


def agent_pod(uid: str, node: str) -> inventory.Pod:
    return inventory.Pod(values.PodUid(uid), "probefleet", {}, values.NodeName(node), uid, None, {}, False)


async def test_an_agent_whose_pod_is_deleted_loses_its_stream() -> None:
    setup = Setup()
    opened = open_session("a")
    setup.control.session_opened(opened)
    setup.control.pod_changed(agent_pod("another", "a"), True)
    setup.control.pod_changed(agent_pod("agent-a", "a"), False)
    setup.control.pod_changed(agent_pod("agent-a", "elsewhere"), True)
    assert not opened.closing.done()
    setup.control.pod_changed(agent_pod("agent-a", "a"), True)
    assert opened.closing.result().code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_session_that_was_fenced_does_not_close_the_newer_one() -> None:
    setup = Setup()
    older, newer = open_session("a"), open_session("a", number=2)
    setup.control.session_opened(older)
    setup.control.session_opened(newer)
    setup.control.session_closed(older, "fenced")
    assert setup.control.sessions() == {"a": newer}
    setup.control.session_closed(newer, "ended")
    assert not setup.control.sessions()
    assert setup.control.hello(values.NodeName("a")) is newer.hello, "a node that is away is still known"
    assert setup.control.seen() == {"a"}


async def test_a_ttl_that_is_over_removes_without_any_news() -> None:
    async with running(Setup()) as setup:
        setup.inventory.add("a")
        setup.plans.add("short", ttl_ms=300, created_ns=time.time_ns())
        opened = open_session("a")
        setup.control.session_opened(opened)
        await setup.round()
        assert names(await push_of(opened)) == ["short"]
        assert names(await push_of(opened)) == [], "nothing but time has passed"
        (candidate,) = setup.plans.plans
        assert candidate.policy is not None and controller.expired(candidate.policy, time.time_ns())


async def test_the_first_push_waits_for_all_plans_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "FIRST_PLANS_SECONDS", 0.2)
    setup = Setup()
    setup.plans.idle = False
    began = time.monotonic()
    async with running(setup):
        setup.inventory.add("a")
        setup.plans.add("p")
        opened = open_session("a")
        setup.control.session_opened(opened)
        await asyncio.wait_for(setup.control.decided.wait(), 5)
        assert time.monotonic() - began >= 0.2
        assert names(await push_of(opened)) == ["p"]


async def test_a_node_that_left_the_cluster_is_forgotten() -> None:
    async with running(Setup()) as setup:
        setup.inventory.add("a", "b")
        setup.plans.add("p")
        opened = open_session("a", cpus=64)
        setup.control.session_opened(opened)
        await setup.round()
        assert setup.control.most_cpus() == 64
        setup.control.session_closed(opened, "gone")
        del setup.inventory.found["a"]
        await setup.round()
        late = open_session("a", number=2)  # an agent that outlives its Node object says Hello once more
        setup.control.session_opened(late)
        setup.control.session_closed(late, "gone")
        await setup.round()
        assert not setup.control.seen() and not setup.control.runs(values.NodeName("a"), values.PolicyUid("p"))
        assert setup.control.most_cpus() == 1


async def test_before_any_decision_nobody_is_desired() -> None:
    setup = Setup()
    assert setup.control.desired() == {}
    setup.store.observe("ProbePolicy", raw_policy("p"), gone=False)
    assert setup.control.policies() == 1


async def test_a_pods_address_reaches_the_nodes_that_share_endpoints_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller, "ENDPOINTS_SECONDS", 0.001)
    web = inventory.Pod(values.PodUid("u-web"), "shop", {}, values.NodeName("b"), "web", None, {}, False, ("10.0.0.1",))
    for shares in (endpoints.UID, ""):
        async with running(Setup()) as setup:
            setup.inventory.add("a", "b")
            setup.plans.add("p", shares=shares)
            opened = open_session("a", addresses=setup.inventory.endpoints)
            setup.control.session_opened(opened)
            await setup.round()
            first = await push_of(opened)
            assert first.endpoints.whole is bool(shares)
            opened.take_status(ready(first))
            setup.inventory.endpoints.put(web.uid, web.addresses)
            setup.control.pod_changed(web, False)  # on a node that has no session
            if shares:
                told = (await push_of(opened)).endpoints
                assert (told.whole, told.addresses) == (False, endpoints.packed("10.0.0.1"))
            else:
                await setup.round()
                assert waits(opened)
