"""The verbs. Each takes the machine from any state, a crashed one included, to the state it names.

    nothing ── up ──▶ running ── down ──▶ nothing
                      join, leave, load, stop and start the API server

Called by cli, under a lock, so that two callers do not build one cluster.
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import control, network, node, processes, settings, waiting
from .errors import ClusterError
from .settings import CONTROL_GROUP, Layout, NodeLayout, NodeNumber

READY_SECONDS = 120

Started = dict[Path, "subprocess.Popen[bytes]"]


def say(text: str) -> None:
    """One line of progress, apart from what a command prints as its result."""
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def up(layout: Layout, node_count: int, archives: Sequence[Path] = ()) -> None:
    """Have a control plane and the nodes 1 to `node_count` running and ready, with these images."""
    archives = _archives(archives)
    wanted = [layout.node(NodeNumber(number)) for number in range(1, node_count + 1)]
    if _alive(layout):
        absent = [one for one in wanted if not node.running(one)]
        for one in absent:
            _clear_node(layout, one)
        if absent:
            _start_nodes(layout, absent, {})
        _wait(layout, "condition=Ready", [f"node/{one.name}" for one in wanted], {})
        if archives:
            load(layout, archives)
        say(f"up, with {len(_running(layout))} nodes; `cluster status` shows them")
        return
    if processes.groups() or network.all_namespaces() or layout.root.exists():
        say("cleaning up what an earlier cluster left")
        down(layout)
    if str(layout.root).startswith("/run/"):
        raise ClusterError(f"{layout.root}: a node has its own /run, so the root cannot lie there; choose another")
    missing = [name for name in ("hyperkube", "helm", "coredns", "pause.tar") if not (layout.binaries / name).exists()]
    if missing:
        raise ClusterError(f"{layout.binaries} has no {', '.join(missing)}: run `tests/cluster/cluster build` first")
    layout.root.mkdir(parents=True)
    _remember(layout, archives)
    settings.POINTER.unlink(missing_ok=True)
    settings.POINTER.symlink_to(layout.root)
    say("starting the control plane")
    watched = control.start(layout)
    _start_nodes(layout, wanted, watched)
    # A pod cannot be created in a namespace before its ServiceAccount is.
    _wait(layout, "create", ["serviceaccount/default", "--namespace=default"], watched)


def _alive(layout: Layout) -> bool:
    return control.api_server_running() and layout.kubeconfig("admin").exists() and control.api_server_ready(layout)


def _running(layout: Layout) -> list[NodeLayout]:
    return [one for one in layout.nodes() if node.running(one)]


def _start_nodes(layout: Layout, nodes: Sequence[NodeLayout], watched: Started) -> None:
    say(f"starting {', '.join(one.name for one in nodes)}")
    # A node that comes back must not be taken for ready by what its Node object said before.
    names = [f"node/{one.name}" for one in nodes]
    subprocess.run(
        control.kubectl(layout, "delete", "--ignore-not-found", *names), check=True, stdout=subprocess.DEVNULL
    )
    with ThreadPoolExecutor(max_workers=len(nodes)) as pool:
        for started in pool.map(lambda one: node.start(layout, one), nodes):
            watched |= started
    for name in names:  # of several at once, `kubectl wait` takes the first absent one for an error
        _wait(layout, "create", [name], watched)
    _wait(layout, "condition=Ready", names, watched)
    say(f"{', '.join(one.name for one in nodes)} ready")


def _wait(layout: Layout, condition: str, objects: Iterable[str], watched: Started) -> None:
    command = control.kubectl(layout, "wait", f"--for={condition}", f"--timeout={READY_SECONDS}s", *objects)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waiting.finish(process, what=f"waiting for {condition}; logs are in {layout.logs}", watched=watched)


def down(layout: Layout) -> None:
    """End every process of the cluster and remove all that it left on the machine."""
    groups = processes.groups()
    for group in groups:
        processes.end(group)
    # Mounts of nodes and pods went with the last process of their namespace; this is for what someone mounted by hand.
    for mount in _mounts_below(layout.root):
        subprocess.run(["umount", "--lazy", mount], check=True)
    for namespace in network.all_namespaces():
        network.remove(namespace)
    network.tidy()
    for group in groups:
        processes.remove_group(group)
    if layout.root.exists():
        shutil.rmtree(layout.root)
    settings.POINTER.unlink(missing_ok=True)
    for point in node.MOUNT_POINTS:
        # Not empty: it holds another program's state, and is not ours to remove.
        with contextlib.suppress(OSError):
            point.rmdir()


def _mounts_below(root: Path) -> list[str]:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(f"{root}/")), reverse=True)


def join(layout: Layout, number: NodeNumber) -> None:
    """Add a node, new and empty but for the images that were loaded."""
    _require(layout)
    one = layout.node(number)
    if node.running(one):
        raise ClusterError(f"{one.name} is running already")
    _clear_node(layout, one)
    _start_nodes(layout, [one], {})


def leave(layout: Layout, number: NodeNumber) -> None:
    """Cut a node's power: its processes and those of its pods end at once. Its Node object stays, as it would."""
    _require(layout)
    one = layout.node(number)
    if not one.directory.exists():
        raise ClusterError(f"there is no {one.name}: `cluster status` lists the nodes")
    _clear_node(layout, one)


