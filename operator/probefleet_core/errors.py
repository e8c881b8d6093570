"""What is wrong with a user's object: where, what, why, and what to write instead.

::

    CoreError
    └── Refused          one object, all its problems at once
        ├── PolicyRefused
        └── ProbeMapRefused

``policy`` and ``planner`` raise these; the operator puts them into the condition ``Accepted`` and an Event, and
``probefleet check`` prints them. Texts are for people and have golden tests: change them with care.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong, and the way out.

    ``path`` is written as kubectl writes it (``spec.outputs[0].from.map``), ``what`` is what was found there,
    ``why`` the reason that it cannot be, ``write`` what to write instead.
    """

    path: str
    what: str
    why: str
    write: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}: {self.why}. {self.write}"


class CoreError(Exception):
    """The root of what the core raises."""


class Refused(CoreError):
    """An object that cannot be carried out; ``problems`` has at least one, in the order of their paths."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(sorted(set(problems)))
        super().__init__("\n".join(str(problem) for problem in self.problems))


class PolicyRefused(Refused):
    """A ProbePolicy."""


class ProbeMapRefused(Refused):
    """A ProbeMap."""


class Problems:
    """Collects problems while an object is read, so that a user hears of all of them at once."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, path: str, what: str, *, why: str, write: str) -> None:
        """Note one problem."""
        self.found.append(Problem(path=path, what=what, why=why, write=write))

    def __bool__(self) -> bool:
        return bool(self.found)


def near(word: str, known: Iterable[str], *, at_most: int = 3) -> list[str]:
    """Known words that look like ``word``, nearest first; none where nothing comes near."""
    choices = sorted(set(known))
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), by_lower, n=at_most, cutoff=0.6)
    return [by_lower[each] for each in close]


def did_you_mean(word: str, known: Sequence[str], *, what: str) -> str:
    """A sentence that names near matches, or else all that there is (up to sixteen)."""
    close = near(word, known)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    choices = sorted(set(known))
    if not choices:
        return f"There is no {what}."
    shown = ", ".join(choices[:16]) + (f" and {len(choices) - 16} more" if len(choices) > 16 else "")
    return f"Known: {shown}."
