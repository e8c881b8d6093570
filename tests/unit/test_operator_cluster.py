"""What the operator keeps in the cluster: its Lease, its CA, its key; documents and Events as they are written."""

from __future__ import annotations

import asyncio
import base64
import datetime
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from probefleet_operator import api, authority, election, errors, kube, query

from tests.fakes.api_server import FakeApiServer

LEASE = "/apis/coordination.k8s.io/v1/namespaces/probefleet/leases/op"
SECRET = "/api/v1/namespaces/probefleet/secrets/authority"
NOW = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(coroutine: Any) -> AsyncIterator[asyncio.Task[Any]]:
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        # Again and again: aiohttp can lose a cancellation that meets a request's timeout, and here those take 20 ms.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.05)
        await asyncio.gather(task, return_exceptions=True)


# The Lease and its term.


def candidate(client: api.Api, identity: str) -> election.Election:
    return election.Election(client, namespace="probefleet", lease="op", identity=identity)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(election, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(election.reflector, "jittered", lambda seconds: seconds / 100)


async def test_one_leads_and_the_other_takes_over_with_a_higher_term() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        first, second = candidate(client, "a"), candidate(client, "b")
        term = await first.acquire()
        async with running(second.acquire()) as waiting:
            await until(lambda: second.reachable)
            assert not waiting.done()
            await first.release()
            assert await waiting > term


async def test_a_lease_that_nobody_renews_is_taken_after_its_duration() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        dead, second = candidate(client, "dead"), candidate(client, "b")
        term = await dead.acquire()
        fake.objects[LEASE]["spec"]["leaseDurationSeconds"] = 0.3
        assert await second.acquire() > term


async def test_a_lease_that_is_renewed_is_not_taken() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        first, second = candidate(client, "a"), candidate(client, "b")
        await first.acquire()
        async with running(first.hold()), running(second.acquire()) as waiting:
            writes = len(fake.writes("PUT"))
            await until(lambda: len(fake.writes("PUT")) > writes + 5)
            assert not waiting.done()


async def test_who_has_lost_the_lease_stops() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        first = candidate(client, "a")
        await first.acquire()
        stolen = fake.objects[LEASE]
        fake.put(LEASE, {**stolen, "spec": {**stolen["spec"], "holderIdentity": "b"}})
        with pytest.raises(errors.LeadershipLost, match="'b'"):
            async with asyncio.timeout(5):
                await first.hold()


async def test_somebody_elses_annotation_on_the_lease_is_no_loss() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        first = candidate(client, "a")
        await first.acquire()
        async with running(first.hold()) as held:
            fake.put(LEASE, {**fake.objects[LEASE], "note": "x"})
            writes = len(fake.writes("PUT"))
            await until(lambda: len(fake.writes("PUT")) > writes + 3)
            assert not held.done()


async def test_while_the_api_server_is_away_the_leader_stays() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        first = candidate(client, "a")
        await first.acquire()
        async with running(first.hold()) as held:
            fake.away = True
            asked = len(fake.requests)
            await until(lambda: len(fake.requests) > asked + 5)
            assert not held.done()
            fake.away = False
            asked = len(fake.requests)
            await until(lambda: len(fake.requests) > asked + 3)
            assert not held.done()


async def test_terms_grow_even_where_somebody_deleted_the_lease() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        term = await candidate(client, "a").acquire()
        fake.delete(LEASE)
        await asyncio.sleep(1.0)  # the term's clock has seconds
        assert await candidate(client, "b").acquire() > term


async def test_two_that_come_at_once_do_not_share_a_term() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        terms = [candidate(client, name) for name in "abc"]
        async with running(terms[0].acquire()), running(terms[1].acquire()), running(terms[2].acquire()):
            await until(lambda: any(each.term for each in terms))
            await asyncio.sleep(0.1)
        assert sum(each.term > 0 for each in terms) == 1


# The CA.


def years(of: authority.Issuer) -> datetime.timedelta:
    certificate = of.certificate()
    return certificate.not_valid_after_utc - certificate.not_valid_before_utc


def test_a_young_ca_is_left_alone() -> None:
    state = authority.Authorities(authority.new_issuer(NOW))
    assert authority.rotate(state, NOW + datetime.timedelta(days=100)) == state


def test_rotation_shows_the_next_ca_before_it_signs_and_the_old_one_after() -> None:
    state = authority.Authorities(authority.new_issuer(NOW))
    late = NOW + datetime.timedelta(days=250)
    announced = authority.rotate(state, late)
    assert announced.active == state.active, "agents do not know the next one yet"
    assert announced.next is not None
    assert announced.next.certificate_pem in announced.bundle(late)
    assert authority.rotate(announced, late + datetime.timedelta(minutes=30)) == announced
    later = late + datetime.timedelta(hours=2)
    promoted = authority.rotate(announced, later)
    assert promoted.active == announced.next
    assert state.active.certificate_pem in promoted.bundle(later), "certificates that it signed are still in use"
    assert state.active.certificate_pem not in promoted.bundle(NOW + datetime.timedelta(days=400))


def test_a_ca_that_ended_is_replaced_at_once() -> None:
    state = authority.Authorities(authority.new_issuer(NOW))
    much_later = NOW + datetime.timedelta(days=500)
    fresh = authority.rotate(state, much_later)
    assert fresh.active.certificate().not_valid_after_utc > much_later


def test_authorities_survive_the_secret() -> None:
    state = authority.rotate(authority.Authorities(authority.new_issuer(NOW)), NOW + datetime.timedelta(days=250))
    state = authority.Authorities(state.active, state.next, (authority.new_issuer(NOW).certificate_pem,))
    assert authority.from_secret_data(authority.to_secret_data(state)) == state


def test_keys_are_not_in_any_repr() -> None:
    issuer = authority.new_issuer(NOW)
    issued = authority.issue(issuer, ["localhost"], NOW)
    for text in (repr(issuer), repr(issued), repr(authority.Authorities(issuer))):
        assert "PRIVATE" not in text


def test_a_server_certificate_is_renewed_before_it_ends_and_never_outlives_its_ca() -> None:
    issuer = authority.new_issuer(NOW)
    late = issuer.certificate().not_valid_after_utc - datetime.timedelta(days=12)
    issued = authority.issue(issuer, ["10.0.0.1", "operator.probefleet.svc"], late)
    assert authority.not_after(issued.chain_pem) == issuer.certificate().not_valid_after_utc
    assert issued.renew_at < authority.not_after(issued.chain_pem)


async def test_the_ca_is_made_once_for_all_replicas() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        stores = [
            authority.AuthorityStore(
                client, namespace="probefleet", secret="authority", bundle="ca", names=("localhost",)
            )
            for _ in range(3)
        ]
        await asyncio.gather(*(each.refresh() for each in stores))
        bundle = fake.objects["/api/v1/namespaces/probefleet/configmaps/ca"]["data"]["ca.crt"]
        stored = base64.b64decode(fake.objects[SECRET]["data"]["ca.crt"]).decode()
        assert bundle == stored
        ends = {each.certificate().chain_pem.decode().split("-----BEGIN")[2] for each in stores}
        assert len(ends) == 1, "one CA signed them all"
        context = ssl.create_default_context(cadata=bundle)
        assert context.get_ca_certs()


async def test_a_secret_that_was_made_empty_by_a_chart_is_filled() -> None:
    fake = FakeApiServer()
    fake.put(SECRET, {"data": {"query.key": "a2V5"}})
    async with fake.running() as client:
        store = authority.AuthorityStore(
            client, namespace="probefleet", secret="authority", bundle="ca", names=("localhost",)
        )
        assert await store.refresh()
        assert not await store.refresh(), "nothing changed since"
        assert {"ca.crt", "ca.key", "query.key"} <= set(fake.objects[SECRET]["data"])
        assert await query.load_key(client, namespace="probefleet", secret="authority") == b"key"


# The query API's tokens.


def test_a_token_is_good_for_its_policy_in_its_hour_and_the_next() -> None:
    tokens = query.Tokens(b"key")
    token = tokens.of("uid-1", now=7200.0)
    assert tokens.good("uid-1", token, now=7200.0)
    assert tokens.good("uid-1", token, now=7200.0 + 3600)
    assert not tokens.good("uid-1", token, now=7200.0 + 7200)
    assert not tokens.good("uid-2", token, now=7200.0)
    assert not query.Tokens(b"other").good("uid-1", token, now=7200.0)
    assert not tokens.good("uid-1", "", now=7200.0)


# What is written, and when.


def document(value: int, *, body: bool = True) -> kube.Document:
    return kube.Document(
        kind="ProbeReport",
        path="/apis/x/v1/namespaces/shop/reports/calls",
        body={"metadata": {"name": "calls"}} if body else None,
        status={"status": {"value": value}},
    )


REPORT = "/apis/x/v1/namespaces/shop/reports/calls"


async def test_what_did_not_change_is_not_written_again() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        publisher = kube.Publisher(client)
        rendered = [0]

        def render() -> kube.Document:
            rendered[0] += 1
            return document(1)

        publisher.offer("report/1", render, interval_seconds=0.01)
        async with running(publisher.run()):
            await until(lambda: rendered[0] == 1)
            for count in range(2, 6):
                publisher.touch("report/1")
                await until(lambda count=count: rendered[0] == count)
        assert len(fake.writes()) == 2, "the object once, and its status once"


async def test_many_changes_are_one_write_an_interval() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        publisher = kube.Publisher(client)
        value = [0]
        publisher.offer("report/1", lambda: document(value[0], body=False), interval_seconds=0.3)
        async with running(publisher.run()):
            for value[0] in range(60):
                publisher.touch("report/1")
                await asyncio.sleep(0.01)
            await until(lambda: fake.objects[REPORT]["status"]["value"] == 59)
        assert len(fake.writes()) <= 5


async def test_a_failed_write_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube, "RETRY_SECONDS", 0.05)
    fake = FakeApiServer(away=True)
    async with fake.running() as client:
        publisher = kube.Publisher(client)
        publisher.offer("report/1", lambda: document(1), interval_seconds=0.01)
        async with running(publisher.run()):
            await until(lambda: len(fake.writes()) >= 2)
            fake.away = False
            await until(lambda: fake.objects.get(REPORT, {}).get("status") == {"value": 1})


