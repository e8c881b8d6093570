"""The plain HTTP port: health, metrics and the query API.

Plain, because three parties reach it and none needs TLS here: the kubelet's probes, Prometheus, and the API server's
service proxy, which has authorized its caller already. Results are behind a token of their own (query.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from probefleet_operator import errors

log = structlog.get_logger(__name__)


class HttpServer:
    """Serves from early on; routes that need a leader answer 503 until there is one."""

    def __init__(
        self,
        bind: str,
        *,
        registry: CollectorRegistry,
        ready: Callable[[], str],
        routes: Iterable[web.AbstractRouteDef] = (),
    ) -> None:
        """`ready()` answers "" or what is still missing; `routes` are the query API's."""
        self._bind, self._registry, self._ready = bind, registry, ready
        self.application = web.Application()
        self.application.router.add_get("/healthz", self._healthz)
        self.application.router.add_get("/readyz", self._readyz)
        self.application.router.add_get("/metrics", self._metrics)
        self.application.router.add_routes(routes)
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> None:
        """Open the port; raises SettingsError where that is impossible."""
        host, _, port = self._bind.rpartition(":")
        # Streams of events end when we do; nobody waits for them.
        self._runner = web.AppRunner(self.application, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host.strip("[]"), int(port)).start()
        except (OSError, ValueError) as problem:
            await self._runner.cleanup()
            raise errors.SettingsError(f"--http {self._bind}: cannot listen there: {problem}") from problem
        self.port = self._runner.addresses[0][1]
        log.info("serving health, metrics and queries", bind=self._bind, port=self.port)

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")  # the main loop turns; kopf's end would have ended the process

    async def _readyz(self, _: web.Request) -> web.Response:
        missing = self._ready()
        return web.Response(text=f"{missing or 'ok'}\n", status=503 if missing else 200)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
