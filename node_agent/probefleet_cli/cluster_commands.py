"""``kubectl probefleet run``, ``events`` and ``nodes``: the same over a whole cluster, as the caller's own user.

``run`` creates a ProbePolicy with a ttl (so that nothing stays where this process is killed), shows its report while it
grows, and deletes it. Reports are asked for once a second: by the query API they are of that moment, else as stored.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from probefleet_cli import cluster_api, interruption, options, render, screen, selectors, sources
from probefleet_cli.failures import BadInput, Failure, KernelRefuses

Json = dict[str, Any]
Command = TypeVar("Command", bound=Callable[..., Any])
POLL_SECONDS = 1.0
TTL_MARGIN_SECONDS = 60
DEFAULT_TTL_SECONDS = 600
RECONNECT_SECONDS = 1.0


def connection(command: Command) -> Command:
    """Which cluster, which namespace."""
    for option in (
        click.option(
            "--system-namespace",
            metavar="NAME",
            default=cluster_api.DEFAULT_SYSTEM_NAMESPACE,
            show_default=True,
            envvar="PROBEFLEET_NAMESPACE",
            help="Where the operator runs.",
        ),
        click.option("--context", metavar="NAME", help="Context of the kubeconfig."),
        click.option("--kubeconfig", type=click.Path(path_type=Path), help="Default: KUBECONFIG, ~/.kube/config."),
        click.option("-n", "--namespace", metavar="NAME", help="Default: the context's."),
    ):
        command = option(command)
    return command


@click.command(short_help="Measure on the whole cluster for a while.")
@click.argument("name", shell_complete=options.complete_probe)
@connection
@click.option("-l", "--selector", metavar="LABELS", help="Only pods with these labels, as kubectl's -l.")
@click.option("--cluster-scope", is_flag=True, help="All namespaces and the host; needs its own RBAC verb.")
@options.settings
@options.by("pod, and workload with --cluster-scope")
@click.option("--for", "duration", type=options.Duration(), help="Stop after this time. Without: Ctrl-C, at most 10m.")
@click.option("--interval", metavar="TIME", default="1s", show_default=True, help="How often nodes send values.")
@click.option("-o", "--output", type=click.Choice(options.FORMATS), default="table", show_default=True)
@options.wide
def run(
    name: str,
    *,
    namespace: str | None,
    kubeconfig: Path | None,
    context: str | None,
    system_namespace: str,
    selector: str | None,
    cluster_scope: bool,
    settings: tuple[str, ...],
    by: str | None,
    duration: float | None,
    interval: str,
    output: str,
    wide: bool,
) -> None:
    """Measure with a catalog probe on the whole cluster, until Ctrl-C or --for; nothing of it stays.

    \b
      kubectl probefleet run runqlat -n shop --for 1m
      kubectl probefleet run syscount -n shop -l app=web --set syscalls=openat,read --by workload
    """
    cluster = cluster_api.Cluster.connect(kubeconfig=kubeconfig, context=context, system_namespace=system_namespace)
    manifest = policy_manifest(
        name,
        namespace=namespace or cluster.namespace,
        selector=selector,
        cluster_scope=cluster_scope,
        settings=sources.parse_settings(settings),
        by=sources.parse_fields(by),
        interval=interval,
        ttl_seconds=DEFAULT_TTL_SECONDS if duration is None else int(duration) + TTL_MARGIN_SECONDS,
    )
    limit = DEFAULT_TTL_SECONDS - TTL_MARGIN_SECONDS if duration is None else duration
    with interruption.Interruption() as stop, _created(cluster, manifest) as (where, called):
        screen.progress(f"created ProbePolicy {where}/{called}; Ctrl-C deletes it")
        last = _follow(cluster, where, called, stop, time.monotonic() + limit, output)
    if last is None:
        raise Failure(
            f"no node has sent a sample of {where}/{called}. kubectl get pods -n {system_namespace} shows agents"
        )
    shown = screen.Shown(called, last["status"], where, whole=True)
    screen.print_reports([shown], output=output, stream=sys.stdout, wide=wide)


def policy_manifest(
    name: str,
    *,
    namespace: str,
    selector: str | None,
    cluster_scope: bool,
    settings: dict[str, str],
    by: Sequence[str] = (),
    interval: str,
    ttl_seconds: int,
) -> Json:
    """The ProbePolicy that ``run`` creates. Whether the probe exists is the operator's to say: its catalog counts.

    Who looks into one namespace wants to know which pod it is; a standing policy tells workloads apart.
    """
    program: Json = {"name": name, **({"parameters": settings} if settings else {})}
    spec: Json = {
        "scope": "Cluster" if cluster_scope else "Namespace",
        "program": {"catalog": program},
        "interval": interval,
        "ttl": f"{ttl_seconds}s",
    }
    if selector:
        spec["pods"] = {"selector": selectors.parse(selector)}
    manifest: Json = {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }
    try:
        catalog = sources.load_catalog()
    except Failure:
        if by:
            raise
        return manifest  # who has only the plugin may have no catalog: then the probe's own groups have to do
    sources.group(manifest, catalog, by or (() if cluster_scope else ("pod",)))
    return manifest


@contextlib.contextmanager
def _created(cluster: cluster_api.Cluster, manifest: Json) -> Iterator[tuple[str, str]]:
    metadata = cluster.create_policy(manifest)["metadata"]
    try:
        yield metadata["namespace"], metadata["name"]
    finally:
        cluster.delete_policy(metadata["namespace"], metadata["name"])


def _follow(
    cluster: cluster_api.Cluster,
    namespace: str,
    name: str,
    stop: interruption.Interruption,
    until: float,
    output: str,
) -> Json | None:
    """Show the report while it grows; the last one. Raises for a policy that the operator or every node refuses."""
    last: Json | None = None
    with screen.Screen(output=output) as view:
        while True:
            ended = stop.wait(max(0.0, min(POLL_SECONDS, until - time.monotonic())))
            stored = cluster.report(namespace, name)
            if stored is not None:
                newest = cluster.live_report(namespace, name, stored) or stored
                if newest.get("status", {}).get("outputs"):
                    last = newest
                    view.show([screen.Shown(name, last["status"], namespace)])
            if ended or time.monotonic() >= until:
                return last
            if last is None:
                _raise_refusal(cluster.policy(namespace, name))


def _raise_refusal(policy: Json) -> None:
    status = policy.get("status") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or ()}
    accepted = conditions.get("Accepted", {})
    if accepted.get("status") == "False":
        raise BadInput(f"the operator does not accept it: {accepted.get('reason')}: {accepted.get('message')}")
    nodes = status.get("nodes") or {}
    failures = status.get("failures") or []
    if failures and nodes.get("desired") and nodes.get("failed") == nodes["desired"]:
        lines = [f"  {each.get('reason')} ({each.get('nodes')} nodes): {each.get('message')}" for each in failures]
        raise KernelRefuses("\n".join(["no node can run it:", *lines]))


@click.command(short_help="Records of a policy's events.")
@click.argument("policy")
@connection
@click.option("-f", "--follow", is_flag=True, help="Go on as records come, until Ctrl-C.")
@click.option(
    "--event-output", "event_output", metavar="NAME", help="Only this output, where the policy has several of events."
)
@click.option("-o", "--output", type=click.Choice(("table", "json")), default="table", show_default=True)
def events(
    policy: str,
    *,
    namespace: str | None,
    kubeconfig: Path | None,
    context: str | None,
    system_namespace: str,
    follow: bool,
    event_output: str | None,
    output: str,
) -> None:
    """Records of a policy's events, one a line."""
    cluster = cluster_api.Cluster.connect(kubeconfig=kubeconfig, context=context, system_namespace=system_namespace)
    where = namespace or cluster.namespace
    parameters = {"follow": "true" if follow else "false", **({"output": event_output} if event_output else {})}
    cursors: dict[str, int] = {}
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                for page in cluster.event_lines(where, policy, _report(cluster, where, policy), **parameters):
                    _print_page(page, output, cursors)
            except cluster_api.ApiError as error:
                # The operator restarts, or the stream broke; what it refuses, it will refuse again. (Who has read
                # before may: the token in the report is a new one each hour.)
                if not follow or error.code in (400, 404) or (error.code in (401, 403) and not cursors):
                    raise
                screen.progress(f"{error}; trying again")
            if not follow:
                return
            if cursors:
                parameters["since"] = str(min(cursors.values()))
            time.sleep(RECONNECT_SECONDS)


