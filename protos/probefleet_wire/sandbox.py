"""Runs a compiler without network, secrets or any file but those granted. Compilers read what a user wrote.

``run([clang, …], grants=…, limits=…)`` starts ``sandbox_child.py`` in a new process, which locks itself in and then
becomes the tool. Called by ``clang`` (in the operator and in ``probefleet check``) and by the agent's BCC child. Why: C
reads files (``#include "/etc/shadow"`` shows them in diagnostics, ``.incbin`` puts them into the object), and a macro
of twenty lines can eat all memory. What holds, each by itself:

- Landlock (Linux 5.13): only granted trees can be opened. No privilege is needed, so it works in a pod under the
  restricted profile. Older ABIs know fewer rights; what they lack, the next two take.
- A seccomp allow-list: no sockets, processes, signals, ptrace, bpf, mounts, keys, io_uring; nothing that is not named.
- As root also a mount namespace with nothing but the granted trees, then uid 65534: it hides even whether a file
  exists, and stands in for Landlock on older kernels. Without root and without Landlock a user namespace is tried.
- rlimits for memory, CPU and file size; wall time and output are watched from here; the environment is empty, every
  descriptor but three is closed, the child dies with its parent.

Neither Landlock nor a namespace: ``SandboxUnavailable`` says what is missing. Nothing is compiled outside.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import select
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from probefleet_wire import syscalls

CHILD = Path(__file__).with_name("sandbox_child.py")
#: The child ends with this status where it could not lock itself in; its reason is on stderr.
REFUSED = 126
_NOBODY = 65534
# Shared libraries and the loader's cache: every dynamic program needs them, and they are the distribution's own.
SYSTEM_TREES = tuple(
    Path(each)
    for each in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/null")
    if Path(each).exists()
)

# What a compiler and CPython need; anything else gives EPERM. Those that only exist on one machine are left out on the
# other. stat and readlink tell that a file exists but not what is in it; the mount namespace hides even that.
_ALLOWED = """
access arch_prctl brk chdir clock_getres clock_gettime clock_nanosleep close close_range dup dup2 dup3 execve exit
exit_group faccessat faccessat2 fadvise64 fchdir fcntl fdatasync flock fstat fstatfs fsync ftruncate futex futex_wait
futex_wake getcwd getdents64 getegid geteuid getgid getpid getppid getrandom getrlimit getrusage gettid gettimeofday
getuid lseek lstat madvise membarrier mkdir mkdirat mmap mprotect mremap munmap nanosleep newfstatat open openat pipe
pipe2 poll ppoll pread64 preadv pselect6 pwrite64 pwritev read readlink readlinkat readv rename renameat renameat2
restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigtimedwait sched_getaffinity
sched_yield select set_robust_list set_tid_address sigaltstack stat statfs statx sysinfo times umask uname unlink
unlinkat wait4 write writev
""".split()  # noqa: SIM905 (a list that people read and compare)
_MISSING = ("clone3",)  # ENOSYS: glibc then uses clone, whose flags a filter can read
_CLONE_THREAD = 0x00010000
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_INSTRUCTION = struct.Struct("<HBBI")


class SandboxError(RuntimeError):
    """The child could not be run as asked."""


class SandboxUnavailable(SandboxError):
    """This machine offers no way to lock a compiler in."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may use; past it the child is ended and ``Finished.limit`` says which one it was."""

    memory_bytes: int = 1 << 30  #: address space; clang maps 250 MB of libraries to begin with
    cpu_seconds: int = 20
    wall_seconds: float = 40.0
    output_bytes: int = 256 << 10  #: of stdout and of stderr, each
    file_bytes: int = 32 << 20  #: each file that it writes


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Grants:
    """What a child may open besides ``SYSTEM_TREES``: trees and files to read, and one directory to write in."""

    scratch: Path
    read: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """How a child ended. ``limit`` is "" or one of memory, cpu, wall, output, file."""

    status: int  #: exit status; minus the signal's number where one ended it
    stdout: bytes
    stderr: bytes
    limit: str
    seconds: float
    #: An upper bound of its memory: between fork and exec the child has its parent's, and the kernel counts that too.
    peak_bytes: int


