"""``probefleet run``: a ProbePolicy on this machine, without Kubernetes.

words ─▶ sources ─▶ preparation ─▶ measurement ─▶ screen. The command's own part is time: it samples until --for is over
or someone presses Ctrl-C, and then reads once more, so that the report at the end has everything. Which pods are here
``pod_watch`` says; where nobody can tell, or none came that was asked for, ``local_choice`` has the words.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from probefleet_core import report, result
from probefleet_wire.v1 import plan_pb2, stream_pb2

from probefleet_cli import (
    interruption,
    local_choice,
    measurement,
    one_process,
    options,
    pod_watch,
    preparation,
    screen,
    selectors,
    sources,
)
from probefleet_cli.failures import BadInput

#: How often the engine is asked whether something is due; rings are emptied as often.
TICK_SECONDS = 0.1


@click.command(short_help="Measure on this machine.")
@click.argument("what", nargs=-1, required=True, metavar="NAME|FILE...", shell_complete=options.complete_what)
@click.option(
    "-n",
    "--namespace",
    metavar="NAME",
    shell_complete=options.complete_namespace,
    help="Count only pods of this namespace that are on this machine.",
)
@click.option(
    "-l",
    "--selector",
    metavar="LABELS",
    help="Count only pods with these labels, as kubectl's -l: app=web,tier!=db,'env in (a,b)',!old.",
)
@options.runtime
@click.option(
    "--pid", type=click.IntRange(min=1), metavar="PID", help="Count only this process. All probes by name can."
)
@click.option("--for", "duration", type=options.Duration(), help="Stop after this time (30s, 5m). Without: Ctrl-C.")
@click.option("--interval", metavar="TIME", help="How often values are read (1s to 1h). Probes by name: 1s.")
@options.settings
@options.by("as the probe has it")
@click.option("-o", "--output", type=click.Choice(options.FORMATS), default="table", show_default=True)
@options.wide
@options.machine
def run(
    what: tuple[str, ...],
    *,
    namespace: str | None,
    pid: int | None,
    selector: str | None,
    runtime_endpoint: str | None,
    duration: float | None,
    interval: str | None,
    settings: tuple[str, ...],
    by: str | None,
    output: str,
    wide: bool,
    bpffs: Path,
    cgroup_root: str,
) -> None:
    """Measure on this machine: probes of the catalog by NAME, or ProbePolicies in FILEs.

    Everything is removed at the end, and the reports that a cluster would write are printed.

    \b
      probefleet run runqlat --for 30s
      probefleet run syscount --set syscalls=openat,read --output json --for 5s
      probefleet run policy.yaml map.yaml -n shop -l app=web
    """
    choice = selectors.Choice.of(namespace, selector)
    if pid is not None:
        one_process.check(pid)
    catalog = sources.load_catalog()
    given = sources.read(
        what,
        catalog=catalog,
        settings=sources.parse_settings(settings),
        interval=interval,
        by=sources.parse_fields(by),
        default_interval=interval or "1s",
    )
    screen.progress("preparing …")
    prepared = preparation.prepare(
        given, catalog=catalog, namespace=namespace or "default", pid=pid or 0, choice=choice
    )
    if output in ("folded", "svg") and not any(_has_stacks(each) for each in prepared):
        raise BadInput(
            f"--output {output} is for outputs of kind stacks, and there is none. Try: probefleet run profile"
        )
    screen.progress("loading …")
    with interruption.Interruption() as stop, pod_watch.following(runtime_endpoint) as watch:
        if nobody := local_choice.check(prepared, watch, choice):
            _warn(nobody)
        with measurement.measure(
            prepared, watch=watch, bpffs=bpffs, cgroup_root=cgroup_root, namespace=namespace
        ) as measured:
            refusals = _refusals(measured)
            if len(refusals) == len(prepared):
                raise measurement.failed(measured.statuses(), "\n".join(refusals))
            for text in refusals:
                click.secho(text, err=True, fg="red")
            screen.progress("counting …" + ("" if duration else " Ctrl-C ends it and prints the report"))
            _watch(measured, stop, duration, output)
            measured.sample_rest()
            late = [text for text in _refusals(measured) if text not in refusals]
            results, statuses = measured.results(), measured.statuses()
        warnings = list(local_choice.warnings(measured, watch, choice))
    screen.print_reports(_shown(measured.prepared, results), output=output, stream=sys.stdout, wide=wide)
    for text in warnings:
        _warn(text)
    if choice and not any(measured.chosen()):
        raise BadInput(f"{choice.words}: nothing was counted, because no such pod was here")
    if refusals or late:
        text = "\n".join(late) or f"{len(refusals)} of {len(prepared)} policies did not run, see above"
        raise measurement.failed(statuses, text)


def _warn(text: str) -> None:
    click.secho(f"probefleet: {text}", err=True, fg="yellow" if sys.stderr.isatty() else None)


def _watch(
    measured: measurement.Measurement, stop: interruption.Interruption, duration: float | None, output: str
) -> None:
    """Sample until the time is over or someone asks to stop."""
    began = time.monotonic()
    with screen.Screen(output=output) as view:
        while not stop.asked:
            left = TICK_SECONDS if duration is None else min(TICK_SECONDS, began + duration - time.monotonic())
            if left <= 0 or stop.wait(left):
                return
            if measured.sample() is not None and view.live:
                view.show(_shown(measured.prepared, measured.results()))
            if all(status.state in measurement.BROKEN for status in measured.statuses()):
                return


def _refusals(measured: measurement.Measurement) -> list[str]:
    statuses: Sequence[stream_pb2.PolicyStatus] = measured.statuses()
    return [
        measurement.refusal(each, status)
        for each, status in zip(measured.prepared, statuses, strict=True)
        if status.state in measurement.BROKEN
    ]


def _has_stacks(each: preparation.Prepared) -> bool:
    return any(output.kind == plan_pb2.Output.STACKS for output in each.planned.plan.outputs)


def _shown(prepared: Sequence[preparation.Prepared], results: Sequence[result.Result]) -> list[screen.Shown]:
    return [
        screen.Shown(each.policy.name, report.status(found), each.policy.namespace, _stacks(found), whole=True)
        for each, found in zip(prepared, results, strict=True)
    ]


def _stacks(found: result.Result) -> dict[str, int]:
    """All stacks of a result, folded: a report shows fewer, and cuts long ones."""
    counts: dict[str, int] = {}
    for output in found.outputs:
        if output.output.kind == plan_pb2.Output.STACKS:
            for labels, weight in zip(output.total.labels, output.total.weights.tolist(), strict=True):
                folded = ";".join(str(label) for label in labels)
                counts[folded] = counts.get(folded, 0) + int(weight)
            if output.total.other is not None:
                counts[result.OTHER] = counts.get(result.OTHER, 0) + int(output.total.other.sum())
    return counts
