"""What a tree of pins holds, in words: ``purge`` shows it before it removes it.

Read from the names in bpffs and from the manifests beside them, nothing of which is opened or changed.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from probefleet_agent import errors
from probefleet_agent.kernel import pins
from probefleet_wire.v1 import plan_pb2

KINDS = (("prog_", "program"), ("link_", "link"), ("map_", "map"))


def described(tree: pins.Root) -> Iterator[str]:
    """One line for each thing: instances with their policies, shared maps, and the agent's own."""
    for digest in tree.list_instances():
        yield f"{_title(tree, digest)}: {_counted(tree.instances / digest)} in {tree.instances / digest}"
    for uid in tree.list_maps():
        yield f"a shared map (ProbeMap {uid}) in {tree.maps / uid}"
    if tree.identity.is_dir() and any(tree.identity.iterdir()):
        yield f"the agent's memory of cgroups and pushes in {tree.identity}"
    for parent in (tree.instances, tree.maps):
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            if path.name not in {*tree.list_instances(), *tree.list_maps()}:
                yield f"half built or half removed: {path}"


def _title(tree: pins.Root, digest: str) -> str:
    """``catalog/runqlat (default/runqlat)``, as the manifest says; the digest where it does not."""
    with contextlib.suppress(errors.ProbefleetError, ValueError, KeyError, TypeError, DecodeError):
        told = json.loads(tree.read_manifest(digest))
        instance = plan_pb2.Instance.FromString(base64.b64decode(told["instance"]))
        plans = [plan_pb2.Plan.FromString(base64.b64decode(each)) for each in told["plans"].values()]
        users = ", ".join(sorted(f"{plan.namespace}/{plan.name}" for plan in plans))
        return f"{instance.title} ({users})" if users else instance.title
    return digest


def _counted(folder: Path) -> str:
    names = [path.name for path in folder.iterdir()]
    counts = [(sum(name.startswith(prefix) for name in names), word) for prefix, word in KINDS]
    return ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)
