"""How the commands end: one exception for people, and the exit statuses that scripts may rely on.

Everything below ``main`` raises ``Failure`` for what a person can understand and change; ``main`` prints it and exits
with its status. What is not a ``Failure`` (nor click's own) is a mistake of ours and ends with ``INTERNAL``.

    0  done    1  could not be done, or a mistake of ours    2  a bad policy or command line    3  refused by this
    kernel
"""

from __future__ import annotations

from collections.abc import Iterable

from probefleet_core import errors as core_errors

DONE = 0
INTERNAL = 1
BAD_INPUT = 2
KERNEL_REFUSES = 3


class Failure(Exception):
    """What went wrong, where, why and what to do; ``status`` is the exit status."""

    def __init__(self, message: str, *, status: int = INTERNAL) -> None:
        super().__init__(message)
        self.status = status


class BadInput(Failure):
    """The user's policy, file or option cannot be carried out as it stands."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=BAD_INPUT)


class KernelRefuses(Failure):
    """The policy is fine, and this machine does not run it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=KERNEL_REFUSES)


def refused(where: str, refusal: core_errors.Refused) -> BadInput:
    """All the problems of one object, each with its path, under the name of where it came from."""
    count = len(refusal.problems)
    head = f"{where}: {count} problem{'s' if count > 1 else ''}"
    return BadInput("\n".join([head, *(f"  {line}" for line in _lines(refusal.problems))]))


def _lines(problems: Iterable[core_errors.Problem]) -> Iterable[str]:
    for problem in problems:
        first, *more = str(problem).splitlines()
        yield first
        yield from (f"  {line}" for line in more)
