"""``probefleet-agent``: the process of the DaemonSet. Opens the engine, keeps the session, leaves programs counting at
its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path

import click
import structlog
from probefleet_wire import heap

from probefleet_agent.engine import VERSION, Engine
from probefleet_agent.errors import ProbefleetError
from probefleet_agent.kernel import btf_kernel


@click.command(context_settings={"auto_envvar_prefix": "PROBEFLEET", "max_content_width": 100})
@click.option("--operator", "target", required=True, metavar="HOST:PORT", help="The operator's gRPC endpoint.")
@click.option("--node", required=True, envvar="NODE_NAME", help="This node's name, as the API server has it.")
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/probefleet/ca/ca.crt"),
    show_default=True,
    help="Certificates that the operator's must be signed by; read again at every connection.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/var/run/secrets/probefleet/token"),
    show_default=True,
    help="The projected ServiceAccount token; read again at every connection.",
)
@click.option("--server-name", default="", help="The name in the operator's certificate, where HOST is another.")
@click.option(
    "--cgroup-root",
    default="/",
    show_default=True,
    help="Only cgroups below this one are this node's. For test clusters, whose nodes share one kernel.",
)
@click.option(
    "--bpffs", type=click.Path(path_type=Path, file_okay=False), default=Path("/sys/fs/bpf"), show_default=True
)
@click.option(
    "--files-root",
    default="",
    help="What stands before the paths of uprobes: /proc/1/root where the agent has other files than the node.",
)
@click.option(
    "--btf",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of BTF files (RELEASE.btf, as BTFHub has them), for kernels that carry no types themselves.",
)
@click.option("--log-format", type=click.Choice(["json", "text"]), default="json", show_default=True)
@click.version_option(VERSION, prog_name="probefleet-agent")
def main(
    target: str,
    node: str,
    ca_file: Path,
    token_file: Path,
    server_name: str,
    cgroup_root: str,
    bpffs: Path,
    files_root: str,
    btf: Path | None,
    log_format: str,
) -> None:
    """Run programs that the operator pushes on this node, and stream back what they measure."""
    heap.settle()
    configure_logs(log_format)
    log = structlog.get_logger("agent").bind(node=node)
    btf_kernel.use(btf)
    try:
        engine = Engine.open(bpffs=bpffs, cgroup_root=cgroup_root, node=node, files_root=files_root)
    except ProbefleetError as error:
        log.error("this node cannot run programs", error=str(error))  # noqa: TRY400  (a trace would say less)
        sys.exit(1)
    with engine:
        log.info("started", version=VERSION, cgroup_root=cgroup_root)
        # gRPC's core writes lines of its own, and no JSON. It reads this when it is imported, so session comes after.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        from probefleet_agent.session import Dial, Session

        session = Session(engine, Dial(target, ca_file, token_file, server_name))
        asyncio.run(_run(session.run()))
        empty = engine.leave()
    log.info("stopped; nothing is left on this node" if empty else "stopped; what is pinned goes on counting")


async def _run(session: Coroutine[None, None, None]) -> None:
    task = asyncio.create_task(session, name="session")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def configure_logs(log_format: str) -> None:
    """One structured line an event, on standard error."""
    renderer = structlog.processors.JSONRenderer() if log_format == "json" else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


if __name__ == "__main__":
    main()
