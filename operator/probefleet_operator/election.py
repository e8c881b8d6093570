"""One operator at a time: a Lease, and the term that fences the ones before.

kopf's peering is no election (equal priorities all pause), and the client library's asynchronous LeaseLock is broken,
so this is the algorithm of client-go in our words: write the Lease with our name by compare-and-swap on its
resourceVersion; renew it; whoever sees it unrenewed for its whole duration *by their own clock* may take it.

The **term** stands in an annotation of the Lease and grows with every acquisition in the same compare-and-swap, so no
two processes ever push with one term. It is at least the Unix time, so it grows even where somebody deleted the Lease.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from dataclasses import dataclass

import structlog

from probefleet_operator import api, errors, reflector

log = structlog.get_logger(__name__)

DURATION_SECONDS = 15
RENEW_SECONDS = 5.0
RENEW_DEADLINE_SECONDS = 10.0  # not renewed for so long: stop acting before others may start
TERM = "probefleet.io/term"


@dataclass(frozen=True, slots=True)
class _Observed:
    """A Lease as it was seen, and when it was first seen so."""

    holder: str
    renewed: str
    seen_at: float


class Election:
    """This process's candidacy."""

    def __init__(self, client: api.Api, *, namespace: str, lease: str, identity: str) -> None:
        """`identity` must differ between processes that can live at the same time."""
        self._client = client
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._namespace, self._lease, self._identity = namespace, lease, identity
        self._observed: _Observed | None = None
        self._resource: api.Json = {}
        self.term = 0
        self.reachable = False  # the last attempt had an answer: a standby with this is a healthy standby

    async def acquire(self) -> int:
        """Wait until this process leads; returns its term."""
        while True:
            try:
                taken = await self._try_take()
                self.reachable = True
                if taken:
                    log.info("leading", term=self.term, identity=self._identity)
                    return self.term
            except errors.Conflict:
                continue  # somebody wrote between our read and write: read again
            except errors.ApiError as problem:
                self.reachable = False
                log.warning("cannot reach the Lease", error=str(problem))
            await asyncio.sleep(reflector.jittered(2.0))

    async def hold(self) -> None:
        """Renew for ever; raises LeadershipLost when others may have taken over."""
        renewed_at = time.monotonic()
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                self._resource = await self._write(self._spec(self._resource))
                renewed_at = time.monotonic()
            except errors.Conflict:
                await self._look_who_holds()
            except errors.ApiError as problem:
                log.warning("cannot renew the Lease", error=str(problem))
                # While the API server is away nobody else can take the Lease either: to end this process then would
                # gain nothing and lose the sessions. Only an answer from it decides.
                if time.monotonic() - renewed_at > RENEW_DEADLINE_SECONDS and not isinstance(
                    problem, errors.ApiUnavailable
                ):
                    raise errors.LeadershipLost(f"the Lease could not be renewed: {problem}") from problem

    async def _look_who_holds(self) -> None:
        """Somebody wrote the Lease: a successor, or only an annotation."""
        try:
            current = await self._client.get(f"{self._collection}/{self._lease}")
        except errors.ApiError as problem:
            log.warning("cannot read the Lease", error=str(problem))
            return
        holder = (current.get("spec") or {}).get("holderIdentity")
        if holder != self._identity:
            raise errors.LeadershipLost(f"the Lease is {holder!r}'s now")
        self._resource = current

    async def release(self) -> None:
        """Give the Lease up, so that the next one need not wait; best effort."""
        if not self.term:
            return
        body = dict(self._resource)
        body["spec"] = dict(body.get("spec") or {}) | {"holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            await self._client.request("PUT", f"{self._collection}/{self._lease}", body=body, timeout_seconds=1.0)
        except errors.ApiError as problem:
            log.info("the Lease was not released", error=str(problem))

    async def _try_take(self) -> bool:
        path = f"{self._collection}/{self._lease}"
        try:
            current = await self._client.get(path)
        except errors.NotFound:
            current = await self._client.request(
                "POST",
                self._collection,
                body={
                    "apiVersion": "coordination.k8s.io/v1",
                    "kind": "Lease",
                    "metadata": {"name": self._lease, "namespace": self._namespace},
                },
            )
        spec = current.get("spec") or {}
        holder, renewed = spec.get("holderIdentity") or "", spec.get("renewTime") or ""
        if holder and holder != self._identity:
            now = time.monotonic()
            if self._observed is None or (self._observed.holder, self._observed.renewed) != (holder, renewed):
                self._observed = _Observed(holder, renewed, now)
            if now - self._observed.seen_at < float(spec.get("leaseDurationSeconds") or DURATION_SECONDS):
                return False
        stored = int((current["metadata"].get("annotations") or {}).get(TERM, "0"))
        term = max(stored + 1, int(time.time()))
        body = self._spec(current)
        body["spec"]["acquireTime"] = body["spec"]["renewTime"]
        body["spec"]["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
        body["metadata"] = dict(body["metadata"])
        body["metadata"]["annotations"] = dict(body["metadata"].get("annotations") or {}) | {TERM: str(term)}
        self._resource = await self._write(body)
        self.term = term
        return True

    def _spec(self, current: api.Json) -> api.Json:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = dict(current.get("spec") or {})
        spec |= {"holderIdentity": self._identity, "leaseDurationSeconds": DURATION_SECONDS, "renewTime": now}
        return {**current, "spec": spec}

    async def _write(self, body: api.Json) -> api.Json:
        """PUT carries the resourceVersion that was read: the compare-and-swap."""
        return await self._client.request(
            "PUT", f"{self._collection}/{self._lease}", body=body, timeout_seconds=RENEW_SECONDS
        )
