"""Questions from a guest of `vm` to the host: bytes in, bytes out, over a virtio port.

The guest calls `ask()`, from any process, network or mount namespace; the host answers by the function that was given
to `vm.run(answer=…)`. A port is opened by one process at a time, so a lock is held from a question to its answer. Each
is sent as its length (8 bytes, little-endian) and then itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

PORT = Path("/dev/vport0p3")
LOCK = Path("/run/vm/questions.lock")


def there() -> bool:
    """Whether this is a guest with somebody to ask."""
    return "VM" in os.environ and PORT.exists()


def ask(question: bytes) -> bytes:
    """The host's answer; OSError where it has none."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        port = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
        try:
            _write(port, question)
            return _read(port)
        finally:
            os.close(port)


@contextlib.contextmanager
def answered(path: Path, answer: Callable[[bytes], bytes]) -> Iterator[None]:
    """While it lasts, what comes by the socket at `path` (qemu's other end of the port) is answered, in a thread."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)

        def serve() -> None:
            # The guest's end, however it came, is the end of the questions.
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    while True:
                        _write(connection.fileno(), answer(_read(connection.fileno())))

        thread = threading.Thread(target=serve, name="vm questions")
        thread.start()
        try:
            yield
        finally:
            # shutdown wakes accept(); qemu, which has ended by now, has closed the connection.
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def _write(fd: int, data: bytes) -> None:
    left = memoryview(len(data).to_bytes(8, "little") + data)
    while left:
        left = left[os.write(fd, left[: 1 << 16]) :]


def _read(fd: int) -> bytes:
    return _exactly(fd, int.from_bytes(_exactly(fd, 8), "little"))


def _exactly(fd: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = os.read(fd, min(count - len(parts), 1 << 16))
        if not part:
            raise OSError(f"the other end closed after {len(parts)} of {count} bytes")
        parts += part
    return bytes(parts)
