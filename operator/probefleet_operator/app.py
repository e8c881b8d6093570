"""The operator's parts, put together and taken apart again.

main.py calls `operate`; it returns after `stop` is set, or raises an OperatorError when going on makes no sense
(another replica leads, kopf ended). Everything long-lived is a named task of one TaskGroup, so nothing outlives it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeVar

import grpc.aio
import structlog
from probefleet_core import catalog, earlier
from prometheus_client import REGISTRY

from probefleet_operator import (
    api,
    authority,
    controller,
    documents,
    drain,
    election,
    errors,
    exposition,
    handlers,
    http_server,
    identity,
    inventory,
    kube,
    kubeconfig,
    memory,
    metrics,
    objects,
    planning,
    query,
    reflector,
    results,
    settings,
    stream,
    toolchain,
)

log = structlog.get_logger(__name__)

T = TypeVar("T")

CERTIFICATE_LOOK_SECONDS = 600.0
STREAMS_END_SECONDS = 0.5
#: 64 KB each.
REPORTS_A_PAGE = 50


class _StopRequested(Exception):
    """Ends the TaskGroup; never leaves this module."""


class Operator:
    """One process's life, from candidacy to the end."""

    def __init__(self, options: settings.Settings, client: api.Api) -> None:
        self._options, self._client = options, client
        self._election = election.Election(
            client, namespace=options.namespace, lease=options.lease, identity=options.identity
        )
        self._serving = False
        self._store = objects.ObjectStore()
        self._controller: controller.Controller | None = None
        self._queries = query.QueryApi()
        self.http = http_server.HttpServer(
            options.http,
            registry=REGISTRY,
            ready=self._missing,
            routes=[*self._queries.routes(), *drain.Drain(lambda: self._controller).routes()],
        )

    def _missing(self) -> str:
        """What keeps this replica from being ready; a standby that could take over is ready."""
        if not self._election.term:
            return "" if self._election.reachable else "the API server cannot be reached"
        if self._controller is None or not self._controller.complete:
            return "the lists of policies, nodes and pods are not complete yet"
        if not self._serving:
            return "the gRPC port is not open yet"
        return ""

    async def run(self, stop: asyncio.Event) -> None:
        """Live until `stop`."""
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._stopper(stop), name="stopper")
                tasks.create_task(self._lead(), name="lead")
        except* _StopRequested:
            log.info("stopping")
        except* errors.OperatorError as group:
            failure = _first(group)
        if failure is not None:  # raised out here: from within except* it would be wrapped into a group again
            raise failure

    async def _stopper(self, stop: asyncio.Event) -> None:
        await stop.wait()
        raise _StopRequested

    async def _lead(self) -> None:
        term = await self._election.acquire()
        metrics.LEADING.set(1)
        try:
            await self._operate(term)
        finally:
            metrics.LEADING.set(0)
            await self._election.release()

    async def _operate(self, term: int) -> None:
        options, client = self._options, self._client
        certificates = self._certificates()
        blobs = toolchain.Blobs()
        publisher = kube.Publisher(client)
        recorder = kube.Recorder(client, instance=options.identity)
        control = controller.Controller(self._store, term=term)
        self._controller = control
        inventory_ = inventory.Inventory(client, on_node=control.node_changed, on_pod=control.pod_changed)
        headers = (options.catalog or catalog.folder()) / "include"
        tools = toolchain.Toolchain(client, toolchain.clang(headers), toolchain.tree_digest(headers))
        plans = planning.Planning(
            self._store,
            tools,
            blobs,
            self._catalog(),
            on_change=control.mark,
            cluster_size=lambda: (max(1, len(inventory_.nodes())), control.most_cpus()),
            pushed_objects=control.pushed_objects,
        )
        tokens = query.Tokens(await self._patiently(self._query_key))
        # Read before this operator's own reports take their places.
        known_before = await self._patiently(self._earlier)
        merged = results.Results(control, plans, inventory_, recorder, known_before)
        papers = documents.Documents(
            control, plans, merged, publisher, recorder, tokens, report_seconds=options.report_seconds
        )
        control.connect(inventory_, plans, on_decided=papers.decided)
        exposition_ = exposition.OutputsCollector(papers.results, series_per_policy=options.series_per_policy)
        watcher = handlers.Watcher(client, self._store, control.mark)
        fleet = stream.Fleet(
            reviewer=identity.Reviewer(client, audience=options.token_audience, account=options.agent_account),
            listener=merged,
            term=term,
            blob_of=blobs.get,
            addresses=inventory_.endpoints,
            complain=lambda who, problem: recorder.warn(
                who.as_pod(namespace=options.namespace),
                "StreamRefused",
                f"node {who.node}: {problem}",
                action="Connect",
            ),
        )
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._election.hold(), name="hold-lease")
            tasks.create_task(metrics.watch_loop_lag(), name="loop-lag")
            tasks.create_task(memory.give_back(), name="memory")
            tasks.create_task(watcher.run(), name="watch-policies")
            inventory_.start(tasks)
            tasks.create_task(control.run(), name="decide")
            tasks.create_task(publisher.run(), name="publish")
            tasks.create_task(recorder.run(), name="events")
            stack.push_async_callback(tools.close)
            stack.push_async_callback(plans.close)
            REGISTRY.register(exposition_)
            stack.callback(REGISTRY.unregister, exposition_)
            self._queries.source, self._queries.tokens = papers, tokens
            await self._patiently(certificates.refresh)
            tasks.create_task(self._renew(certificates), name="certificates")
            # Agents that came earlier would be read before anybody knows which policies their samples belong to.
            await control.decided.wait()
            server, _ = await stream.serve(fleet, options.bind, certificate=certificates.certificate)
            self._serving = True
            try:
                await asyncio.Event().wait()  # until the group is cancelled
            finally:
                self._serving = False
                await _close(fleet, server)

    def _catalog(self) -> catalog.Catalog:
        try:
            return catalog.load(self._options.catalog)
        except (catalog.CatalogError, OSError) as problem:
            raise errors.SettingsError(f"the catalog cannot be read: {problem}. Give --catalog FOLDER.") from problem

    def _certificates(self) -> authority.AuthorityStore | authority.GivenCertificate:
        options = self._options
        if options.tls_certificate and options.tls_key:
            return authority.GivenCertificate(
                self._client,
                namespace=options.namespace,
                secret=options.secret,
                bundle=options.bundle,
                certificate=options.tls_certificate,
                key=options.tls_key,
                ca=options.tls_ca,
            )
        return authority.AuthorityStore(
            self._client,
            namespace=options.namespace,
            secret=options.secret,
            bundle=options.bundle,
            names=options.service_dns,
        )

    async def _earlier(self) -> dict[str, earlier.Earlier]:
        """By policy, of the reports that say so."""
        found: dict[str, earlier.Earlier] = {}
        async for page in self._client.pages(f"{api.GROUP_PATH}/probereports", limit=REPORTS_A_PAGE):
            found |= dict(filter(None, map(earlier.of_report, page.get("items") or ())))
        return found

    async def _query_key(self) -> bytes:
        return await query.load_key(self._client, namespace=self._options.namespace, secret=self._options.secret)

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try until the API server answers: without keys and certificates there is nothing to serve."""
        while True:
            try:
                return await attempt()
            except errors.ApiError as problem:
                log.warning("not ready to serve yet", error=str(problem))
                await asyncio.sleep(reflector.jittered(2.0))

    async def _renew(self, certificates: authority.AuthorityStore | authority.GivenCertificate) -> None:
        while True:
            await asyncio.sleep(reflector.jittered(CERTIFICATE_LOOK_SECONDS))
            try:
                await certificates.refresh()
            except errors.OperatorError as problem:
                log.warning("certificates not looked at", error=str(problem))


async def _close(fleet: stream.Fleet, server: grpc.aio.Server) -> None:
    """End the streams with a reason, then the server."""
    fleet.draining = True
    for each in list(fleet.sessions.values()):
        each.close(grpc.StatusCode.UNAVAILABLE, "the operator is shutting down: come back to the next one")
    await server.stop(STREAMS_END_SECONDS)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One error of possibly nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def operate(options: settings.Settings, stop: asyncio.Event) -> None:
    """Run an operator until `stop` is set; raises OperatorError."""
    began = time.monotonic()
    access = kubeconfig.access(options.kubeconfig) if options.kubeconfig else api.in_cluster(os.environ)
    log.info("starting", identity=options.identity, server=access.server, namespace=options.namespace)
    async with api.Api(access) as client:
        operator = Operator(options, client)
        await operator.http.start()
        try:
            await operator.run(stop)
        finally:
            await operator.http.stop()
    log.info("stopped", after_seconds=round(time.monotonic() - began, 1))
