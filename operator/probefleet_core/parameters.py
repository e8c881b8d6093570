"""Parameters of catalog probes: a user's text in, the bytes of a ``const volatile`` variable out. Pure.

``catalog`` makes them from probe.yaml, ``planner`` encodes what a policy sets. A value is refused with what was given,
why it cannot be, and what to write instead.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from probefleet_wire import syscalls

from probefleet_core import errors, quantities


class ParameterError(errors.CoreError):
    """A parameter's value cannot be taken: ``what`` was given, ``why`` not, ``write`` what to write instead."""

    def __init__(self, what: str, *, why: str, write: str) -> None:
        self.what, self.why, self.write = what, why, write
        super().__init__(f"{what}: {why}. {write}")


class ParameterType(enum.StrEnum):
    """How a parameter's text is read."""

    DURATION = "duration"  #: 500us → nanoseconds
    INTEGER = "integer"
    BOOLEAN = "boolean"
    CHOICE = "choice"  #: one of ``choices``; the program gets its index
    SYSCALLS = "syscalls"  #: names → a bitmap of the machine's numbers


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a user may set. ``variable`` is the ``const volatile`` that carries it; empty: it sets an attachment."""

    name: str
    type: ParameterType
    default: str
    doc: str
    unit: str = ""
    minimum: int | None = None
    maximum: int | None = None
    choices: tuple[str, ...] = ()
    variable: str = ""
    size_bytes: int = 0
    fills: str = ""  #: a field of the key that is 0 unless this boolean is true

    def number(self, text: str) -> int:
        """The value as a number (durations: nanoseconds; booleans: 0 or 1; choices: the index). ParameterError."""
        number = _NUMBERS[self.type](self, text)
        if self.minimum is not None and number < self.minimum:
            self._refuse(text, f"it is below {self._shown(self.minimum)}", f"Write {self._range()}.")
        if self.maximum is not None and number > self.maximum:
            self._refuse(text, f"it is above {self._shown(self.maximum)}", f"Write {self._range()}.")
        return number

    def encode(self, text: str, *, machine: str = "x86_64") -> bytes:
        """The variable's bytes; ``machine`` (as ``uname -m`` says) decides the numbers of system calls."""
        if self.type is ParameterType.SYSCALLS:
            return self._bitmap(text, machine)
        return self.number(text).to_bytes(self.size_bytes, "little", signed=False)

    def _bitmap(self, text: str, machine: str) -> bytes:
        names = [name.strip() for name in text.replace(",", " ").split()]
        if not names:
            return b"\xff" * self.size_bytes
        bits = 0
        for name in names:
            number = syscalls.number(name, machine)
            if number is None:
                known = list(syscalls.names(machine).values())
                self._refuse(
                    name,
                    f"{machine} has no such system call",
                    errors.did_you_mean(name, known, what="system call"),
                )
            bits |= 1 << number
        return bits.to_bytes(self.size_bytes, "little")

    def _refuse(self, text: str, why: str, write: str) -> NoReturn:
        raise ParameterError(f"{self.name}: {text!r}", why=why, write=write)

    def _shown(self, number: int) -> str:
        return _show_duration(number) if self.type is ParameterType.DURATION else f"{number}"

    def _range(self) -> str:
        unit = f" {self.unit}" if self.unit and self.type is ParameterType.INTEGER else ""
        if self.minimum is not None and self.maximum is not None:
            return f"{self._shown(self.minimum)} to {self._shown(self.maximum)}{unit}"
        if self.minimum is not None:
            return f"{self._shown(self.minimum)}{unit} or more"
        return f"{self._shown(self.maximum or 0)}{unit} or less"


def _show_duration(nanoseconds: int) -> str:
    for unit in ("h", "m", "s", "ms", "us"):
        if nanoseconds and nanoseconds % quantities.NS_PER_UNIT[unit] == 0:
            return f"{nanoseconds // quantities.NS_PER_UNIT[unit]}{unit}"
    return f"{nanoseconds}ns"


def _duration(parameter: Parameter, text: str) -> int:
    try:
        return quantities.duration_ns(text) if text != "0" else 0
    except ValueError as error:
        parameter._refuse(text, "it is no duration", f"Write {str(error).split(' is ', 1)[-1]}.")


def _integer(parameter: Parameter, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        parameter._refuse(text, "it is no whole number", f"Write a number, such as {parameter.default}.")
    return int(text)


def _boolean(parameter: Parameter, text: str) -> int:
    if text.lower() not in ("true", "false"):
        parameter._refuse(text, "it is neither true nor false", 'Write "true" or "false".')
    return int(text.lower() == "true")


def _choice(parameter: Parameter, text: str) -> int:
    if text not in parameter.choices:
        parameter._refuse(text, "there is no such choice", f"Write one of: {', '.join(parameter.choices)}.")
    return parameter.choices.index(text)


def _no_number(parameter: Parameter, text: str) -> int:
    raise ValueError(f"{parameter.name} is a list, not a number")


_NUMBERS: Mapping[ParameterType, Callable[[Parameter, str], int]] = {
    ParameterType.DURATION: _duration,
    ParameterType.INTEGER: _integer,
    ParameterType.BOOLEAN: _boolean,
    ParameterType.CHOICE: _choice,
    ParameterType.SYSCALLS: _no_number,
}
