"""Processes live and die by cgroup: what `start` puts into a group, and all its descendants, `end` ends.

A pod's process cannot leave its cgroup, whatever it forks or re-parents to, so a group is the only honest list of
"everything the cluster started". Called by control, node and cluster.
"""

import contextlib
import functools
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import settings
from .errors import ClusterError

END_SECONDS = 30.0


@functools.cache
def hierarchies() -> tuple[Path, ...]:
    """Mount points of every cgroup hierarchy: one with cgroup v2, about ten with v1 (where v2 may be there as well)."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ")
        if after.split()[0] in ("cgroup", "cgroup2"):
            points.append(Path(before.split()[4]))
    if not points:
        raise ClusterError("no cgroup file system is mounted: mount cgroup2 at /sys/fs/cgroup")
    return tuple(dict.fromkeys(points))


@functools.cache
def _unified() -> Path | None:
    return next((point for point in hierarchies() if (point / "cgroup.controllers").exists()), None)


@functools.cache
def _tracked() -> tuple[Path, ...]:
    """The hierarchies that processes are put into: the first one is asked who is left."""
    # With v1, kubelet puts pods into every controller's hierarchy, and nothing but a process limit follows from
    # `pids`. The v2 hierarchy beside it gives BPF programs the cgroup id.
    pids = next((point for point in hierarchies() if point.name == "pids"), None)
    return tuple(point for point in (pids, _unified()) if point is not None)


def make_group(group: str) -> None:
    """Make a top-level group in every hierarchy, ready to have controlled children."""
    for point in hierarchies():
        path = point / group
        path.mkdir(exist_ok=True)
        if (path / "cpuset.cpus").exists() and not _unified_only():
            # A v1 cpuset starts empty, and no process may enter an empty one.
            for name in ("cpuset.cpus", "cpuset.mems"):
                (path / name).write_text((point / name).read_text())
    if _unified_only():
        for controller in (hierarchies()[0] / "cgroup.controllers").read_text().split():
            # A controller in use by v1 or held by realtime processes stays away; kubelet names the one it misses.
            with contextlib.suppress(OSError):
                (hierarchies()[0] / "cgroup.subtree_control").write_text(f"+{controller}")


def _unified_only() -> bool:
    return hierarchies() == (_unified(),)


def start(command: Sequence[str | Path], *, group: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a daemon in `group` (a path below every hierarchy's root) that outlives this program."""
    paths = [point / group for point in _tracked()]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    enter = 'IFS=:; for g in $1; do echo $$ > "$g/cgroup.procs"; done; shift; exec "$@"'
    with log.open("ab") as output:
        return subprocess.Popen(
            ["/bin/sh", "-c", enter, "sh", ":".join(map(str, paths)), *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C at the keyboard is not meant for the cluster
        )


def groups() -> list[str]:
    """Names of the cluster's top-level groups, whatever state they are in."""
    names = {path.name for point in hierarchies() for path in point.glob(f"{settings.NAME}-*") if path.is_dir()}
    return sorted(names)


def members(group: str) -> set[int]:
    """Process ids in a group and below it."""
    return {pid for path in _processes_files(group) for pid in _read_pids(path)}


def _processes_files(group: str) -> Iterator[Path]:
    top = _tracked()[0] / group
    for directory, _, _ in os.walk(top):
        yield Path(directory) / "cgroup.procs"


def _read_pids(path: Path) -> list[int]:
    try:
        # A process of another pid namespace reads as 0.
        return [int(line) for line in path.read_text().split() if line != "0"]
    except OSError:  # the group went while it was read
        return []


def end(group: str) -> None:
    """Kill everything in a group at once, as a power cut would, and return when all of it is gone."""
    deadline = time.monotonic() + END_SECONDS
    # More than one round: a shim may fork while its siblings end.
    while pids := members(group):
        if time.monotonic() > deadline:
            raise ClusterError(f"processes {sorted(pids)} of {group} do not end after SIGKILL: see /proc/PID/stack")
        _kill(group, pids)


def _kill(group: str, pids: set[int]) -> None:
    with contextlib.ExitStack() as stack:
        poller = select.poll()
        waiting: set[int] = set()
        for pid in pids:
            try:
                handle = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            stack.callback(os.close, handle)
            # The id may have been given to somebody else since it was read; behind the handle it cannot change.
            if not _is_member(group, pid):
                continue
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            poller.register(handle, select.POLLIN)
            waiting.add(handle)
        while waiting:
            ended = poller.poll(2000)
            if not ended:
                return  # `end` looks again, and gives up at its deadline
            for handle, _ in ended:
                poller.unregister(handle)
                waiting.discard(handle)


def _is_member(group: str, pid: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return False
    return any(f"/{group}/" in f"{line.split(':', 2)[2]}/" for line in lines)


def remove_group(group: str) -> None:
    """Remove a group without processes from every hierarchy."""
    deadline = time.monotonic() + END_SECONDS
    for point in hierarchies():
        top = point / group
        while top.exists():
            for directory, _, _ in os.walk(top, topdown=False):
                # EBUSY while the kernel still takes the last process out of it.
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()
            if top.exists() and time.monotonic() > deadline:
                raise ClusterError(f"cgroup {top} cannot be removed: does a process outside the cluster sit in it?")
