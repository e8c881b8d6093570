"""Namespaces, cables and routes: the nodes' network, apart from the machine's own.

    control plane 10.89.0.1 ── bridge kube0 ─┬─ node1 10.89.0.11 ── pods 10.88.1.0/24
                                             └─ node2 10.89.0.12 ── pods 10.88.2.0/24 …

The control plane's namespace is the router between the nodes. There is no way out: a pod reaches other pods, Services
and the API server, nothing else. Called by control and node.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import settings
from .settings import CONTROL_GROUP, NodeLayout

BRIDGE = "kube0"
NAMESPACES = Path("/run/netns")


def inside(namespace: str) -> list[str]:
    """Words to put before a command that is to run in a network namespace.

    Not `ip netns exec`: that mounts a new /sys, and /sys/fs/cgroup would be hidden.
    """
    return ["nsenter", f"--net={NAMESPACES / namespace}", "--"]


def make_control() -> None:
    """The control plane's namespace with the bridge that nodes are plugged into."""
    _ip("netns", "add", CONTROL_GROUP)
    _batch(
        CONTROL_GROUP,
        "link set lo up",
        f"link add {BRIDGE} type bridge",
        f"addr add {settings.CONTROL_ADDRESS}/{settings.NODE_NETWORK_PREFIX_LENGTH} dev {BRIDGE}",
        f"link set {BRIDGE} up",
    )
    # The bridge carries a packet in and out again; telling the sender about a shorter way would be noise.
    _sysctl(CONTROL_GROUP, "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0")


def make_node(node: NodeLayout) -> None:
    """A node's namespace, its cable to the bridge, and the way to its pods."""
    _ip("netns", "add", node.group)
    cable = f"pf-{node.name}"
    _batch(
        CONTROL_GROUP,
        f"link add {cable} type veth peer name eth0 netns {node.group}",
        f"link set {cable} master {BRIDGE} up",
        f"route replace {node.pods} via {node.address}",
    )
    _batch(
        node.group,
        "link set lo up",
        f"addr add {node.address}/{settings.NODE_NETWORK_PREFIX_LENGTH} dev eth0",
        "link set eth0 up",
        f"route add default via {settings.CONTROL_ADDRESS}",
    )
    _sysctl(node.group, "net.ipv4.ip_forward=1")


def remove(namespace: str) -> None:
    """Remove a namespace with every interface in it; nothing happens where there is none."""
    if (NAMESPACES / namespace).exists():
        _ip("netns", "delete", namespace)


def all_namespaces() -> list[str]:
    """Names of the cluster's network namespaces that exist."""
    return sorted(path.name for path in NAMESPACES.glob(f"{settings.NAME}-*"))


def tidy() -> None:
    """Undo what `ip netns add` mounted to hold names, when no name is left."""
    if NAMESPACES.is_dir() and not any(NAMESPACES.iterdir()):
        # Not Path.is_mount: it compares devices, and this is a bind mount of a folder onto itself.
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for _ in range(points.count(str(NAMESPACES))):
            subprocess.run(["umount", NAMESPACES], check=True)
        NAMESPACES.rmdir()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _batch(namespace: str, *lines: str) -> None:
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True)


def _sysctl(namespace: str, *values: str) -> None:
    command: Sequence[str] = [*inside(namespace), "sysctl", "-qw", *values]
    subprocess.run(command, check=True)
