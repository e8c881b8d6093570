"""kopf, in a thread and loop of its own: events of ProbePolicies and ProbeMaps, handed to the main loop.

Only `on.event` is used: no finalizer (deletion must not hang while the operator is away) and no annotation (kopf's
other handlers copy the whole spec into one). Its own loop, because kopf's stop cancels every task that came after its
start, and a gRPC server in the same loop would go with it.

`run` also makes the whole lists from which completeness and absence are read (see objects.py): at the start, before
kopf, and every minute after, metadata only.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import structlog
from probefleet_wire import imports

from probefleet_operator import api, errors, objects, reflector

with imports.without("kubernetes"):
    import kopf

log = structlog.get_logger(__name__)

RELIST_SECONDS = 60.0
STOP_SECONDS = 2.0


class ForEver:
    """Seconds between attempts, without an end: an API server that is away is no reason for kopf to stop."""

    def __iter__(self) -> Iterator[float]:
        yield from (1, 1, 2, 3, 5, 8)
        while True:
            yield reflector.jittered(15)


def settings_for(settings: kopf.OperatorSettings) -> kopf.OperatorSettings:
    """What suits an operator that only listens."""
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.watching.server_timeout = 600
    settings.watching.client_timeout = 660
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 60
    settings.networking.error_backoffs = ForEver()
    return settings


def connection(access: api.Access) -> kopf.ConnectionInfo:
    """Our access, as kopf wants it; called again whenever the API server refuses the token."""
    return kopf.ConnectionInfo(
        server=access.server,
        ca_path=str(access.ca_file) if access.ca_file else None,
        insecure=not access.verify,
        token=access.bearer(),
        certificate_path=str(access.certificate_file) if access.certificate_file else None,
        private_key_path=str(access.key_file) if access.key_file else None,
    )


class KopfThread:
    """kopf's thread; `started` and `ended` are set in the main loop."""

    def __init__(self, access: api.Access, sink: Callable[[objects.Kind, api.Json, bool], None]) -> None:
        """`sink(kind, object, gone)` is called in the loop that runs here."""
        self._access = access
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="kopf", daemon=True)
        self.ended = asyncio.Event()
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    async def stop(self) -> None:
        """End kopf and wait for its thread."""
        self._stop.set()
        if self._thread.is_alive():
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await self.ended.wait()
            except TimeoutError:
                log.warning("kopf did not stop in time")

    def _main(self) -> None:
        try:
            asyncio.run(self._operator())
        except (Exception, asyncio.CancelledError) as problem:
            self.failure = problem
        finally:
            self._hand_over(self.ended.set)

    async def _operator(self) -> None:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(self._login)
        for kind, plural in objects.PLURAL.items():
            kopf.on.event("probefleet.io", "v1alpha1", plural, registry=registry, id=f"see-{plural}")(
                functools.partial(self._on_event, kind)
            )
        await kopf.operator(
            registry=registry, settings=settings_for(kopf.OperatorSettings()), clusterwide=True, stop_flag=self._stop
        )

    def _login(self, **_: Any) -> kopf.ConnectionInfo:
        return connection(self._access)

    async def _on_event(self, kind: objects.Kind, event: Any, **_: Any) -> None:
        raw: api.Json = event["object"]
        self._hand_over(functools.partial(self._sink, kind, raw, event["type"] == "DELETED"))

    def _hand_over(self, call: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            pass  # the main loop has ended before us: nobody is left to hear


class Watcher:
    """Everything about the two kinds: own lists for completeness, kopf for news."""

    def __init__(self, client: api.Api, store: objects.ObjectStore, on_change: Callable[[], None]) -> None:
        """`on_change()` is called in the main loop whenever the store has changed or become complete."""
        self._client, self._store, self._on_change = client, store, on_change
        logging.getLogger("kopf").setLevel(logging.WARNING)
        # It warns that signals are not its business in a thread: right so.
        logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)

    async def run(self) -> None:
        """List until it works, start kopf, relist for ever; raises OperatorError where kopf ends by itself."""
        backoff = reflector.BACKOFF_FIRST_SECONDS
        while True:
            try:
                for kind in objects.PLURAL:
                    await self._list(kind, whole=True)
                break
            except errors.ApiError as problem:
                log.warning("cannot list policies", error=str(problem), retry_seconds=backoff)
                await asyncio.sleep(reflector.jittered(backoff))
                backoff = min(backoff * 2, reflector.BACKOFF_MAX_SECONDS)
        thread = KopfThread(self._client.access, self._observe)
        thread.start()
        try:
            while True:
                try:
                    async with asyncio.timeout(reflector.jittered(RELIST_SECONDS)):
                        await thread.ended.wait()
                    raise errors.OperatorError(f"kopf has ended: {thread.failure!r}")
                except TimeoutError:
                    pass
                try:
                    for kind in objects.PLURAL:
                        await self._list(kind, whole=False)
                except errors.ApiError as problem:
                    log.warning("cannot list policies", error=str(problem))
        finally:
            await thread.stop()

    def _observe(self, kind: objects.Kind, raw: api.Json, gone: bool) -> None:
        if self._store.observe(kind, raw, gone=gone):
            self._on_change()

    async def _list(self, kind: objects.Kind, *, whole: bool) -> None:
        known_before = list(self._store.all(kind))
        uids: list[str] = []
        changed = not self._store.complete
        async for page in self._client.pages(
            f"{api.GROUP_PATH}/{objects.PLURAL[kind]}", accept="application/json" if whole else api.METADATA_ONLY
        ):
            for raw in page.get("items") or ():
                uids.append(raw["metadata"]["uid"])
                if whole:
                    # Items of a list lack what every single object has.
                    item = {"apiVersion": "probefleet.io/v1alpha1", "kind": kind, **raw}
                    changed |= self._store.observe(kind, item, gone=False)
        changed |= self._store.relisted(kind, uids, known_before=known_before)
        if changed:
            self._on_change()
