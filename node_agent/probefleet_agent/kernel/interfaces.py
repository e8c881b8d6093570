"""Network interfaces by name, by pattern, and by pod: where network programs are attached.

A pod's interfaces lie in its own network namespace, which any of its processes leads to. A thread may enter another
namespace for a moment (setns(2) moves one thread only); sockets, and links, made there belong to it ever after.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import cgroups, netlink

_CLONE_NEWNET = 0x40000000
_MINE = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace: the file that leads to it, its number, and whose it is in words ("" for the node's)."""

    path: str
    number: int
    owner: str = ""


def of_node(root: str) -> Namespace:
    """The node's own: that of the process whose root is given ("/proc/1/root"), or ours."""
    path = str(Path(root).parent / "ns/net") if root.startswith("/proc/") else _MINE
    return Namespace(path, Path(path).stat().st_ino)


def of_pod(uid: str, groups: Sequence[str]) -> Namespace | None:
    """A pod's, found by a process in one of its cgroups; None where none runs (any more)."""
    mount = cgroups.mount_point()
    for group in groups:
        try:
            pids = (mount / group.strip("/") / "cgroup.procs").read_text().split()
        except OSError:
            continue  # gone meanwhile
        for pid in pids:
            path = f"/proc/{pid}/ns/net"
            with contextlib.suppress(OSError):
                return Namespace(path, Path(path).stat().st_ino, f"pod {uid}")
    return None


@contextlib.contextmanager
def entered(namespace: Namespace) -> Iterator[None]:
    """This thread is in that namespace within the block."""
    before = os.open(_MINE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(before).st_ino == namespace.number:
            yield
            return
        there = os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(there, f"enter the network namespace {namespace.path}")
        finally:
            os.close(there)
        try:
            yield
        finally:
            _enter(before, "come back to the agent's own network namespace")
    finally:
        os.close(before)


def _enter(fd: int, what: str) -> None:
    if _libc.setns(ctypes.c_int(fd), ctypes.c_int(_CLONE_NEWNET)) < 0:
        raise KernelError(ctypes.get_errno(), what, "It needs CAP_SYS_ADMIN and CAP_SYS_PTRACE.")


def matching(namespace: Namespace, patterns: Sequence[str]) -> list[netlink.Interface]:
    """The interfaces there that a name or pattern fits; without patterns all but loopback."""
    with entered(namespace):
        found = netlink.interfaces()
    if not patterns:
        return [each for each in found if each.name != "lo"]
    return [each for each in found if any(fnmatch.fnmatchcase(each.name, pattern) for pattern in patterns)]


def is_pattern(name: str) -> bool:
    """Whether it may fit several interfaces, or none."""
    return any(character in name for character in "*?")
