"""What decoding asks of this machine: commands, users, devices, stacks. Remembered, so that a row keeps its name.

Implements ``decode.Lookups`` and ``collect.Stacks`` on /proc, the user database and ``kernel.symbols``.

A pid that is used again must not bring its former owner's name. The kernel gives pids out in turn (idr_alloc_cyclic in
kernel/pid.c), so none comes again before nearly all others were given: a name is good for half as many forks.
"""

from __future__ import annotations

import os
import platform
import pwd
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from probefleet_wire.map_types import Flag

from probefleet_agent.kernel import clock, maps, symbols
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.symbols import Symbolizer

#: Names of processes that are kept; the oldest go first.
MAX_COMMANDS = 65_536
_FORKS = re.compile(rb"^processes (\d+)", re.MULTILINE)
#: bpf_get_stackid()'s answer when there was no stack: -EFAULT; when the bucket was taken: -EEXIST.
_NO_STACK, _COLLISION = -14, -17


class MachineLookups:
    """``decode.Lookups`` of the running machine."""

    def __init__(self) -> None:
        self.machine = platform.machine()
        self.wall_minus_ktime_ns = clock.offset_ns()
        self._commands: dict[int, tuple[str, int]] = {}  # with the number of forks by then
        self._good_for_forks = int(Path("/proc/sys/kernel/pid_max").read_text()) // 2
        self._forks = _forks()
        self._users: dict[int, str] = {}

    def refresh(self) -> None:
        """Ask for the clocks' difference anew (the wall clock is stepped and slewed), and how many forks there were."""
        self.wall_minus_ktime_ns = clock.offset_ns()
        self._forks = _forks()

    def command(self, pid: int) -> str:
        """``comm`` of a process, also after its end if it was asked for before."""
        known = self._commands.get(pid)
        if known is not None and self._forks - known[1] < self._good_for_forks:
            return known[0]
        try:
            command = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
        except OSError:
            return ""
        self.learn(pid, command)
        return command

    def learn(self, pid: int, command: str) -> None:
        """A record says itself what a process is called: it may be gone by now, or be called otherwise later."""
        # Anew at the end: the oldest go first.
        self._commands.pop(pid, None)
        if len(self._commands) >= MAX_COMMANDS:
            self._commands.pop(next(iter(self._commands)))
        self._commands[pid] = command, self._forks

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

    def function(self, address: int) -> str:
        """Name of the kernel function around an address; a module loaded since then has none."""
        (name,) = symbols.kallsyms().resolve(np.array([address & (1 << 64) - 1], np.uint64))
        return "" if name == symbols.UNKNOWN else name


def _forks() -> int:
    """How many tasks were ever made on this machine."""
    found = _FORKS.search(Path("/proc/stat").read_bytes())
    return int(found[1]) if found else 0


#: What a program is called in a kernel's stack, and what stands between it and the place that it is at.
_PROGRAM = re.compile(r"bpf_prog_[0-9a-f]{16}_(\w+)")
_BETWEEN = re.compile(
    r"bpf_trace_run\d+|__bpf_trace_\w+|__traceiter_\w+|trace_call_bpf|perf_trace_\w+|perf_call_bpf_\w+|bpf_trampoline_\w+"
)


def without_own(innermost_first: Sequence[str], programs: Collection[str]) -> Sequence[str]:
    """A stack without the frames of the program that took it. Those of others stay: they are where time goes."""
    own = _PROGRAM.fullmatch(innermost_first[0]) if innermost_first else None
    # The kernel knows a program by 15 characters where it has no BTF of it.
    if own is None or not any(own[1] in (name, name[:15]) for name in programs):
        return innermost_first
    first = 1
    while first < len(innermost_first) and _BETWEEN.fullmatch(innermost_first[first]):
        first += 1
    return innermost_first[first:]


