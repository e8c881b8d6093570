"""`probefleet-operator`: options in, a process that runs until SIGTERM out.

The wiring of everything: one main loop for gRPC, the API client and deciding; kopf in a thread of its own
(handlers.py). A standby waits for the Lease with only its health endpoint up; the leader opens the gRPC port. On
SIGTERM it stops within three seconds and gives the Lease up; agents keep what they run and come back to the next one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
import structlog
from probefleet_wire import heap

from probefleet_operator import api, errors, memory, settings

log = structlog.get_logger("probefleet_operator")

NAMESPACE_FILE = api.SERVICE_ACCOUNT / "namespace"


def configure_logs(level: str) -> None:
    """One JSON object a line on stderr, from our loggers and from the libraries'."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("kopf", "aiohttp.access", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def default_namespace() -> str:
    """The pod's own namespace; "probefleet" outside a pod."""
    try:
        return NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "probefleet"


def default_identity() -> str:
    """The pod's name, where it is told (a restarted container is then known as itself); else one of this process."""
    if name := os.environ.get("POD_NAME"):
        return f"{name}_{os.environ.get('POD_UID', '')}"
    return f"{socket.gethostname()}_{uuid.uuid4().hex[:12]}"


def run_until_signal(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run a coroutine that ends soon after its event is set by SIGTERM or SIGINT; answers with the exit status."""

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    try:
        asyncio.run(body())
    except errors.SettingsError as problem:
        log.error("cannot start", error=str(problem))  # noqa: TRY400  the text says it; a traceback says less
        return 2
    except errors.OperatorError as problem:
        log.error("stopped", error=str(problem), kind=type(problem).__name__)  # noqa: TRY400  as above
        return 1
    except Exception:
        log.exception("stopped by a bug")
        return 1
    return 0


@click.command(context_settings={"auto_envvar_prefix": "PROBEFLEET", "max_content_width": 110})
@click.option("--namespace", default=default_namespace, help="Where the Lease, the CA's Secret and its bundle lie.")
@click.option("--bind", default="0.0.0.0:8443", show_default=True, help="gRPC over TLS, for agents.")
@click.option("--http", default="0.0.0.0:8080", show_default=True, help="Health, metrics and the query API.")
@click.option(
    "--service-dns",
    multiple=True,
    help="Name or address by which agents reach the operator; it stands in the certificate. May be repeated.",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="A certificate to use instead of the own CA's.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key.")
@click.option("--tls-ca", type=click.Path(path_type=Path), help="The CA that agents are to trust for it.")
@click.option("--catalog", type=click.Path(path_type=Path), help="Folder with the catalog's probes (bpf/).")
@click.option("--token-audience", default="probefleet-agent", show_default=True, help="Audience of agents' tokens.")
@click.option(
    "--agent-service-account", default="probefleet-agent", show_default=True, help="ServiceAccount of agents."
)
@click.option("--kubeconfig", type=click.Path(path_type=Path), help="To run outside a cluster.")
@click.option("--lease", default="probefleet-operator", show_default=True, help="Name of the Lease.")
@click.option("--secret", default="probefleet-authority", show_default=True, help="Name of the CA's Secret.")
@click.option("--bundle", default="probefleet-ca", show_default=True, help="Name of the CA bundle's ConfigMap.")
@click.option("--series-per-policy", default=2000, show_default=True, help="Limit of Prometheus series a policy.")
@click.option("--report-seconds", default=10.0, show_default=True, help="A report is written at most this often.")
@click.option("--identity", default=default_identity, help="Name of this process in the Lease.", show_default=False)
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
def main(
    *,
    namespace: str,
    bind: str,
    http: str,
    service_dns: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    catalog: Path | None,
    token_audience: str,
    agent_service_account: str,
    kubeconfig: Path | None,
    lease: str,
    secret: str,
    bundle: str,
    series_per_policy: int,
    report_seconds: float,
    identity: str,
    log_level: str,
) -> None:
    """Run the Probefleet operator. Every option can be given as PROBEFLEET_OPTION in the environment."""
    configure_logs(log_level)
    heap.settle(large_bytes=memory.LARGE_BYTES)
    names = tuple(name for each in service_dns for name in each.replace(",", " ").split()) or tuple(
        f"probefleet-operator{suffix}"
        for suffix in (f".{namespace}.svc", f".{namespace}.svc.cluster.local", f".{namespace}", "")
    )
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together.")
    options = settings.Settings(
        namespace=namespace,
        identity=identity,
        bind=bind,
        http=http,
        service_dns=names,
        tls_certificate=tls_cert,
        tls_key=tls_key,
        tls_ca=tls_ca,
        catalog=catalog,
        token_audience=token_audience,
        agent_account=f"system:serviceaccount:{namespace}:{agent_service_account}",
        kubeconfig=kubeconfig,
        lease=lease,
        secret=secret,
        bundle=bundle,
        series_per_policy=series_per_policy,
        report_seconds=report_seconds,
    )

    # gRPC's core writes a line of its own, and no JSON, for each bad handshake: anybody could fill the log. It reads
    # this when it is imported, so the parts that import it come after.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from probefleet_operator import app

    async def operate(stop: asyncio.Event) -> None:
        await app.operate(options, stop)

    sys.exit(run_until_signal(operate))


if __name__ == "__main__":
    main()
