"""The Kubernetes API over one aiohttp session: JSON in, JSON out, errors of ours.

Called by everything here that reads or writes the cluster, except kopf, which has a session of its own made from the
same `Access`. A client library would parse every pod into objects of hundreds of fields; lists of pods are the
operator's largest input, so they are trimmed straight from JSON (see reflector.py).
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp

from probefleet_operator import errors

# JSON as it comes from the API server. Adapters take out what they need, with types.
Json = dict[str, Any]

FIELD_MANAGER = "probefleet-operator"
GROUP_PATH = "/apis/probefleet.io/v1alpha1"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
METADATA_WATCH = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach an API server and who we are there. Files, not contents: they are rotated under us."""

    server: str
    ca_file: Path | None = None
    token_file: Path | None = None
    token: str | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    verify: bool = True

    def bearer(self) -> str | None:
        """The token to show now; read each time, because the kubelet replaces the file."""
        if self.token_file is not None:
            return self.token_file.read_text().strip()
        return self.token

    def tls(self) -> ssl.SSLContext | None:
        """Verification of the server and our client certificate, or None for plain HTTP."""
        if not self.server.startswith("https:"):
            return None
        context = ssl.create_default_context(cafile=str(self.ca_file) if self.ca_file else None)
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate_file:
            context.load_cert_chain(str(self.certificate_file), str(self.key_file) if self.key_file else None)
        return context


def in_cluster(environment: Mapping[str, str]) -> Access:
    """Access by the pod's own ServiceAccount; raises SettingsError outside a pod."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (SERVICE_ACCOUNT / "token").exists():
        raise errors.SettingsError(
            "This is no pod with a ServiceAccount (KUBERNETES_SERVICE_HOST or its token file is missing). "
            "Outside a cluster give --kubeconfig FILE."
        )
    bracketed = f"[{host}]" if ":" in host else host
    return Access(
        server=f"https://{bracketed}:{port}",
        ca_file=SERVICE_ACCOUNT / "ca.crt",
        token_file=SERVICE_ACCOUNT / "token",
    )


def error_of(status: int, body: bytes, what: str) -> errors.ApiError:
    """The API server's Status object, as one of our errors."""
    try:
        answer = json.loads(body)
        message, reason = str(answer.get("message", "")), str(answer.get("reason", ""))
    except (ValueError, AttributeError):
        message, reason = body[:200].decode(errors="replace"), ""
    text = f"{what}: {status} {reason}: {message}"
    kinds: dict[int, type[errors.ApiError]] = {404: errors.NotFound, 409: errors.Conflict, 410: errors.Gone}
    kind = kinds.get(status)
    if kind is None:
        kind = errors.ApiUnavailable if status == 429 or status >= 500 else errors.ApiError
    return kind(text, status=status, reason=reason)


class Api:
    """One HTTP session to the API server. An async context manager; one per process."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=self.access.tls() or True, limit=64, keepalive_timeout=60)
        self._session = aiohttp.ClientSession(base_url=self.access.server, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            # aiohttp closes TLS transports in the loop's next turns.
            await asyncio.sleep(0)
            self._session = None

    def _headers(self, extra: Mapping[str, str]) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "probefleet-operator", **extra}
        if bearer := self.access.bearer():
            headers["Authorization"] = f"Bearer {bearer}"
        return headers

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Json | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        params: Mapping[str, str] | None = None,
        timeout_seconds: float = 30,
    ) -> Json:
        """One request; raises ApiError and its kinds."""
        assert self._session is not None, "used outside its context"
        what = f"{method} {path}"
        try:
            async with self._session.request(
                method,
                path,
                params=params,
                data=None if body is None else json.dumps(body, separators=(",", ":")).encode(),
                headers=self._headers({"Content-Type": content_type, "Accept": accept}),
                timeout=aiohttp.ClientTimeout(total=timeout_seconds, connect=10),
            ) as response:
                data = await response.read()
                if response.status >= 400:
                    raise error_of(response.status, data, what)
                answer: Json = json.loads(data)
                return answer
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as problem:
            raise errors.ApiUnavailable(f"{what}: {type(problem).__name__}: {problem}") from problem

    async def get(self, path: str, **options: Any) -> Json:
        """GET."""
        return await self.request("GET", path, **options)

    async def apply(self, path: str, body: Json, *, params: Mapping[str, str] | None = None) -> Json:
        """Server-side apply: we own exactly the fields in `body`."""
        return await self.request(
            "PATCH",
            path,
            body=body,
            content_type="application/apply-patch+yaml",  # JSON is YAML
            params={"fieldManager": FIELD_MANAGER, "force": "true", **(params or {})},
        )

    async def pages(self, path: str, *, accept: str = "application/json", limit: int = 500) -> AsyncIterator[Json]:
        """The pages of one consistent list; the last page's metadata.resourceVersion is where to watch from."""
        token = ""
        while True:
            params = {"limit": str(limit)} | ({"continue": token} if token else {})
            page = await self.request("GET", path, params=params, accept=accept, timeout_seconds=60)
            yield page
            token = page.get("metadata", {}).get("continue", "")
            if not token:
                return

    async def watch(
        self, path: str, *, resource_version: str, timeout_seconds: int, accept: str = "application/json"
    ) -> AsyncIterator[Json]:
        """Watch events until the server ends the watch; raises Gone when the version is too old."""
        assert self._session is not None, "used outside its context"
        params = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_seconds),
        }
        what = f"WATCH {path}"
        try:
            async with self._session.get(
                path,
                params=params,
                headers=self._headers({"Accept": accept}),
                # The server ends it; the margin notices a connection that died without a word.
                timeout=aiohttp.ClientTimeout(total=timeout_seconds + 30, connect=10),
            ) as response:
                if response.status >= 400:
                    raise error_of(response.status, await response.read(), what)
                pending = b""
                # Not readline(): it refuses lines longer than its buffer, and a pod may be.
                async for chunk in response.content.iter_any():
                    *lines, pending = (pending + chunk).split(b"\n")
                    for line in lines:
                        if line:
                            event: Json = json.loads(line)
                            if event.get("type") == "ERROR":
                                status = event.get("object", {})
                                raise error_of(int(status.get("code", 500)), json.dumps(status).encode(), what)
                            yield event
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as problem:
            raise errors.ApiUnavailable(f"{what}: {type(problem).__name__}: {problem}") from problem
