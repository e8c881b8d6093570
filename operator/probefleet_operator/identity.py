"""Who is at the other end of a stream: a projected ServiceAccount token, reviewed by the API server.

`Reviewer.identify(token)` is called by stream.py before a session begins and again while it lives. The TokenReview says
which pod on which node the token was made for (Kubernetes ≥ 1.30); an agent may speak for that node alone. Answers are
cached by the token's hash until shortly before the token ends, so that an agent that reconnects costs no review; the
token itself is neither kept nor logged.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections import OrderedDict
from dataclasses import dataclass

from probefleet_operator import api, errors

MAX_CACHED = 20_000
CACHE_SECONDS = 600.0  # a deleted pod's token is refused at the latest after this
MAX_TOKEN_BYTES = 16_384
CONCURRENT_REVIEWS = 32  # 5,000 agents that come at once must not flood the API server
EXTRA = "authentication.kubernetes.io/"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a token proves."""

    node: str
    node_uid: str
    pod: str
    pod_uid: str
    expires_at: float  # wall clock, seconds

    def as_pod(self, *, namespace: str) -> api.Json:
        """The agent's pod, as far as an Event has to name it."""
        metadata = {"name": self.pod, "namespace": namespace, "uid": self.pod_uid}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}


def expiry_of(token: str, *, default: float) -> float:
    """The `exp` claim of a JWT that the API server has just found good; `default` where it has none."""
    try:
        payload = token.split(".", 2)[1:2][0]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    except (IndexError, ValueError, KeyError, TypeError):
        return default


def identity_from(review: api.Json, *, audience: str, account: str, token: str, now: float) -> Identity:
    """Judge a TokenReview's answer; raises IdentityRefused. Pure."""
    status = review.get("status") or {}
    if not status.get("authenticated"):
        raise errors.IdentityRefused(
            f"the API server does not accept the token: {status.get('error', 'no reason given')}"
        )
    if audience not in (status.get("audiences") or ()):
        raise errors.IdentityRefused(f"the token is not made for audience {audience!r}")
    user = status.get("user") or {}
    if user.get("username") != account:
        raise errors.IdentityRefused(f"the token is {user.get('username')!r}'s; agents are {account!r}")
    extra = user.get("extra") or {}

    def claim(name: str) -> str:
        values = extra.get(EXTRA + name) or []
        return str(values[0]) if len(values) == 1 else ""

    if not claim("node-name"):
        raise errors.IdentityRefused(
            "the token names no node: it must be a projected token of a scheduled pod, and Kubernetes 1.30 or newer"
        )
    return Identity(
        node=claim("node-name"),
        node_uid=claim("node-uid"),
        pod=claim("pod-name"),
        pod_uid=claim("pod-uid"),
        expires_at=expiry_of(token, default=now + CACHE_SECONDS),
    )


class Reviewer:
    """TokenReview with a cache."""

    def __init__(self, client: api.Api, *, audience: str, account: str) -> None:
        """`account` is "system:serviceaccount:NAMESPACE:NAME"."""
        self._client, self._audience, self._account = client, audience, account
        self._cache: OrderedDict[bytes, tuple[float, Identity]] = OrderedDict()
        self._slots = asyncio.Semaphore(CONCURRENT_REVIEWS)

    async def identify(self, token: str, *, fresh: bool = False) -> Identity:
        """The identity that a token proves; raises IdentityRefused, or ApiUnavailable where nobody can tell now."""
        if not token or len(token) > MAX_TOKEN_BYTES:
            raise errors.IdentityRefused("the call metadata has no `authorization: Bearer TOKEN` of a usable length")
        digest = hashlib.sha256(token.encode()).digest()
        now = time.time()
        if not fresh and (cached := self._cache.get(digest)) and now < cached[0]:
            return cached[1]
        async with self._slots:
            review = await self._client.request(
                "POST",
                "/apis/authentication.k8s.io/v1/tokenreviews",
                body={
                    "apiVersion": "authentication.k8s.io/v1",
                    "kind": "TokenReview",
                    "spec": {"token": token, "audiences": [self._audience]},
                },
            )
        try:
            identity = identity_from(review, audience=self._audience, account=self._account, token=token, now=now)
        except errors.IdentityRefused:
            self._cache.pop(digest, None)
            raise
        if identity.expires_at <= now:
            raise errors.IdentityRefused("the token has expired")
        self._cache[digest] = (min(now + CACHE_SECONDS, identity.expires_at), identity)
        self._cache.move_to_end(digest)
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return identity
