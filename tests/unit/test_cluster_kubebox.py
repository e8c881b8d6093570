"""The test cluster's pure parts: go.mod of an embedding program, image archives, names and certificates' subjects."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from tests.cluster.kubebox import build, oci, pki, settings

KUBERNETES_GO_MOD = """\
module k8s.io/kubernetes

go 1.24.0

godebug default=go1.24

require (
	github.com/spf13/cobra v1.9.1
	k8s.io/api v0.0.0
	k8s.io/klog/v2 v2.130.1
)

require (
	go.etcd.io/bbolt v1.4.2 // indirect
	k8s.io/kubelet v0.0.0 // indirect
)

replace (
	k8s.io/api => ./staging/src/k8s.io/api
	k8s.io/kubelet => ./staging/src/k8s.io/kubelet
)
"""


def test_staging_modules_become_the_published_ones_of_the_same_release() -> None:
    lines = build.go_mod(KUBERNETES_GO_MOD, "1.34.4").splitlines()
    assert "k8s.io/kubernetes v1.34.4" in lines
    assert "k8s.io/api v0.34.4" in lines
    assert "k8s.io/kubelet v0.34.4 // indirect" in lines
    assert "k8s.io/api => k8s.io/api v0.34.4" in lines
    assert "k8s.io/kubelet => k8s.io/kubelet v0.34.4" in lines


def test_everything_that_is_no_staging_module_keeps_its_version() -> None:
    lines = build.go_mod(KUBERNETES_GO_MOD, "1.34.4").splitlines()
    assert {"go 1.24.0", "godebug default=go1.24", "github.com/spf13/cobra v1.9.1"} <= set(lines)
    # k8s.io/klog is published from a repository of its own
    assert "k8s.io/klog/v2 v2.130.1" in lines
    assert not any(line.startswith("k8s.io/klog/v2 =>") for line in lines)


def test_an_archive_holds_every_blob_under_its_digest(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF" + bytes(997))
    archive = tmp_path / "image.tar"
    oci.write(archive, name="localhost/tiny:1", files={"program": program}, entry_point=["/program"])
    with tarfile.open(archive) as tar:
        contents = {member.name: _read(tar, member) for member in tar.getmembers()}
    (entry,) = json.loads(contents["index.json"])["manifests"]
    assert entry["annotations"] == {"io.containerd.image.name": "localhost/tiny:1"}
    manifest = _blob(contents, entry)
    config = _blob(contents, manifest["config"])
    (layer,) = manifest["layers"]
    assert config["config"] == {"Entrypoint": ["/program"]}
    assert config["rootfs"]["diff_ids"] == [layer["digest"]]
    assert len(contents[_path(layer)]) == layer["size"]
    with tarfile.open(fileobj=io.BytesIO(contents[_path(layer)])) as inner:
        (member,) = inner.getmembers()
        assert (member.name, member.size, member.mode) == ("program", 1001, 0o755)


def test_nodes_are_listed_in_order_of_their_numbers(tmp_path: Path) -> None:
    layout = settings.Layout(root=tmp_path, binaries=tmp_path)
    for name in ("node10", "node2", "logs", "node1", "nodes"):
        (tmp_path / name).mkdir()
    assert [node.name for node in layout.nodes()] == ["node1", "node2", "node10"]


def test_no_two_nodes_share_an_address_or_a_cgroup(tmp_path: Path) -> None:
    layout = settings.Layout(root=tmp_path, binaries=tmp_path)
    nodes = [layout.node(settings.NodeNumber(number)) for number in range(1, settings.LARGEST_NODE + 1)]
    for values in ({n.address for n in nodes}, {n.pods for n in nodes}, {n.group for n in nodes}):
        assert len(values) == settings.LARGEST_NODE
    assert settings.CONTROL_ADDRESS not in {node.address for node in nodes}


def test_a_certificate_says_user_groups_hosts_and_addresses() -> None:
    hosts = ("node1", "10.89.0.11")
    identity = pki.Identity("node1", "system:node:node1", groups=("system:nodes",), hosts=hosts)
    assert identity.subject() == "/O=system:nodes/CN=system:node:node1"
    assert identity.alternative_names() == "DNS:node1,IP:10.89.0.11"


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _path(descriptor: dict[str, Any]) -> str:
    return f"blobs/{descriptor['digest'].replace(':', '/')}"


def _blob(contents: dict[str, bytes], descriptor: dict[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(contents[_path(descriptor)])
    return value
