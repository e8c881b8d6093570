"""The control plane: etcd, API server, controller manager, scheduler and DNS, each in a cgroup leaf of its own.

Called by `cluster`. The leaf per component lets the API server be killed and started again under a running cluster.
"""

import subprocess
from pathlib import Path

from . import network, pki, processes, settings, waiting
from .pki import Identity
from .settings import CONTROL_GROUP, Layout

READY_SECONDS = 120.0
MASTERS = "system:masters"

API_SERVER_HOSTS = (
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    f"kubernetes.default.svc.{settings.CLUSTER_DOMAIN}",
    "127.0.0.1",
    settings.SERVICE_NETWORK_FIRST,
    settings.CONTROL_ADDRESS,
)

DNS_CONFIGURATION = """\
.:53 {{
    bind {address}
    errors
    ready {address}:8181
    kubernetes {domain} {{
        kubeconfig {kubeconfig}
        pods verified
    }}
    cache 5
}}
"""


def start(layout: Layout) -> dict[Path, "subprocess.Popen[bytes]"]:
    """Start everything and return, by log, what has to live, when API server and DNS answer."""
    pki.make_authority(layout)
    pki.issue(layout, Identity("apiserver", "kube-apiserver", hosts=API_SERVER_HOSTS))
    pki.issue(layout, Identity("apiserver-kubelet-client", "kube-apiserver-kubelet-client", groups=(MASTERS,)))
    pki.kubeconfig(layout, Identity("admin", "admin", groups=(MASTERS,)))
    pki.kubeconfig(layout, Identity("controller-manager", "system:kube-controller-manager"))
    pki.kubeconfig(layout, Identity("scheduler", "system:kube-scheduler"))
    pki.kubeconfig(layout, Identity("proxy", "system:kube-proxy"))
    pki.kubeconfig(layout, Identity("dns", "dns", groups=(MASTERS,)))
    (layout.root / "resolv.conf").write_text(f"nameserver {settings.CONTROL_ADDRESS}\n")
    corefile = layout.root / "Corefile"
    corefile.write_text(
        DNS_CONFIGURATION.format(
            address=settings.CONTROL_ADDRESS, domain=settings.CLUSTER_DOMAIN, kubeconfig=layout.kubeconfig("dns")
        )
    )

    processes.make_group(CONTROL_GROUP)
    network.make_control()
    watched: dict[Path, subprocess.Popen[bytes]] = {}
    # fsync is for data that has to survive a power cut; this cluster does not.
    etcd = ["--data-dir", f"{layout.root}/etcd", "--unsafe-no-fsync", "--logger", "zap", "--log-level", "warn"]
    watched |= _component(layout, "etcd", "etcd", *etcd)
    watched |= start_api_server(layout, watched)
    watched |= _component(
        layout,
        "kube-controller-manager",
        layout.binaries / "kube-controller-manager",
        f"--kubeconfig={layout.kubeconfig('controller-manager')}",
        f"--service-account-private-key-file={layout.pki}/sa.key",
        f"--root-ca-file={layout.pki}/ca.crt",
        "--use-service-account-credentials=true",
        f"--cluster-signing-cert-file={layout.pki}/ca.crt",
        f"--cluster-signing-key-file={layout.pki}/ca.key",
        "--leader-elect=false",
        f"--flex-volume-plugin-dir={layout.root}/volume-plugins",
        f"--node-monitor-grace-period={settings.NODE_GRACE_SECONDS}s",
        "--node-monitor-period=2s",
    )
    watched |= _component(
        layout,
        "kube-scheduler",
        layout.binaries / "kube-scheduler",
        f"--kubeconfig={layout.kubeconfig('scheduler')}",
        "--leader-elect=false",
    )
    watched |= _component(layout, "coredns", layout.binaries / "coredns", "-conf", corefile)
    url = f"http://{settings.CONTROL_ADDRESS}:8181/ready"
    waiting.until(lambda: _http_ok(url), what="DNS is ready", seconds=READY_SECONDS, watched=watched)
    return watched


def start_api_server(layout: Layout, watched: waiting.Watched | None = None) -> dict[Path, "subprocess.Popen[bytes]"]:
    """Start the API server and return when it says that it is ready."""
    started = _component(
        layout,
        "kube-apiserver",
        layout.binaries / "kube-apiserver",
        "--etcd-servers=http://127.0.0.1:2379",
        f"--secure-port={settings.API_PORT}",
        f"--advertise-address={settings.CONTROL_ADDRESS}",
        f"--client-ca-file={layout.pki}/ca.crt",
        f"--tls-cert-file={layout.pki}/apiserver.crt",
        f"--tls-private-key-file={layout.pki}/apiserver.key",
        f"--service-account-key-file={layout.pki}/sa.key",
        f"--service-account-signing-key-file={layout.pki}/sa.key",
        f"--service-account-issuer=https://kubernetes.default.svc.{settings.CLUSTER_DOMAIN}",
        f"--service-cluster-ip-range={settings.SERVICE_NETWORK}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--kubelet-preferred-address-types=InternalIP",
        f"--kubelet-client-certificate={layout.pki}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={layout.pki}/apiserver-kubelet-client.key",
        # No kube-proxy runs beside the API server: it has to find webhooks by their end points.
        "--enable-aggregator-routing=true",
    )
    waiting.until(
        lambda: api_server_ready(layout),
        what="the API server is ready",
        seconds=READY_SECONDS,
        watched={**(watched or {}), **started},
    )
    return started


def stop_api_server() -> None:
    """Kill the API server; etcd and everything else live on."""
    processes.end(f"{CONTROL_GROUP}/kube-apiserver")


def api_server_running() -> bool:
    """Whether there is a process of it."""
    return bool(processes.members(f"{CONTROL_GROUP}/kube-apiserver"))


def api_server_ready(layout: Layout) -> bool:
    """Whether `/readyz` answers with 200."""
    command = kubectl(layout, "get", "--raw", "/readyz", "--request-timeout=2s")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def kubectl(layout: Layout, *words: str) -> list[str]:
    """The command line of a kubectl that is the cluster's administrator."""
    program = [str(layout.binaries / "kubectl"), f"--kubeconfig={layout.kubeconfig('admin')}"]
    return [*network.inside(CONTROL_GROUP), *program, *words]


def _component(layout: Layout, name: str, *command: str | Path) -> dict[Path, "subprocess.Popen[bytes]"]:
    log = layout.logs / f"{name}.log"
    words = [*network.inside(CONTROL_GROUP), *command]
    return {log: processes.start(words, group=f"{CONTROL_GROUP}/{name}", log=log)}


def _http_ok(url: str) -> bool:
    ask = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=2)"
    command = [*network.inside(CONTROL_GROUP), "/usr/bin/python3", "-c", ask, url]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
