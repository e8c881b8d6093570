"""Ctrl-C as a wish, not as an accident: signals end a wait, and what was begun is taken down in order.

``run`` and the cluster's commands wait by ``Interruption.wait``. The first SIGINT, SIGTERM or SIGHUP makes it
return True; a second one raises KeyboardInterrupt wherever the process is, for someone who does not want to wait
for the report. A pipe and select() rather than an Event: a handler that runs in the middle of Event.wait() could
lock itself out.
"""

from __future__ import annotations

import os
import select
import signal
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """Holds the handlers while entered; belongs to the main thread."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def wait(self, seconds: float) -> bool:
        """Wait that long, or until someone asks to stop; whether they did."""
        if not self.asked:
            select.select([self._read], [], [], max(0.0, seconds))
        return self.asked

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(self._write, b"x")
