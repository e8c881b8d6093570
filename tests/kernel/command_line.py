"""`probefleet …` started by a test, as a fork of the test's own process.

Python takes a second to start and to import the command, and 15 s on an emulated CPU; a fork has done that already, and
is a process like any other: its own pid, its own signals, its own output; the test's compilers (`host_compilers`). The
tests of the command itself (`test_cli_*`) start it as a user does.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


class Process:
    """What `subprocess.Popen` would be, as far as tests of the command need it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        _import_what_a_run_does()
        self.returncode: int | None = None
        # Closed by close(), as the process is ended by it.
        self._files = tuple(tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._become(arguments)
        self._ended = os.pidfd_open(self.pid)

    def _become(self, arguments: Sequence[str]) -> None:
        """In the fork: `probefleet`, with nothing of pytest's but the memory."""
        status = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a worker that dies leaves none
            for number, file in enumerate(self._files, start=1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            warnings.resetwarnings()
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
            sys.argv = ["probefleet", *arguments]
            from probefleet_cli import main

            status = main.main()
        except BaseException:  # nobody is above it to say it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """Its exit status, if it has ended."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended."""
        if self.poll() is None and not select.select([self._ended], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("probefleet", timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, once it has ended."""
        self.wait(timeout)
        for each in self._files:
            each.seek(0)
        said, errors = (each.read().decode() for each in self._files)
        return said, errors

    def send_signal(self, number: int) -> None:
        """As `kill` does."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        """End it, if it has not ended, and keep nothing of it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self.wait()
        os.close(self._ended)
        for each in self._files:
            each.close()


def _import_what_a_run_does() -> None:
    """Once, and not in each fork: 40 modules, two seconds of an emulated CPU."""
    for name in ("numpy.ma", "probefleet_agent.engine", "probefleet_cli.main"):
        importlib.import_module(name)


def start(*arguments: str) -> Process:
    """`probefleet` with these arguments, running."""
    return Process(arguments)
