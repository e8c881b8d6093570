"""The locked child: takes its own rights away, step by step, then becomes the tool. Run by ``sandbox``, never imported.

It runs as ``python -I -S -B sandbox_child.py CONFIG`` with nothing but the standard library, so that it starts in 30 ms
and trusts nothing of the caller's. The order matters: namespaces need the rights that the later steps drop, Landlock
holds for the calling thread only and so comes before any other thread, seccomp comes last because the steps before it
need calls that it refuses. Kernel facts: Documentation/userspace-api/landlock.rst, seccomp(2), pivot_root(2).
"""

# pathlib would add a third to the time that the child takes to start.
# ruff: noqa: PTH103, PTH110, PTH114, PTH115, PTH116, PTH118, PTH120, PTH123, PTH211

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import stat
import sys
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
REFUSED = 126
FILTER = b""
_CONFINED = ""

# The same numbers on x86-64 and arm64.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x08000000, 0x10000000, 0x40000000
_MNT_DETACH = 2
_CAPABILITY_VERSION = 0x20080522

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
# Rights by ABI: 1 has the first 13, 2 adds REFER, 3 TRUNCATE, 5 IOCTL_DEV; 4 adds TCP, 6 the scopes.
_FILESYSTEM_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_SCRATCH = _READ_FILE | _READ_DIR | _WRITE_FILE | 1 << 5 | 1 << 4 | 1 << 7 | 1 << 8 | 1 << 13 | _TRUNCATE


class Refused(Exception):
    """The child cannot be locked in; the text says why."""


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def limit(config: dict[str, Any]) -> None:
    """Rlimits: they hold through every later step and for the tool."""
    for name, value in (
        (resource.RLIMIT_AS, config["memory"]),
        (resource.RLIMIT_FSIZE, config["file"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
    # SIGXCPU at the soft limit names the reason; SIGKILL follows a second later.
    resource.setrlimit(resource.RLIMIT_CPU, (config["cpu"], config["cpu"] + 1))
    os.umask(0o077)


def landlock_version() -> int:
    """The kernel's Landlock ABI; 0 where there is none, or it is not switched on."""
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))))


def enter_namespaces(config: dict[str, Any]) -> None:
    """A mount namespace whose root holds the granted trees and nothing else. Raises OSError where it may not."""
    root = os.geteuid() == 0
    uid, gid = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNS | _CLONE_NEWIPC | (0 if root else _CLONE_NEWUSER | _CLONE_NEWNET)
    _check(_libc.unshare(flags), "unshare")
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    # The new root is put over a directory that exists everywhere; only this namespace sees it.
    base = "/tmp"
    os.umask(0o022)  # its directories have to be passable for the uid that the child changes to
    scratch = os.open(config["scratch"], os.O_PATH | os.O_DIRECTORY)
    sources = {path: os.open(path, os.O_PATH) for path in dict.fromkeys(config["read"]) if os.path.exists(path)}
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path, source in sources.items():
        if any(path.startswith(other + "/") for other in sources):
            continue  # lies within another tree
        if os.path.islink(path) and not os.path.exists(base + path):
            os.makedirs(base + os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(path), base + path)
            continue
        _bind(source, base + path, _MS_RDONLY | _MS_NOSUID | (0 if path.startswith("/dev/") else _MS_NODEV))
    _bind(scratch, base + config["scratch"], _MS_NOSUID | _MS_NODEV)
    for each in (scratch, *sources.values()):
        os.close(each)
    _mount(None, base, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(base)
    _check(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir(config["scratch"])
    os.umask(0o077)


def _bind(source: int, target: str, flags: int) -> None:
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT, 0o600))
    _mount(f"/proc/self/fd/{source}", target, None, _MS_BIND)
    _mount(None, target, None, _MS_REMOUNT | _MS_BIND | flags)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind, data)]
    result = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _check(result, f"mount {target}")


