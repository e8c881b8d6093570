"""Uninstalling: everything is deleted, and nobody says it is done before every agent has said that it runs nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from probefleet_operator import api, controller, drain, objects
from probefleet_wire.v1 import stream_pb2

from tests.fakes.api_server import FakeApiServer
from tests.fakes.operator_parts import FakeInventory, FakePlans, open_session, raw_policy

SHOP = f"{api.GROUP_PATH}/namespaces/shop"
NOTHING = {"done": True, "policies": 0, "busyNodes": 0, "busy": [], "awayNodes": 0, "away": []}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "ASK_SECONDS", 0.01)


def leader(*, complete: bool = True) -> controller.Controller:
    store = objects.ObjectStore()
    if complete:
        for kind in ("ProbePolicy", "ProbeMap"):
            store.relisted(kind, [], known_before=[])
    made = controller.Controller(store, term=7)
    made.connect(FakeInventory(), FakePlans(), on_decided=lambda: None)
    return made


# What the operator answers.


async def test_a_node_is_busy_until_it_says_that_it_has_neither_program_nor_map() -> None:
    control = leader()
    opened = open_session("a", applied=(7, 1))
    control.session_opened(opened)
    assert drain.control_progress(control).busy == ("a",), "it has not said what it runs"
    runs = stream_pb2.PolicyStatus(policy_uid="p", digest="d")
    opened.take_status(stream_pb2.Status(policies=[runs]))
    assert drain.control_progress(control).busy == ("a",)
    opened.take_status(stream_pb2.Status(probe_maps=[stream_pb2.MapStatus(uid="m", kernel_map_id=3)]))
    assert drain.control_progress(control).busy == ("a",), "a pinned map is left"
    opened.take_status(stream_pb2.Status())
    assert drain.control_progress(control).done


async def test_a_node_that_was_there_and_is_not_keeps_it_from_being_done() -> None:
    control = leader()
    opened = open_session("a")
    control.session_opened(opened)
    control.session_closed(opened, "gone")
    progress = drain.control_progress(control)
    assert (progress.away, progress.busy, progress.done) == (("a",), (), False)
    assert progress.to_json()["awayNodes"] == 1


async def test_a_policy_that_is_left_keeps_it_from_being_done() -> None:
    control = leader()
    control._store.observe("ProbePolicy", raw_policy("p"), gone=False)
    assert drain.control_progress(control).policies == 1 and not drain.control_progress(control).done


async def test_ten_thousand_nodes_are_a_short_answer() -> None:
    progress = drain.Progress(0, tuple(f"n{i}" for i in range(10_000)), ())
    assert progress.to_json()["busyNodes"] == 10_000 and len(progress.to_json()["busy"]) == drain.MAX_NAMED


@pytest.mark.parametrize("control", [None, leader(complete=False)])
async def test_who_does_not_lead_or_know_everything_says_nothing(control: controller.Controller | None) -> None:
    async with served(drain.Drain(lambda: control).routes()) as url, api_of(FakeApiServer()) as client:
        lines: list[str] = []
        assert await drain.drain(client, url, 0.1, lines.append, namespace="system") == 1
        assert "does not lead, or has not listed everything" in "\n".join(lines)


# What the hook does.


@asynccontextmanager
async def served(routes: list[web.RouteDef]) -> AsyncIterator[str]:
    """An HTTP server on loopback with these routes; its URL."""
    application = web.Application()
    application.add_routes(routes)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def api_of(fake: FakeApiServer) -> AsyncIterator[api.Api]:
    async with fake.running() as client:
        yield client


def answering(*answers: dict[str, Any]) -> list[web.RouteDef]:
    """An operator that gives these answers in turn, the last one for ever."""
    left = list(answers)

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(left.pop(0) if len(left) > 1 else left[0])

    return [web.get("/drainz", answer)]


async def test_everything_is_deleted_and_it_waits_for_the_last_node() -> None:
    fake = FakeApiServer()
    for path in ("probepolicies/a", "probepolicies/b", "probemaps/m"):
        fake.put(f"{SHOP}/{path}", {"metadata": {"namespace": "shop"}})
    fake.put("/api/v1/namespaces/system/pods/probefleet-test", {})  # what `helm test` left
    lines: list[str] = []
    busy = {**NOTHING, "done": False, "busyNodes": 1, "busy": ["a"]}
    async with served(answering(busy, busy, NOTHING)) as url, api_of(fake) as client:
        assert await drain.drain(client, url, 5, lines.append, namespace="system") == 0
    assert lines == ["deleted 2 probepolicies", "deleted 1 probemaps", "no program, map or pin is left on any node"]
    assert not fake.objects


async def test_nodes_that_are_away_are_named_and_do_not_hold_up_the_rest() -> None:
    lines: list[str] = []
    away = {**NOTHING, "done": False, "awayNodes": 1, "away": ["lost"]}
    async with served(answering(away)) as url, api_of(FakeApiServer()) as client:
        assert await drain.drain(client, url, 0.2, lines.append, namespace="system") == 0
    assert "Their pins stay until `probefleet purge` or a reboot: ['lost']" in lines[-1]


async def test_a_node_that_does_not_get_empty_stops_the_uninstallation() -> None:
    lines: list[str] = []
    busy = {**NOTHING, "done": False, "busyNodes": 1, "busy": ["stuck"]}
    async with served(answering(busy)) as url, api_of(FakeApiServer()) as client:
        assert await drain.drain(client, url, 1, lines.append, namespace="system") == 1
    assert "1 nodes still remove ['stuck']" in lines[-2]
    assert "helm uninstall --no-hooks" in lines[-1]


async def test_an_operator_that_does_not_answer_stops_it_too() -> None:
    lines: list[str] = []
    async with api_of(FakeApiServer()) as client:
        assert await drain.drain(client, "http://127.0.0.1:9", 0.1, lines.append, namespace="system") == 1
    assert "http://127.0.0.1:9/drainz: " in lines[-2]
