"""Paths below another root, as a process with that root would walk them: "/proc/1/root", "/proc/PID/root".

The kernel follows an absolute symbolic link from the agent's own root, so a container could lead its reader to any
file of the node. ``user_files`` and ``symbols`` resolve links here instead.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from probefleet_agent.errors import NoSuchTarget

MAX_LINKS = 40


def in_root(path: str, root: str) -> str:
    """``path`` below ``root``, its links followed as a process with that root would."""
    rest, at, links = path.split("/")[::-1], "", 0
    while rest:
        part = rest.pop()
        if part in ("", "."):
            continue
        if part == "..":
            at = at.rpartition("/")[0]
            continue
        try:
            target = str(Path(f"{root}{at}/{part}").readlink())
        except OSError:  # no link, or not there: whoever opens it will say
            at = f"{at}/{part}"
            continue
        links += 1
        if links > MAX_LINKS:
            raise NoSuchTarget(f"file {path}", why="its links lead in a circle", where="on this node")
        at = "" if target.startswith("/") else at
        rest += target.split("/")[::-1]
    return f"{root}{at}" or "/"


def open_regular(path: str | Path) -> int:
    """A descriptor of a regular file. OSError EINVAL for anything else: whoever owns the place may have put a FIFO
    there, which nobody ever writes to, or a device, which does something when it is opened.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(place)
