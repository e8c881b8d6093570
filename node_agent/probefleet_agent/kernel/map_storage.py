"""Maps that have no list of keys: local storage of tasks and cgroups, maps of maps, queues.

``maps.read`` calls the first two. The kernel finds a storage's entry by a descriptor of its owner, so every owner is
asked; an inner map is opened by the id that the outer one holds (CAP_SYS_ADMIN). Keys are given as
``probefleet_wire.map_layout`` describes them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from probefleet_agent.errors import KernelError, UnsupportedFeature
from probefleet_agent.kernel import cgroups, syscall
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.syscall import MapInfo
from probefleet_agent.kernel.uapi import MapType

Bytes = npt.NDArray[np.uint8]
_PIDFD_THREAD = 0o200  # O_EXCL
MAX_OWNERS = 1 << 17


@functools.cache
def thread_descriptors() -> bool:
    """Can threads other than a process's first be opened (Linux 6.9)?"""
    try:
        os.close(os.pidfd_open(os.getpid(), _PIDFD_THREAD))
    except OSError:
        return False
    return True


def read_storage(fd: SupportsIndex, info: MapInfo) -> tuple[Bytes, Bytes]:
    """What every task, or every cgroup, has in a storage map: keys ``u1[n, 8]``, values ``u1[n, value_size]``."""
    owners = _tasks() if info.type == MapType.TASK_STORAGE else _cgroups()
    keys, values = bytearray(), bytearray()
    for key, owner in owners:
        with owner:
            try:
                value = syscall.map_lookup(fd, struct.pack("<i", int(owner)), info.value_size)
            except KernelError as error:
                if error.errno == errno.ESRCH:  # the task has ended
                    continue
                raise
        if value is not None:
            keys += key
            values += value
    count = len(keys) // 8
    return (
        np.frombuffer(bytes(keys), np.uint8).reshape(count, 8),
        np.frombuffer(bytes(values), np.uint8).reshape(count, info.value_size),
    )


def _tasks() -> Iterator[tuple[bytes, Fd]]:
    """(process, thread) and a descriptor of every task; before Linux 6.9 of every process's first thread."""
    flags = _PIDFD_THREAD if thread_descriptors() else 0
    seen = 0
    for process in _numbers(Path("/proc")):
        threads = _numbers(Path(f"/proc/{process}/task")) if flags else [process]
        for thread in threads:
            with contextlib.suppress(OSError):  # it has ended
                yield struct.pack("<II", process, thread), Fd(os.pidfd_open(thread, flags), f"task {thread}")
            seen += 1
            if seen >= MAX_OWNERS:
                return


def _numbers(folder: Path) -> list[int]:
    try:
        return [int(each.name) for each in folder.iterdir() if each.name.isdigit()]
    except OSError:
        return []


def _cgroups() -> Iterator[tuple[bytes, Fd]]:
    mount = cgroups.mount_point()
    for cgroup_id, path in cgroups.scan(mount=mount).items():
        with contextlib.suppress(OSError):  # it has been removed
            place = mount / path.strip("/") if path != "/" else mount
            yield struct.pack("<Q", cgroup_id), Fd(os.open(place, os.O_RDONLY | os.O_CLOEXEC), f"cgroup {path}")


def inner_maps(fd: SupportsIndex, info: MapInfo) -> Iterator[tuple[bytes, Fd]]:
    """(outer key, inner map) of an array or hash of maps."""
    key: bytes | None = None
    for _ in range(4 * info.max_entries + 64):
        key = syscall.map_get_next_key(fd, key, info.key_size)
        if key is None:
            return
        found = syscall.map_lookup(fd, key, 4)
        if found is None:
            continue
        try:
            yield key, syscall.fd_by_id("map", int.from_bytes(found, "little"))
        except KernelError as error:
            if error.errno == errno.ENOENT:  # replaced since
                continue
            if error.errno == errno.EPERM:
                why = "they are opened by their ids, which takes CAP_SYS_ADMIN"
                raise UnsupportedFeature("inner maps for this agent", why=why) from error
            raise


def pop_all(fd: SupportsIndex, info: MapInfo) -> list[bytes]:
    """Everything in a queue (oldest first) or stack (newest first), which is empty afterwards."""
    found: list[bytes] = []
    # What programs push while we pop is left to the next time.
    while len(found) < info.max_entries:
        value = syscall.map_pop(fd, info.value_size)
        if value is None:
            break
        found.append(value)
    return found
