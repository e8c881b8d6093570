"""A folder of pins of one command's own, gone when the command is: `<bpffs>/probefleet-run-<pid>`.

The agent's tree is another one, so that a run beside an agent disturbs nothing. The folder is locked while its owner
lives (flock(2) on the folder itself: bpffs takes no files, and a pid alone may be someone else's by now), so
whatever a killed run left is known by its free lock; the next run and ``probefleet purge`` sweep it away.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from probefleet_agent.kernel import links_network, mounts, pins

from probefleet_cli.failures import Failure

PREFIX = "probefleet-run-"


@dataclass(frozen=True, slots=True)
class Found:
    """A run's folder, and whether its owner lives."""

    path: Path
    in_use: bool


@contextlib.contextmanager
def open_private(bpffs: Path) -> Iterator[Path]:
    """This process's folder, empty; everything in it is detached and removed at the end, whatever happens."""
    mounts.mount_bpffs(bpffs)
    sweep(bpffs)
    path = bpffs / f"{PREFIX}{os.getpid()}"
    path.mkdir(mode=0o700)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        _remove(path)
        os.close(lock)


def check_readable(bpffs: Path) -> None:
    """Failure where this user may not see what of ours is pinned, for whom nothing would be there."""
    try:
        ours = [path for path in bpffs.iterdir() if path.name == "probefleet" or path.name.startswith(PREFIX)]
        closed = [path for path in ours if not os.access(path, os.R_OK | os.X_OK)]
    except PermissionError:
        closed = [bpffs]
    except (FileNotFoundError, NotADirectoryError):
        closed = []
    if closed:
        raise Failure(f"{closed[0]} is not for this user to read. What is pinned is seen by root: sudo probefleet …")


def list_private(bpffs: Path) -> list[Found]:
    """All runs' folders under that bpffs."""
    found = []
    for path in sorted(bpffs.glob(f"{PREFIX}*")):
        if path.is_mount():
            continue  # a bpffs of its own is not of our making
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # its owner was faster
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between making its folder and locking it a run is known by its pid.
            found.append(Found(path, in_use=Path("/proc", path.name.removeprefix(PREFIX)).exists()))
        except BlockingIOError:
            found.append(Found(path, in_use=True))
        finally:
            os.close(lock)
    return found


def sweep(bpffs: Path) -> list[Path]:
    """Remove what dead runs left; the folders that are gone."""
    dead = [found.path for found in list_private(bpffs) if not found.in_use]
    for path in dead:
        _remove(path)
    return dead


def _remove(path: Path) -> None:
    pins.root(path).purge()
    links_network.sweep(pins.root(path).path)
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()
