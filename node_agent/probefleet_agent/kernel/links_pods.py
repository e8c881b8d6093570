"""Probes on files of pods: uprobes and USDT in the containers of selected pods, which come and go.

A place is a file, not a container: containers of one image share its layers, the kernel attaches to the inode below
them, and a second probe there would count everything twice. An overlay shows that inode's number, size and time in
every container, while device numbers differ; so these three say which file it is. Whose processes are counted is the
program's to decide (probefleet_selected()).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import SupportsIndex

from probefleet_agent.errors import NoSuchTarget
from probefleet_agent.kernel import cgroups, features, links_usdt, links_user, user_files
from probefleet_agent.kernel.link import Attachment, Link
from probefleet_agent.kernel.spread import Found, Holder, Place, Pods, Spread


def spread(prog_fd: SupportsIndex, attachment: Attachment) -> Spread:
    """A ``uprobe`` or ``usdt`` with ``pods``, on every file of that name in the pods."""
    kind = str(attachment.WhichOneof("target"))
    path = getattr(attachment, kind).path

    def find(pods: Pods) -> Found:
        found: dict[str, Place] = {}
        missing = []
        for uid, groups in pods.items():
            roots = list(_roots(groups))
            places = [place for root in roots if (place := _place(path, root, uid)) is not None]
            found |= {place.key: place for place in places if place.key not in found}
            if roots and not places:  # where no process is (any more) nobody calls anything
                missing.append(f"pod {uid} has no {path} now")
        return Found(tuple(found.values()), tuple(missing))

    def attach(place: Place) -> Holder:
        moved = Attachment()
        moved.CopyFrom(attachment)
        getattr(moved, kind).path = str(place.details)
        made: Link = (links_usdt if kind == "usdt" else links_user).KINDS[kind].attach(prog_fd, moved)
        return made.fds[0] if len(made.fds) == 1 and not made.keeps else made

    return Spread(f"{kind} {path} in pods", find, attach, features.perf_link())


def _roots(groups: object) -> Iterator[str]:
    """Roots of the processes of these cgroups, each once."""
    seen: set[tuple[int, int]] = set()
    assert isinstance(groups, list | tuple)
    for group in groups:
        try:
            pids = (cgroups.mount_point() / str(group).strip("/") / "cgroup.procs").read_text().split()
        except OSError:
            continue  # gone meanwhile
        for pid in pids:
            try:
                root = Path(f"/proc/{pid}/root").stat()
            except OSError:
                continue
            if (root.st_dev, root.st_ino) not in seen:
                seen.add((root.st_dev, root.st_ino))
                yield f"/proc/{pid}/root"


def _place(path: str, root: str, uid: str) -> Place | None:
    try:
        file = user_files.locate(path, root)
        there = Path(file).stat()
    except (NoSuchTarget, OSError):
        return None
    return Place(f"file:{there.st_ino}:{there.st_size}:{there.st_mtime_ns}", f"{path} of pod {uid}", file)
