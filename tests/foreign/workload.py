"""What goes on while foreign programs are tried: a little of everything that they watch. It says itself what it does.

Run in the VM by ``attempt``; each step is independent, and what this machine lacks is passed
over. Files, directories, programs, signals, threads, users, TCP and UDP over both protocols, refused and lost
connections, TLS, Unix sockets, names, shared memory, mounts, page faults, a process killed for want of memory, CPU and
sleep, block devices with ext4 and xfs where the kernel and the machine have them.
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
NANOSLEEP = {"x86_64": 35, "aarch64": 101}.get(os.uname().machine)


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


def sleep(_: Path) -> None:
    """nanosleep(2) itself: the C library sleeps by another call."""
    if NANOSLEEP is not None:
        LIBC.syscall(NANOSLEEP, (ctypes.c_long * 2)(0, 3_000_000), None)


def tls(folder: Path) -> None:
    """A page over TLS, by OpenSSL's own server and client."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    if not certificate.exists():
        make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        ends = ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*make, *ends], check=True, capture_output=True)
    serve = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-naccept", "1", "-www"]
    with subprocess.Popen(
        [*serve, "-cert", str(certificate), "-key", str(key)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            line = next(line for line in server.stdout if line.startswith("ACCEPT "))
            ask = ["openssl", "s_client", "-quiet", "-connect", line.split()[1]]
            subprocess.run(ask, input=b"GET / HTTP/1.0\r\n\r\n", check=True, capture_output=True, timeout=60)
        finally:
            server.terminate()


def want_of_memory(_: Path) -> None:
    """A process of a cgroup of 16 MiB takes more, and is killed."""
    group = Path("/sys/fs/cgroup/foreign-little-memory")
    with contextlib.suppress(OSError):
        if "memory" not in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split():
            return  # without a limit it would take all that there is
        Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / "memory.max").write_text(str(16 << 20))
        assert (group / "memory.max").read_text() == f"{16 << 20}\n"
        taking = f"echo $$ >{group}/cgroup.procs && exec tail /dev/zero"
        subprocess.run(["/bin/sh", "-c", taking], check=False, capture_output=True, timeout=20)
    with contextlib.suppress(OSError):
        group.rmdir()


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
    with socket.socket() as full, socket.socket() as waiting, socket.socket() as lost:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting.connect(full.getsockname())  # nobody accepts it, and there is no room for another
        lost.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            lost.connect(full.getsockname())  # its SYN is dropped, and is sent again after a second
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
    """A loop device with a file system on it, where there is such a thing."""

    def __init__(self, folder: Path, system: str, size_bytes: int, *options: str) -> None:
        self.where = folder / system
        self.where.mkdir()
        for module in ("loop", system, "crc32c_generic"):
            subprocess.run(["modprobe", module], check=False, capture_output=True)
        image = folder / f"{system}.image"
        with image.open("wb") as file:
            file.truncate(size_bytes)
        mkfs = shutil.which(f"mkfs.{system}") or f"/sbin/mkfs.{system}"
        self.there = False
        if not Path(mkfs).exists():
            print(f"workload: no {mkfs}", file=sys.stderr)
            return
        made = subprocess.run([mkfs, "-q", *options, str(image)], check=False, capture_output=True)
        mounted = subprocess.run(
            ["mount", "-o", "loop", str(image), str(self.where)], check=False, capture_output=True, text=True
        )
        self.there = made.returncode == 0 and mounted.returncode == 0
        why = made.stderr.decode().strip() or mounted.stderr.strip()
        print(f"workload: loop device with {system}: {'yes' if self.there else why}", file=sys.stderr)

    def use(self, _: Path) -> None:
        """Write, sync, forget, read again."""
        if not self.there:
            return
        path = self.where / "data"
        with path.open("wb") as file:
            file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        os.sync()
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3")
        path.read_bytes()
        path.unlink()
        os.sync()


def main() -> None:
    """Every step once for each line on stdin."""
    folder = Path(tempfile.mkdtemp(prefix="foreign-"))
    ext4 = Disk(folder, "ext4", 64 << 20, "-F")
    xfs = Disk(folder, "xfs", 320 << 20, "-f")
    steps: list[Callable[[Path], None]] = [
        *(files, programs, threads, sleep, network, tls, memory, want_of_memory, mounts),
        *(ext4.use, xfs.use),
    ]

    def once() -> None:
        for step in steps:
            try:
                step(folder)
            except Exception as error:  # the other steps are independent of it
                print(f"workload: {step.__name__}: {error!r}", file=sys.stderr)

    # Before anything is attached: what the kernel does at first use (modules, static keys, page cache) is behind it.
    once()
    print("ready", flush=True)
    while sys.stdin.readline():
        once()
        print("done", flush=True)


if __name__ == "__main__":
    main()
