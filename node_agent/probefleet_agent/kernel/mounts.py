"""Where bpffs and tracefs are, mounting them where they are not.

Pins need bpffs, tracepoints need tracefs; a fresh machine or container has neither. Called once at start by ``main``
and ``doctor``; ``links`` asks ``tracefs()`` for the numbers of tracepoints.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from probefleet_agent.errors import KernelError

BPFFS = Path("/sys/fs/bpf")
TRACEFS = Path("/sys/kernel/tracing")
SECURITYFS = Path("/sys/kernel/security")
_BPF_MAGIC = 0xCAFE4A11
_TRACEFS_MAGIC = 0x74726163
_SECURITYFS_MAGIC = 0x73636673
_libc = ctypes.CDLL(None, use_errno=True)


def _magic(path: Path) -> int:
    """``f_type`` of statfs(2): the first word of the structure on every 64-bit machine; 0 where it cannot be asked."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return 0
    return int.from_bytes(buffer.raw[:8], "little")


def is_bpffs(path: Path) -> bool:
    """Whether maps and links can be pinned there."""
    return _magic(path) == _BPF_MAGIC


def is_tracefs(path: Path) -> bool:
    """Whether tracepoints are described there."""
    return _magic(path) == _TRACEFS_MAGIC


def mount_bpffs(path: Path = BPFFS) -> Path:
    """Mount bpffs there unless it is. KernelError with what to do instead."""
    return _mount("bpf", path, is_bpffs, "Mount it on the host: mount -t bpf bpf /sys/fs/bpf")


def mount_tracefs(path: Path = TRACEFS) -> Path:
    """Where tracefs is, mounting it when it is nowhere."""
    found = tracefs()
    if found is not None:
        return found
    return _mount("tracefs", path, is_tracefs, "Mount it on the host: mount -t tracefs tracefs /sys/kernel/tracing")


def tracefs() -> Path | None:
    """tracefs, where one is mounted."""
    for path in (TRACEFS, Path("/sys/kernel/debug/tracing")):
        if is_tracefs(path):
            return path
    return None


def securityfs() -> Path | None:
    """securityfs, mounted where it is not; None where that cannot be: it is asked for one list only."""
    try:
        return _mount("securityfs", SECURITYFS, lambda path: _magic(path) == _SECURITYFS_MAGIC, "")
    except KernelError:
        return None


def _mount(kind: str, path: Path, there: object, advice: str) -> Path:
    assert callable(there)
    if there(path):
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(error.errno or 0, f"make the folder {path}", advice) from error
    if there(path):  # a folder within one that is mounted
        return path
    if _libc.mount(kind.encode(), os.fsencode(path), kind.encode(), ctypes.c_ulong(0), None) != 0:
        number = ctypes.get_errno()
        if not there(path):  # another process may have been faster
            raise KernelError(number, f"mount {kind} on {path}", advice)
    return path