def _clear_node(layout: Layout, one: NodeLayout) -> None:
    processes.end(one.group)
    network.remove(one.group)
    processes.remove_group(one.group)
    if one.directory.exists():
        shutil.rmtree(one.directory)
    layout.kubeconfig(one.name).unlink(missing_ok=True)


def load(layout: Layout, archives: Sequence[Path]) -> None:
    """Bring image archives into every node's containerd, and remember them for nodes that join."""
    _require(layout)
    archives = _archives(archives)
    nodes = _running(layout)
    with ThreadPoolExecutor(max_workers=len(nodes)) as pool:
        jobs = [pool.submit(node.load, one, archive) for archive in archives for one in nodes]
        for job in jobs:
            job.result()
    _remember(layout, archives)
    say(f"{', '.join(archive.name for archive in archives)} on {', '.join(one.name for one in nodes)}")


def _archives(paths: Sequence[Path]) -> list[Path]:
    for path in paths:
        if not path.is_file():
            raise ClusterError(f"{path}: no such image archive")
    return [path.absolute() for path in paths]


def _remember(layout: Layout, archives: Sequence[Path]) -> None:
    """Nodes that start later get these images, too."""
    known = layout.loaded_archives.read_text().splitlines() if layout.loaded_archives.exists() else []
    lines = dict.fromkeys([*known, *map(str, archives)])
    layout.loaded_archives.write_text("".join(f"{line}\n" for line in lines))


def stop_api_server(layout: Layout) -> None:
    """Kill the API server."""
    _require(layout)
    control.stop_api_server()


def start_api_server(layout: Layout) -> None:
    """Start the API server again; nothing happens where it runs."""
    _require(layout)
    if not control.api_server_running():
        control.start_api_server(layout)


def status(layout: Layout) -> int:
    """Print what runs; 0 where everything that was started does, 1 otherwise."""
    if not processes.groups():
        print("no cluster: `cluster up` starts one")
        return 1
    ready = _alive(layout)
    print(f"root        {layout.root}\nkubeconfig  {layout.kubeconfig('admin')}\nlogs        {layout.logs}")
    print(f"API server  {'ready' if ready else 'not ready'}")
    nodes = layout.nodes()
    for one in nodes:
        state = "running" if node.running(one) else "broken"
        print(f"{one.name:<11} {state}, {len(processes.members(one.group))} processes, cgroup /{one.group}")
    if ready:
        subprocess.run(control.kubectl(layout, "get", "nodes", "-o", "wide"), check=True)
    return 0 if ready and all(node.running(one) for one in nodes) else 1


def _require(layout: Layout) -> None:
    if CONTROL_GROUP not in processes.groups() or not layout.root.exists():
        raise ClusterError("no cluster is running: `cluster up` starts one")