def stay_where_nobody_may_not_go(config: dict[str, Any]) -> None:
    """Without a namespace paths are the machine's: in a checkout below /root, say, nobody could open what is granted.

    Then the child keeps its uid, without capabilities, under Landlock and the filter; its scratch is its own again.
    """
    if config["uid"] is None or all(_open_to_all(path) for path in (*config["read"], config["scratch"])):
        return
    config["uid"] = None
    for folder, _, files in os.walk(config["scratch"]):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)


def _open_to_all(path: str) -> bool:
    if not os.path.exists(path):
        return True  # there is nothing to open
    while path != "/":
        path = os.path.dirname(path)
        if not os.stat(path).st_mode & stat.S_IXOTH:
            return False
    return True


def drop_privileges(config: dict[str, Any]) -> None:
    """Leave root for nobody, where that may be done, and every capability in any case."""
    if config["uid"] is not None:
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    # For uid 0 too they are gone for good now: under no_new_privs its execve() gives nothing back.
    _check(_libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()), "capset")
    # Changing the uid clears the parent-death signal, so it is asked for here; the parent may be gone by now.
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    if os.getppid() != config["parent"]:
        raise Refused("its parent ended before it started")


class _Ruleset(ctypes.Structure):
    _fields_ = (("filesystem", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("access", ctypes.c_uint64), ("parent", ctypes.c_int32))


def enter_landlock(config: dict[str, Any], version: int) -> None:
    """Open nothing but the granted trees, with every right that this ABI knows refused elsewhere."""
    handled = (1 << _FILESYSTEM_BITS.get(version, 16)) - 1
    rules = _Ruleset(handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), 0), "landlock")
    for path in dict.fromkeys(config["read"]):
        _allow(ruleset, path, (_READ_FILE | _READ_DIR | _EXECUTE) & handled)
    _allow(ruleset, config["scratch"], _SCRATCH & handled)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0)), "landlock")
    os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(os.fstat(parent).st_mode):
        access &= _FILE_RIGHTS
    rule = _Beneath(access, parent)
    result = _libc.syscall(_LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint(0))
    os.close(parent)
    _check(result, f"landlock rule for {path}")


class _Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install_filter(program: bytes, *, listener: bool = False) -> int:
    """Install a seccomp filter for the calling thread; with ``listener`` returns the descriptor that gets its calls."""
    holder = _Program(len(program) // 8, program)
    flags = 8 if listener else 0
    number = _SECCOMP[platform.machine()]
    return _check(_libc.syscall(number, 1, ctypes.c_uint(flags), ctypes.byref(holder)), "seccomp")


def confine(config: dict[str, Any]) -> str:
    """Every step but the last; returns how. Raises ``Refused``."""
    limit(config)
    version = landlock_version()
    ways = []
    try:
        if os.geteuid() == 0 or not version:
            enter_namespaces(config)
            ways.append("namespaces")
    except OSError as error:
        if not version:
            raise Refused(
                f"neither Landlock (Linux 5.13, in the kernel's list of LSMs) nor a mount namespace ({error}) is to be "
                "had here, so no compiler is started. Enable Landlock, or run as root with CAP_SYS_ADMIN."
            ) from error
        stay_where_nobody_may_not_go(config)
    drop_privileges(config)
    if version:
        enter_landlock(config, version)
        ways.append(f"landlock {version}")
    return ", ".join(ways)


def main() -> None:
    """Lock in, then become the tool."""
    global FILTER, _CONFINED
    config: dict[str, Any] = json.loads(sys.argv[1])
    FILTER = bytes.fromhex(config["filter"])
    try:
        _CONFINED = confine(config)
        argv = config["argv"]
        if config["script"]:
            with open(argv[0], encoding="utf-8") as file:
                code = compile(file.read(), argv[0], "exec")
            sys.argv = argv
            exec(code, {"__name__": "__main__", "install_filter": install_filter, "FILTER": FILTER})
            return
        install_filter(FILTER)
        os.execve(argv[0], argv, dict(os.environ))
    except (Refused, OSError) as error:
        os.write(2, f"sandbox: {error}\n".encode())
        os._exit(REFUSED)


if __name__ == "__main__":
    main()
