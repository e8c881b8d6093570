"""``probefleet doctor``, ``catalog``, ``purge``, ``version`` and ``completion``: what belongs to no policy."""

from __future__ import annotations

import json
import platform
import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
from click.shell_completion import get_completion_class
from probefleet_agent import errors as agent_errors
from probefleet_agent.kernel import links_network, mounts, pins
from probefleet_core import catalog as catalog_module
from probefleet_core import errors as core_errors

from probefleet_cli import options, pinned_here, sources, workspace
from probefleet_cli.failures import BadInput, Failure

WIDTH = 80  # of what is read as text, as kubectl explain has it
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(short_help="Can this machine run probes?")
@click.option("-o", "--output", type=click.Choice(("table", "json")), default="table", show_default=True)
def doctor(*, output: str) -> None:
    """Can this machine run probes, and if not, what is to be changed? Exit status 1 if something fails."""
    from probefleet_agent import doctor as examination

    found = examination.checks()
    if output == "json":
        rows = [{"name": c.name, "level": str(c.level), "detail": c.detail, "advice": c.advice} for c in found]
        click.echo(json.dumps({"checks": rows, "worst": str(examination.worst(found))}, indent=2, ensure_ascii=False))
    else:
        width = max(len(check.name) for check in found)
        for check in found:
            level = click.style(f"{check.level:4}", fg=_COLOURS[check.level])
            first, *more = _wrapped(check.detail, WIDTH - width - 8)
            click.echo(f"{level}  {check.name:{width}}  {first}")
            if check.advice:
                more += _wrapped(f"→ {check.advice}", WIDTH - width - 8, hanging="  ")
            for line in more:
                click.echo(f"{'':4}  {'':{width}}  {line}")
    if examination.worst(found) is examination.Level.FAIL:
        failed = ", ".join(check.name for check in found if check.level is examination.Level.FAIL)
        raise Failure(f"this machine cannot run probes as it is: {failed}")


@click.command(short_help="The probes that Probefleet ships, and their documentation.")
@click.argument("name", required=False, shell_complete=options.complete_probe)
def catalog(name: str | None) -> None:
    """The probes that Probefleet ships; with a NAME, its documentation and parameters."""
    known = sources.load_catalog()
    if name is None:
        width = max(len(probe.name) for probe in known)
        for probe in known:
            click.echo(f"{probe.name:{width}}  {probe.title}")
        click.echo("\nprobefleet catalog NAME tells more; probefleet run NAME measures.")
        return
    found = known.get(name)
    if found is None:
        near = core_errors.did_you_mean(name, known.names, what="probe in the catalog")
        raise BadInput(f"no probe {name!r} in the catalog. {near}")
    for line in "\n".join(described(found)).split("\n"):
        indent = len(line) - len(line.lstrip())
        for part in _wrapped(line, WIDTH, hanging=" " * (indent + 2 if indent else 0)):
            click.echo(part)


def described(probe: catalog_module.Probe) -> Iterator[str]:
    """One probe's documentation."""
    yield f"{probe.name}: {probe.title}"
    yield from ("", probe.description, "", f"Whose events: {probe.identity_says}")
    if probe.parameters:
        yield from ("", "Parameters:")
    for parameter in probe.parameters:
        choices = f" ({', '.join(parameter.choices)})" if parameter.choices else ""
        default = parameter.default or "empty"
        yield f"  {parameter.name}: {parameter.type}{choices}, default {default}. {parameter.doc}"
    yield from ("", "Outputs:")
    for each in probe.outputs:
        output = each.output
        unit = f", {output.unit}" if output.unit else ""
        by = f", by {', '.join(output.group_by)}" if output.group_by else ""
        yield f"  {output.name}: {output.kind}{unit}{by}"
        if each.allowed_group_by:
            yield f"    groupBy can be: node, {', '.join(each.allowed_group_by)}"
    yield from ("", "Maps:")
    for each_map in probe.maps:
        yield f"  {each_map.name} ({each_map.max_entries:,}): {each_map.holds}; when full: {each_map.full}"
    yield from ("", "As a policy:")
    manifest = sources.of_catalog(
        probe.name, catalog_module.Catalog({probe.name: probe}), scope="Namespace", interval="10s", namespace="default"
    )
    yield from (f"  {line}" for line in _yaml(manifest))


def _wrapped(text: str, width: int, hanging: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False) or [""]


def _yaml(manifest: sources.Manifest) -> list[str]:
    import yaml

    return str(yaml.safe_dump(manifest, sort_keys=False)).splitlines()


@click.command(short_help="Remove everything of ours from this machine.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--bpffs",
    type=click.Path(path_type=Path),
    default=mounts.BPFFS,
    show_default=True,
    envvar="PROBEFLEET_BPFFS",
    help="Where bpffs is mounted.",
)
def purge(*, yes: bool, bpffs: Path) -> None:
    """Detach and remove everything that Probefleet has pinned on this machine.

    An agent that runs here notices at its next push and loads its policies anew, with counts from zero. Runs that are
    under way in other terminals are left alone. Shows what it is about to remove, and asks.
    """
    workspace.check_readable(bpffs)
    tree = pins.root(bpffs)
    found = workspace.list_private(bpffs)
    for each in found:
        if each.in_use:
            click.echo(f"{each.path} belongs to a run that is under way; end that one with Ctrl-C", err=True)
    listed = [*pinned_here.described(tree)]
    for each in found:
        if not each.in_use:
            listed += [f"left by a run that died ({each.path.name}):", *pinned_here.described(pins.root(each.path))]
    if not listed:
        click.echo(f"nothing of ours is pinned under {bpffs}")
        return
    for line in listed:
        click.echo(line)
    if not yes:
        if not sys.stdin.isatty():
            raise BadInput("nobody can be asked here whether all of this is to go. Write --yes")
        if not click.confirm("Remove all of it?", err=True):
            raise Failure("nothing was removed")
    try:
        tree.purge()
        links_network.sweep(tree.path)
        workspace.sweep(bpffs)
    except agent_errors.ProbefleetError as error:
        raise Failure(f"not everything could be removed: {error}") from error
    click.echo("removed")


@click.command(short_help="Versions of Probefleet, Python and the kernel.")
def version() -> None:
    """Versions of Probefleet, Python and the kernel."""
    click.echo(
        f"probefleet {metadata.version('probefleet')}, Python {platform.python_version()}, Linux {platform.release()}"
    )


@click.command(short_help="Code for the shell that completes commands and options.")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the code that completes commands, options and probes' names in a shell.

    \b
      source <(probefleet completion bash)        # in ~/.bashrc
      source <(probefleet completion zsh)         # in ~/.zshrc
      probefleet completion fish | source         # in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    root = context.find_root()
    click.echo(kind(root.command, {}, "probefleet", "_PROBEFLEET_COMPLETE").source())
