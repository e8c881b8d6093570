"""An open file descriptor with one owner. Everything in ``kernel/`` that makes one hands it on as ``Fd``."""

from __future__ import annotations

import fcntl
import os
import warnings
from types import TracebackType


class Fd:
    """Owns one descriptor: close it, use it as a context manager, or ``detach`` it. Forgetting it warns.

    It can stand wherever a number is wanted (``os.read(fd, …)``, ``select.poll().register(fd)``).
    """

    __slots__ = ("_number", "what")

    def __init__(self, number: int, what: str) -> None:
        self._number = number
        self.what = what

    def fileno(self) -> int:
        """The number; ValueError once it is closed."""
        if self._number < 0:
            raise ValueError(f"the descriptor of {self.what} is closed")
        return self._number

    __index__ = fileno

    @property
    def closed(self) -> bool:
        """Whether it was closed or given away."""
        return self._number < 0

    def detach(self) -> int:
        """Give the number away: closing it is the caller's business now."""
        number = self.fileno()
        self._number = -1
        return number

    def dup(self) -> Fd:
        """A second descriptor of the same thing, with an owner of its own."""
        return Fd(fcntl.fcntl(self.fileno(), fcntl.F_DUPFD_CLOEXEC, 3), self.what)

    def close(self) -> None:
        """Close it; a second time does nothing."""
        if self._number >= 0:
            number, self._number = self._number, -1
            os.close(number)

    def __enter__(self) -> Fd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fd({'closed' if self._number < 0 else self._number}, {self.what!r})"

    def __del__(self) -> None:
        if getattr(self, "_number", -1) >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()
