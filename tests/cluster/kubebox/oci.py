"""Files → an OCI image archive of one layer, without a builder: enough for a static binary. Called by build."""

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterable
from pathlib import Path

MEDIA = "application/vnd.oci.image"
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def write(archive: Path, *, name: str, files: dict[str, Path], entry_point: list[str]) -> None:
    """Write `archive`, which `ctr image import` reads and calls `name`; `files` are executables by path inside."""
    layer = _tar((path, file.read_bytes(), 0o755) for path, file in files.items())
    config = _json(
        {
            "architecture": MACHINES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Entrypoint": entry_point},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{MEDIA}.manifest.v1+json",
            "config": _descriptor("config.v1+json", config),
            "layers": [_descriptor("layer.v1.tar", layer)],
        }
    )
    named = {**_descriptor("manifest.v1+json", manifest), "annotations": {"io.containerd.image.name": name}}
    index = _json({"schemaVersion": 2, "manifests": [named]})
    blobs = [(f"blobs/{_digest(blob).replace(':', '/')}", blob, 0o644) for blob in (layer, config, manifest)]
    layout = [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}', 0o644), ("index.json", index, 0o644)]
    archive.write_bytes(_tar([*layout, *blobs]))


def _tar(entries: Iterable[tuple[str, bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data, mode in entries:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _descriptor(kind: str, data: bytes) -> dict[str, object]:
    return {"mediaType": f"{MEDIA}.{kind}", "digest": _digest(data), "size": len(data)}
