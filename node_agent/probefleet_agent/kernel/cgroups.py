"""The cgroup2 tree of this machine: ids ↔ paths. ``pods`` finds pods and containers by path, programs by id.

The id that bpf_get_current_cgroup_id() returns is the inode number of the cgroup's folder (kernfs, 64-bit machines).
Paths are below the cgroup2 mount, beginning with ``/``; a hybrid machine has its cgroup2 tree at …/unified.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from probefleet_agent.errors import UnsupportedFeature

_OCTAL = re.compile(r"\\([0-7]{3})")
MAX_CGROUPS = 200_000


def mount_point(mountinfo: str | None = None) -> Path:
    """Where cgroup2 is mounted; the mount that shows most of the tree. UnsupportedFeature where it is not mounted."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    found: list[tuple[int, str]] = []
    for line in text.splitlines():
        fields = line.split()
        if "-" in fields and fields[fields.index("-") + 1] == "cgroup2":
            root, path = (_OCTAL.sub(lambda octal: chr(int(octal[1], 8)), fields[at]) for at in (3, 4))
            found.append((len(root.strip("/")), path))
    if not found:
        why = "it is not mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified (or boot with a unified hierarchy)"
        raise UnsupportedFeature("cgroup2", why=why)
    # Shortest root wins; among equals the first, which is the system's own.
    return Path(min(found, key=lambda pair: pair[0])[1])


def id_of(path: str, mount: Path | None = None) -> int:
    """The id of a cgroup. FileNotFoundError when it is gone."""
    return _absolute(path, mount or mount_point()).stat().st_ino


def scan(under: str = "/", mount: Path | None = None) -> dict[int, str]:
    """id → path of every cgroup at and below ``under``, parents first. What vanishes meanwhile is left out."""
    base = mount or mount_point()
    root = _absolute(under, base)
    found: dict[int, str] = {}
    try:
        found[root.stat().st_ino] = _relative(str(root), base)
    except FileNotFoundError:
        return found
    for inode, path in _walk(str(root)):
        found[inode] = _relative(path, base)
        if len(found) >= MAX_CGROUPS:
            break
    return found


def _walk(path: str) -> Iterator[tuple[int, str]]:
    """Folders below, without recursion: the tree is as deep as its owner likes."""
    waiting = [path]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                folders = [(entry.inode(), entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError, OSError):
            continue  # removed while we looked (ENODEV from kernfs)
        yield from folders
        waiting.extend(path for _, path in reversed(folders))


def _absolute(path: str, mount: Path) -> Path:
    return mount / path.strip("/") if path.strip("/") else mount


def _relative(path: str, mount: Path) -> str:
    return "/" + os.path.relpath(path, mount) if Path(path) != mount else "/"


def of_process(pid: int | str = "self") -> str:
    """The cgroup2 path of a process (the line ``0::/…`` of /proc/PID/cgroup), as seen from our cgroup namespace."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line[3:]
    raise UnsupportedFeature("cgroup2", why=f"process {pid} is in none")
