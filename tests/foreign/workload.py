"""What goes on while foreign programs are tried: a little of everything that they watch. It says itself what it does.

Run in the VM by ``attempt`` and ``run_bpftrace``; each step is independent, and what this machine lacks is passed
over. Files, directories, programs, signals, threads, users, TCP and UDP over both protocols, refused and lost
connections, Unix sockets, names, shared memory, mounts, page faults, CPU and sleep, a block device with ext4 where
the kernel has loop and ext4.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)


def files(folder: Path) -> None:
    """Create, write, sync, read, link, rename, stat, list, remove; and what is not there."""
    path = folder / "file"
    path.write_bytes(b"x" * 65536)
    with path.open("r+b") as file:
        file.write(b"y" * 8192)
        file.flush()
        os.fsync(file.fileno())
        os.readv(file.fileno(), [bytearray(4096)])
    path.read_bytes()
    os.link(path, folder / "link")
    path.rename(folder / "renamed")
    os.statvfs(folder)
    list(folder.iterdir())
    for name in ("link", "renamed"):
        (folder / name).unlink()
    for missing in ("/nonexistent/a", "/nonexistent/b"):
        with contextlib.suppress(OSError):
            os.stat(missing)
        with contextlib.suppress(OSError):
            os.open(missing, os.O_RDONLY)
    os.sync()
    with (folder / "mapped").open("w+b") as file:
        file.truncate(1 << 20)
        with mmap.mmap(file.fileno(), 1 << 20) as mapped:
            mapped[::4096] = b"z" * 256
            mapped.flush()


def programs(folder: Path) -> None:
    """Start, fail to start, end with a status and by a signal; as another user; bash, which reads lines."""
    subprocess.run(["/bin/true"], check=False)
    subprocess.run(["/bin/sh", "-c", "exit 3"], check=False)
    with contextlib.suppress(OSError):
        subprocess.run([str(folder / "missing")], check=False)
    sleeper = subprocess.Popen(["/bin/sleep", "30"])
    sleeper.send_signal(signal.SIGTERM)
    sleeper.wait()
    subprocess.run(["setpriv", "--reuid=64023", "--clear-groups", "/bin/true"], check=False)
    subprocess.run(["/bin/bash", "-i"], input=b"echo hello\nexit\n", capture_output=True, check=False)


def threads(_: Path) -> None:
    """Threads that wake each other, hold locks, sleep and compute."""
    turn = threading.Barrier(4)

    def work() -> None:
        for _ in range(20):
            turn.wait()
            sum(range(2000))
        time.sleep(0.01)  # part of the workload: programs watch threads sleep

    started = [threading.Thread(target=work) for _ in range(4)]
    for each in started:
        each.start()
    for each in started:
        each.join()


def network(folder: Path) -> None:
    """TCP and UDP over IPv4 and IPv6, a refused connection, one that nobody answers, a Unix socket, a name."""
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as server:
            server.bind((address, 0))
            server.listen(1)
            port = server.getsockname()[1]
            with socket.create_connection((address, port)) as client:
                other, _ = server.accept()
                with other:
                    client.sendall(b"question" * 64)
                    other.recv(4096)
                    other.sendall(b"answer" * 64)
                    client.recv(4096)
        with contextlib.suppress(OSError):
            socket.create_connection((address, 9), timeout=1).close()
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as one:
            one.bind((address, 0))
            one.sendto(b"datagram", one.getsockname())
            one.recv(100)
    with contextlib.suppress(OSError), socket.socket() as lost:
        lost.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            lost.connect(("10.0.2.77", 81))  # nobody has that address: the SYN is sent again after a second
        time.sleep(1.2)  # until the kernel has sent it again, of which only a probe would hear
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    (folder / "socket").unlink()
    with contextlib.suppress(OSError):
        socket.getaddrinfo("localhost", 80)
    left, right = socket.socketpair(socket.AF_UNIX)
    socket.send_fds(left, [b"x"], [0])
    socket.recv_fds(right, 10, 1)
    left.close()
    right.close()


def memory(_: Path) -> None:
    """Anonymous pages, System V shared memory, the heap."""
    with mmap.mmap(-1, 8 << 20) as mapped:
        mapped[::4096] = b"p" * 2048
    made = LIBC.shmget(0, 65536, 0o1666)
    if made >= 0:
        LIBC.shmat.restype = ctypes.c_void_p
        at = LIBC.shmat(made, None, 0)
        LIBC.shmdt(ctypes.c_void_p(at))
        LIBC.shmctl(made, 0, None)
    bytes(4 << 20)


def mounts(folder: Path) -> None:
    """Mount and unmount."""
    where = folder / "mounted"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(where)], check=False, capture_output=True)
    subprocess.run(["umount", str(where)], check=False, capture_output=True)
    where.rmdir()


class Disk:
    """A loop device with ext4 on it, where there is such a thing."""

    def __init__(self, folder: Path) -> None:
        self.where = folder / "disk"
        self.where.mkdir()
        for module in ("loop", "ext4", "crc32c_generic"):
            subprocess.run(["modprobe", module], check=False, capture_output=True)
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        mkfs = shutil.which("mkfs.ext4") or "/sbin/mkfs.ext4"
        made = subprocess.run([mkfs, "-q", "-F", str(image)], check=False, capture_output=True)
        mounted = subprocess.run(
            ["mount", "-o", "loop", str(image), str(self.where)], check=False, capture_output=True, text=True
        )
        self.there = made.returncode == 0 and mounted.returncode == 0
        print(f"workload: loop device with ext4: {'yes' if self.there else mounted.stderr.strip()}", file=sys.stderr)

    def use(self, _: Path) -> None:
        """Write, sync, forget, read again."""
        if not self.there:
            return
        path = self.where / "data"
        path.write_bytes(os.urandom(1 << 20))
        os.sync()
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3")
        path.read_bytes()
        path.unlink()
        os.sync()


def main() -> None:
    """Every step once for each line on stdin."""
    folder = Path(tempfile.mkdtemp(prefix="foreign-"))
    disk = Disk(folder)
    steps: list[Callable[[Path], None]] = [files, programs, threads, network, memory, mounts, disk.use]

    def once() -> None:
        for step in steps:
            try:
                step(folder)
            except OSError as error:
                print(f"workload: {step.__name__}: {error}", file=sys.stderr)

    # Before anything is attached: what the kernel does at first use (modules, static keys, page cache) is behind it.
    once()
    print("ready", flush=True)
    while sys.stdin.readline():
        once()
        print("done", flush=True)


if __name__ == "__main__":
    main()
