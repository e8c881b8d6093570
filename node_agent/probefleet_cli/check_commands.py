"""``probefleet check`` and ``explain``: what a policy amounts to, before anything is measured.

``check`` goes all the way into the kernel and back: valid, compiled, planned, loaded and attached here for a moment in
a folder of its own. ``explain`` stops at the plan, so it works on a laptop, and needs no root.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from probefleet_agent import errors as agent_errors
from probefleet_agent.kernel import libbpf
from probefleet_core import quantities
from probefleet_wire.v1 import stream_pb2

from probefleet_cli import advice, interruption, measurement, options, preparation, sources

Facts = dict[str, Any]


@click.command(short_help="Is a policy valid, and does it load here?")
@click.argument("what", nargs=-1, required=True, metavar="FILE|NAME...", shell_complete=options.complete_what)
@options.settings
@click.option("-v", "--verbose", is_flag=True, help="The verifier's whole log, where it refuses.")
@click.option("-o", "--output", type=click.Choice(("text", "json")), default="text", show_default=True)
@options.machine
def check(
    what: tuple[str, ...],
    *,
    settings: tuple[str, ...],
    verbose: bool,
    output: str,
    bpffs: Path,
    cgroup_root: str,
) -> None:
    """Is it valid, and would it load here? Loads every program once and removes it at once.

    Hints say where a program of your own could ask less of its maps; they are advice, and fail nothing. Exit status 2
    for what is wrong with a policy, 3 for what this kernel refuses.
    """
    prepared = _prepare(what, settings)
    if verbose:
        agent_errors.VerifierError.tail_bytes = libbpf.LOG_BYTES
    with interruption.Interruption(), measurement.measure(prepared, bpffs=bpffs, cgroup_root=cgroup_root) as measured:
        statuses = measured.statuses()
    checked, refusals = [], []
    for each, status in zip(prepared, statuses, strict=True):
        checked.append(_checked(each, status))
        if status.state in measurement.BROKEN:
            refusals.append(measurement.refusal(each, status, whole_log=verbose))
        elif output == "text":
            for line in _checked_lines(checked[-1]):
                click.echo(line)
    if output == "json":
        click.echo(json.dumps({"policies": checked}, indent=2, ensure_ascii=False))
    if refusals:
        raise measurement.failed(statuses, "\n".join(refusals))


def _checked(each: preparation.Prepared, status: stream_pb2.PolicyStatus) -> Facts:
    """What came of one policy, as JSON has it."""
    found: Facts = {"where": each.where, "name": each.policy.name, "loads": status.state not in measurement.BROKEN}
    if not found["loads"]:
        return {**found, "reason": status.reason, "message": status.message}
    hints = [
        {"kind": str(hint.kind), "map": hint.map, "seen": hint.seen, "advice": hint.advice} for hint in advice.of(each)
    ]
    return {
        **found,
        "verifiedInstructions": status.verified_instructions,
        "attached": list(status.ways),
        "hints": hints,
    }


def _checked_lines(found: Facts) -> Iterator[str]:
    instructions = found["verifiedInstructions"]
    verified = f", {instructions:,} instructions verified" if instructions else ""
    yield f"{found['where']}: ok, loads on this kernel{verified}"
    yield from (f"  {way}" for way in found["attached"])
    yield from (f"  hint: {each['seen']}. {each['advice']}." for each in found["hints"])


@click.command(short_help="What a policy puts on each node, and what rights it takes.")
@click.argument("what", nargs=-1, required=True, metavar="FILE|NAME...", shell_complete=options.complete_what)
@options.settings
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    metavar="COUNT",
    default=1,
    show_default=True,
    help="For how many nodes to reckon.",
)
def explain(what: tuple[str, ...], *, settings: tuple[str, ...], nodes: int) -> None:
    """What a policy would put on each node, and which rights it takes to apply it."""
    for index, each in enumerate(_prepare(what, settings, nodes=nodes)):
        if index:
            click.echo()
        for line in _explained(each, nodes):
            click.echo(line)


def _prepare(what: tuple[str, ...], settings: tuple[str, ...], *, nodes: int = 1) -> list[preparation.Prepared]:
    catalog = sources.load_catalog()
    given = sources.read(what, catalog=catalog, settings=sources.parse_settings(settings), interval=None)
    return preparation.prepare(given, catalog=catalog, node_count=nodes)


def _explained(each: preparation.Prepared, nodes: int) -> Iterator[str]:
    plan, summary = each.planned.plan, each.planned.summary
    yield f"{each.policy.namespace}/{each.policy.name} ({plan.instance.title}, scope {each.policy.scope})"
    whose = (
        "this policy's own, for what it writes into maps"
        if plan.instance.owner
        else "policies with this digest share one program"
    )
    yield f"  digest    {plan.instance.digest}: {whose}"
    yield from _listed("programs", summary.programs)
    yield from _listed("maps", [_sized(name, size, dict(summary.not_read)) for name, size in summary.maps])
    if plan.instance.HasField("object"):
        yield f"  map bytes {_times(summary.map_bytes, nodes)}"
    else:
        most = _times(plan.budget.map_memory_bytes, nodes)
        yield f"  map bytes at most {most} (the budget: this program's own maps are made, and known, on the node)"
    outputs = [f"{output.name}, by {', '.join(output.group_by) or 'nothing'}" for output in plan.outputs]
    yield from _listed("outputs", outputs)
    yield from _listed("pins", summary.pins)
    budget = plan.budget
    cpu = f"{budget.cpu_millicores}m CPU" if budget.cpu_millicores else "no limit of CPU"
    yield f"  budget    {cpu}, {quantities.show_bytes(budget.map_memory_bytes)} of maps, on each node"
    yield f"  interval  {plan.interval_ms / 1000:g} s"
    yield from _listed("needs", summary.verbs)


def _times(size: int, nodes: int) -> str:
    total = quantities.show_bytes(size)
    return f"{total} × {nodes} nodes = {quantities.show_bytes(size * nodes)}" if nodes > 1 else f"{total} on a node"


def _sized(name: str, size: int, notes: Mapping[str, str]) -> str:
    note = f" ({notes[name]})" if name in notes else ""
    return f"{name}: {quantities.show_bytes(size)}{note}"


def _listed(title: str, items: tuple[str, ...] | list[str]) -> Iterator[str]:
    with contextlib.suppress(StopIteration):
        left = iter(items)
        yield f"  {title:9} {next(left)}"
        for item in left:
            yield f"  {'':9} {item}"
