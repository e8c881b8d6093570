"""What decoding asks of this machine: commands, users, devices, stacks. Remembered, so that a row keeps its name.

Implements ``decode.Lookups`` and ``collect.Stacks`` on /proc, the user database and ``kernel.symbols``.
"""

from __future__ import annotations

import os
import platform
import pwd
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probefleet_agent.kernel import clock, maps
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.symbols import Symbolizer

#: Names of processes that are kept; the oldest go first.
MAX_COMMANDS = 65_536
#: bpf_get_stackid()'s answer when there was no stack: -EFAULT; when the bucket was taken: -EEXIST.
_NO_STACK, _COLLISION = -14, -17


class MachineLookups:
    """``decode.Lookups`` of the running machine."""

    def __init__(self) -> None:
        self.machine = platform.machine()
        self.wall_minus_ktime_ns = clock.offset_ns()
        self._commands: dict[int, str] = {}
        self._users: dict[int, str] = {}

    def refresh(self) -> None:
        """Ask for the clocks' difference anew: the wall clock is stepped and slewed."""
        self.wall_minus_ktime_ns = clock.offset_ns()

    def command(self, pid: int) -> str:
        """``comm`` of a process, also after its end if it was asked for before."""
        known = self._commands.get(pid)
        if known is not None:
            return known
        try:
            command = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
        except OSError:
            return ""
        if len(self._commands) >= MAX_COMMANDS:
            self._commands.pop(next(iter(self._commands)))
        self._commands[pid] = command
        return command

    def user(self, uid: int) -> str:
        """Name of a user of this machine."""
        if uid not in self._users:
            try:
                self._users[uid] = pwd.getpwuid(uid).pw_name
            except KeyError:
                self._users[uid] = ""
        return self._users[uid]

    def device(self, number: int) -> str:
        """Name of a block device, by the kernel's own dev_t: 12 bits major, 20 bits minor."""
        link = Path(f"/sys/dev/block/{number >> 20}:{number & 0xFFFFF}")
        try:
            return os.path.basename(link.readlink())  # noqa: PTH119  (a link's text, no path of ours)
        except OSError:
            return ""


class StackReader:
    """``collect.Stacks`` over one stack trace map."""

    def __init__(self, fd: Fd, symbolizer: Symbolizer, lookups: MachineLookups) -> None:
        self._fd, self._info = fd, maps.info(fd)
        self._symbolizer, self._lookups = symbolizer, lookups
        self.collisions = 0

    def folded(self, pid: int, kernel_id: int | None, user_id: int | None) -> str:
        """``command;outermost;…;innermost``: user frames first, kernel frames marked ``_[k]``."""
        user = self._addresses(user_id)
        kernel = self._addresses(kernel_id)
        parts = [self._lookups.command(pid) or (f"pid {pid}" if pid else "idle")]
        if user is not None:
            parts += reversed(self._symbolizer.user(pid, user))
        if kernel is not None:
            parts += [f"{name}_[k]" for name in reversed(self._symbolizer.kernel(kernel))]
        return ";".join(part.replace(";", ":") for part in parts)

    def _addresses(self, stack_id: int | None) -> npt.NDArray[np.uint64] | None:
        if stack_id is None or stack_id < 0:
            self.collisions += stack_id == _COLLISION
            return None
        key = np.array([stack_id], np.uint32).view(np.uint8).reshape(1, 4)
        values, there = maps.lookup_many(self._fd, self._info, key)
        if not there[0]:
            return None
        addresses = np.asarray(values[0].view(np.uint64))
        found: npt.NDArray[np.uint64] = addresses[addresses != 0]
        return found
