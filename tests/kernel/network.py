"""Networks of a test's own: namespaces that sit in threads, and a veth pair between two of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from probefleet_agent.kernel import interfaces

_CLONE_NEWNET = 0x40000000
PORT = 4711
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Wire:
    """A veth pair: ``near`` on the "node" (192.0.2.1), its other end in another namespace (192.0.2.2)."""

    near: str
    far: str
    here: interfaces.Namespace
    there: interfaces.Namespace

    def send_there(self, times: int) -> int:
        """Datagrams from here to the other end; how many arrived."""
        return self._send(self.here, self.there, "192.0.2.2", times)

    def send_here(self, times: int, *, source: str = "", payload_bytes: int = 4) -> int:
        """Datagrams from the other end to here; how many arrived."""
        return self._send(self.there, self.here, "192.0.2.1", times, source, payload_bytes)

    @staticmethod
    def _send(
        start: interfaces.Namespace,
        end: interfaces.Namespace,
        address: str,
        times: int,
        source: str = "",
        size: int = 4,
    ) -> int:
        with interfaces.entered(end):
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with interfaces.entered(start):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        arrived = 0
        with receiver, sender:
            receiver.bind((address, PORT))
            receiver.settimeout(2)
            sender.bind((source, 0))
            for number in range(times):
                sender.sendto(number.to_bytes(4, "little").ljust(size, b"\0"), (address, PORT))
                try:
                    assert int.from_bytes(receiver.recv(size)[:4], "little") == number
                except TimeoutError:
                    break
                arrived += 1
        return arrived


def ip(*words: str) -> None:
    """iproute2, in the calling thread's namespace."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def namespace() -> Iterator[interfaces.Namespace]:
    """A network namespace that lives as long as the block: a thread of its own sits in it."""
    ready, done = threading.Event(), threading.Event()
    thread_id: list[int] = []

    def sit() -> None:
        assert _libc.unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        thread_id.append(threading.get_native_id())
        ready.set()
        done.wait()

    thread = threading.Thread(target=sit, name="namespace")
    thread.start()
    ready.wait(10)
    path = f"/proc/{os.getpid()}/task/{thread_id[0]}/ns/net"
    try:
        yield interfaces.Namespace(path, Path(path).stat().st_ino)
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def wire(near: str = "pf0n", far: str = "pf0f") -> Iterator[Wire]:
    """A veth pair from the namespace that this thread is in to a new one."""
    here = interfaces.of_node("")
    with namespace() as there:
        ip("link", "add", "name", near, "type", "veth", "peer", "name", far)
        ip("link", "set", far, "netns", there.path)
        ip("addr", "add", "192.0.2.1/30", "dev", near)
        ip("link", "set", near, "up")
        with interfaces.entered(there):
            ip("addr", "add", "192.0.2.2/30", "dev", far)
            ip("link", "set", far, "up")
        yield Wire(near, far, interfaces.Namespace(here.path, here.number), there)
