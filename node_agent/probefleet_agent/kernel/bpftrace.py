"""A bpftrace process: a script in, its JSON lines out. It loads its programs itself, so it is root.

``bpftrace_programs`` owns one for each instance of that kind. Of root's rights the process keeps CAP_BPF, CAP_PERFMON,
CAP_SYSLOG (without it no address in /proc/kallsyms has a name: kernel stacks, ``kaddr``) and CAP_SYS_ADMIN (it opens
modules' BTF by id, which the kernel lets nobody else), as far as the agent has them; it cannot get others back
(no_new_privs), has no network and no environment, may not run commands (no ``--unsafe``), and dies with the agent: its
programs are not pinned, and end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from probefleet_agent.errors import UnsupportedFeature
from probefleet_agent.kernel import bcc_headers, btf_kernel

MAX_LINE_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_HEADERS = ("--btf", "--include", str(Path(bcc_headers.__file__).with_name("macros.h")))
#: setpriv refuses to keep what the agent itself has not.
_KEPT = {"bpf": 39, "perfmon": 38, "sys_admin": 21, "syslog": 34}


class BpftraceUnavailable(UnsupportedFeature):
    """There is no bpftrace on this node."""


def version() -> str:
    """What it calls itself; empty where there is none."""
    found = shutil.which("bpftrace")
    if found is None:
        return ""
    return subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.strip()


def _locked_in() -> list[str]:
    """What stands before its command line."""
    told = Path("/proc/self/status").read_text().partition("CapBnd:\t")[2].split("\n", 1)[0]
    kept = ",".join(["-all", *(f"+{name}" for name, number in _KEPT.items() if int(told, 16) >> number & 1)])
    rights = ["--no-new-privs", "--pdeathsig", "KILL", "--inh-caps=-all", f"--bounding-set={kept}"]
    return ["unshare", "--net", "setpriv", *rights]


class Process:
    """One running script. It starts in its own time; what it says tells how far it is."""

    def __init__(self, script: str, *, includes: bool = False) -> None:
        """``includes``: the script named headers. Types come from BTF all the same, macros from those for BCC."""
        program = shutil.which("bpftrace")
        if program is None:
            raise BpftraceUnavailable(
                "bpftrace", why="it is not installed here; Debian: apt install bpftrace (the agent's image has it)"
            )
        self.ended = ""
        self._buffer = b""
        self._errors, errors = os.pipe()
        os.set_blocking(self._errors, False)
        try:
            self._process = subprocess.Popen(
                [*_locked_in(), program, "-f", "json", *(_HEADERS if includes else ()), "-e", script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(),
                start_new_session=True,
            )
        finally:
            os.close(errors)
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def pid(self) -> int:
        """Of bpftrace itself."""
        return self._process.pid

    def messages(self, wait_seconds: float = 0.0) -> list[dict[str, Any]]:
        """What it has said since the last time: ``{"type": "map", "data": {…}}`` and the like, in order."""
        said: list[dict[str, Any]] = []
        assert self._process.stdout is not None
        if wait_seconds:
            select.select([self._process.stdout], [], [], wait_seconds)
        ended = False
        while not ended and len(self._buffer) < MAX_LINE_BYTES:
            try:
                part = os.read(self._process.stdout.fileno(), _READ_BYTES)
            except BlockingIOError:
                break
            ended = not part
            self._buffer += part
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and "type" in found:
                    said.append(found)
        if ended and not self.ended:
            self.ended = self._why_it_ended()
        return said

    def close(self) -> None:
        """End it, and with it its programs."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1

    def _why_it_ended(self) -> str:
        status = self._process.wait()
        try:
            text = os.read(self._errors, 65536).decode("utf-8", "replace")
        except BlockingIOError:
            text = ""
        lines = [line for line in text.splitlines() if line.strip() and "RLIMIT_MEMLOCK" not in line]
        # As it prints them: a line of tildes stands under what it means.
        return "\n".join(lines)[-600:] or (f"it ended with status {status}" if status else "the script called exit()")


def _environment() -> dict[str, str]:
    made = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent", "BPFTRACE_STRLEN": "64"}
    # By itself it looks for types by their ids, which Linux 5.10 does not have yet. Where no module has types, it
    # misses nothing by being given the kernel's.
    of_modules = btf_kernel.own() and len(list(btf_kernel.VMLINUX.parent.iterdir())) > 1
    if btf_kernel.available() and not of_modules:
        made["BPFTRACE_BTF"] = str(btf_kernel.file())
    return made
