"""What the operator writes into the cluster: statuses and reports by server-side apply, and Events.

Callers say *that* something may have changed (`touch`); this decides *when* it is written and whether at all: each
document has its shortest interval, equal content is not written again, few writes are under way at a time. So a
thousand changes a second become one write per document and interval, and a failed write is tried again without
anybody's help.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import structlog

from probefleet_operator import api, errors, metrics

log = structlog.get_logger(__name__)

CONCURRENT_WRITES = 8
RETRY_SECONDS = 5.0
REFRESH_SECONDS = 30.0  # nodes turn stale without a word: look again without being told
MAX_EVENT_NOTE = 1000  # the API's limit is 1024
EVENT_SILENCE_SECONDS = 3600.0  # the same Event is written again after so long
MAX_EVENTS_REMEMBERED = 5_000


@dataclass(frozen=True, slots=True)
class Document:
    """An object to be there. `status` goes to its status subresource; `body` only when it is not there yet."""

    kind: str
    path: str  # of the object
    body: api.Json | None  # None: somebody else's object, of which only the status is ours
    status: api.Json  # whole apply body, with apiVersion, kind and metadata.name


Render = Callable[[], Document | None]
"""The document as it should be now; None: nothing to say yet."""


@dataclass(slots=True)
class _Publication:
    """One document's schedule."""

    render: Render
    interval_seconds: float
    due: float
    written: str = ""  # digest of what was written last
    created: bool = False
    uid: str = ""  # of the object, as the API server answered
    path: str = ""
    busy: bool = False
    touched: bool = field(default=True)