#: CHOWN, DAC_OVERRIDE, FOWNER, SETGID, SETUID: to hand files over to another user, become him, and clean up after him.
_TO_BECOME_ANOTHER = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 6 | 1 << 7


def _can_become_nobody() -> bool:
    """Root with its usual capabilities. Others, and the agent without privilege, stay who they are and drop what they
    may.
    """
    status = Path("/proc/self/status").read_text()
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    return os.geteuid() == 0 and effective & _TO_BECOME_ANOTHER == _TO_BECOME_ANOTHER


def run(
    argv: Sequence[str | Path],
    *,
    grants: Grants,
    limits: Limits = DEFAULT_LIMITS,
    stdin: bytes = b"",
    script: bool = False,
    more_syscalls: Sequence[str] = (),
) -> Finished:
    """Run a tool locked in, and wait for its end.

    With ``script`` the first word is a Python file that runs in the locked child itself, with the child's namespace
    (``install_filter``, ``FILTER``); it has to install the seccomp filter when it is ready (the BCC child does). The
    call blocks: from asyncio use ``to_thread``. Raises ``SandboxUnavailable`` or ``SandboxError``.
    """
    as_nobody = _can_become_nobody()
    config = {
        "argv": [str(word) for word in argv],
        "script": script,
        "parent": os.getpid(),
        "uid": _NOBODY if as_nobody else None,
        "scratch": str(grants.scratch),
        "read": [str(tree) for tree in (*SYSTEM_TREES, *grants.read, *_python_trees(script))],
        "memory": limits.memory_bytes,
        "cpu": limits.cpu_seconds,
        "file": limits.file_bytes,
        "filter": seccomp_filter(platform.machine(), more_syscalls).hex(),
    }
    if as_nobody:
        os.chown(grants.scratch, _NOBODY, _NOBODY)
        for inside in grants.scratch.iterdir():
            os.chown(inside, _NOBODY, _NOBODY)
    command = [_python(), "-I", "-S", "-B", str(CHILD), json.dumps(config)]
    started = time.monotonic()
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"LC_ALL": "C.UTF-8", "TMPDIR": str(grants.scratch), "HOME": str(grants.scratch)},
        cwd=grants.scratch,
        close_fds=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr, limit = _watch(process, stdin, limits, started)
        finally:
            # Whatever happened, nothing of the child stays; the filter lets it have no processes but itself.
            # (Not Popen.kill, which may reap it: wait4 tells what it used.)
            os.kill(process.pid, signal.SIGKILL)
            _, wait_status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(wait_status)
    status = process.returncode
    if status == REFUSED and stderr.startswith(b"sandbox: "):
        text = stderr.decode("utf-8", "replace").strip().removeprefix("sandbox: ")
        raise (SandboxUnavailable if text.startswith("neither ") else SandboxError)(text)
    return Finished(
        status=status,
        stdout=stdout,
        stderr=stderr,
        limit=limit or _limit_of(status, stderr),
        seconds=time.monotonic() - started,
        peak_bytes=usage.ru_maxrss * 1024,
    )


