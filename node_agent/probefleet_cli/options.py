"""What several commands take on their command line: durations, settings, and where this machine's things are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem
from probefleet_agent.kernel import mounts
from probefleet_core import quantities

Command = TypeVar("Command", bound=Callable[..., Any])
FORMATS = ("table", "json", "yaml", "folded", "svg")


class Duration(click.ParamType[float]):
    """``30s``, ``1h30m`` → seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """click's; fails with the reason."""
        if isinstance(value, float):
            return value
        try:
            return quantities.duration_ns(str(value)) / 1e9
        except ValueError as error:
            self.fail(f"{value!r}: {error}.", param, ctx)


def complete_probe(context: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """The catalog's names, for the shell."""
    from probefleet_cli import sources

    return [
        CompletionItem(probe.name, help=probe.title) for probe in sources.load_catalog() if probe.name.startswith(word)
    ]


def complete_what(context: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """The catalog's names, and files."""
    return [*complete_probe(context, parameter, word), CompletionItem(word, type="file")]


def complete_file(context: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """A path, for the shell."""
    return [CompletionItem(word, type="file")]


def complete_namespace(context: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """Namespaces that have a pod on this machine, for the shell."""
    from probefleet_cli import local_pods

    return [CompletionItem(name) for name in local_pods.find().namespaces if name.startswith(word)]


def runtime(command: Command) -> Command:
    """``--runtime-endpoint``."""
    return click.option(
        "--runtime-endpoint",
        metavar="SOCKET",
        shell_complete=complete_file,
        envvar="CONTAINER_RUNTIME_ENDPOINT",
        help="The container runtime's CRI socket, which knows pods and labels; without, well-known ones are tried "
        "(containerd, k3s, CRI-O, cri-dockerd). Also CONTAINER_RUNTIME_ENDPOINT.",
    )(command)


def machine(command: Command) -> Command:
    """``--bpffs`` and ``--cgroup-root``."""
    command = click.option(
        "--cgroup-root",
        metavar="PATH",
        default="/",
        show_default=True,
        envvar="PROBEFLEET_CGROUP_ROOT",
        help="Only processes of this cgroup and below count as this machine.",
    )(command)
    return click.option(
        "--bpffs",
        type=click.Path(path_type=Path),
        default=mounts.BPFFS,
        show_default=True,
        envvar="PROBEFLEET_BPFFS",
        help="Where bpffs is mounted (or is to be).",
    )(command)


def settings(command: Command) -> Command:
    """``--set``."""
    return click.option(
        "--set", "settings", multiple=True, metavar="PARAMETER=VALUE", help="A catalog probe's parameter; repeatable."
    )(command)


def by(default: str) -> Callable[[Command], Command]:
    """``--by``; in words, what is told apart without it."""
    return click.option(
        "--by",
        metavar="FIELD[,FIELD]",
        help="Whose numbers are told apart: node, namespace, workload, pod, container, or a field that "
        f"`probefleet catalog NAME` lists. Without: {default}.",
    )


def wide(command: Command) -> Command:
    """``--wide``."""
    return click.option("--wide", is_flag=True, help="On a terminal, show records and keys whole, as in a pipe.")(
        command
    )
