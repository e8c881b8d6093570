"""Everything that can go wrong in the operator, as one tree; adapters translate into it at the edge.

OperatorError
├── SettingsError          options that contradict each other or name what is not there
├── ApiError               the Kubernetes API server answered with an error, or not at all
│   ├── ApiUnavailable     no answer: try again later, decide nothing from it
│   ├── NotFound           404
│   ├── Conflict           409: someone else wrote first
│   └── Gone               410: a watch must start again from a list
├── IdentityRefused        a stream's token does not prove what its Hello claims
├── ProtocolViolation      a stream said what an agent never says; it is closed with this text
├── StreamOutdated         a stream builds on what this operator never saw: the agent has to begin a new one
├── LeadershipLost         another replica holds the Lease: this process has to end
└── ToolchainError         a compiler or an object's source gave no object
    └── ToolchainUnavailable   not the source's fault; trying again may help
"""

from __future__ import annotations


class OperatorError(Exception):
    """Base of all errors of the operator."""


class SettingsError(OperatorError):
    """An option is wrong; the text says which and what to do."""


class ApiError(OperatorError):
    """The API server refused a request."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class ApiUnavailable(ApiError):
    """The API server gave no usable answer (network, timeout, 429, 5xx)."""


class NotFound(ApiError):
    """The object or the resource is not there."""


class Conflict(ApiError):
    """The object changed since it was read, or exists already."""


class Gone(ApiError):
    """The resource version is too old to watch from."""


class IdentityRefused(OperatorError):
    """A token does not prove the identity that is claimed."""


class ProtocolViolation(OperatorError):
    """A stream broke the contract of stream.proto."""


class StreamOutdated(OperatorError):
    """The agent has to begin a new stream."""


class LeadershipLost(OperatorError):
    """Another replica has taken over."""


class ToolchainError(OperatorError):
    """A program could not be made from its source."""

    def __init__(self, reason: str, message: str, *, lasting: bool = True) -> None:
        """`lasting`: the same source will fail again, so that the answer may be kept."""
        super().__init__(message)
        self.reason = reason
        self.lasting = lasting


class ToolchainUnavailable(ToolchainError):
    """The toolchain itself failed: the same source may compile later."""
