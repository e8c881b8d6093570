"""Paths below another root, as a process with that root would walk them: "/proc/1/root", "/proc/PID/root".

The kernel follows an absolute symbolic link from the agent's own root, so a container could lead its reader to any
file of the node. ``user_files`` and ``symbols`` resolve links here instead.
"""

from __future__ import annotations

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
