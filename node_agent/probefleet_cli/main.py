"""The command line: ``probefleet`` on one machine, ``kubectl probefleet`` on a cluster. One program, two names.

kubectl finds plugins by their name on the PATH, so the name that this was called by decides which commands come first.
Commands raise ``Failure``; here, and nowhere else, it becomes words on stderr and an exit status.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click
import structlog

from probefleet_cli import check_commands, inspect, machine_commands, map_commands, run_command
from probefleet_cli.failures import BAD_INPUT, DONE, INTERNAL, Failure
from probefleet_cli.start import INTERRUPTED

CLUSTER_COMMANDS: tuple[click.Command, ...] = ()
try:
    from probefleet_cli import cluster_commands
except ModuleNotFoundError as missing:
    if missing.name != "urllib3":  # the agent's image has no HTTP client: a node talks to no API server
        raise
else:
    CLUSTER_COMMANDS = (cluster_commands.run, cluster_commands.events, cluster_commands.nodes)

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.option("-v", "--verbose", is_flag=True, help="Log what is done, and print tracebacks of failures of ours.")
def machine(*, verbose: bool) -> None:
    """eBPF measurement on this machine; `probefleet cluster`, or kubectl probefleet, is for a whole fleet.

    Exit status: 0 done, 1 failed, 2 a bad policy or command line, 3 refused by this kernel.
    """
    configure_logs(verbose=verbose)


@click.group(context_settings=CONTEXT, short_help="The same on a whole cluster; also as kubectl probefleet.")
def cluster() -> None:
    """The same on a whole cluster, by the caller's own kubeconfig and rights.

    Exit status: 0 done, 1 failed, 2 a bad policy or command line, 3 refused by every node's kernel.
    """
    configure_logs(verbose=False)


TOOLS = (machine_commands.catalog, check_commands.explain, machine_commands.version, machine_commands.completion)
HERE = (run_command.run, check_commands.check, inspect.inspect, map_commands.maps)
for _command in (*HERE, machine_commands.doctor, machine_commands.purge, *TOOLS):
    machine.add_command(_command)
for _command in (*CLUSTER_COMMANDS, *TOOLS):
    cluster.add_command(_command)
if CLUSTER_COMMANDS:
    machine.add_command(cluster)


def configure_logs(*, verbose: bool) -> None:
    """The engine's log to stderr: warnings, or everything."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO if verbose else logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


def command_for(program: str) -> click.Group:
    """The commands that belong to the name we were called by."""
    return cluster if program.endswith("kubectl-probefleet") else machine


def invoke(command: click.Group, arguments: Sequence[str], *, program: str) -> int:
    """Run a command line; its exit status."""
    try:
        command.main(args=list(arguments), prog_name=program, standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return BAD_INPUT
    except Failure as failure:
        click.secho(f"probefleet: {failure}", err=True, fg="red" if sys.stderr.isatty() else None)
        return failure.status
    except BrokenPipeError:
        # Whoever read has gone; nothing more can be said, also not by Python at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERNAL
    except Exception as error:
        click.echo(f"probefleet: this is a mistake of ours: {type(error).__name__}: {error}", err=True)
        if {"-v", "--verbose"} & set(arguments):
            traceback.print_exc()
        else:
            click.echo("`probefleet -v …` prints where it happened; please report it.", err=True)
        return INTERNAL
    return DONE


def main() -> int:
    """The entry point of both names."""
    program = Path(sys.argv[0]).name
    return invoke(command_for(program), sys.argv[1:], program="kubectl probefleet" if "kubectl" in program else program)


if __name__ == "__main__":
    sys.exit(main())
