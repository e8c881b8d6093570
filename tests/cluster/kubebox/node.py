"""One node: containerd, kubelet and kube-proxy in namespaces and cgroups of their own.

What a node has for itself: a network namespace; a mount namespace with its own /run, /var/log and, above all, its own
bpf file system, so that nodes do not see each other's pins; and the cgroup `/probefleet-nodeN` in every hierarchy, the
parent of all its pods. What it shares with the machine is the kernel. Called by `cluster`.
"""

import hashlib
import json
import subprocess
from pathlib import Path

from . import image_store, network, pki, processes, settings, waiting
from .errors import ClusterError
from .pki import Identity
from .settings import Layout, NodeLayout

RUNTIME_SECONDS = 60.0

# Run once in the node's new mount namespace; then containerd takes the shell's place and keeps the namespace alive.
# $1 is the node's folder. The /run of its own hides the machine's init system, containers and locks.
ENTER = """
set -e
mount --make-rshared /
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /var/lib/cni
mount --bind "$1/kubelet" /var/lib/kubelet
mount --bind "$1/log" /var/log
mount -t bpf bpf /sys/fs/bpf
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
shift
exec "$@"
"""
MOUNT_POINTS = (Path("/var/lib/cni"), Path("/var/lib/kubelet"))
"""Made on the machine where they are missing, for a node to mount its own there."""

CONTAINERD_CONFIGURATION = """\
version = 2
root = "{directory}/containerd"
state = "{directory}/containerd-state"
[grpc]
  address = "{directory}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{directory}/cni-configuration"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""


def start(layout: Layout, node: NodeLayout) -> dict[Path, "subprocess.Popen[bytes]"]:
    """Start a node with every image that was loaded, and return, by log, what has to live."""
    for name in ("log", "cni-configuration", "volume-plugins", "kubelet"):
        (node.directory / name).mkdir(parents=True)
    node.static_pods.mkdir()
    for point in MOUNT_POINTS:
        point.mkdir(exist_ok=True)
    processes.make_group(node.group)
    network.make_node(node)
    hosts = (node.name, node.address)
    identity = Identity(node.name, f"system:node:{node.name}", groups=("system:nodes",), hosts=hosts)
    pki.kubeconfig(layout, identity)
    _write_configuration(layout, node)

    archives = layout.loaded_archives.read_text().splitlines() if layout.loaded_archives.exists() else []
    # One that was deleted since can be missed only by a pod, whose event then names the image.
    present = [layout.binaries / "pause.tar", *(path for path in map(Path, archives) if path.exists())]
    if image_store.fill(node.directory / "containerd", present):
        for archive in present:
            _note(node, archive)

    watched: dict[Path, subprocess.Popen[bytes]] = {}
    namespaces = [*network.inside(node.group), "unshare", "--mount", "--propagation", "slave"]
    containerd = ["containerd", "-c", str(node.directory / "containerd.toml")]
    enter = [*namespaces, "/bin/sh", "-c", ENTER, "sh", str(node.directory), *containerd]
    log = layout.logs / f"{node.name}-containerd.log"
    watched[log] = processes.start(enter, group=f"{node.group}/runtime/containerd", log=log)
    node.pid_file.write_text(f"{watched[log].pid}\n")
    waiting.until(
        lambda: image_store.answers(node.socket),
        what=f"containerd of {node.name} answers",
        seconds=RUNTIME_SECONDS,
        watched=watched,
    )
    for archive in present:
        load(node, archive)

    kubelet = [str(layout.binaries / "kubelet"), f"--config={node.directory}/kubelet.json"]
    kubelet += [f"--kubeconfig={layout.kubeconfig(node.name)}"]
    kubelet += [f"--hostname-override={node.name}", f"--node-ip={node.address}"]
    watched |= _component(layout, node, "kubelet", kubelet)
    # The machine's connection tracking table belongs to the machine: 0 leaves its limits as they are.
    proxy = [str(layout.binaries / "kube-proxy"), f"--kubeconfig={layout.kubeconfig('proxy')}"]
    proxy += [f"--hostname-override={node.name}", f"--cluster-cidr={settings.POD_NETWORK}"]
    proxy += ["--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0"]
    proxy += ["--conntrack-tcp-timeout-close-wait=0"]
    watched |= _component(layout, node, "kube-proxy", proxy)
    return watched


def load(node: NodeLayout, archive: Path) -> None:
    """Import an image archive, OCI's or Docker's, into a node's containerd, unless it is there already."""
    stamp, content = _stamp(node, archive)
    if stamp.exists() and stamp.read_text() == content:
        return
    image_store.load(node.socket, archive)
    _note(node, archive)


