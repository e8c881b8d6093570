"""A Kubernetes API server small enough to break on purpose.

Models: GET, POST, PUT with resourceVersion compare-and-swap, merge-patch, apply (as a merge that creates), DELETE,
lists in pages, watches with bookmarks and 410, TokenReviews from a dictionary, being away (every request fails), and
a log of requests. Does not model: validation, field ownership, status subresources as something separate, RBAC,
namespaces. What depends on those runs on the real one (control_plane.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from probefleet_operator import api

Json = dict[str, Any]


@dataclass
class FakeApiServer:
    """State and switches; `client` is an Api on it while `running`."""

    objects: dict[str, Json] = field(default_factory=dict)
    tokens: dict[str, Json] = field(default_factory=dict)  # token → TokenReview status
    requests: list[tuple[str, str]] = field(default_factory=list)
    away: bool = False
    oldest_version: int = 0  # watches from before it get 410
    page_size: int = 500
    version: int = 100
    base_url: str = ""
    history: list[tuple[int, str, Json]] = field(default_factory=list)  # version, path, event: replayed to watches
    _watches: list[tuple[str, asyncio.Queue[Json | None]]] = field(default_factory=list)

    def put(self, path: str, obj: Json) -> Json:
        """Create or replace an object, as somebody else would."""
        self.version += 1
        kind = "MODIFIED" if path in self.objects else "ADDED"
        metadata = {"name": path.rsplit("/", 1)[1], "uid": f"uid-{path}", **obj.get("metadata", {})}
        stored = {**obj, "metadata": {**metadata, "resourceVersion": str(self.version)}}
        self.objects[path] = stored
        self._tell(path, kind, stored)
        return stored

    def delete(self, path: str) -> None:
        self.version += 1
        gone = self.objects.pop(path)
        self._tell(path, "DELETED", {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self.version)}})

    def drop_watches(self) -> None:
        """End all watches, as a restarting API server does."""
        for _, queue in self._watches:
            queue.put_nowait(None)

    def bookmark(self) -> None:
        for _, queue in self._watches:
            queue.put_nowait({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(self.version)}}})

    def writes(self, method: str = "") -> list[tuple[str, str]]:
        return [each for each in self.requests if each[0] != "GET" and (not method or each[0] == method)]

    def _tell(self, path: str, kind: str, obj: Json) -> None:
        self.history.append((self.version, path, {"type": kind, "object": obj}))
        for collection, queue in self._watches:
            if _within(collection, path):
                queue.put_nowait({"type": kind, "object": obj})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.requests.append((request.method, path))
        if self.away:
            raise web.HTTPServiceUnavailable(text=json.dumps({"message": "away", "reason": "ServiceUnavailable"}))
        if request.query.get("watch"):
            return await self._watch(request)
        body = await request.json() if request.can_read_body else {}
        if path.endswith("/tokenreviews"):
            status = self.tokens.get(body["spec"]["token"], {"authenticated": False, "error": "unknown token"})
            return web.json_response({**body, "status": status})
        if request.method == "GET":
            return self._get(request)
        return self._write(request.method, path.removesuffix("/status"), body)

    def _get(self, request: web.Request) -> web.Response:
        path = request.path
        if path in self.objects:
            return web.json_response(self.objects[path])
        items = [obj for key, obj in sorted(self.objects.items()) if _within(path, key)]
        if not items and not path.endswith("s"):
            return _failure(404, "NotFound")
        begin = int(request.query.get("continue") or 0)
        page = items[begin : begin + self.page_size]
        metadata: Json = {"resourceVersion": str(self.version)}
        if begin + self.page_size < len(items):
            metadata["continue"] = str(begin + self.page_size)
        return web.json_response({"metadata": metadata, "items": page})

    def _write(self, method: str, path: str, body: Json) -> web.Response:
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.objects:
                return _failure(409, "AlreadyExists")
            return web.json_response(self.put(path, body), status=201)
        current = self.objects.get(path)
        if method == "DELETE":
            if current is None:
                return _failure(404, "NotFound")
            self.delete(path)
            return web.json_response({"status": "Success"})
        if method == "PUT":
            if current is None:
                return _failure(404, "NotFound")
            if body["metadata"].get("resourceVersion") != current["metadata"]["resourceVersion"]:
                return _failure(409, "Conflict")
            return web.json_response(self.put(path, body))
        return web.json_response(self.put(path, _merged(current or {}, body)))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        if int(request.query["resourceVersion"]) < self.oldest_version:
            return _failure(410, "Expired")
        queue: asyncio.Queue[Json | None] = asyncio.Queue()
        for version, path, happened in self.history:
            if version > int(request.query["resourceVersion"]) and _within(request.path, path):
                queue.put_nowait(happened)
        entry = (request.path, queue)
        self._watches.append(entry)
        response = web.StreamResponse()
        try:
            await response.prepare(request)
            while (event := await queue.get()) is not None:
                await response.write(json.dumps(event).encode() + b"\n")
        except ConnectionResetError:
            pass  # who watched has gone: no error of a server
        finally:
            self._watches.remove(entry)
        return response

    @asynccontextmanager
    async def running(self) -> AsyncIterator[api.Api]:
        """Serve on loopback; yields a client."""
        application = web.Application(client_max_size=4 << 20)
        application.router.add_route("*", "/{tail:.*}", self._handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with api.Api(api.Access(server=self.base_url)) as client:
                yield client
        finally:
            self.drop_watches()
            await runner.cleanup()


def _within(collection: str, path: str) -> bool:
    """Whether an object's path lies in a collection, also in a cluster-wide list of a namespaced kind."""
    if path.rsplit("/", 1)[0] == collection:
        return True
    base, _, plural = collection.rpartition("/")
    return path.startswith(f"{base}/namespaces/") and path.rsplit("/", 2)[1] == plural


def _merged(into: Json, patch: Json) -> Json:
    result = dict(into)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def _failure(status: int, reason: str) -> web.Response:
    return web.json_response({"code": status, "reason": reason, "message": reason}, status=status)


def review(node: str, *, account: str = "system:serviceaccount:probefleet:probefleet-agent", **claims: str) -> Json:
    """The status of a TokenReview that is as it should be."""
    extra = {
        "node-name": node,
        "node-uid": f"uid-{node}",
        "pod-name": f"agent-{node}",
        "pod-uid": f"pod-{node}",
        **claims,
    }
    return {
        "authenticated": True,
        "audiences": ["probefleet-agent"],
        "user": {
            "username": account,
            "extra": {f"authentication.kubernetes.io/{key}": [value] for key, value in extra.items() if value},
        },
    }