def describe() -> str:
    """How a child would be locked in here, for ``probefleet doctor``: ``landlock 7, namespaces``."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = syscalls.number("landlock_create_ruleset", platform.machine())
    version = -1
    if number is not None:
        version = libc.syscall(ctypes.c_long(number), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    ways = [f"landlock {version}"] if version > 0 else []
    if os.geteuid() == 0:
        ways.append("namespaces")
    return ", ".join(ways) or "none"


def seccomp_filter(machine: str, more: Sequence[str] = ()) -> bytes:
    """The allow-list as a classic BPF program (struct sock_filter[]) for a machine as ``uname -m`` calls it."""
    if machine not in _ARCHITECTURES:
        raise SandboxUnavailable(f"neither x86_64 nor aarch64: no list of system calls for {machine}")

    def number(name: str) -> int | None:
        return syscalls.number(name, machine)

    allowed = [each for each in map(number, (*_ALLOWED, *more)) if each is not None]
    absent = [each for each in map(number, _MISSING) if each is not None]
    clone, prlimit = number("clone"), number("prlimit64")
    load, equal, set_bits, give = 0x20, 0x15, 0x45, 0x06
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch: another ABI would give the numbers other meanings
        (equal, 1, 0, _ARCHITECTURES[machine]),
        (give, 0, 0, _KILL),
        (load, 0, 0, 0),  # seccomp_data.nr
    ]
    # clone only for threads, prlimit64 only for the caller: a word of their first argument decides.
    for special, test in ((clone, (set_bits, 0, 1, _CLONE_THREAD)), (prlimit, (equal, 0, 1, 0))):
        if special is not None:
            program += [(equal, 0, 4, special), (load, 0, 0, 16), test]
            program += [(give, 0, 0, _ALLOW), (give, 0, 0, _ERRNO | errno.EPERM)]
    for each in absent:
        program += [(equal, 0, 1, each), (give, 0, 0, _ERRNO | errno.ENOSYS)]
    count = len(allowed)
    program += [(equal, count - index, 0, each) for index, each in enumerate(allowed)]
    program += [(give, 0, 0, _ERRNO | errno.EPERM), (give, 0, 0, _ALLOW)]
    return b"".join(_INSTRUCTION.pack(*each) for each in program)


def _python() -> str:
    return str(Path(sys.executable).resolve())


def _python_trees(script: bool) -> tuple[Path, ...]:
    """The interpreter that the child already runs; a script may still import its standard library."""
    library = Path(sys.base_prefix) / "lib"
    trees = [] if any(library.is_relative_to(each) for each in SYSTEM_TREES) else [library]
    return (*trees, CHILD) if script else tuple(trees)


def _watch(process: subprocess.Popen[bytes], stdin: bytes, limits: Limits, started: float) -> tuple[bytes, bytes, str]:
    """Feed and read the child until it closes its output or passes a limit."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    got = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    left = memoryview(stdin)
    limit = ""
    with selectors.DefaultSelector() as selector:
        for each in got:
            selector.register(each, selectors.EVENT_READ)
        if left:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin.fileno(), selectors.EVENT_WRITE)
        else:
            process.stdin.close()
        while selector.get_map() and not limit:
            remaining = started + limits.wall_seconds - time.monotonic()
            ready = selector.select(max(0.0, remaining))
            if not ready and remaining <= 0:
                limit = "wall"
            for key, _ in ready:
                if key.fd in got:
                    block = os.read(key.fd, 65536)
                    got[key.fd] += block
                    if not block:
                        selector.unregister(key.fd)
                    elif len(got[key.fd]) > limits.output_bytes:
                        limit = "output"
                    continue
                try:
                    left = left[os.write(key.fd, left[:65536]) :]
                except BrokenPipeError:
                    left = left[:0]  # it ended early; its status says why
                if not left:
                    selector.unregister(key.fd)
                    process.stdin.close()
    if not limit:
        # It closed its output; give it what is left of its time to end by itself.
        ended = os.pidfd_open(process.pid)
        try:
            remaining = max(0.0, started + limits.wall_seconds - time.monotonic())
            if not select.select([ended], [], [], remaining)[0]:
                limit = "wall"
        finally:
            os.close(ended)
    stdout, stderr = (bytes(each[: limits.output_bytes]) for each in got.values())
    return stdout, stderr, limit


def _limit_of(status: int, stderr: bytes) -> str:
    if status == -signal.SIGXCPU:
        return "cpu"
    if status == -signal.SIGXFSZ:
        return "file"
    if status != 0 and any(word in stderr for word in (b"out of memory", b"bad_alloc", b"Cannot allocate memory")):
        return "memory"
    return ""