#: ``struct bpf_stack_build_id``, of maps with BPF_F_STACK_BUILD_ID: with status 1 a place in a file, else an address.
_BY_BUILD_ID = np.dtype([("status", "<i4"), ("build_id", "u1", 20), ("place", "<u8")])
_PLACE_IN_A_FILE = 1
_KERNEL_HALF = np.uint64(1 << 63)


def _of_kernel(addresses: npt.NDArray[np.uint64]) -> bool:
    return bool(len(addresses)) and bool(addresses[0] >= _KERNEL_HALF)


class StackReader:
    """``collect.Stacks`` over an instance's stack trace maps; ``programs`` are those of the instance.

    An id does not say which map it is of. Where several maps have one of that number, it is the one with addresses of
    the right half, the kernel's or the user's; where that leaves several, none is taken, and it is counted.
    """

    def __init__(
        self, fds: Sequence[Fd], symbolizer: Symbolizer, lookups: MachineLookups, programs: Collection[str] = ()
    ) -> None:
        self._maps = [(fd, maps.info(fd)) for fd in fds]
        self._symbolizer, self._lookups, self._programs = symbolizer, lookups, programs
        self.collisions = self.ambiguous = 0

    def folded(
        self, pids: Sequence[int], kernel_ids: Sequence[int | None], user_ids: Sequence[int | None]
    ) -> list[str]:
        """``command;outermost;…;innermost`` of each: user frames first, kernel frames marked ``_[k]``."""
        users = [self._addresses(each, pid) for pid, each in zip(pids, user_ids, strict=True)]
        # What its type calls a stack, and no more, may be one of the kernel.
        named = iter(
            self._symbolizer.users(
                [
                    (pid, user)
                    for pid, user in zip(pids, users, strict=True)
                    if user is not None and not _of_kernel(user)
                ]
            )
        )
        found = []
        for pid, user, kernel_id in zip(pids, users, kernel_ids, strict=True):
            parts = [self._lookups.command(pid) or (f"pid {pid}" if pid else "idle")]
            kernels = [self._addresses(kernel_id)]
            if user is not None and _of_kernel(user):
                kernels.append(user)
            elif user is not None:
                parts += reversed(next(named))
            for kernel in kernels:
                if kernel is not None:
                    functions = without_own(self._symbolizer.kernel(kernel), self._programs)
                    parts += [f"{name}_[k]" for name in reversed(functions)]
            found.append(";".join(part.replace(";", ":") for part in parts))
        return found

    def _addresses(self, stack_id: int | None, pid: int | None = None) -> npt.NDArray[np.uint64] | None:
        """Of the kernel, or of the process."""
        if stack_id is None or stack_id < 0:
            self.collisions += stack_id == _COLLISION
            return None
        key = np.array([stack_id], np.uint32).view(np.uint8).reshape(1, 4)
        stacks: dict[bytes, npt.NDArray[np.uint64]] = {}
        for fd, info in self._maps:
            values, there = maps.lookup_many(fd, info, key)
            if there[0]:
                addresses = self._read(values[0], info, pid)
                stacks[addresses.tobytes()] = addresses
        found = [each for each in stacks.values() if _of_kernel(each) == (pid is None)] or [*stacks.values()]
        self.ambiguous += len(found) > 1
        return found[0] if len(found) == 1 else None

    def _read(self, value: npt.NDArray[np.uint8], info: maps.MapInfo, pid: int | None) -> npt.NDArray[np.uint64]:
        if not info.flags & Flag.STACK_BUILD_ID:
            addresses = value.view(np.uint64)
            plain: npt.NDArray[np.uint64] = addresses[addresses != 0]
            return plain
        frames = value.view(_BY_BUILD_ID)
        frames = frames[frames["status"] != 0]
        in_files = frames["status"] == _PLACE_IN_A_FILE
        found: npt.NDArray[np.uint64] = frames["place"].astype(np.uint64)
        if pid is not None and in_files.any():
            places = [(each["build_id"].tobytes().hex(), int(each["place"])) for each in frames[in_files]]
            found[in_files] = self._symbolizer.loaded_at(pid, places)
        return found