def _note(node: NodeLayout, archive: Path) -> None:
    """The node has this archive's image."""
    stamp, content = _stamp(node, archive)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(content)


def _stamp(node: NodeLayout, archive: Path) -> tuple[Path, str]:
    # Only the file's name, size and time are compared: reading it all would take as long as importing it.
    stat = archive.stat()
    name = hashlib.sha256(str(archive).encode()).hexdigest()[:16]
    return node.directory / "imported" / name, f"{archive} {stat.st_size} {stat.st_mtime_ns}\n"


def inside(node: NodeLayout) -> list[str]:
    """Words to put before a command that is to run in the node's mount and network namespaces."""
    return ["nsenter", f"--target={containerd_pid(node)}", "--mount", "--net", "--"]


def containerd_pid(node: NodeLayout) -> int:
    """The process that holds the node's namespaces."""
    try:
        pid = int(node.pid_file.read_text())
    except FileNotFoundError:
        raise ClusterError(f"there is no {node.name}: `cluster status` lists the nodes") from None
    if pid not in processes.members(f"{node.group}/runtime/containerd"):
        raise ClusterError(f"{node.name} has no containerd: start the node again by `cluster join {node.number}`")
    return pid


def running(node: NodeLayout) -> bool:
    """Whether all three components of a node have a process."""
    components = ("containerd", "kubelet", "kube-proxy")
    return all(processes.members(f"{node.group}/runtime/{name}") for name in components)


def _component(
    layout: Layout, node: NodeLayout, name: str, command: list[str]
) -> dict[Path, "subprocess.Popen[bytes]"]:
    log = layout.logs / f"{node.name}-{name}.log"
    words = [*inside(node), *command]
    return {log: processes.start(words, group=f"{node.group}/runtime/{name}", log=log)}


def _write_configuration(layout: Layout, node: NodeLayout) -> None:
    directory = node.directory
    text = CONTAINERD_CONFIGURATION.format(directory=directory, pause=settings.PAUSE_IMAGE)
    (directory / "containerd.toml").write_text(text)
    # ptp, not bridge: a Service whose end point is on the caller's own node then works without br_netfilter.
    point_to_point = {
        "type": "ptp",
        "ipMasq": False,
        "ipam": {
            "type": "host-local",
            "dataDir": f"{directory}/cni",
            "ranges": [[{"subnet": node.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    port_map = {"type": "portmap", "capabilities": {"portMappings": True}}
    cni = {"cniVersion": "1.0.0", "name": "pods", "plugins": [point_to_point, port_map]}
    (directory / "cni-configuration" / "10-pods.conflist").write_text(json.dumps(cni, indent=1))
    kubelet = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{node.socket}",
        "staticPodPath": str(node.static_pods),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.group}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "seccompDefault": True,
        "authentication": {
            "anonymous": {"enabled": False},
            "x509": {"clientCAFile": f"{layout.pki}/ca.crt"},
            "webhook": {"enabled": True},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{layout.pki}/{node.name}.crt",
        "tlsPrivateKeyFile": f"{layout.pki}/{node.name}.key",
        "clusterDNS": [settings.CONTROL_ADDRESS],
        "clusterDomain": settings.CLUSTER_DOMAIN,
        "resolvConf": f"{layout.root}/resolv.conf",
        "volumePluginDir": f"{directory}/volume-plugins",
        "enforceNodeAllocatable": [],
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        # An image that was loaded by hand cannot be pulled again: never collect any.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "nodeLeaseDurationSeconds": settings.NODE_LEASE_SECONDS,
        "nodeStatusUpdateFrequency": "4s",
    }
    (directory / "kubelet.json").write_text(json.dumps(kubelet, indent=1))
