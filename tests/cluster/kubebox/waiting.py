"""Waiting for a condition or for the end of a process, never for a length of time.

`until` asks again and again, because neither sockets nor HTTP end points announce themselves; `finish` sleeps in the
kernel until a process ends. Both give up at once when a component that they depend on has died, with its last words.
"""

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import ClusterError

ASK_AGAIN_SECONDS = 0.05

Watched = Mapping[Path, "subprocess.Popen[bytes]"]
"""Components that have to live meanwhile, by their log."""


def until(condition: Callable[[], bool], *, what: str, seconds: float, watched: Watched) -> None:
    """Return when `condition` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        check(watched)
        if time.monotonic() > deadline:
            logs = ", ".join(str(log) for log in watched)
            raise ClusterError(f"{what}: not after {seconds:.0f} s; see {logs}")
        time.sleep(ASK_AGAIN_SECONDS)


def finish(process: "subprocess.Popen[str]", *, what: str, watched: Watched) -> str:
    """Return what a process printed when it has ended well."""
    with contextlib.ExitStack() as stack:
        poller = select.poll()
        for pid in [process.pid, *(component.pid for component in watched.values())]:
            handle = os.pidfd_open(pid)
            stack.callback(os.close, handle)
            poller.register(handle, select.POLLIN)
        poller.poll()
    if process.poll() is None:
        try:
            check(watched)
        finally:
            process.kill()
    output, errors = process.communicate()
    if process.returncode:
        raise ClusterError(f"{what}: {errors.strip() or output.strip()}")
    return output


def check(watched: Watched) -> None:
    """Raise if a component has died, with the end of its log."""
    for log, component in watched.items():
        if component.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ClusterError(f"{log.stem} ended with status {component.returncode}; the end of {log}:\n{tail}")
