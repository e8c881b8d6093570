"""Words on the command line → one verb. The only module that parses arguments and sets the exit status."""

import argparse
import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import build, cluster, network, node, settings
from .errors import ClusterError
from .settings import CONTROL_GROUP, Layout, NodeNumber

DEFAULT_NODES = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    options = _parser().parse_args(arguments)
    layout = settings.layout(options.root)
    if os.geteuid() != 0:
        print("cluster: namespaces and cgroups need root: run it with sudo", file=sys.stderr)
        return 1
    try:
        match options.command:
            case "run":
                _become(network.inside(CONTROL_GROUP), options.words, layout)
            case "on":
                _become(node.inside(layout.node(options.number)), options.words, layout)
            case "status":
                return cluster.status(layout)
            case "build":
                build.build(layout.binaries)
            case _:
                with _lock():
                    _change(layout, options)
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        words = error.stderr or b""
        text = words.decode(errors="replace") if isinstance(words, bytes) else words
        print(f"cluster: {error}\n{text}", file=sys.stderr)
        return 1
    return 0


def _change(layout: Layout, options: argparse.Namespace) -> None:
    match options.command:
        case "up":
            cluster.up(layout, options.nodes, options.images)
        case "down":
            cluster.down(layout)
        case "join":
            cluster.join(layout, options.number)
        case "leave":
            cluster.leave(layout, options.number)
        case "load":
            cluster.load(layout, options.archives)
        case "stop-apiserver":
            cluster.stop_api_server(layout)
        case "start-apiserver":
            cluster.start_api_server(layout)


def _become(inside: list[str], words: list[str], layout: Layout) -> None:
    """Replace this process by a command that finds the cluster."""
    if words[:1] == ["--"]:
        words = words[1:]
    if not words:
        raise ClusterError("what is to be run? For example: cluster run kubectl get nodes")
    if not layout.kubeconfig("admin").exists():
        raise ClusterError("no cluster is running: `cluster up` starts one")
    environment = dict(os.environ)
    environment["KUBECONFIG"] = str(layout.kubeconfig("admin"))
    environment["PATH"] = f"{layout.binaries}:{environment.get('PATH', os.defpath)}"
    command = [*inside, *words]
    os.execvpe(command[0], command, environment)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    directory = settings.cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cluster.say("waiting for another `cluster` command to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _node_number(text: str) -> NodeNumber:
    number = int(text)
    if not 1 <= number <= settings.LARGEST_NODE:
        raise argparse.ArgumentTypeError(f"a node's number is 1 to {settings.LARGEST_NODE}, not {number}")
    return NodeNumber(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cluster", description="A real Kubernetes of several nodes on this machine. See tests/cluster/README.md."
    )
    root = argparse.ArgumentParser(add_help=False)
    where = f"folder of the cluster's files (default: the running cluster's, or {settings.DEFAULT_ROOT})"
    root.add_argument("--root", type=Path, help=where)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[root], help=description, description=description)

    command("build", "compile Kubernetes, Helm and CoreDNS, once")
    up = command("up", "start the control plane and N nodes, or what of them is missing")
    up.add_argument("nodes", type=_node_number, nargs="?", default=NodeNumber(DEFAULT_NODES), metavar="N")
    images = "image archives that nodes begin with: faster than to load them afterwards"
    up.add_argument("--images", type=Path, nargs="+", default=[], metavar="TAR", help=images)
    load = command("load", "bring image archives to every node, and to those that join later")
    load.add_argument("archives", type=Path, nargs="+", metavar="TAR")
    run = command("run", "run a command in the control plane's network, with KUBECONFIG and PATH set")
    on = command("on", "run a command in a node's mount and network namespaces")
    join = command("join", "add one node while the cluster runs")
    leave = command("leave", "cut a node's power")
    for one in (on, join, leave):
        one.add_argument("number", type=_node_number, metavar="N")
    for one in (run, on):
        one.add_argument("words", nargs=argparse.REMAINDER, metavar="CMD…")
    command("stop-apiserver", "kill the API server")
    command("start-apiserver", "start the API server again")
    command("status", "what runs; exit status 1 where something does not")
    command("down", "end everything and leave nothing")
    return parser