@click.command(short_help="A policy on each of its nodes.")
@click.argument("policy")
@connection
@click.option("-o", "--output", type=click.Choice(("table", "json")), default="table", show_default=True)
def nodes(
    policy: str,
    *,
    namespace: str | None,
    kubeconfig: Path | None,
    context: str | None,
    system_namespace: str,
    output: str,
) -> None:
    """A policy on each of its nodes: state, kernel, agent, and why it does not run where it does not."""
    cluster = cluster_api.Cluster.connect(kubeconfig=kubeconfig, context=context, system_namespace=system_namespace)
    where = namespace or cluster.namespace
    rows = cluster.query(where, policy, "nodes", _report(cluster, where, policy))["nodes"]
    if output == "json":
        click.echo(json.dumps({"nodes": rows}, indent=2, ensure_ascii=False))
        return
    header = ("NODE", "STATE", "KERNEL", "AGENT", "SAMPLE", "REASON")
    for line in render._columns(header, [_node_cells(row) for row in rows]):
        click.echo(line)
    for row in rows:
        if row.get("message"):
            click.echo(f"\n{row['name']}: {row['message']}")


def _node_cells(row: Json) -> list[str]:
    age = row.get("sampleAgeSeconds")
    state = str(row["state"]) + ("" if row.get("connected") else " (away)")
    sample = "-" if age is None else f"{age:.0f}s ago"
    return [str(row["name"]), state, row.get("kernel") or "-", row.get("agent") or "-", sample, row.get("reason") or ""]


def _report(cluster: cluster_api.Cluster, namespace: str, name: str) -> Json:
    cluster.policy(namespace, name)
    report = cluster.report(namespace, name)
    if report is None:
        raise Failure(f"ProbePolicy {namespace}/{name} has no ProbeReport yet. kubectl describe ppol {name} tells why")
    return report


def _print_page(page: Json, output: str, cursors: dict[str, int]) -> None:
    name, cursor = str(page["output"]), int(page["cursor"])
    known = cursors.get(name, 0)
    cursors[name] = cursor
    # One `since` serves all outputs after a break, so some send again what was printed. (A cursor that goes back is
    # that of an operator who began anew.)
    printed = max(0, known - (cursor - len(page["records"]))) if known <= cursor else 0
    if page.get("missed"):
        click.echo(f"{page['missed']} records of {name} were gone before they could be read", err=True)
    for record in page["records"][printed:]:
        click.echo(json.dumps(record, ensure_ascii=False) if output == "json" else render.event_line(record))
    sys.stdout.flush()
