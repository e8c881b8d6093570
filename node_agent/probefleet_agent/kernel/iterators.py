"""Programs that are asked, not told: iterators, read to their end, and syscall programs, run once.

An iterator's link can be pinned; each reading opens it anew and walks over everything there is at that moment. TCP and
UDP iterators walk over the network namespace of whoever opens them, so that is done in the node's.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import SupportsIndex

from probefleet_agent.errors import KernelError
from probefleet_agent.kernel import interfaces, syscall, uapi
from probefleet_agent.kernel.fds import Fd
from probefleet_agent.kernel.uapi import Command

#: Of one reading; a task iterator that writes a line of 100 bytes comes to that with 160,000 threads.
MAX_BYTES = 16 << 20
_STEP_BYTES = 1 << 18
#: The kernel gives up a read after a million objects that wrote nothing, and wants to be asked again.
_TRIES = 1000
_CONTEXT_BYTES = 4096


def read(link: SupportsIndex, root: str = "") -> tuple[bytes, bool]:
    """All that an iterator writes, and whether that was all: a reading has a limit. ``root``: see ``interfaces``."""
    with interfaces.entered(interfaces.of_node(root)):
        attr = uapi.IterCreate(link_fd=int(link))
        opened = Fd(syscall.bpf(Command.ITER_CREATE, attr, "open an iterator"), "iterator")
    parts: list[bytes] = []
    size = tries = 0
    with opened as fd:
        while size < MAX_BYTES:
            try:
                data = os.read(fd.fileno(), _STEP_BYTES)
            except OSError as error:
                tries += 1
                if error.errno == errno.EAGAIN and tries < _TRIES:
                    continue
                raise KernelError(error.errno or 0, "read an iterator") from error
            if not data:
                return b"".join(parts), True
            parts.append(data)
            size += len(data)
    return b"".join(parts), False


def run(program: SupportsIndex) -> int:
    """Run a syscall program once; what it returns. Its context is zeros."""
    context = ctypes.create_string_buffer(_CONTEXT_BYTES)
    attr = uapi.TestRun(prog_fd=int(program), ctx_in=syscall.address(context), ctx_size_in=_CONTEXT_BYTES)
    syscall.bpf(Command.PROG_TEST_RUN, attr, "run a syscall program")
    return int(ctypes.c_int32(attr.retval).value)