class Publisher:
    """Schedules and makes the writes. Belongs to the main loop; `run` is one task."""

    def __init__(self, client: api.Api) -> None:
        self._client = client
        self._publications: dict[str, _Publication] = {}
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(CONCURRENT_WRITES)
        self._deletions: list[tuple[str, str, str]] = []

    def offer(self, key: str, render: Render, *, interval_seconds: float) -> None:
        """Publish a document from now on, and look at it at once."""
        known = self._publications.get(key)
        if known is not None:
            known.interval_seconds = interval_seconds
        else:
            self._publications[key] = _Publication(render, interval_seconds, due=0.0)
            self._wake.set()

    def touch(self, key: str) -> None:
        """The document may have changed."""
        publication = self._publications.get(key)
        if publication is not None and not publication.touched:
            publication.touched = True
            self._wake.set()

    def withdraw(self, key: str, *, delete: bool) -> None:
        """Publish it no more; `delete` removes the object too, if it is still the one that was written."""
        publication = self._publications.pop(key, None)
        if publication is not None and delete and publication.uid:
            self._deletions.append((key, publication.path, publication.uid))
            self._wake.set()

    def keys(self) -> set[str]:
        """What is published."""
        return set(self._publications)

    async def run(self) -> None:
        """Write for ever; ends its writes when it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wake.clear()
                now = time.monotonic()
                nearest = now + REFRESH_SECONDS
                for key, path, uid in self._deletions:
                    tasks.create_task(_alone(self._delete(path, uid)), name=f"delete-{key}")
                self._deletions.clear()
                for key, publication in self._publications.items():
                    if publication.busy:
                        continue
                    due = publication.due if publication.touched else publication.due + REFRESH_SECONDS
                    if due <= now:
                        publication.busy = True
                        publication.touched = False
                        tasks.create_task(_alone(self._write(key, publication)), name=f"write-{key}")
                    else:
                        nearest = min(nearest, due)
                try:
                    async with asyncio.timeout(max(0.01, nearest - time.monotonic())):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _write(self, key: str, publication: _Publication) -> None:
        delay = publication.interval_seconds * random.uniform(1.0, 1.2)
        kind = "unknown"
        try:
            async with self._slots:
                document = publication.render()
                if document is None:
                    delay = 0.2
                    return
                kind = document.kind
                digest = hashlib.sha256(json.dumps(document.status, sort_keys=True).encode()).hexdigest()
                if digest == publication.written:
                    return
                await self._apply(publication, document)
                publication.written = digest
                metrics.API_WRITES.labels(kind, "written").inc()
        except errors.NotFound as problem:
            # A policy that was just deleted, or a report that somebody removed: then the next write makes it anew.
            publication.created = False
            publication.touched = self._publications.get(key) is publication
            metrics.API_WRITES.labels(kind, "gone").inc()
            log.info("object is gone", key=key, error=str(problem))
            delay = RETRY_SECONDS
        except errors.ApiError as problem:
            publication.touched = True
            delay = max(RETRY_SECONDS, delay)
            metrics.API_WRITES.labels(kind, "failed").inc()
            log.warning("cannot write", key=key, error=str(problem), retry_seconds=round(delay, 1))
        except Exception:
            # A bug in rendering one document must not silence the others.
            publication.touched = True
            delay = max(RETRY_SECONDS, delay)
            metrics.API_WRITES.labels(kind, "bug").inc()
            log.exception("cannot render", key=key)
        finally:
            publication.due = time.monotonic() + delay
            publication.busy = False
            self._wake.set()

    async def _apply(self, publication: _Publication, document: Document) -> None:
        publication.path = document.path
        if document.body is not None and not publication.created:
            answer = await self._client.apply(document.path, document.body)
            publication.uid = answer["metadata"]["uid"]
            publication.created = True
        await self._client.apply(f"{document.path}/status", document.status)

    async def _delete(self, path: str, uid: str) -> None:
        try:
            await self._client.request("DELETE", path, body={"preconditions": {"uid": uid}})
        except (errors.NotFound, errors.Conflict):
            pass  # gone, or another one of that name
        except errors.ApiError as problem:
            log.info("left to the garbage collector", path=path, error=str(problem))


async def _alone(work: Coroutine[None, None, None]) -> None:
    """One write, whose failure ends no other: not even where the log cannot be written, so that is only counted."""
    try:
        await work
    except Exception:
        metrics.API_WRITES.labels("unknown", "bug").inc()


class Recorder:
    """Events (events.k8s.io/v1), each once an hour at most. A bounded queue: a storm of failures drops Events only."""

    def __init__(self, client: api.Api, *, instance: str) -> None:
        self._client, self._instance = client, instance
        self._queue: asyncio.Queue[tuple[str, api.Json]] = asyncio.Queue(maxsize=200)
        self._seen: OrderedDict[bytes, float] = OrderedDict()

    def warn(self, regarding: api.Json, reason: str, note: str, *, action: str) -> None:
        """A Warning about an object (raw, with metadata)."""
        metadata = regarding["metadata"]
        digest = hashlib.sha256(f"{metadata['uid']}\0{reason}\0{note}".encode()).digest()
        now = time.monotonic()
        if now - self._seen.get(digest, -EVENT_SILENCE_SECONDS) < EVENT_SILENCE_SECONDS:
            return
        self._seen[digest] = now
        self._seen.move_to_end(digest)
        while len(self._seen) > MAX_EVENTS_REMEMBERED:
            self._seen.popitem(last=False)
        stamp = time.time_ns()
        body: api.Json = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name'][:200]}.{stamp:x}", "namespace": metadata["namespace"]},
            "eventTime": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stamp // 10**9))
            + f".{stamp % 10**9 // 1000:06d}Z",
            "reportingController": "probefleet.io/operator",
            "reportingInstance": self._instance[:128],
            "action": action,
            "reason": reason[:128],
            "regarding": {
                "apiVersion": regarding.get("apiVersion", "probefleet.io/v1alpha1"),
                "kind": regarding.get("kind", "ProbePolicy"),
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
                "resourceVersion": metadata.get("resourceVersion", ""),
            },
            "note": note if len(note) <= MAX_EVENT_NOTE else note[: MAX_EVENT_NOTE - 1] + "…",
            "type": "Warning",
        }
        try:
            self._queue.put_nowait((metadata["namespace"], body))
        except asyncio.QueueFull:
            metrics.API_WRITES.labels("Event", "dropped").inc()

    async def run(self) -> None:
        """Write for ever, one at a time."""
        while True:
            namespace, body = await self._queue.get()
            try:
                await self._client.request("POST", f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", body=body)
                metrics.API_WRITES.labels("Event", "written").inc()
            except errors.ApiError as problem:
                metrics.API_WRITES.labels("Event", "failed").inc()
                log.info("event not written", reason=body["reason"], error=str(problem))
