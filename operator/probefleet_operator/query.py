"""The query API: what does not fit into a ProbeReport, for `kubectl probefleet`.

Reached through the API server's service proxy, so callers need RBAC's `services/proxy` and no port is opened. A caller
shows, in the header X-Probefleet-Token, the token that stands in the ProbeReport's `status.query.token`: who may read a
policy's report may read its events and nodes, and of no other policy's.

All below /query/v1/namespaces/NAMESPACE/probepolicies/NAME:

- `/report`: the ProbeReport of now, as it would be written.
- `/nodes`: `{"nodes": [{"name", "state", "connected", "kernel", "agent", "generation", "reason", "message", "log",
  "sampleAgeSeconds"}]}`, all of them.
- `/events?output=NAME&since=CURSOR&follow=true`: JSON lines `{"output", "cursor", "missed", "records": […]}`.
`cursor` is   what to ask with as `since` after a break; `missed` says how many records had been dropped before they
were asked for.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from aiohttp import web
from probefleet_core import values

from probefleet_operator import api, authority, errors

HEADER = "X-Probefleet-Token"
TOKEN_SECONDS = 3600
KEY = "query.key"
MAX_FOLLOWERS = 64
FOLLOW_SECONDS = 0.25  # a follower hears of news at most this often
IDLE_LINE_SECONDS = 15.0  # an empty line now and then keeps proxies from closing


class Source(Protocol):
    """Where answers come from (results.py)."""

    def find(self, namespace: str, name: str) -> values.PolicyUid | None:
        """The policy of this name, if there is one."""

    def live_report(self, uid: values.PolicyUid) -> api.Json | None:
        """Its ProbeReport of now."""

    def node_rows(self, uid: values.PolicyUid) -> list[api.Json]:
        """Its nodes."""

    def event_outputs(self, uid: values.PolicyUid) -> tuple[str, ...]:
        """Its outputs that are events."""

    def event_page(self, uid: values.PolicyUid, output: str, cursor: int) -> api.Json:
        """Records since a cursor: cursor, missed, records."""

    async def wait_news(self, seconds: float) -> None:
        """Return when a batch came, or after that time."""


class Tokens:
    """Tokens of policies: an HMAC over policy and hour, so nothing is stored but the key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, uid: str, *, now: float | None = None, ago: int = 0) -> str:
        """The token of a policy in this hour, or `ago` hours before."""
        hour = int((time.time() if now is None else now) // TOKEN_SECONDS) - ago
        digest = hmac.new(self._key, f"{uid}\0{hour}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest[:24]).decode()

    def good(self, uid: str, shown: str, *, now: float | None = None) -> bool:
        """Whether a token is this hour's or the last one's."""
        return any(hmac.compare_digest(self.of(uid, now=now, ago=ago), shown) for ago in (0, 1))


async def load_key(client: api.Api, *, namespace: str, secret: str) -> bytes:
    """The key of tokens, from the Secret; made where there is none. Raises ApiError."""
    path = f"/api/v1/namespaces/{namespace}/secrets"
    fresh = {KEY: base64.b64encode(secrets.token_bytes(32)).decode()}
    try:
        found = await client.get(f"{path}/{secret}")
    except errors.NotFound:
        body: api.Json = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": secret, "namespace": namespace, "labels": authority.LABELS},
            "type": "Opaque",
            "data": fresh,
        }
        found = await client.request("POST", path, body=body)
    if KEY not in (found.get("data") or {}):
        found = await client.request(
            "PATCH", f"{path}/{secret}", body={"data": fresh}, content_type="application/merge-patch+json"
        )
    return base64.b64decode(found["data"][KEY])


class QueryApi:
    """The routes; `source` and `tokens` are None until this process leads."""

    def __init__(self) -> None:
        self.source: Source | None = None
        self.tokens: Tokens | None = None
        self._followers = 0

    def routes(self) -> list[web.RouteDef]:
        """For the HTTP server."""
        base = "/query/v1/namespaces/{namespace}/probepolicies/{name}"
        return [
            web.get(f"{base}/report", self._authorized(self._report)),
            web.get(f"{base}/nodes", self._authorized(self._nodes)),
            web.get(f"{base}/events", self._authorized(self._events)),
        ]

    def _authorized(
        self, answer: Callable[[web.Request, Source, values.PolicyUid], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            source, tokens = self.source, self.tokens
            if source is None or tokens is None:
                return _problem(503, "this replica does not lead: try again")
            uid = source.find(request.match_info["namespace"], request.match_info["name"])
            # One answer for "no such policy" and "wrong token": who may not read it learns nothing of it.
            if uid is None or not tokens.good(uid, request.headers.get(HEADER, "")):
                return _problem(403, f"show the ProbeReport's status.query.token in the header {HEADER}")
            return await answer(request, source, uid)

        return handle

    async def _report(self, _: web.Request, source: Source, uid: values.PolicyUid) -> web.Response:
        report = source.live_report(uid)
        return web.json_response(report) if report is not None else _problem(404, "no sample has come yet")

    async def _nodes(self, _: web.Request, source: Source, uid: values.PolicyUid) -> web.Response:
        return web.json_response({"nodes": source.node_rows(uid)})

    async def _events(self, request: web.Request, source: Source, uid: values.PolicyUid) -> web.StreamResponse:
        outputs = source.event_outputs(uid)
        wanted = request.query.get("output")
        if wanted is not None and wanted not in outputs:
            return _problem(404, f"no output {wanted!r} of events; there are: {', '.join(outputs) or 'none'}")
        if not outputs:
            return _problem(404, "this policy has no output of events")
        try:
            since = int(request.query.get("since", "0"))
        except ValueError:
            return _problem(400, "since must be the cursor of an earlier line")
        follow = request.query.get("follow", "false").lower() == "true"
        if follow and self._followers >= MAX_FOLLOWERS:
            return _problem(429, f"{MAX_FOLLOWERS} others follow events already")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        self._followers += 1
        try:
            cursors = dict.fromkeys([wanted] if wanted else outputs, since)
            await self._lines(response, source, uid, cursors, follow=follow)
        except ConnectionError:
            pass  # the caller has gone
        finally:
            self._followers -= 1
        return response

    async def _lines(
        self,
        response: web.StreamResponse,
        source: Source,
        uid: values.PolicyUid,
        cursors: dict[str, int],
        *,
        follow: bool,
    ) -> None:
        quiet_since = time.monotonic()
        while True:
            wrote = False
            for output, cursor in cursors.items():
                try:
                    page = source.event_page(uid, output, cursor)
                except KeyError:
                    return  # the policy or the output has gone
                cursors[output] = page["cursor"]
                if page["records"] or page["missed"]:
                    wrote = True
                    await response.write(json.dumps({"output": output, **page}).encode() + b"\n")
            if not follow:
                return
            if wrote:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > IDLE_LINE_SECONDS:
                quiet_since = time.monotonic()
                await response.write(b"\n")
            await asyncio.sleep(FOLLOW_SECONDS)
            await source.wait_news(IDLE_LINE_SECONDS)


def _problem(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)