async def test_one_document_that_cannot_be_rendered_does_not_silence_the_others() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        publisher = kube.Publisher(client)

        def broken() -> kube.Document:
            raise ZeroDivisionError

        publisher.offer("report/0", broken, interval_seconds=0.01)
        publisher.offer("report/1", lambda: document(1), interval_seconds=0.01)
        async with running(publisher.run()):
            await until(lambda: REPORT in fake.objects)


async def test_a_log_that_cannot_be_written_does_not_end_the_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        def __getattr__(self, _level: str) -> Any:
            raise OSError("no space left on device")

    monkeypatch.setattr(kube, "log", FullDisk())
    fake = FakeApiServer()
    async with fake.running() as client:
        publisher = kube.Publisher(client)
        failed = [0]

        def broken() -> kube.Document:
            failed[0] += 1
            raise ZeroDivisionError

        publisher.offer("report/0", broken, interval_seconds=0.01)
        async with running(publisher.run()):
            await until(lambda: failed[0] == 1)
            publisher.offer("report/1", lambda: document(1), interval_seconds=0.01)
            await until(lambda: REPORT in fake.objects)


async def test_only_the_report_that_was_written_is_deleted() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        publisher = kube.Publisher(client)
        publisher.offer("report/1", lambda: document(1), interval_seconds=0.01)
        async with running(publisher.run()):
            await until(lambda: "status" in fake.objects.get(REPORT, {}))
            publisher.withdraw("report/1", delete=True)
            await until(lambda: REPORT not in fake.objects)
            publisher.withdraw("report/1", delete=True)


def policy() -> dict[str, Any]:
    return {"metadata": {"name": "calls", "namespace": "shop", "uid": "u1", "resourceVersion": "5"}}


async def test_the_same_event_is_written_once() -> None:
    fake = FakeApiServer()
    async with fake.running() as client:
        recorder = kube.Recorder(client, instance="op-1")
        for _ in range(5):
            recorder.warn(policy(), "VerifierRefused", "node a: R1 invalid", action="Program")
        recorder.warn(policy(), "VerifierRefused", "x" * 5000, action="Program")
        async with running(recorder.run()):
            await until(lambda: len(fake.writes("POST")) == 2)
        events = [each for path, each in fake.objects.items() if "/events/" in path]
        assert max(len(each["note"]) for each in events) <= 1024
        assert events[0]["regarding"]["uid"] == "u1"


async def test_a_storm_of_events_is_dropped_not_kept() -> None:
    async with FakeApiServer().running() as client:
        recorder = kube.Recorder(client, instance="op-1")
        for number in range(10_000):
            recorder.warn(policy(), "VerifierRefused", f"node {number}", action="Program")
        assert recorder._queue.qsize() == 200
        assert len(recorder._seen) <= kube.MAX_EVENTS_REMEMBERED
