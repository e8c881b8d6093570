"""What can go wrong on a node, as one tree; each error says what, where, why and what to do.

Adapters in ``kernel/`` raise these at the edge; ``execute`` puts ``reason`` and ``str()`` into PolicyStatus.

    ProbefleetError
    ├── KernelError           a system call failed: errno, what was tried, advice
    ├── VerifierError         the kernel's verifier refused a program: summary, whole log
    ├── ObjectError           the compiled object is not what it should be (no such map, variable, program)
    ├── ScriptRefused         bpftrace does not start a script: its own words
    ├── UnsupportedFeature    this kernel cannot do it: feature, since which version, why
    ├── NoSuchTarget          nothing of that name to attach to: near matches, "inlined"
    ├── BudgetExceeded        it would cost more than the policy allows
    ├── LayoutMismatch        a shared map's key or value does not fit
    ├── SlotTaken             a slot of a shared program array holds another policy's program
    ├── CannotGrow            a shared map that is in use cannot become what is asked for
    └── NotObserving          the program could change what it watches
"""

from __future__ import annotations

import errno as errno_names
import os
import re
from typing import ClassVar

_PROCESSED = re.compile(r"^processed (\d+) insns", re.MULTILINE)
# Errors whose number alone says which word a user should read in the policy's status.
_REASONS = {
    errno_names.EPERM: "NotPermitted",
    errno_names.EACCES: "NotPermitted",
    errno_names.ENOMEM: "OutOfMemory",
    errno_names.EMFILE: "TooManyFiles",
    errno_names.ENFILE: "TooManyFiles",
    errno_names.EBUSY: "TargetBusy",
}


class ProbefleetError(Exception):
    """What the agent says to people; ``reason`` is one CamelCase word for PolicyStatus.reason."""

    reason = "InternalError"


class KernelError(ProbefleetError):
    """A system call failed. ``what`` says which and on what; ``advice`` what a person can do about it."""

    def __init__(self, errno: int, what: str, advice: str = "") -> None:
        self.errno = errno
        self.what = what
        self.advice = advice
        self.reason = _REASONS.get(errno, "KernelRefused")
        name = errno_names.errorcode.get(errno, str(errno))
        super().__init__(f"{what}: {os.strerror(errno)} ({name})" + (f". {advice}" if advice else ""))


class VerifierError(ProbefleetError):
    """The verifier refused a program. ``str()`` is the summary, ``.log`` everything the kernel said.

    ``tail_bytes`` is how much of it a policy's status gets. `probefleet check -v` wants all, and raises it for its
    process.
    """

    tail_bytes: ClassVar[int] = 4096
    reason = "VerifierRefused"

    def __init__(self, summary: str, log: str, program: str) -> None:
        super().__init__(summary)
        self.summary = summary
        self.log = log
        self.program = program

    @property
    def tail(self) -> str:
        """The log's last lines, at most ``tail_bytes``: where the verifier stopped."""
        data = self.log.encode()
        if len(data) <= self.tail_bytes:
            return self.log
        text = data[-self.tail_bytes :].decode(errors="ignore")
        return text[text.find("\n") + 1 :]

    @property
    def instructions(self) -> int:
        """How many instructions the verifier went through before it gave up; 0 if it does not say."""
        found = _PROCESSED.search(self.log)
        return int(found[1]) if found else 0


class ObjectError(ProbefleetError):
    """A compiled object cannot be used as asked: no such program, map or variable, or not a BPF object."""

    reason = "BadObject"


class ScriptRefused(ProbefleetError):
    """bpftrace did not start the script, for what is in it or for what this kernel lacks: it does not say which."""

    reason = "ScriptRefused"


class UnsupportedFeature(ProbefleetError):
    """This kernel cannot do it. ``minimum_version`` is the release that brought it ("" where that is not why)."""

    reason = "UnsupportedFeature"

    def __init__(self, feature: str, minimum_version: str = "", why: str = "") -> None:
        self.feature = feature
        self.minimum_version = minimum_version
        self.why = why
        since = f" (needs Linux {minimum_version} or later)" if minimum_version else ""
        super().__init__(f"this kernel has no {feature}{since}" + (f": {why}" if why else ""))


class NoSuchTarget(ProbefleetError):
    """Nothing to attach to. ``target`` in words ("tracepoint a:b"), ``why`` e.g. "inlined"; near names for a slip."""

    reason = "NoSuchAttachPoint"

    def __init__(
        self, target: str, near_matches: tuple[str, ...] = (), why: str = "", where: str = "on this kernel"
    ) -> None:
        self.target = target
        self.near_matches = near_matches
        self.why = why
        message = f"no {target} {where}"
        if why == "inlined":
            message += "; inlined: the compiler left no function of that name to attach to"
        elif why:
            message += f"; {why}"
        if near_matches:
            message += f"; near: {', '.join(near_matches)}"
        super().__init__(message)


class BudgetExceeded(ProbefleetError):
    """More than the policy's budget allows; refused before anything was created, or detached after measuring."""

    reason = "BudgetExceeded"

    def __init__(self, message: str, *, reason: str = "BudgetExceeded") -> None:
        self.reason = reason
        super().__init__(message)


class LayoutMismatch(ProbefleetError):
    """A program's idea of a shared map's key or value differs from the map's; both layouts are in the message."""

    reason = "LayoutMismatch"


class SlotTaken(ProbefleetError):
    """Two policies name the same slot of a program array that they share: which, and whose it is."""

    reason = "SlotTaken"


class CannotGrow(ProbefleetError):
    """A ProbeMap stays what it is: why, and what to do."""

    reason = "CannotGrow"


class NotObserving(ProbefleetError):
    """The program could change a packet, a verdict or a process."""

    reason = "NotObserveOnly"

    def __init__(self, title: str, helpers: list[str]) -> None:
        super().__init__(
            f"{title} calls {', '.join(helpers)}: Probefleet observes only, and that can change what it watches. "
            "Leave the call away."
        )

    @classmethod
    def because(cls, title: str, why: str) -> NotObserving:
        """For whatever else could not be proved."""
        made = cls(title, [])
        made.args = (f"{title} is refused: {why}. Probefleet observes only",)
        return made
